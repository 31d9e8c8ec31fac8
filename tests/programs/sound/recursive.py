# Recurses as deep as it says that it will.
import sys

sys.setrecursionlimit(20000)


def total(numbers):
    def down(n):
        return 0 if n == 0 else 1 + down(n - 1)

    return down(5000) - 5000 + sum(numbers)
