"""What an instance and the server do beside steps takes time on simulated machines too."""

from dataclasses import replace

import pytest

from triptych.core import Placement
from triptych.planning.costs.cost_model import Costs
from triptych.planning.simulation.frontend import Record
from triptych.planning.simulation.simulator import Simulation
from triptych.planning.workloads.demand import Demand, Item

PLAIN = Costs(encode_step=0.02, prefill_step=0.01, decode_step=0.001, message=0.0, transfer=0.0, cores=16)
PICTURE = Item((16,))


def simulate(placement: str, costs: Costs, *demands: Demand) -> list[Record]:
    return Simulation(Placement.parse(placement), costs).run(demands)


def test_a_step_after_a_rest_takes_longer_and_the_next_one_does_not() -> None:
    costs = replace(PLAIN, wake=0.005)
    first, second, rested = simulate(
        "1epd", costs, Demand(0.0, output_tokens=1), Demand(0.001, output_tokens=1), Demand(1.0, output_tokens=1)
    )
    assert first.ttft_s == pytest.approx(0.015)
    assert second.ttft_s == pytest.approx(0.014 + 0.010)
    assert rested.ttft_s == pytest.approx(0.015)


def test_messages_that_bring_no_step_take_time() -> None:
    """P hears that the picture is encoded, and orders the pull only then."""
    demand = Demand(0.0, (PICTURE,), output_tokens=1)
    (without,), (with_turns,) = (simulate("1e1pd", replace(PLAIN, turn=turn), demand) for turn in (0.0, 0.003))
    assert without.ttft_s == pytest.approx(0.03)
    assert 0.033 <= with_turns.ttft_s <= 0.03 + 3 * 0.003 + 1e-9


def test_what_a_step_sampled_costs_the_server_once_however_many_tokens_it_brings() -> None:
    costs = replace(PLAIN, server_step=0.004, server_token=0.001)
    (alone,) = simulate("1epd", costs, Demand(0.0, output_tokens=1))
    together = simulate("1epd", costs, Demand(0.0, output_tokens=1), Demand(0.0, output_tokens=1))
    assert alone.ttft_s == pytest.approx(0.015)
    assert [record.ttft_s for record in together] == [pytest.approx(0.016)] * 2
