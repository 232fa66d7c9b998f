"""Traces of production services, by path: streamed, cut, and stretched to another rate.

| format | files | what is in a line |
|---|---|---|
| azure | CSV, also gzipped | TIMESTAMP, NumImages, ContextTokens (text and images together), GeneratedTokens |
| burstgpt | CSV | Timestamp (seconds), Request tokens, Response tokens (0: the request failed, and is left out) |
| mooncake | JSONL | timestamp (ms), input_length, output_length, hash_ids of each 512 tokens of the prompt |
| servegen | a folder | see `servegen` |

Every request has at least one token of text and one of output. The Azure trace does not say how large its pictures are:
all of them are taken to be of one size, and what its rows leave of ContextTokens is text.
"""

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from triptych.config import KV_BLOCK_TOKENS
from triptych.errors import ConfigError
from triptych.planning.quantities import PerSecond, PixelSize, Seconds, parse_pixels
from triptych.planning.workloads.demand import JPEG_BYTES_PER_PIXEL, MOST_MEDIA, MOST_TOKENS, Demand, Item, Rows
from triptych.planning.workloads.distributions import check_sizes
from triptych.planning.workloads.servegen import servegen

Stream = Iterator[Demand]  # times since the first line of the file, in order

MOONCAKE_BLOCK_TOKENS = 512
KV_BLOCKS = MOONCAKE_BLOCK_TOKENS // KV_BLOCK_TOKENS
MOST_HASH = (1 << 63) - 1
USUAL_SIZE = "1024x768"
TEXT: Any = {"newline": "", "encoding": "utf-8-sig"}  # what spreadsheets write begins with a mark


