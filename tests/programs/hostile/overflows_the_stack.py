# Recurses until the stack of the interpreter ends.
import sys

sys.setrecursionlimit(10**9)


class Deep:
    def __getattr__(self, name):
        return getattr(self, name + "x")


def total(numbers):
    def down(n):
        return down(n + 1) + sum(map(down, [n]))

    try:
        return down(0)
    except RecursionError:
        return Deep().x
