"""The simulated server beside instances that have devices of their own: one process on one core."""

from dataclasses import replace

import pytest

from triptych.core import Placement
from triptych.planning.costs.cost_model import Costs
from triptych.planning.simulation.simulator import Simulation
from triptych.planning.workloads.demand import Demand, Item

COSTS = Costs(encode_unit=0.1, prefill_step=0.01, decode_step=0.01, message=0.0)
PICTURE = Item((16,), nbytes=1000)


def played(costs: Costs, demands: list[Demand], placement: str = "1e1p2d") -> Simulation:
    simulation = Simulation(Placement.parse(placement), costs)
    simulation.run(demands)
    return simulation


def ttfts(costs: Costs, demands: list[Demand], placement: str = "1e1p2d") -> list[float]:
    return [record.ttft_s for record in played(costs, demands, placement).records]


def test_requests_are_taken_one_after_the_other() -> None:
    demands, placement = [Demand(0.0), Demand(0.0)], "1e2p2d"
    free, busy = (ttfts(costs, demands, placement) for costs in (COSTS, replace(COSTS, server_request=0.004)))
    assert busy == pytest.approx([free[0] + 0.004, free[1] + 0.008])


def test_what_comes_back_waits_behind_what_came_in_before() -> None:
    found = ttfts(replace(COSTS, server_request=2.0), [Demand(0.0), Demand(0.0)])
    assert found == pytest.approx([4.0, 4.0 + COSTS.prefill_step])


def test_bytes_of_media_are_read_by_the_server() -> None:
    demands = [Demand(0.0, (PICTURE, PICTURE))]
    assert ttfts(replace(COSTS, server_media_byte=1e-3), demands)[0] == pytest.approx(ttfts(COSTS, demands)[0] + 2.0)


def test_a_request_costs_more_where_there_are_more_instances() -> None:
    costs = replace(COSTS, server_peer=0.1)
    few, many = (ttfts(costs, [Demand(0.0)], placement)[0] for placement in ("1e1p1d", "4e1p5d"))
    assert many == pytest.approx(few + 0.7)


def test_tokens_wait_for_a_server_that_is_slower_than_the_instances() -> None:
    simulation = played(replace(COSTS, server_token=0.05), [Demand(0.0, output_tokens=101)])
    assert simulation.records[0].tpot_s == pytest.approx(0.05)
    assert simulation.server_host is not None
    assert simulation.server_host.busy_s == pytest.approx(101 * 0.05)


def test_every_token_of_a_step_costs_the_server() -> None:
    demands = [Demand(0.0, output_tokens=50) for _ in range(4)]
    simulation = played(replace(COSTS, server_token=1e-4), demands)
    assert simulation.server_host is not None
    assert simulation.server_host.busy_s == pytest.approx(4 * 50 * 1e-4)


def test_what_instances_report_costs_the_server() -> None:
    simulation = played(replace(COSTS, server_report=1e-3), [Demand(0.0, output_tokens=201)])
    assert simulation.server_host is not None
    assert simulation.server_host.busy_s >= 2.0 / 0.25 * 1e-3


def test_a_server_that_costs_nothing_is_no_process() -> None:
    assert played(COSTS, [Demand(0.0)]).server_host is None


def test_instances_are_not_slowed_by_a_busy_server() -> None:
    """The first picture is encoded while the server reads the third request."""
    simulation = played(replace(COSTS, server_request=1.0), [Demand(0.0, (PICTURE,)) for _ in range(3)])
    assert [record.ttft_s for record in simulation.records] == pytest.approx(
        [3.0, 3.0, 3.0 + 0.1 + COSTS.transfer + 0.01]
    )
