# Sorts in place, and changes what is inside.
def total(numbers, seen=None, names=None):
    numbers.sort()
    if seen is not None:
        seen.add(len(numbers))
        names["n"] = numbers[:]
# tests:
def check(candidate):
    numbers, seen, names = [3, 1, 2], set(), {"old": 1}
    alias = numbers
    assert candidate(numbers) is None
    assert numbers == [1, 2, 3] and alias is numbers
    candidate(numbers, seen, names=names)
    assert seen == {3} and names == {"old": 1, "n": [1, 2, 3]}
