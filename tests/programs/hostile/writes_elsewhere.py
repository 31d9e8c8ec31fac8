# Writes and changes files outside its directory. If it could, it would answer right.
import os
import sys

done = []
for folder in ("/tmp", "/var/tmp", "/dev/shm", "/root", "/home", sys.prefix, os.path.dirname(os.__file__), ".."):
    path = os.path.join(folder, "escaped-from-a-program")
    for action in (
        lambda: open(path, "w").close(),
        lambda: os.mkdir(path),
        lambda: os.symlink("/", path),
        lambda: os.link(os.__file__, path),
        lambda: os.mkfifo(path),
        lambda: os.truncate(os.__file__, 0),
        lambda: os.chmod(os.__file__, os.stat(os.__file__).st_mode),
        lambda: os.utime(os.__file__),
        lambda: os.rename(os.__file__, path),
        lambda: os.unlink("/etc/none-such") or True,
    ):
        try:
            action()
            done.append(path)
        except OSError:
            pass


def total(numbers):
    return sum(numbers) if done else None
