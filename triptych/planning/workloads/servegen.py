"""Workloads composed of the clients of a production service, as ServeGen does it (arXiv 2505.09999).

A folder holds a pool of clients, two files each:
- `chunk-K-trace.csv`: a line per window of time: start (s), requests a second, coefficient of variation, family of the
  intervals (Gamma or Weibull; nothing where no request came), its shape and its scale. The scale follows from the rate,
  so it is not used.
- `chunk-K-dataset.json`: per start of a longer window the probability by value of text_tokens, output_tokens, and of
  `..._count` and `..._tokens` (of each item) of image, audio and video.

Each client has its own arrivals, its own rate over time and its own requests. After the last window the first follows.
The pool says how many rows an item has, not how large it is: a row stands for 28x28 pixels, as in Qwen-VL.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triptych.errors import ConfigError
from triptych.planning import files
from triptych.planning.quantities import PerSecond, Seconds
from triptych.planning.workloads.arrivals import LEAST_SHAPE, MOST_CV, Gamma, Intervals, Poisson, Weibull, until
from triptych.planning.workloads.demand import JPEG_BYTES_PER_PIXEL, MOST_MEDIA, MOST_TOKENS, Demand, Item, dealt
from triptych.planning.workloads.distributions import pick

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PIXELS_PER_ROW = 28 * 28
MOST_S = 366 * 86_400.0  # of recorded time: all windows of all clients are gone through
MODALITIES = ("image", "video", "audio")


@dataclass(frozen=True, slots=True)
class Spread:
    """Values and their probabilities."""

    values: Integers
    shares: Floats

    def draw(self, rng: np.random.Generator, number: int) -> Integers:
        return self.values[pick(self.shares, rng, number)]

    @property
    def is_nothing(self) -> bool:
        return not self.values.any()


@dataclass(frozen=True, slots=True)
class Window:
    start_s: float
    end_s: float
    rate: float
    process: Intervals


@dataclass(frozen=True, slots=True)
class Client:
    windows: list[Window]
    datasets: dict[float, dict[str, Spread]]  # by start

    @property
    def lasts_s(self) -> float:
        return self.windows[-1].end_s

    def spans(self, start_s: float, end_s: float) -> Iterator[tuple[Window, float, float]]:
        """Windows from one time to the other, each with its part of that time. After the last comes the first."""
        day_s = start_s // self.lasts_s * self.lasts_s
        while day_s < end_s:
            for window in self.windows:
                begin_s, until_s = max(day_s + window.start_s, start_s), min(day_s + window.end_s, end_s)
                if begin_s < until_s:
                    yield window, begin_s, until_s
            day_s += self.lasts_s

    def expected(self, start_s: float, end_s: float) -> float:
        """Requests from one time to the other."""
        return sum(window.rate * (ends - begins) for window, begins, ends in self.spans(start_s, end_s))

    def dataset_at(self, start_s: float) -> float:
        return max(start for start in self.datasets if start <= start_s)

    def times(self, start_s: float, end_s: float, factor: float, rng: np.random.Generator) -> dict[float, Floats]:
        """Arrivals, by the dataset that their requests are of. What is left of an interval at the end of a window is
        measured in mean intervals, and goes on in the next one."""
        times: dict[float, list[Floats]] = {}
        left: float | None = None
        for window, begins_s, ends_s in self.spans(start_s, end_s):
            rate = window.rate * factor
            if rate <= 0:
                continue
            left = window.process.first(rng) if left is None else left
            length = (ends_s - begins_s) * rate
            found, following = until(window.process, rng, left, length)
            left = following - length
            times.setdefault(self.dataset_at(window.start_s), []).append(begins_s + found / rate)
        return {dataset: np.concatenate(parts) for dataset, parts in times.items()}


def servegen(
    path: str | Path,
    start_s: float = 0.0,
    duration_s: float | None = None,
    max_requests: int | None = None,
    *,
    rate: float | None = None,
    seed: int = 0,
) -> list[Demand]:
    """From `start_s` of the recorded time on, which becomes 0; to the end of the recorded time if nothing says when it
    ends. `rate` changes the rates of all clients by one factor, such that it is their mean over what is played.

    Raises ConfigError naming the file that cannot be used.
    """
    clients = load(path)
    lasts_s = duration_s
    if lasts_s is None and max_requests is not None:
        lasts_s = max_requests / rate if rate is not None else _seconds_for(clients, start_s, max_requests)
    if lasts_s is None:
        lasts_s = clients[0].lasts_s - start_s % clients[0].lasts_s
    if not lasts_s <= MOST_S:
        raise ConfigError(f"{path}: {lasts_s:g} s would be played; at most {MOST_S:g} s are possible")
    expected = sum(client.expected(start_s, start_s + lasts_s) for client in clients)
    if expected <= 0:
        raise ConfigError(f"{path}: no client sends anything within {lasts_s:g} s from {start_s:g} s on")
    factor = 1.0 if rate is None else rate * lasts_s / expected
    while True:
        demands = _composed(clients, start_s, lasts_s, factor, seed)
        if duration_s is not None or max_requests is None or len(demands) >= max_requests:
            return demands[:max_requests]
        lasts_s *= 1.1


def load(path: str | Path) -> list[Client]:
    """In the order of their numbers."""
    names = sorted(Path(path).glob("chunk-*-trace.csv"), key=lambda name: (len(name.name), name.name))
    if not names:
        raise ConfigError(f"{path}: not a ServeGen client pool: no file chunk-K-trace.csv in it")
    return [_client(name, name.with_name(name.name.replace("-trace.csv", "-dataset.json"))) for name in names]


def _composed(clients: list[Client], start_s: float, lasts_s: float, factor: float, seed: int) -> list[Demand]:
    demands: list[Demand] = []
    items: dict[tuple[str, int], Item] = {}
    for number, client in enumerate(clients):
        when, what = (np.random.default_rng([seed, number, stream]) for stream in (0, 1))
        for dataset, times in client.times(start_s, start_s + lasts_s, factor, when).items():
            demands += _requests(client.datasets[dataset], times - start_s, what, items)
    demands.sort(key=lambda demand: demand.at_s)
    return demands


def _requests(
    dataset: dict[str, Spread], times: Floats, rng: np.random.Generator, items: dict[tuple[str, int], Item]
) -> Iterator[Demand]:
    number = len(times)
    text = np.maximum(dataset["text_tokens"].draw(rng, number), 1).tolist()
    output = np.maximum(dataset["output_tokens"].draw(rng, number), 1).tolist()
    media: list[tuple[Item, ...]] = [()] * number
    for modality in MODALITIES:
        spread = dataset.get(f"{modality}_count")
        if spread is None or spread.is_nothing:
            continue
        counts = spread.draw(rng, number)
        rows = dataset[f"{modality}_tokens"].draw(rng, int(counts.sum())).tolist()
        found = [items.get((modality, one)) or _item(modality, one, items) for one in rows]
        media = [before + own for before, own in zip(media, dealt(found, counts.tolist()), strict=True)]
    return map(Demand, times.tolist(), media, text, output)


def _item(modality: str, num_rows: int, items: dict[tuple[str, int], Item]) -> Item:
    rows = max(1, num_rows)
    pixels = 0 if modality == "audio" else rows * PIXELS_PER_ROW
    item = items[modality, num_rows] = Item((rows,), pixels, int(pixels * JPEG_BYTES_PER_PIXEL), modality)
    return item


def _seconds_for(clients: list[Client], start_s: float, number: int) -> float:
    """In which so many requests are expected, to within a percent or two."""
    day_s = clients[0].lasts_s
    daily = sum(client.expected(0.0, day_s) for client in clients)
    if daily <= 0:
        return day_s
    low, high = 0.0, day_s * (number / daily + 1)
    while high - low > 0.01 * high:
        middle = 0.5 * (low + high)
        if sum(client.expected(start_s, start_s + middle) for client in clients) < number:
            low = middle
        else:
            high = middle
    return high


# ---- files


def _client(trace: Path, dataset: Path) -> Client:
    windows, datasets = _windows(trace), _datasets(dataset)
    for window in windows:
        if window.rate > 0 and min(datasets) > window.start_s:
            raise ConfigError(f"{dataset}: nothing says what is asked for at {window.start_s:g} s")
    return Client(windows, datasets)


def _windows(path: Path) -> list[Window]:
    rows: list[tuple[float, float, Intervals]] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows += (_row(line, f"{path}:{number}") for number, line in enumerate(csv.reader(file), 1) if line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    starts = [start for start, _, _ in rows]
    if not rows or any(before >= after for before, after in pairwise(starts)):
        raise ConfigError(f"{path}: windows must begin one after the other, and there must be one")
    starts.append(starts[-1] + (starts[-1] - starts[-2] if len(starts) > 1 else 600.0))
    return [Window(start, end, *row[1:]) for row, (start, end) in zip(rows, pairwise(starts), strict=True)]


def _row(line: list[str], place: str) -> tuple[float, float, Intervals]:
    try:
        start, rate, _, family, shape = line[:5]
        start_s, is_still = Seconds(float(start)), float(rate) == 0
        per_second = PerSecond(1 if is_still else float(rate))
        process = Poisson(rate=per_second) if is_still or not family else _process(family, per_second, float(shape))
        return start_s, 0.0 if is_still else per_second, process
    except (ValueError, OverflowError):
        needed = "start, rate, cv, Gamma or Weibull, shape and scale are needed, all of them numbers of at least 0"
        raise ConfigError(f"{place}: {','.join(line)!r} is no window; {needed}") from None


def _process(family: str, rate: PerSecond, shape: float) -> Intervals:
    if family == "Gamma" and MOST_CV**-2 <= shape < math.inf:
        return Gamma(rate=rate, cv=shape**-0.5)
    if family == "Weibull" and LEAST_SHAPE <= shape < math.inf:
        return Weibull(rate=rate, shape=shape)
    raise ValueError(f"{family} of shape {shape}")


def _datasets(path: Path) -> dict[float, dict[str, Spread]]:
    read = files.load_object(path)
    try:
        datasets = {
            float(Seconds(float(start))): {
                name: _spread(text, MOST_MEDIA if name.endswith("_count") else MOST_TOKENS)
                for name, text in fields.items()
            }
            for start, fields in read.items()
        }
    except (ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{path}: no dataset of a client: {error}") from None
    for start, fields in datasets.items():
        needed = {"text_tokens", "output_tokens"} | {
            f"{name.removesuffix('_count')}_tokens" for name in fields if name.endswith("_count")
        }
        if needed - set(fields):
            raise ConfigError(f"{path}: {start:g}: {', '.join(sorted(needed - set(fields)))} is missing")
    if not datasets:
        raise ConfigError(f"{path}: no dataset of a client: it is empty")
    return datasets


def _spread(text: str, most: int) -> Spread:
    """Of "{136: 0.25, 372: 0.75}"."""
    pairs = [pair.split(":") for pair in text.strip("{} ").split(",")]
    values = np.array([int(value) for value, _ in pairs])
    shares = np.array([float(share) for _, share in pairs])
    if not 0 <= values.min() <= values.max() <= most or not (shares.min() >= 0 and 0 < shares.sum() < math.inf):
        raise ValueError(f"{text[:40]!r}... is no probability by value")
    return Spread(values, shares)
