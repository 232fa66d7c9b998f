"""What clients ask for on simulated time: when, which media, how much text, how long an answer."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Demand:
    """One request. `media` has one entry per item: the embedding rows of its units. All media are different ones."""

    at_s: float
    media: tuple[tuple[int, ...], ...] = ()
    text_tokens: int = 22  # of the prompt, beside the placeholders of its media
    output_tokens: int = 10


@dataclass(frozen=True, slots=True)
class Phase:
    """So many requests, one like the other."""

    num_requests: int
    output_tokens: int
    media: tuple[tuple[int, ...], ...] = ()
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
