# Counts its calls: all of them are made in one process.
calls = []


def total(numbers):
    calls.append(numbers)
    return len(calls)
# tests:
assert [total([]), total([]), total([])] == [1, 2, 3]
