"""Loads on a real server: what they took stands by the right instance, and the requests are those it got."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

import pytest

from tests.planning.test_profile import make_profile
from triptych.bench.cpu import CpuMeter
from triptych.bench.live_costs import Pictures, asked, demands_of
from triptych.bench.report import Record
from triptych.bench.serving import Ask, LiveServer, server
from triptych.core import Placement
from triptych.errors import InstanceError
from triptych.planning.costs.profile import Profile, StageCosts
from triptych.planning.costs.reference import BUILT_IN_COSTS
from triptych.planning.quantities import Seconds
from triptych.planning.simulation.calibration import calibrate
from triptych.planning.simulation.simulator import Simulation

PLACEMENT = Placement.parse("1e1p1d")
PICTURES = Pictures({448: (16,)}, lead_tokens=8)


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with server(["--placement", str(PLACEMENT), "--threads", "1"]) as (url, pid):
        yield LiveServer(url, pid)


@pytest.fixture
def profile() -> Profile:
    return make_profile(cores=2, decode_step=Seconds(0.002), prefill_step=Seconds(0.01), encode_step=Seconds(0.02))


def test_the_work_of_each_stage_stands_by_its_instance(live: LiveServer, profile: Profile) -> None:
    text = asked(live, PLACEMENT, profile, PICTURES, Ask(40, 24), 0.3, seconds=0.5)
    pictures = asked(live, PLACEMENT, profile, PICTURES, Ask(40, 2, images=2, side=448), 0.3, seconds=0.5)
    assert text is not None and pictures is not None
    e, p, d = text.instances
    assert e["encode_cpu_s"] == e["prefill_cpu_s"] == p["encode_cpu_s"] == p["decode_cpu_s"] == d["prefill_cpu_s"] == 0
    assert d["decode_cpu_s"] > p["prefill_cpu_s"] > p["other_cpu_s"] > e["other_cpu_s"] > 0
    assert d["decode_tokens"] == 23 * len(text.demands) >= d["decode_steps"] > 0
    e, p, d = pictures.instances
    assert e["encode_cpu_s"] > d["decode_cpu_s"] < p["prefill_cpu_s"]
    assert min(text.server_s, text.client_s) > 0


def test_the_demands_are_the_requests_that_the_server_got(live: LiveServer, profile: Profile) -> None:
    found = asked(live, PLACEMENT, profile, PICTURES, Ask(40, 3, images=2, side=448), 0.3, seconds=0.5)
    assert found is not None
    assert len(found.demands) >= 12
    assert {len(demand.media) for demand in found.demands} == {2}
    assert {demand.output_tokens for demand in found.demands} == {3}
    assert all(demand.media_rows == 32 and demand.text_tokens > 40 for demand in found.demands)
    times = [demand.at_s for demand in found.demands]
    assert times == sorted(times)


def loaded(live: LiveServer, ask: Ask) -> tuple[Sequence[Record], float]:
    """The requests of a load, and how many cores were busy with something else meanwhile."""
    meter, began_s = CpuMeter(live.pid), time.perf_counter()
    served = live.serve(ask, rate=10.0, requests=18).requests
    _, _, foreign_s = meter.read()
    return served, (foreign_s or 0.0) / (time.perf_counter() - began_s)


def ttft_s(served: Sequence[Record]) -> float:
    return median(record.ttft_s or 0.0 for record in served)


def test_the_simulator_foretells_a_load_that_it_was_not_calibrated_with(live: LiveServer) -> None:
    """A short form of benchmarks/truth.py. What else the machine does only makes a server slower: the fastest of three
    loads counts, the simulated machine has as much less of its cores, and bounds leave room for more."""
    names = [name for name in StageCosts.__struct_fields__ if name.startswith(("encode_", "prefill_", "decode_"))]
    guessed = make_profile(cores=2, **{name: getattr(BUILT_IN_COSTS, name) for name in names})
    runs = [
        asked(live, PLACEMENT, guessed, PICTURES, ask, 0.3, seconds=1.5)
        for ask in (Ask(40, 24), Ask(300, 8), Ask(40, 8, images=2, side=448))
    ]
    found = calibrate(guessed.costs(), [run for run in runs if run is not None])
    ask = Ask(60, 16, images=1, side=448)
    served, num_foreign = min((loaded(live, ask) for _ in range(3)), key=lambda load: ttft_s(load[0]))
    costs = replace(found.costs, cores=max(0.2, found.costs.cores - num_foreign))
    simulated = Simulation(PLACEMENT, costs, guessed.as_served(PLACEMENT)).run(demands_of(served, ask, PICTURES))
    live_ttft_s = ttft_s(served)
    live_tpot_s = median(record.tpot_s or 0.0 for record in served)
    assert 0.4 < median(record.ttft_s for record in simulated) / live_ttft_s < 2.5
    assert 0.4 < median(record.tpot_s or 0.0 for record in simulated) / live_tpot_s < 2.5


def test_what_would_take_too_long_is_left_out(live: LiveServer) -> None:
    slow = make_profile(cores=2, prefill_step=Seconds(30.0))
    assert asked(live, PLACEMENT, slow, None, Ask(40, 4), 0.3, seconds=0.5) is None


def test_a_server_that_does_not_start_is_told() -> None:
    with pytest.raises(InstanceError, match="did not start"), server(["--placement", "nonsense"]):
        pass
