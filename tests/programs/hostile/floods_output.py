# Writes without end.
import os
import sys


def total(numbers):
    while True:
        print("x" * 1000000)
        os.write(2, b"y" * 1000000)
        sys.stdout.flush()
