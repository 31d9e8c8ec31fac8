# Returns what derives from plain data.
import collections
import enum


class Level(enum.IntEnum):
    HIGH = 3


def total(kind):
    return {
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict([("x", 1)]),
        "default": collections.defaultdict(list, {"x": [1]}),
        "named": collections.namedtuple("Point", "x y")(1, 2),
        "enum": Level.HIGH,
        "keys": (key for key in "ab"),
        "map": map(int, "12"),
    }[kind]
# tests:
assert total("counter") == {"a": 2, "b": 1}
assert total("ordered") == {"x": 1}
assert total("default") == {"x": [1]}
assert total("named") == (1, 2)
assert total("enum") == 3
assert list(total("keys")) == ["a", "b"]
assert total("map") != [1, 2]
assert list(total("map")) == [1, 2]
