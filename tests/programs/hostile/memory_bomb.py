# Takes memory without end.
kept = []


def total(numbers):
    while True:
        kept.append(bytearray(1 << 24))
