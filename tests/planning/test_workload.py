"""Workload files: what they become, which are refused and in which words; and the examples can all be played."""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.rows import SimpleRows
from triptych.errors import ConfigError
from triptych.planning import files
from triptych.planning.model.shapes import preset
from triptych.planning.quantities import PerSecond, Seconds
from triptych.planning.workloads.arrivals import AllAtOnce, Gamma, Poisson, Uniform, Weibull
from triptych.planning.workloads.demand import Demand
from triptych.planning.workloads.kinds import Images, Kind
from triptych.planning.workloads.presets import load
from triptych.planning.workloads.workload import Period, Slo, Workload

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "workloads").glob("*.json"))
WEIGHTLESS = {"distribution": "values", "values": [1], "weights": [0]}
GOOD: dict[str, Any] = {
    "name": "good",
    "arrivals": {"process": "poisson", "rate": "2 req/s"},
    "kinds": {"text": {}, "pictures": {"weight": 3, "images": {"size": "400x300"}}},
    "num_requests": 10,
}


def made(**changes: Any) -> Workload:
    return files.convert({key: value for key, value in (GOOD | changes).items() if value is not None}, Workload)


def demands(**changes: Any) -> list[Demand]:
    return made(**changes).demands(SimpleRows())


def refused(**changes: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        made(**changes)
    return str(caught.value)


def test_the_same_seed_gives_the_same_demands() -> None:
    assert demands(seed=3) == demands(seed=3) != demands(seed=4)


def test_another_number_of_requests_replaces_what_said_how_many_come() -> None:
    assert made().with_requests(7).num_requests == 7
    lasting = made(num_requests=None, duration="3 s").with_requests(7)
    assert (lasting.num_requests, lasting.duration) == (7, None)
    phased = made(num_requests=None, phases=[{"num_requests": 5}, {"num_requests": 6, "rate_factor": 2}])
    assert phased.with_requests(7) == phased
    trace = {"format": "mooncake", "path": "trace.jsonl"}
    part = made(arrivals=None, num_requests=None, duration="3 s", trace=trace).with_requests(7)
    assert (part.num_requests, part.duration) == (7, Seconds(3))


def test_at_another_rate_the_same_requests_come_faster() -> None:
    workload = made(num_requests=500)
    slow, fast = workload.demands(SimpleRows()), workload.at_rate(8).demands(SimpleRows())
    assert [one.media for one in slow] == [one.media for one in fast]
    assert [one.at_s / 4 for one in slow] == pytest.approx([one.at_s for one in fast])
    assert workload.rate == 2 and workload.at_rate(8).rate == 8


def test_kinds_come_as_often_as_their_weights_say() -> None:
    pictures = [one for one in demands(num_requests=4000) if one.media]
    assert len(pictures) == pytest.approx(3000, rel=0.03)


def test_a_duration_ends_the_workload() -> None:
    asked = demands(num_requests=None, duration="500 s")
    assert len(asked) == pytest.approx(1000, rel=0.15)
    assert asked[-1].at_s < 500


def test_what_comes_at_once_comes_at_the_beginning() -> None:
    assert {one.at_s for one in demands(arrivals={"process": "all_at_once"})} == {0.0}


def test_phases_follow_each_other_with_their_own_mix_and_rate() -> None:
    phases = [
        {"duration": "100 s", "mix": {"text": 1}},
        {"duration": "100 s", "rate_factor": 10, "mix": {"pictures": 1}},
        {"num_requests": 30, "mix": {"text": 1}},
    ]
    asked = demands(num_requests=None, phases=phases, seed=1)
    assert [one.at_s for one in asked] == sorted(one.at_s for one in asked)
    first, second, third = ([one for one in asked if low <= one.at_s < low + 100] for low in (0, 100, 200))
    assert len(first) == pytest.approx(200, rel=0.2) and len(second) == pytest.approx(2000, rel=0.1)
    assert not any(one.media for one in first) and all(one.media for one in second)
    assert len(third) == 30 and not any(one.media for one in third)


def test_the_load_of_table_6_is_a_file() -> None:
    asked = load(Path(EXAMPLES[0].parent, "shifting.json")).demands(SimpleRows())
    assert [one.output_tokens for one in asked] == [50] * 10 + [500] * 90
    assert {(len(one.media), one.media[0].pixels, one.text_tokens) for one in asked} == {(1, 4032 * 3024, 22)}
    assert 100 / asked[-1].at_s == pytest.approx(3, rel=0.3)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_can_be_played_and_written(path: Path, tmp_path: Path) -> None:
    workload = load(path)
    assert workload.name == path.stem
    asked = workload.demands(SimpleRows())
    assert len(asked) > 90 and asked == sorted(asked, key=lambda one: one.at_s)
    files.write(tmp_path / "again.json", workload)
    assert load(tmp_path / "again.json") == workload


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arrivals": None}, 'arrivals: is missing; for example {"process": "poisson", "rate": "1 req/s"}'),
        ({"kinds": {}}, "kinds: at least one kind of requests is needed, or a trace"),
        ({"name": None}, "name: is missing"),
        ({"num_request": 3}, "num_request: unknown key; did you mean 'num_requests'? known are name, arrivals, kinds,"),
        ({"duration": "1 min"}, "num_requests and duration given; one of num_requests, duration, phases is needed"),
        ({"num_requests": None}, "no end given; one of num_requests, duration, phases is needed"),
        ({"num_requests": 0}, "num_requests: 0 is not valid; a whole number of at least 1 and at most 10000000"),
        ({"num_requests": None, "duration": "0 s"}, "duration: '0 s' is out of range; a finite number above 0"),
        ({"num_requests": None, "duration": "5e6 h"}, "36000000000 requests would come; at most 10000000 are possible"),
        ({"arrivals": {"process": "poisson", "rate": 2}}, "arrivals.rate: 2 has no unit; use req/s, req/min or req/h"),
        ({"arrivals": {"process": "poisson", "rate": "0 req/s"}}, "arrivals.rate: '0 req/s' is out of range; a"),
        ({"arrivals": {"process": "gamma", "rate": "1 req/s", "cv": -1}}, "arrivals.cv: -1 is not valid; a number"),
        ({"kinds": {"a": {"weight": 0}}}, "kinds: all weights are 0; at least one must be above 0"),
        ({"kinds": {"a": {"text_tokens": -5}}}, "kinds.a.text_tokens: -5 is not valid; a number of at least 0 and at"),
        ({"kinds": {"a": {"image": {}}}}, "kinds.a.image: unknown key; did you mean 'images'? known are weight,"),
        ({"kinds": {"a": {"images": {"size": "4k"}}}}, "kinds.a.images.size: '4k' is no size in pixels; use"),
        ({"kinds": {"a": {"images": {"size": "4x4", "count": WEIGHTLESS}}}},
         "kinds.a.images.count.weights: all weights are 0; at least one must be above 0"),
        ({"kinds": {"a": {"repeated": {"share": 1.5}}}}, "kinds.a.repeated.share: 1.5 is not valid; a number above"),
        ({"kinds": {"a": {"timeout": 3}}}, "kinds.a.timeout: 3 has no unit; use h, min, s, ms, us or ns"),
        ({"kinds": {"a": {"timeout": "0 s"}}}, "kinds.a.timeout: '0 s' is out of range; a finite number above 0"),
        ({"kinds": {"a": {"shared_prefix": {"tokens": 10**8}}}},
         "kinds.a.shared_prefix.tokens: 100000000 is not valid; a whole number of at least 1 and at most 10000000 is"),
        ({"slo": {"ttft": "0 s"}}, "slo.ttft: '0 s' is out of range; a finite number above 0 is needed"),
        ({"slo": {"ttft": "2 s", "e2e": "1 s"}}, "slo.e2e: 1 s is less than ttft, 2 s; at least that is needed"),
        ({"slo": {}}, "slo: nothing is bounded; at least one of ttft, tpot and e2e is needed"),
        ({"slo": {"ttft": "1 s", "attainment": 90}}, "slo.attainment: 90 is not valid; a number above 0 and at most"),
        ({"num_requests": None, "phases": [{"num_requests": 1}, {}]}, "phases[1]: a phase lasts either num_requests"),
        ({"num_requests": None, "phases": [{"num_requests": 1, "mix": {"picture": 1}}]},
         "phases[0].mix.picture: no such kind; did you mean 'pictures'? kinds are text, pictures"),
        ({"num_requests": None, "phases": [{"num_requests": 1, "mix": {"text": 0}}]}, "phases[0].mix: all weights"),
        ({"arrivals": {"process": "all_at_once"}, "num_requests": None, "duration": "1 s"},
         "duration: requests that come all at once have none; use num_requests"),
        ({"trace": {"format": "azure", "path": "x.csv"}}, "trace: has its own arrivals and knows no phases; leave out"),
        ({"trace": {"format": "azur", "path": "x.csv"}}, "trace.format: \"azur\" is not valid; did you mean 'azure'?"),
        ({"trace": {"format": "azure", "path": "x", "image_size": "big"}}, "trace.image_size: 'big' is no size in"),
    ],
)  # fmt: skip
def test_a_workload_that_cannot_be_is_refused_by_key_and_range(changes: dict[str, Any], told: str) -> None:
    assert refused(**changes).startswith(told)


