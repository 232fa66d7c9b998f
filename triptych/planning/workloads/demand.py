"""What clients ask for on simulated time: when, which media, how much text, how long an answer.

Files are checked where they are read; what is asserted here is that whoever made a demand did so.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from triptych.config import KV_BLOCK_TOKENS

MOST_NAMES = 1 << 127  # of media and of blocks: larger ones are the simulator's own
MOST_TOKENS, MOST_MEDIA = 10_000_000, 10_000  # of one request: more is a mistake in the file
JPEG_BYTES_PER_PIXEL = 0.25  # about what a photograph takes at the usual qualities


@dataclass(frozen=True, slots=True)
class Item:
    """One picture, video or audio clip of a request."""

    rows: tuple[int, ...]  # embedding rows of its units, in order
    pixels: int = 0  # of the source, all frames: every encoder that gets a unit of it decodes them
    nbytes: int = 0  # of the file
    modality: str = "image"  # or video, audio
    name: int | None = None  # equal names are equal items, which caches know; None: unlike all others

    def __post_init__(self) -> None:
        assert self.name is None or 0 <= self.name < MOST_NAMES, f"{self.name} is no name: 0 to 2**127 - 1 are"


@dataclass(frozen=True, slots=True)
class Demand:
    """One request."""

    at_s: float
    media: tuple[Item, ...] = ()
    text_tokens: int = 22  # of the prompt, beside the placeholders of its media
    output_tokens: int = 10
    prefix: tuple[int, ...] = ()  # names of the leading full KV blocks of its text; (): shares no beginning
    timeout_s: float | None = None
    lead_tokens: int = 0  # of the text: they come before the media, the others behind them

    def __post_init__(self) -> None:
        assert 0 <= self.at_s < math.inf, f"comes at {self.at_s} s"
        if self.prefix:
            named = len(self.prefix) * KV_BLOCK_TOKENS
            assert named <= self.text_tokens, f"{named} tokens of {self.text_tokens} have names"
            least, most = min(self.prefix), max(self.prefix)
            assert 0 <= least <= most < MOST_NAMES, f"{least} to {most} are no names: 0 to 2**127 - 1 are"

    @property
    def media_rows(self) -> int:
        return sum(sum(item.rows) for item in self.media)

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + self.media_rows


class Rows(Protocol):
    """The rule of a model: embedding rows of each unit of an item, in order."""

    def image(self, width: int, height: int) -> tuple[int, ...]: ...
    def video(self, frames: int, width: int, height: int) -> tuple[int, ...]: ...
    def audio(self, seconds: float) -> tuple[int, ...]: ...


def dealt(items: Sequence[Item], counts: Sequence[int]) -> Iterator[tuple[Item, ...]]:
    """So many of the items, in order, to each request."""
    begin = 0
    for count in counts:
        yield tuple(items[begin : begin + count]) if count else ()
        begin += count


@dataclass(frozen=True, slots=True)
class Phase:
    """So many requests, one like the other."""

    num_requests: int
    output_tokens: int
    media: tuple[Item, ...] = ()
    text_tokens: int = 22


def poisson(phases: Sequence[Phase], rate: float, seed: int) -> list[Demand]:
    """One phase after the other, `rate` requests a second."""
    times = _poisson_times(rate, seed)
    return [
        Demand(next(times), phase.media, phase.text_tokens, phase.output_tokens)
        for phase in phases
        for _ in range(phase.num_requests)
    ]


def _poisson_times(rate: float, seed: int) -> Iterator[float]:
    rng, now = random.Random(seed), 0.0
    while True:
        yield now
        now += rng.expovariate(rate)
