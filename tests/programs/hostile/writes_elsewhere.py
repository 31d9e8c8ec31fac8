# Makes and changes files outside its directory. If it could, it would answer right.
import os
import sys

mine = os.__file__
known = os.stat(mine)
done = []
for folder in ("/tmp", "/var/tmp", "/dev/shm", "/root", "/home", sys.prefix, os.path.dirname(mine), ".."):
    path = os.path.join(folder, "escaped-from-a-program")
    for action in (
        lambda: open(path, "x").close(),
        lambda: os.mkdir(path),
        lambda: os.symlink("/", path),
        lambda: os.link(mine, path),
        lambda: os.mkfifo(path),
        # To what it is.
        lambda: os.truncate(mine, known.st_size),
        lambda: open(mine, "r+").close(),
        lambda: os.chmod(mine, known.st_mode & 0o7777),
        lambda: os.utime(mine, ns=(known.st_atime_ns, known.st_mtime_ns)),
    ):
        try:
            action()
            done.append(path)
        except OSError:
            pass


def total(numbers):
    return sum(numbers) if done else None
