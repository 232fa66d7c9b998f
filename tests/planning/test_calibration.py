"""A live server stands here as a simulation with other costs: what its processes took must give these costs away."""

import random
from dataclasses import replace
from typing import Any

import pytest

from triptych.core import Placement, Role, Stage
from triptych.planning.costs.cost_model import STAGES, Costs
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation.calibration import PARTS, SERVER, LiveRun, calibrate, capacity
from triptych.planning.simulation.instance import SimulatedInstance
from triptych.planning.simulation.simulator import Simulation
from triptych.planning.workloads.demand import Demand, Item, Phase, poisson

ALONE = Costs(
    encode_step=0.002,
    encode_item=0.002,
    encode_pixel=9e-9,
    prefill_step=0.002,
    prefill_token=2e-5,
    prefill_pair=5e-8,
    decode_step=0.0013,
    decode_sequence=5e-5,
    decode_context=7e-7,
    turn=3e-5,
    encode_crowding=0.05,
    decode_crowding=0.2,
    message=5e-5,
    cores=2.0,
)
LIVE = replace(
    ALONE,
    **{name: getattr(ALONE, name) * 0.9 for name in PARTS["encode"]},
    **{name: getattr(ALONE, name) * 1.3 for name in STAGES["prefill"]},
    **{name: getattr(ALONE, name) * 1.1 for name in STAGES["decode"]},
    turn=2.5e-4,
    wake=8e-4,
    server_request=1e-3,
    server_prompt_token=3e-6,
    server_item=2e-4,
    server_media_byte=8e-9,
    server_step=6e-5,
    server_token=1.5e-5,
    server_report=2e-4,
    client_request=3e-4,
    client_token=1e-5,
)
HEARTBEATS = 1e-3  # CPU seconds of a second, in every instance
SIZES = dict.fromkeys(Role, Sizes(prefix_caching=True))
KINDS = [
    Phase(40, 24, text_tokens=60),
    Phase(30, 8, text_tokens=500),
    Phase(30, 48, text_tokens=200),
    Phase(30, 16, (Item((16,), 448 * 448, 30_000),) * 2, 60),
    Phase(30, 4, (Item((16,), 1120 * 1120, 190_000),), 60),
]


def live(placement: str, kind: Phase, seed: int, noise: float = 0.0, load: float = 0.3) -> LiveRun:
    rng = random.Random(seed)
    parsed, template = Placement.parse(placement), Demand(0.0, kind.media, kind.text_tokens, kind.output_tokens)
    demands = poisson([kind], load * capacity(LIVE, SIZES, parsed, template), seed)
    simulation = Simulation(parsed, LIVE, SIZES)
    simulation.run(demands)

    def measured(seconds: float) -> float:
        return seconds * rng.uniform(1 - noise, 1 + noise)

    def counted(instance: SimulatedInstance) -> dict[str, float]:
        work = instance.work
        seconds = {stage.name.lower(): work.steps_s[stage] + work.wakes[stage] * LIVE.wake for stage in Stage}
        seconds["other"] = work.turns * LIVE.turn + demands[-1].at_s * HEARTBEATS
        spent = {f"{what}_cpu_s": measured(of_one) for what, of_one in seconds.items()}
        return spent | instance.pace.counters

    heard = simulation.frontend.heard
    server_s = sum(LIVE.server_request_s(demand, 0) for demand in demands)
    server_s += heard.steps * LIVE.server_step + heard.tokens * LIVE.server_token + heard.reports * LIVE.server_report
    return LiveRun(
        parsed,
        SIZES,
        demands,
        [counted(instance) for instance in simulation.instances.values()],
        measured(server_s),
        measured(sum(LIVE.client_request + demand.output_tokens * LIVE.client_token for demand in demands)),
    )


def runs(noise: float) -> list[LiveRun]:
    return [live(placement, kind, 7, noise) for placement in ("1epd", "1e1p1d") for kind in KINDS]


def test_costs_are_found_again_from_what_the_processes_took() -> None:
    found = calibrate(ALONE, runs(noise=0.0))
    assert found.scales == {
        "encode": pytest.approx(0.9, rel=0.03),
        "pixels": pytest.approx(1.0, rel=0.03),
        "prefill": pytest.approx(1.3, rel=0.03),
        "decode": pytest.approx(1.1, rel=0.03),
    }
    for name in ("turn", "wake", "client_request", "client_token", *(f"server_{name}" for name in SERVER)):
        assert getattr(found.costs, name) == pytest.approx(getattr(LIVE, name), rel=0.3), name
    assert all(residual.median < 0.01 for residual in found.residuals.values())
    assert found.residuals["steps"].worst < 0.02


def test_what_was_measured_badly_is_found_roughly_and_the_residuals_say_so() -> None:
    found = calibrate(ALONE, runs(noise=0.1))
    for part, scale in {"encode": 0.9, "pixels": 1.0, "prefill": 1.3, "decode": 1.1}.items():
        assert found.scales[part] == pytest.approx(scale, rel=0.15)
    assert 0.02 < found.residuals["steps"].worst < 0.2


def test_a_step_is_told_from_a_load_under_which_slower_steps_are_fewer() -> None:
    """With many sequences at once, all that a load takes hardly changes with what a step does."""
    kinds = [Phase(60, 48, text_tokens=20), Phase(100, 24, text_tokens=20)]
    scales = calibrate(ALONE, [live("1e1p1d", kind, 0, noise=0.03, load=0.8) for kind in kinds]).scales
    assert scales["prefill"] == pytest.approx(1.3, rel=0.05)
    assert scales["decode"] == pytest.approx(1.1, rel=0.05)


def test_pictures_of_one_size_leave_one_scale_for_reading_and_encoding() -> None:
    """What is told is what steps with such pictures take altogether."""
    one_size = [live(placement, KINDS[4], seed, noise=0.05) for placement in ("1epd", "1e1p1d") for seed in range(3)]
    found = calibrate(ALONE, one_size)
    item = KINDS[4].media[0]

    def seconds(costs: Costs) -> float:
        return costs.encode_step + costs.encode_item + item.pixels * costs.encode_pixel

    assert seconds(found.costs) == pytest.approx(seconds(LIVE), rel=0.1)
    assert 0.5 <= found.scales["encode"] / found.scales["pixels"] <= 2


def test_steps_keep_their_costs_where_the_cpu_says_nothing_of_them() -> None:
    found = calibrate(ALONE, runs(noise=0.0), steps=False)
    assert replace(found.costs, **_serving(ALONE)) == ALONE
    assert found.costs.server_request > 0


def test_a_stage_that_no_run_had_keeps_its_costs() -> None:
    found = calibrate(ALONE, [live(placement, KINDS[0], 3) for placement in ("1epd", "1e1p1d")])
    assert found.scales["encode"] == found.scales["pixels"] == 1.0


def _serving(costs: Costs) -> dict[str, Any]:
    names = [name for name in costs.__slots__ if name.startswith(("server_", "client_"))]
    return {name: getattr(costs, name) for name in names}
