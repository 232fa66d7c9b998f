"""What a drawn picture shows, and the one vector that says so.

Knows the closed lists of shapes, colours, digits and counts. Does not know pixels, wordings or the model.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "black", "white")
DIGITS = tuple(range(10))
COUNTS = (1, 2, 3, 4)
MAX_PICTURES = 8

_KINDS = {"one": 0.24, "many": 0.28, "digit": 0.28, "pair": 0.2}
_SIGNS = (*SHAPES, "digit")
_GROUPS = {
    "shapes": len(_SIGNS),
    "colours": len(COLOURS),
    "pairs": len(_SIGNS) * len(COLOURS),
    "digit": len(DIGITS),
    "count": len(COUNTS),
}
NUM_FACTS = sum(_GROUPS.values())


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape (or "digit") in one colour."""

    shape: str
    colour: str


@dataclass(frozen=True, slots=True)
class Facts:
    """One picture: `count` equal things, or a digit, or two different things (each once)."""

    things: tuple[Thing, ...]
    count: int = 1
    digit: int | None = None

    @property
    def is_pair(self) -> bool:
        return len(self.things) == 2

    def to_row(self) -> list[int]:
        """Six small integers, the form in which a pool of pictures is stored."""
        row = [self.count, -1 if self.digit is None else self.digit]
        for thing in self.things:
            row += [_SIGNS.index(thing.shape), COLOURS.index(thing.colour)]
        return row + [-1] * (6 - len(row))

    @classmethod
    def from_row(cls, row: Sequence[int]) -> Facts:
        count, digit, *signs = (int(value) for value in row)
        things = [Thing(_SIGNS[s], COLOURS[c]) for s, c in zip(signs[::2], signs[1::2], strict=True) if s >= 0]
        return cls(tuple(things), count, None if digit < 0 else digit)


def random_facts(rng: random.Random, pair_weight: float = _KINDS["pair"]) -> Facts:
    weights = {**_KINDS, "pair": pair_weight}
    kind = rng.choices(list(weights), list(weights.values()))[0]
    shapes, colours = rng.sample(SHAPES, 2), rng.sample(COLOURS, 2)
    if kind == "digit":
        return Facts((Thing("digit", colours[0]),), digit=rng.choice(DIGITS))
    if kind == "pair":
        return Facts((Thing(shapes[0], colours[0]), Thing(shapes[1], colours[1])))
    return Facts((Thing(shapes[0], colours[0]),), count=rng.choice(COUNTS[1:]) if kind == "many" else 1)


def fact_vector(facts: Facts) -> NDArray[np.float32]:
    """[NUM_FACTS] of 0 and 1: which shapes, which colours, which of both together, the digit, the count."""
    vector = np.zeros(NUM_FACTS, np.float32)
    for thing in facts.things:
        vector[[shape_fact(thing.shape), colour_fact(thing.colour), pair_fact(thing)]] = 1
    if facts.digit is not None:
        vector[digit_fact(facts.digit)] = 1
    vector[count_fact(facts.count)] = 1
    return vector


def shape_fact(shape: str) -> int:
    return _start("shapes") + _SIGNS.index(shape)


def colour_fact(colour: str) -> int:
    return _start("colours") + COLOURS.index(colour)


def pair_fact(thing: Thing) -> int:
    return _start("pairs") + _SIGNS.index(thing.shape) * len(COLOURS) + COLOURS.index(thing.colour)


def digit_fact(digit: int) -> int:
    return _start("digit") + digit


def count_fact(count: int) -> int:
    return _start("count") + COUNTS.index(count)


def _start(group: str) -> int:
    return int(group_slices()[group].start)


@functools.cache
def group_slices() -> dict[str, slice]:
    """Where each group of facts stands in the vector."""
    slices, start = {}, 0
    for name, size in _GROUPS.items():
        slices[name] = slice(start, start + size)
        start += size
    return slices


def fact_directions(width: int) -> NDArray[np.float32]:
    """[NUM_FACTS, width] orthonormal rows: where in the language model's space each fact is written.

    Always the same rows, so that the vision tower and the language model can be trained apart and then joined.
    """
    return _directions(width)[:NUM_FACTS]


def number_directions(width: int) -> NDArray[np.float32]:
    """[MAX_PICTURES, width]: the same for a picture's number."""
    return _directions(width)[NUM_FACTS:]


@functools.cache
def _directions(width: int) -> NDArray[np.float32]:
    random_state = np.random.RandomState(0)
    noise = np.concatenate([random_state.normal(size=(width, num)) for num in (NUM_FACTS, MAX_PICTURES)], axis=1)
    return np.ascontiguousarray(np.linalg.qr(noise)[0].T.astype(np.float32))
