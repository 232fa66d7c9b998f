"""Roles follow a load that shifts, and leave a steady one alone."""

import random
from dataclasses import replace

import pytest

from triptych.core import Placement, Role
from triptych.planning.costs.reference import PAPER_COSTS, PICTURE_4K, paper_shifting_load
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation.adaptation import Adaptation
from triptych.planning.simulation.frontend import Record
from triptych.planning.simulation.simulator import Simulation
from triptych.planning.workloads.demand import Phase, poisson

QUICK = Sizes(heartbeat_s=1.0)


def mean_latency_s(records: list[Record]) -> float:
    return sum(record.latency_s for record in records) / len(records)


@pytest.mark.parametrize("seed", range(4))
def test_the_shifting_load_of_the_paper_is_served_twice_as_fast(seed):
    """Table 6 of the paper: 61.10 s static, 28.01 s with role switches; from 5E1P2D to 2E1P5D."""
    asked = paper_shifting_load(seed)
    static = mean_latency_s(Simulation(Placement.parse("5e1p2d"), PAPER_COSTS).run(asked))
    simulation = Simulation(Placement.parse("5e1p2d"), PAPER_COSTS)
    adaptation = Adaptation(simulation)
    adaptive = mean_latency_s(simulation.run(asked))
    assert static == pytest.approx(61.1, rel=0.1)
    assert static / adaptive > 1.7
    assert {(decision.switch.before, decision.switch.after) for decision in adaptation.switches} == {(Role.E, Role.D)}


@pytest.mark.parametrize("seed", range(8))
def test_a_shift_is_followed_in_seconds_by_the_first_switch_and_soon_by_all(seed):
    asked = paper_shifting_load(seed)
    shift_s = next(demand.at_s for demand in asked if demand.output_tokens == 500)
    simulation = Simulation(Placement.parse("5e1p2d"), PAPER_COSTS)
    adaptation = Adaptation(simulation)
    simulation.run(asked)
    first, _, third = [decision.at_s - shift_s for decision in adaptation.switches]
    assert first < 9.0
    assert third < 30.0


@pytest.mark.parametrize(
    ("placement", "rate", "output_tokens"),
    [
        ("5e1p2d", 0.3, 50),  # hardly anything to do
        ("5e1p2d", 3.0, 50),  # the first phase of the paper's load, for ever
        ("2e1p5d", 2.6, 300),  # encoders 88%, decode 50%
        ("1e1p1d", 1.2, 100),  # encoders 82%, and nobody to spare
        ("2e1p2d", 2.5, 50),  # encoders 85%
        ("4e1p3d", 5.0, 100),  # encoders 85%, decode 53%
        ("5e1p1d", 3.2, 80),  # decode 87%
        ("2e2pd", 2.5, 90),
        ("4epd", 2.5, 90),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_steady_load_never_switches(placement, rate, output_tokens, seed):
    asked = poisson([Phase(int(100 * rate), output_tokens, (PICTURE_4K,))], rate, seed)
    simulation = Simulation(Placement.parse(placement), PAPER_COSTS, QUICK)
    adaptation = Adaptation(simulation)
    simulation.run(asked)
    assert [decision.line() for decision in adaptation.switches] == []


@pytest.mark.parametrize(("placement", "rate", "usual_tokens"), [("5e1p2d", 3.0, 100), ("2e1p5d", 2.6, 200)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_steady_load_of_answers_of_every_length_never_switches(placement, rate, usual_tokens, seed):
    """A few of them are many times as long as most: that several come in a row is no shift."""
    rng = random.Random(seed)
    asked = [
        replace(demand, output_tokens=2 + int(rng.expovariate(1 / usual_tokens)))
        for demand in poisson([Phase(int(200 * rate), usual_tokens, (PICTURE_4K,))], rate, seed)
    ]
    simulation = Simulation(Placement.parse(placement), PAPER_COSTS, QUICK)
    adaptation = Adaptation(simulation)
    simulation.run(asked)
    assert [decision.line() for decision in adaptation.switches] == []


def test_a_placement_that_does_not_suit_a_steady_load_is_changed_until_it_does_and_then_left_alone():
    asked = poisson([Phase(600, 50, (PICTURE_4K,))], rate=3.0, seed=1)
    simulation = Simulation(Placement.parse("1e1p6d"), PAPER_COSTS, QUICK)
    adaptation = Adaptation(simulation)
    simulation.run(asked)
    assert [decision.switch.after for decision in adaptation.switches] == [Role.E] * len(adaptation.switches)
    assert 1 <= len(adaptation.switches) <= 3
    assert adaptation.switches[-1].at_s < 60.0


def test_roles_follow_a_load_that_goes_back_and_forth():
    """Two minutes of pictures with short answers, two of long answers to text, and again."""
    pictures, talk = Phase(240, 20, (PICTURE_4K,) * 3), Phase(240, 400)
    asked = poisson([pictures, talk, pictures], rate=2.0, seed=1)
    static, adaptive = (Simulation(Placement.parse("6e1p1d"), PAPER_COSTS, QUICK) for _ in range(2))
    adaptation = Adaptation(adaptive)
    assert mean_latency_s(static.run(asked)) > 3 * mean_latency_s(adaptive.run(asked))
    moves = {(decision.switch.before, decision.switch.after) for decision in adaptation.switches}
    assert (Role.E, Role.D) in moves and (Role.D, Role.E) in moves
    assert len(adaptation.switches) < 12


def test_decode_without_memory_is_helped_although_its_steps_are_short():
    """Room for four sequences each: most of a step is its fixed part, and sequences wait for blocks."""
    few_blocks = Sizes(num_kv_blocks=4 * 75, heartbeat_s=1.0)
    asked = poisson([Phase(150, 450, (PICTURE_4K,))], rate=1.0, seed=1)
    static, adaptive = (Simulation(Placement.parse("4e1p2d"), PAPER_COSTS, few_blocks) for _ in range(2))
    adaptation = Adaptation(adaptive)
    assert mean_latency_s(static.run(asked)) > 1.3 * mean_latency_s(adaptive.run(asked))
    assert {decision.switch.after for decision in adaptation.switches} == {Role.D}
