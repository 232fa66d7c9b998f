"""Units of media, and the rules that say how many a picture, a video or a clip has.

The same numbers as `triptych.model.families` gives with a checkpoint's own processor: `tests/planning` compares them.
Those rules need transformers, which planning does without.
"""

from typing import NamedTuple, Protocol


class Unit(NamedTuple):
    """What the encoder treats independently: rows that it gives, and positions that it computes for them."""

    rows: int
    positions: int


Units = tuple[Unit, ...]


class Pictures(Protocol):
    def units(self, width: int, height: int, num_images: int) -> Units: ...


class Videos(Protocol):
    def units(self, frames: int, width: int, height: int) -> Units: ...


class Sounds(Protocol):
    def units(self, seconds: float) -> Units: ...
