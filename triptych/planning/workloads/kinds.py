"""Kinds of requests in a workload, as its file describes them, and samples of what they ask for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from triptych.config import KV_BLOCK_TOKENS
from triptych.errors import ConfigError
from triptych.planning.quantities import PositiveSeconds
from triptych.planning.workloads.demand import Demand, Item, Rows, dealt
from triptych.planning.workloads.distributions import (
    MOST,
    Distribution,
    Integers,
    Number,
    Sizes,
    check_sizes,
    counts,
    pick,
    pixel_sizes,
    sample,
)

Share = Annotated[float, Meta(gt=0, le=1)]

MOST_REPEATED = 1_000_000
MOST_ITEMS = 50_000_000  # media of all requests, or blocks of all shared texts


class Images(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    size: Sizes
    count: Distribution = 1
    bytes_per_pixel: Number = 0.25  # of the file: about a JPEG photograph

    def __post_init__(self) -> None:
        check_sizes(self.size, "size")


class Videos(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    frames: Distribution  # that the model looks at
    size: Sizes
    count: Distribution = 1
    bytes_per_pixel: Number = 0.0125  # of each of these frames: about H.264

    def __post_init__(self) -> None:
        check_sizes(self.size, "size")


class Audio(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    seconds: Distribution
    count: Distribution = 1
    bytes_per_second: Number = 16_000  # of the file: 128 kbit/s


class Repeated(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Media that come again and again. `skew` is the exponent of Zipf's law: 0 makes all of them as popular."""

    share: Share  # of all media
    distinct: Annotated[int, Meta(ge=1, le=MOST_REPEATED)] = 100
    skew: Number = 0.0