def test_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(GOOD | {"seed": -1}))
    with pytest.raises(ConfigError, match=r"bad\.json: seed: -1 is not valid; a whole number of at least 0 is needed"):
        load(path)


def test_what_a_model_cannot_take_is_refused_with_the_file_and_the_kind() -> None:
    workload = made(kinds={"chat": {}, "calls": {"audio": {"seconds": 3}}})
    with pytest.raises(ConfigError, match=r"^desk\.json: kinds\.calls: qwen2\.5-vl-7b: takes no audio$"):
        workload.demands(preset("qwen2.5-vl-7b"), "desk.json")
    with pytest.raises(ConfigError, match=r"^good: kinds\.calls: qwen2\.5-vl-7b: takes no audio$"):
        workload.demands(preset("qwen2.5-vl-7b"))


def test_a_span_in_which_nothing_comes_is_refused() -> None:
    with pytest.raises(ConfigError, match="good: no request comes within 1e-09 s; a longer duration is needed"):
        demands(num_requests=None, duration="1 ns")


@pytest.mark.filterwarnings("error")
def test_requests_that_would_never_come_are_refused() -> None:
    never = "good: the requests would never come; a higher rate is needed"
    with pytest.raises(ConfigError, match=never):
        demands(arrivals={"process": "poisson", "rate": "1e-310 req/s"})
    with pytest.raises(ConfigError, match=never):
        demands(num_requests=None, phases=[{"num_requests": 3, "rate_factor": 1e-320}])


