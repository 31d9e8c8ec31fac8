# Ends with what would wait for input if it were run.
import sys


def total(numbers):
    return sum(numbers)


if __name__ == "__main__":
    print(total(map(int, input().split())))
    sys.exit(1)