class Trace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which part of which file, and how fast it is played."""

    format: Literal["azure", "burstgpt", "mooncake", "servegen"]
    path: str
    start: Seconds = Seconds(0)  # what comes earlier is left out; time begins here
    rate: PerSecond | None = None  # mean over what is played; None: as recorded
    image_size: PixelSize = USUAL_SIZE  # of all pictures of the Azure trace

    def __post_init__(self) -> None:
        check_sizes(self.image_size, "image_size")

    def demands(
        self, rows_of: Rows, *, duration_s: float | None = None, max_requests: int | None = None, seed: int = 0
    ) -> list[Demand]:
        """Raises ConfigError naming the file and the line that cannot be read."""
        is_pool = self.format == "servegen"
        if is_pool:
            span = (float(self.start), duration_s, max_requests)
            demands = servegen(self.path, *span, rate=self.rate, seed=seed)
        else:
            part = _Part(self._stream(rows_of), self.start, duration_s, max_requests)
            demands = list(part)
        if not demands:
            raise ConfigError(f"{self.path}: no request in the part that is played, from {self.start} on")
        if self.rate is None or is_pool:
            return demands
        return _stretched(demands, part.lasts_s, self.rate, self.path)

    def _stream(self, rows_of: Rows) -> Stream:
        if self.format == "azure":
            return azure(self.path, rows_of, self.image_size)
        return burstgpt(self.path) if self.format == "burstgpt" else mooncake(self.path)


def azure(path: str | Path, rows_of: Rows, image_size: str = USUAL_SIZE) -> Stream:
    """The Azure LMM inference trace (AzurePublicDataset); without the column NumImages that of text models."""
    picture = _picture(path, rows_of, *parse_pixels(image_size))
    rows = sum(picture.rows)
    since = _Since()
    columns = {"TIMESTAMP": "", "NumImages": "0", "ContextTokens": "", "GeneratedTokens": ""}

    def demand(stamp: str, images: str, context: str, generated: str) -> Demand:
        number = _whole(images, "NumImages", MOST_MEDIA)
        text = max(1, _whole(context, "ContextTokens") - number * rows)
        return Demand(since.moment(stamp), (picture,) * number, text, max(1, _whole(generated, "GeneratedTokens")))

    return _table(Path(path), columns, demand)


def _picture(path: str | Path, rows_of: Rows, width: int, height: int) -> Item:
    try:
        return Item(rows_of.image(width, height), width * height, int(width * height * JPEG_BYTES_PER_PIXEL))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def burstgpt(path: str | Path) -> Stream:
    since = _Since()
    columns = {"Timestamp": "", "Request tokens": "", "Response tokens": ""}

    def demand(stamp: str, request: str, response: str) -> Demand | None:
        at_s = since.seconds(_seconds(stamp))
        prompt, answer = _whole(request, "Request tokens"), _whole(response, "Response tokens")
        return Demand(at_s, (), max(1, prompt), answer) if answer else None

    return _table(Path(path), columns, demand)


class _MooncakeLine(msgspec.Struct):
    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Annotated[int, Meta(ge=0, le=MOST_TOKENS)]
    output_length: Annotated[int, Meta(ge=0, le=MOST_TOKENS)]
    hash_ids: list[Annotated[int, Meta(ge=0, le=MOST_HASH)]] = []


def mooncake(path: str | Path) -> Stream:
    """A hash names 512 tokens and all before them, so equal hashes are equal KV blocks."""
    since = _Since()
    decode = msgspec.json.Decoder(_MooncakeLine).decode
    names: dict[int, tuple[int, ...]] = {}  # shared, because there are millions of blocks

    def blocks(hash_id: int) -> tuple[int, ...]:
        if hash_id not in names:
            names[hash_id] = tuple(range(hash_id * KV_BLOCKS, (hash_id + 1) * KV_BLOCKS))
        return names[hash_id]

    def demand(line: str) -> Demand:
        read = decode(line)
        full = tuple(chain.from_iterable(map(blocks, read.hash_ids)))[: read.input_length // KV_BLOCK_TOKENS]
        at_s = since.seconds(read.timestamp / 1000)
        return Demand(at_s, (), max(1, read.input_length), max(1, read.output_length), full)

    return _lines(Path(path), demand)


# ---- which part, and how fast


class _Part:
    """Of a recording: from its start on, so long, so many requests, or to its end. Once it is played, `lasts_s` is how
    long it was."""

    def __init__(self, stream: Stream, start_s: float, duration_s: float | None, max_requests: int | None) -> None:
        self.lasts_s = 0.0
        self._stream, self._start_s, self._duration_s, self._max_requests = stream, start_s, duration_s, max_requests

    def __iter__(self) -> Stream:
        number = 0
        for demand in self._stream:
            at_s = demand.at_s - self._start_s
            if at_s < 0:
                continue
            if self._duration_s is not None and at_s >= self._duration_s:
                self.lasts_s = self._duration_s
                return
            self.lasts_s = at_s
            yield replace(demand, at_s=at_s) if self._start_s else demand
            number += 1
            if number == self._max_requests:
                return


def _stretched(demands: list[Demand], lasts_s: float, rate: float, path: str) -> list[Demand]:
    if lasts_s <= 0:
        raise ConfigError(f"{path}: rate: all requests that are played come at one moment, which is no rate to change")
    factor = len(demands) / lasts_s / rate
    if not demands[-1].at_s * factor < math.inf:
        raise ConfigError(f"{path}: rate: {rate:g} req/s is too slow for the last request ever to come")
    return [replace(demand, at_s=demand.at_s * factor) for demand in demands]


# ---- lines


def _table(path: Path, columns: dict[str, str], demand: Callable[..., Demand | None]) -> Stream:
    """`columns` by name, each with what stands for it where the table does not have it; "": it must."""

    def rows(file: IO[str]) -> Iterator[tuple[int, Demand | None]]:
        lines = csv.reader(file)
        header = [name.strip() for name in next(lines, [])]
        missing = [name for name, default in columns.items() if name not in header and not default]
        if missing:
            raise ValueError(f"the column {missing[0]!r} is missing; the first line must name {', '.join(columns)}")
        yield 1, None
        places = [header.index(name) if name in header else len(header) + i for i, name in enumerate(columns)]
        defaults = list(columns.values())
        for row in lines:
            if not row:
                yield lines.line_num, None
                continue
            if len(row) < len(header):
                raise ValueError(f"{len(row)} columns, {len(header)} are needed")
            row += defaults if len(row) == len(header) else []
            yield lines.line_num, demand(*[row[place] for place in places])

    return _read(path, rows)


def _lines(path: Path, demand: Callable[[str], Demand]) -> Stream:
    def rows(file: IO[str]) -> Iterator[tuple[int, Demand | None]]:
        for number, line in enumerate(file, 1):
            yield number, demand(line) if line.strip() else None

    return _read(path, rows)


def _read(path: Path, rows: Callable[[IO[str]], Iterator[tuple[int, Demand | None]]]) -> Stream:
    """Names the line that cannot be read: the one after the last that could."""
    line = 0
    try:
        with gzip.open(path, "rt", **TEXT) if path.suffix == ".gz" else open(path, **TEXT) as file:
            for number, demand in rows(file):
                line = number
                if demand is not None:
                    yield demand
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{path}:{line + 1}: {error}") from None
    except (EOFError, zlib.error):
        raise ConfigError(f"{path}: not a whole gzip file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


class _Since:
    """Seconds since the first line; lines come in order."""

    def __init__(self) -> None:
        self._first: Any = None
        self._last_s = 0.0

    def moment(self, text: str) -> float:
        """An ISO date and time."""
        try:
            moment = datetime.fromisoformat(text)
            self._first = self._first or moment
            at_s = (moment - self._first).total_seconds()
        except (ValueError, TypeError):
            raise ValueError(
                f"TIMESTAMP is {text!r}; a date and time such as 2024-10-15T12:00:00.269Z is needed"
            ) from None
        return self._in_order(at_s, text)

    def seconds(self, at_s: float) -> float:
        self._first = at_s if self._first is None else self._first
        return self._in_order(at_s - self._first, f"{at_s:g} s")

    def _in_order(self, at_s: float, text: str) -> float:
        if at_s < self._last_s:
            raise ValueError(f"{text} is earlier than the line before; lines must be in order of time")
        self._last_s = at_s
        return at_s


def _whole(text: str, name: str, most: int = MOST_TOKENS) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most):
        raise ValueError(f"{name} is {text[:40]!r}; a whole number from 0 to {most} is needed")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return float(Seconds(float(text)))
    except ValueError:
        raise ValueError(f"Timestamp is {text!r}; seconds, a finite number of at least 0, are needed") from None
