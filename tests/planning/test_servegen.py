"""Workloads composed of clients: rates over time, what each client asks for, and pools that are refused."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.planning.rows import SimpleRows
from triptych.errors import ConfigError
from triptych.planning.quantities import PerSecond
from triptych.planning.workloads.demand import Demand
from triptych.planning.workloads.servegen import PIXELS_PER_ROW, load, servegen
from triptych.planning.workloads.traces import Trace

NOTHING = "{0: 1.0}"
PICTURES = {
    "text_tokens": "{100: 0.5, 300: 0.5}",
    "image_tokens": "{64: 0.25, 1000: 0.75}",
    "image_count": "{1: 0.5, 3: 0.5}",
    "audio_count": NOTHING,
    "audio_tokens": NOTHING,
    "video_count": NOTHING,
    "video_tokens": NOTHING,
    "output_tokens": "{7: 1.0}",
}
TEXT = PICTURES | {"image_count": NOTHING, "image_tokens": NOTHING, "text_tokens": "{0: 0.5, 9: 0.5}"}


def write_client(folder: Path, number: int, windows: str, datasets: dict[str, Any]) -> None:
    (folder / f"chunk-{number}-trace.csv").write_text(windows)
    (folder / f"chunk-{number}-dataset.json").write_text(json.dumps(datasets))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """An hour: the first client sends pictures, from 1800 s on text; the second is silent at first, then bursty."""
    windows = "0,2.0,1,Gamma,1.0,0.5\n1800,4.0,1,Weibull,1.0,0.25\n"
    write_client(tmp_path, 0, windows, {"0": PICTURES, "1800": TEXT})
    write_client(tmp_path, 1, "0,0.0,0,,0,0\n1800,1.0,2,Gamma,0.25,4\n", {"0": PICTURES})
    return tmp_path


def between(demands: list[Demand], begin_s: float, end_s: float) -> list[Demand]:
    return [one for one in demands if begin_s <= one.at_s < end_s]


def test_each_client_has_its_rate_over_time_and_its_requests(pool: Path) -> None:
    demands = servegen(pool)
    assert demands == sorted(demands, key=lambda one: one.at_s)
    early, late = between(demands, 0, 1800), between(demands, 1800, 3600)
    assert len(early) == pytest.approx(3600, rel=0.06)
    assert len(late) == pytest.approx(9000, rel=0.06)
    assert all(one.media for one in early)
    text = [one for one in late if not one.media]
    assert len(text) == pytest.approx(7200, rel=0.06)
    assert {one.text_tokens for one in text} == {1, 9}


def test_requests_have_what_the_dataset_says(pool: Path) -> None:
    early = between(servegen(pool), 0, 1800)
    number = len(early)
    assert {one.output_tokens for one in early} == {7}
    assert sum(one.text_tokens == 100 for one in early) == pytest.approx(number / 2, rel=0.1)
    assert sum(len(one.media) for one in early) == pytest.approx(2 * number, rel=0.05)
    items = [item for one in early for item in one.media]
    assert {item.rows for item in items} == {(64,), (1000,)}
    assert sum(item.rows == (1000,) for item in items) == pytest.approx(0.75 * len(items), rel=0.05)
    assert all(item.pixels == item.rows[0] * PIXELS_PER_ROW and item.modality == "image" for item in items)


def test_other_media_are_items_too(tmp_path: Path) -> None:
    dataset = PICTURES | {"image_count": NOTHING, "audio_count": "{2: 1.0}", "audio_tokens": "{30: 1.0}"}
    write_client(tmp_path, 0, "0,1.0,1,Gamma,1,1\n", {"0": dataset})
    (one, *_) = servegen(tmp_path)
    assert [(item.modality, item.rows, item.pixels) for item in one.media] == [("audio", (30,), 0)] * 2


def test_a_part_begins_at_0(pool: Path) -> None:
    demands = servegen(pool, start_s=1700, duration_s=200)
    assert demands[0].at_s >= 0 and demands[-1].at_s < 200
    assert len(between(demands, 0, 100)) == pytest.approx(200, rel=0.3)
    assert len(between(demands, 100, 200)) == pytest.approx(500, rel=0.3)


def test_after_the_recorded_time_it_begins_again(pool: Path) -> None:
    demands = servegen(pool, start_s=3600, duration_s=7200)
    assert len(between(demands, 0, 1800)) == pytest.approx(3600, rel=0.06)
    assert len(between(demands, 3600, 5400)) == pytest.approx(3600, rel=0.06)
    assert len(servegen(pool, max_requests=30_000)) == 30_000


@pytest.mark.parametrize("rate", [0.5, 30.0])
def test_another_rate_is_the_mean_over_what_is_played_and_keeps_its_shape(pool: Path, rate: float) -> None:
    demands = servegen(pool, duration_s=3600, rate=rate)
    assert len(demands) == pytest.approx(3600 * rate, rel=0.1)
    assert len(between(demands, 0, 1800)) == pytest.approx(len(demands) * 3600 / 12_600, rel=0.15)


def test_a_number_of_requests_comes_at_the_rate(pool: Path) -> None:
    demands = servegen(pool, max_requests=5000, rate=5)
    assert len(demands) == 5000
    assert 5000 / demands[-1].at_s == pytest.approx(5, rel=0.1)


def test_the_seed_decides_everything(pool: Path) -> None:
    assert servegen(pool, seed=1, duration_s=60) == servegen(pool, seed=1, duration_s=60)
    assert servegen(pool, seed=1, duration_s=60) != servegen(pool, seed=2, duration_s=60)


def test_a_pool_is_a_trace(pool: Path) -> None:
    trace = Trace(format="servegen", path=str(pool), rate=PerSecond(5))
    assert trace.demands(SimpleRows(), max_requests=10, seed=3) == servegen(pool, max_requests=10, rate=5, seed=3)


def test_a_part_so_short_that_nobody_comes_is_refused(pool: Path) -> None:
    with pytest.raises(ConfigError, match="no request in the part that is played, from 0 s on"):
        Trace(format="servegen", path=str(pool)).demands(SimpleRows(), duration_s=1e-9)


@pytest.mark.parametrize(
    ("windows", "told"),
    [
        ("0,1.0,1,Gamma,1,1\n600,fast,1,Gamma,1,1\n", r"chunk-0-trace\.csv:2: '600,fast,1,Gamma,1,1' is no window"),
        ("0,1.0,1,Pareto,1,1\n", r"chunk-0-trace\.csv:1: .* is no window; start, rate, cv, Gamma or Weibull"),
        ("0,-1.0,1,Gamma,1,1\n", r"chunk-0-trace\.csv:1: .* is no window"),
        ("0,1.0,1,Gamma,0,1\n", r"chunk-0-trace\.csv:1: .* is no window"),
        ("0,1.0,1,Gamma,nan,1\n", r"chunk-0-trace\.csv:1: .* is no window"),
        ("nan,1.0,1,Gamma,1,1\n", r"chunk-0-trace\.csv:1: .* is no window"),
        ("0,inf,1,Gamma,1,1\n", r"chunk-0-trace\.csv:1: .* is no window"),
        ("0,nan,1,,1,1\n", r"chunk-0-trace\.csv:1: .* is no window"),
        ("0,1.0\n", r"chunk-0-trace\.csv:1: .* is no window"),
        ("600,1.0,1,Gamma,1,1\n0,1.0,1,Gamma,1,1\n", r"chunk-0-trace\.csv: windows must begin one after the other"),
        ("", r"chunk-0-trace\.csv: windows must begin one after the other, and there must be one"),
    ],
)
def test_windows_that_cannot_be_are_refused(tmp_path: Path, windows: str, told: str) -> None:
    write_client(tmp_path, 0, windows, {"0": PICTURES})
    with pytest.raises(ConfigError, match=told):
        load(tmp_path)


@pytest.mark.parametrize(
    ("datasets", "told"),
    [
        ({}, r"chunk-0-dataset\.json: no dataset of a client: it is empty"),
        ({"noon": PICTURES}, r"chunk-0-dataset\.json: no dataset of a client"),
        ({"nan": PICTURES}, r"chunk-0-dataset\.json: no dataset of a client: nan s is out of range"),
        ({"0": {"text_tokens": "{1: 1}"}}, r"chunk-0-dataset\.json: 0: output_tokens is missing"),
        (
            {"0": {"text_tokens": "{1: 1}", "output_tokens": "{1: 1}", "image_count": "{1: 1}"}},
            "0: image_tokens is missing",
        ),
        ({"0": PICTURES | {"text_tokens": "many"}}, r"chunk-0-dataset\.json: no dataset of a client"),
        ({"0": PICTURES | {"text_tokens": "{-1: 1.0}"}}, r"dataset\.json: no dataset .* is no probability by value"),
        (
            {"0": PICTURES | {"text_tokens": "{99999999999999999999: 1.0}"}},
            r"chunk-0-dataset\.json: no dataset of a client",
        ),
        ({"0": PICTURES | {"image_count": "{10001: 1.0}"}}, r"dataset\.json: no dataset .* is no probability by value"),
        ({"0": PICTURES | {"text_tokens": "{1: nan}"}}, r"dataset\.json: no dataset .* is no probability by value"),
        ({"0": PICTURES | {"text_tokens": "{1: 0}"}}, r"dataset\.json: no dataset .* is no probability by value"),
        ({"60": PICTURES}, r"chunk-0-dataset\.json: nothing says what is asked for at 0 s"),
        ([1], r"chunk-0-dataset\.json: is no JSON object"),
    ],
)
def test_datasets_that_cannot_be_are_refused(tmp_path: Path, datasets: Any, told: str) -> None:
    write_client(tmp_path, 0, "0,1.0,1,Gamma,1,1\n", datasets)
    with pytest.raises(ConfigError, match=told):
        load(tmp_path)


def test_a_folder_that_is_no_pool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a ServeGen client pool: no file chunk-K-trace\.csv in it"):
        load(tmp_path)
    (tmp_path / "chunk-0-trace.csv").write_text("0,1.0,1,Gamma,1,1\n")
    with pytest.raises(ConfigError, match=r"chunk-0-dataset\.json: cannot be read: No such file"):
        load(tmp_path)


def test_nesting_and_empty_lines_are_no_crash(tmp_path: Path) -> None:
    write_client(tmp_path, 0, "\ufeff0,1.0,1,Gamma,1,1\n\n", {"0": PICTURES})
    assert len(load(tmp_path)[0].windows) == 1
    (tmp_path / "chunk-0-dataset.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"chunk-0-dataset\.json: is nested too deeply"):
        load(tmp_path)


@pytest.mark.parametrize("options", [{"duration_s": 1e300}, {"max_requests": 3, "rate": 1e-310}])
def test_a_part_that_would_take_for_ever_is_refused(pool: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"s would be played; at most 3\.16224e\+07 s are possible"):
        servegen(pool, **options)


def test_a_pool_in_which_nobody_sends_anything_is_refused(tmp_path: Path) -> None:
    write_client(tmp_path, 0, "0,0.0,0,,0,0\n600,1,1,Gamma,1,1\n", {"0": PICTURES})
    with pytest.raises(ConfigError, match="no client sends anything within 500 s from 0 s on"):
        servegen(tmp_path, duration_s=500)
    write_client(tmp_path, 0, "0,0.0,0,,0,0\n", {"0": PICTURES})
    with pytest.raises(ConfigError, match="no client sends anything"):
        servegen(tmp_path, max_requests=5)


REAL = os.environ.get("TRIPTYCH_SERVEGEN", "")


@pytest.mark.skipif(not REAL, reason="TRIPTYCH_SERVEGEN is not the folder of ServeGen's image-language pool")
def test_the_real_pool_gives_a_day_of_a_production_service() -> None:
    """The mean rate of its 35 clients over the day is 9.47 requests a second."""
    clients = load(REAL)
    assert len(clients) == 35 and clients[0].lasts_s == 86_400
    assert sum(client.expected(0, 86_400) for client in clients) / 86_400 == pytest.approx(9.475, abs=0.01)
    began = time.perf_counter()
    demands = servegen(REAL, max_requests=100_000)
    assert time.perf_counter() - began < 10
    assert len(demands) == 100_000
    assert sum(len(one.media) for one in demands) / len(demands) == pytest.approx(1.6, abs=0.2)
    hour = sum(client.expected(36_000, 39_600) for client in clients)
    assert len(servegen(REAL, start_s=36_000, duration_s=3600)) == pytest.approx(hour, rel=0.05)