def test_a_rate_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"good: at 0 req/s: 0\.0 req/s is out of range; a finite number above 0"):
        made().at_rate(0)
    with pytest.raises(ConfigError, match="good: at 5 req/s: arrivals: requests that come all at once have no rate"):
        made(arrivals={"process": "all_at_once"}).at_rate(5)
    with pytest.raises(ConfigError, match="requests would come; at most 10000000 are possible"):
        made(num_requests=None, duration="1 min").at_rate(1e9)


def test_times_of_a_trace_with_other_requests(tmp_path: Path) -> None:
    trace = tmp_path / "burst.csv"
    trace.write_text("Timestamp,Model,Request tokens,Response tokens\n5,a,100,10\n6.5,a,200,20\n")
    path = tmp_path / "workload.json"
    path.write_text(json.dumps({"name": "t", "trace": {"format": "burstgpt", "path": "burst.csv"}}))
    assert load(path).demands(SimpleRows()) == [Demand(0.0, (), 100, 10), Demand(1.5, (), 200, 20)]
    own = {"name": "t", "kinds": {"a": {"text_tokens": 7}}, "trace": {"format": "burstgpt", "path": "burst.csv"}}
    path.write_text(json.dumps(own))
    assert load(path).demands(SimpleRows()) == [Demand(0.0, (), 7), Demand(1.5, (), 7)]
    assert [one.at_s for one in load(path).at_rate(10).demands(SimpleRows())] == pytest.approx([0, 0.2])


RATES = st.floats(0.1, 50).map(PerSecond)
PROCESSES = (
    st.builds(Poisson, rate=RATES)
    | st.builds(Gamma, rate=RATES, cv=st.floats(0.1, 4))
    | st.builds(Weibull, rate=RATES, shape=st.floats(0.3, 4))
    | st.builds(Uniform, rate=RATES)
    | st.just(AllAtOnce())
)
PERIODS = st.builds(Period, num_requests=st.integers(1, 50), rate_factor=st.floats(0.1, 10))


@settings(max_examples=50, deadline=None)
@given(process=PROCESSES, phases=st.lists(PERIODS, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_any_workload_is_read_back_and_gives_all_its_requests_in_order(
    process: Any, phases: list[Period], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kinds = {"text": Kind(), "pictures": Kind(images=Images(size="10x10"))}
    slo = Slo(tpot=Seconds(0.03))
    workload = Workload(name="any", arrivals=process, kinds=kinds, phases=phases, seed=seed, slo=slo)
    path = tmp_path_factory.getbasetemp() / "any.json"
    files.write(path, workload)
    assert load(path) == workload
    times = [one.at_s for one in workload.demands(SimpleRows())]
    assert len(times) == sum(phase.num_requests or 0 for phase in phases)
    assert times == sorted(times) and np.isfinite(times).all() and times[0] >= 0


def best_s(run: Callable[[], object], tries: int = 3) -> float:
    def once() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return min(once() for _ in range(tries))


def test_a_hundred_thousand_requests_take_seconds() -> None:
    """0.3 s on one core of 2022."""
    assert best_s(lambda: demands(num_requests=100_000)) < 3


def test_every_kind_is_drawn_from_its_own_numbers() -> None:
    """More requests of one kind do not change those of the others."""
    few = Counter(one.output_tokens for one in demands(kinds={"a": {"output_tokens": [1, 2, 3]}}))
    assert set(few) <= {1, 2, 3}
    other = {"b": {"weight": 0, "images": {"size": "10x10"}}}
    assert few == Counter(one.output_tokens for one in demands(kinds={"a": {"output_tokens": [1, 2, 3]}} | other))
