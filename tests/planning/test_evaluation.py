"""What a candidate is worth: rates are searched, runs end early, and what does not fit is told with the reason."""

import pickle

import pytest

from tests.planning.places import COSTS, make_candidate, make_evaluator, make_load
from triptych.planning.costs.sizes import Sizes
from triptych.planning.search.goals import HighestRate, LeastCost
from triptych.planning.search.machines import FixedMachines
from triptych.planning.simulation.figures import meets

SPLIT = make_candidate("2e1p1d")
QUICK = make_load(30, answer=3)


def test_a_load_at_another_rate_has_the_same_requests_closer_together():
    load = make_load(50)
    faster = load.at(4.0)
    assert [demand.at_s for demand in faster] == pytest.approx([demand.at_s / 4 for demand in load.demands])
    assert [demand.media for demand in faster] == [demand.media for demand in load.demands]
    assert [demand.at_s for demand in load.apart(3.0)][:3] == [0.0, 3.0, 6.0]
    assert load.short.demands == load.demands
    assert len(make_load(800).short.demands) == 100


def test_the_goodput_attains_and_what_is_above_it_does_not():
    evaluator = make_evaluator(QUICK)
    rate = evaluator.kept_rate(SPLIT)
    assert evaluator.attains(SPLIT, rate)
    assert not evaluator.attains(SPLIT, rate * 1.01)
    assert rate < evaluator.bound(SPLIT)


def test_a_rate_at_which_queues_grow_is_not_kept_because_the_first_half_was_served_in_time():
    """The later half of 400 requests misses an objective that all together just meet."""
    load = make_load(400, answer=3)
    evaluator = make_evaluator(load, ttft_ms=60_000.0, tpot_ms=None)
    rate = evaluator.kept_rate(SPLIT)
    rates = [rate * times for times in (1.02, 1.05, 1.1, 1.2, 1.4)]
    hidden = [rate for rate in rates if evaluator.figures(SPLIT, rate).slo_attainment >= 0.9]
    assert hidden and not any(evaluator.attains(SPLIT, rate) for rate in hidden)


def test_where_the_search_begins_changes_little():
    evaluator = make_evaluator(QUICK)
    rate = evaluator.kept_rate(SPLIT)
    assert evaluator.kept_rate(SPLIT, guess=0.3 * rate) == pytest.approx(rate, rel=0.02)
    assert evaluator.kept_rate(SPLIT, least=0.5 * rate) == pytest.approx(rate, rel=0.02)
    assert evaluator.kept_rate(SPLIT, most=0.5 * rate) == 0.5 * rate
    assert evaluator.kept_rate(SPLIT, least=1.1 * rate) == 0.0


@pytest.mark.parametrize("rate", [0.1, 1.0, 1.5, 2.0, 3.0, 20.0])
@pytest.mark.parametrize("placement", ["2e1p1d", "2epd"])
def test_a_run_that_ends_early_decides_as_the_whole_run_does(placement: str, rate: float):
    evaluator, candidate = make_evaluator(QUICK), make_candidate(placement)
    records = evaluator.run(candidate, rate).records
    share = sum(meets(record, evaluator.objectives) for record in records) / len(records)
    assert evaluator.attains(candidate, rate) == (share >= 0.9)


def test_what_cannot_be_kept_on_an_idle_server_is_worth_nothing():
    assert make_evaluator(QUICK, ttft_ms=100.0).kept_rate(SPLIT) == 0.0
    assert make_evaluator(QUICK, tpot_ms=5.0).kept_rate(SPLIT) == 0.0


def test_options_reach_the_simulation():
    evaluator = make_evaluator(QUICK)
    assert evaluator.kept_rate(make_candidate("2e1p1d", parallel_encode=False)) < evaluator.kept_rate(SPLIT)
    tight = make_evaluator(make_load(30, media=(), answer=100), ttft_ms=500.0)
    assert tight.kept_rate(make_candidate("1e1p1d", max_num_seqs=1)) < tight.kept_rate(make_candidate("1e1p1d"))


def test_costs_are_dollars_or_gpus():
    assert make_evaluator(price=2.0).cost(SPLIT) == 8.0
    assert make_evaluator(price=None).cost(make_candidate("2e1p1d", degrees=(1, 2, 2))) == 6.0


def test_an_evaluator_can_be_sent_to_another_process():
    evaluator = make_evaluator(QUICK)
    copy = pickle.loads(pickle.dumps(evaluator))
    assert copy == evaluator
    assert copy.kept_rate(SPLIT, short=True) == evaluator.kept_rate(SPLIT, short=True)


def test_goals_turn_goodput_and_cost_into_one_number():
    paper, least = HighestRate(beta=0.1), LeastCost(3.0)
    assert paper.score(5.0, 10.0) == 4.0
    assert paper.needed(4.0, 20.0) == 6.0
    assert paper.score(0.0, 1.0) < paper.score(0.1, 1000.0)
    assert least.score(3.0, 10.0) > least.score(4.0, 11.0) > least.score(2.9, 1.0) > least.score(2.0, 1.0)
    assert least.needed(-10.0, 9.0) == 3.0
    assert least.needed(-10.0, 10.0) == float("inf")
    assert least.needed(least.score(2.0, 1.0), 99.0) == pytest.approx(2.0)


def test_fixed_machines_take_the_bounds_of_the_candidate():
    machines = FixedMachines(COSTS, Sizes(num_kv_blocks=7))
    sizes = machines.sizes(make_candidate("2e1p1d", max_num_seqs=9))
    assert {size.max_num_seqs for size in sizes.values()} == {9}
    assert {size.num_kv_blocks for size in sizes.values()} == {7}