class SharedPrefix(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text at the beginning of prompts, such as a system prompt, beside `text_tokens`."""

    tokens: Annotated[int, Meta(ge=1, le=MOST)]
    distinct: Annotated[int, Meta(ge=1, le=MOST_REPEATED)] = 1
    share: Share = 1.0  # of the requests that begin with one of them


class Kind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests that are alike. Each has at least one token of text and one of output."""

    weight: Number = 1.0  # against the other kinds
    text_tokens: Distribution = 22  # of the prompt, beside the placeholders of its media
    output_tokens: Distribution = 10
    images: Images | None = None
    videos: Videos | None = None
    audio: Audio | None = None
    repeated: Repeated | None = None
    shared_prefix: SharedPrefix | None = None
    timeout: PositiveSeconds | None = None


@dataclass(frozen=True, slots=True)
class _Stock:
    """Makes items of one modality; the same stock has the same popular ones, whatever is drawn besides."""

    made: Callable[[np.random.Generator, int], list[Item]]
    repeated: Repeated | None
    rng_of_popular: np.random.Generator
    first_name: int

    def draw(self, rng: np.random.Generator, number: int) -> list[Item]:
        items = self.made(rng, number)
        if self.repeated is None or not items:
            return items
        popular = [
            Item(one.rows, one.pixels, one.nbytes, one.modality, self.first_name + index)
            for index, one in enumerate(self.made(self.rng_of_popular, self.repeated.distinct))
        ]
        weights = np.arange(1.0, len(popular) + 1).astype(np.float64) ** -self.repeated.skew
        again = np.flatnonzero(rng.random(number) < self.repeated.share)
        for place, index in zip(again.tolist(), pick(weights, rng, len(again)).tolist(), strict=True):
            items[place] = popular[index]
        return items


def requests(
    kind: Kind, number: int, rows_of: Rows, seed: int, kind_number: int, where: str = "kind"
) -> Iterator[Demand]:
    """So many of this kind, all at 0 s. Names of media and of prefixes are those of this kind number only.

    Raises ConfigError that begins with `where`, for what is too much or what the model cannot take.
    """
    rng = np.random.default_rng([seed, 2, kind_number])
    text = counts(kind.text_tokens, rng, number, least=1)
    output = counts(kind.output_tokens, rng, number, least=1).tolist()
    prefixes: list[tuple[int, ...]] = [()] * number
    try:
        media = _media(kind, number, rows_of, rng, seed, kind_number)
        if kind.shared_prefix is not None:
            text, prefixes = _begun(kind.shared_prefix, text, rng, kind_number)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    timeout_s = None if kind.timeout is None else float(kind.timeout)
    for one in zip(media, text.tolist(), output, prefixes, strict=True):
        yield Demand(0.0, *one, timeout_s)


def _media(
    kind: Kind, number: int, rows_of: Rows, rng: np.random.Generator, seed: int, kind_number: int
) -> list[tuple[Item, ...]]:
    """Of each request: pictures, then videos, then audio."""
    media: list[tuple[Item, ...]] = [()] * number
    parts = [(kind.images, _images), (kind.videos, _videos), (kind.audio, _audio)]
    for place, (part, making) in enumerate(parts):
        if part is None:
            continue
        popular = np.random.default_rng([seed, 3, kind_number, place])
        name = (kind_number * len(parts) + place) * MOST_REPEATED
        stock = _Stock(making(part, rows_of), kind.repeated, popular, name)  # type: ignore[operator]
        numbers = counts(part.count, rng, number)
        if numbers.sum() > MOST_ITEMS:
            raise ConfigError(f"count: {numbers.sum()} media in {number} requests; at most {MOST_ITEMS} are possible")
        items = stock.draw(rng, int(numbers.sum()))
        media = [before + own for before, own in zip(media, dealt(items, numbers.tolist()), strict=True)]
    return media


def _images(images: Images, rows_of: Rows) -> Callable[[np.random.Generator, int], list[Item]]:
    known: dict[tuple[int, int], Item] = {}

    def item(size: tuple[int, int]) -> Item:
        pixels = size[0] * size[1]
        made = known[size] = Item(rows_of.image(*size), pixels, round(pixels * images.bytes_per_pixel))
        return made

    def make(rng: np.random.Generator, number: int) -> list[Item]:
        return [known.get(size) or item(size) for size in pixel_sizes(images.size, rng, number)]

    return make


def _videos(videos: Videos, rows_of: Rows) -> Callable[[np.random.Generator, int], list[Item]]:
    known: dict[tuple[int, int, int], Item] = {}

    def item(frames: int, width: int, height: int) -> Item:
        pixels, rows = frames * width * height, rows_of.video(frames, width, height)
        made = Item(rows, pixels, round(pixels * videos.bytes_per_pixel), "video")
        known[frames, width, height] = made
        return made

    def make(rng: np.random.Generator, number: int) -> list[Item]:
        frames = counts(videos.frames, rng, number, least=1).tolist()
        shapes = [(n, *size) for n, size in zip(frames, pixel_sizes(videos.size, rng, number), strict=True)]
        return [known.get(shape) or item(*shape) for shape in shapes]

    return make


def _audio(audio: Audio, rows_of: Rows) -> Callable[[np.random.Generator, int], list[Item]]:
    known: dict[float, Item] = {}

    def item(seconds: float) -> Item:
        made = Item(rows_of.audio(seconds), 0, round(seconds * audio.bytes_per_second), "audio")
        known[seconds] = made
        return made

    def make(rng: np.random.Generator, number: int) -> list[Item]:
        lengths = np.maximum(np.round(sample(audio.seconds, rng, number), 2), 0.01)
        return [known.get(seconds) or item(seconds) for seconds in lengths.tolist()]

    return make


def _begun(
    prefix: SharedPrefix, text: Integers, rng: np.random.Generator, kind_number: int
) -> tuple[Integers, list[tuple[int, ...]]]:
    """Text with the beginnings that some have, and the KV blocks of these."""
    num_blocks = prefix.tokens // KV_BLOCK_TOKENS
    drawn = rng.integers(prefix.distinct, size=len(text))
    has_one = rng.random(len(text)) < prefix.share
    names: dict[int, tuple[int, ...]] = {-1: ()}
    texts = set(drawn.tolist())
    if len(texts) * num_blocks > MOST_ITEMS:
        raise ConfigError(
            f"shared_prefix: {len(texts)} texts of {prefix.tokens} tokens; at most {MOST_ITEMS * KV_BLOCK_TOKENS} "
            "tokens are possible together"
        )
    for number in texts:
        first = kind_number << 80 | number << 40  # room for any number of blocks
        names[number] = tuple(range(first, first + num_blocks))
    prefixes = [names[number] for number in np.where(has_one, drawn, -1).tolist()]
    return text + has_one * prefix.tokens, prefixes
