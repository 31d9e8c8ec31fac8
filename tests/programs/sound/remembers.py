# Is wrapped, as by a cache, and is a lambda in the end.
import functools

total = functools.lru_cache(maxsize=None)(lambda numbers: sum(numbers))
# tests:
assert total((1, 2)) == 3 and total((1, 2)) == 3
assert total.__name__ == "total"
