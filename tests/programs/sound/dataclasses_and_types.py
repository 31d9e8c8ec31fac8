# Uses what looks its own module up.
from __future__ import annotations

import enum
import pickle
import typing
from dataclasses import dataclass, field


class Colour(enum.Enum):
    RED = 1


@dataclass(order=True)
class Sum:
    parts: typing.List[int] = field(default_factory=list)
    colour: typing.Optional[Colour] = None


def total(numbers: typing.List[int]) -> int:
    typing.get_type_hints(Sum)
    return sum(pickle.loads(pickle.dumps(Sum(list(numbers), Colour.RED))).parts)
