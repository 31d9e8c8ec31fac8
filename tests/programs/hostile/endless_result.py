# Returns an iterator without an end.
import itertools


def total(numbers):
    return itertools.count()
