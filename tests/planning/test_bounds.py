"""A bound is never below what a simulation reaches, and near it where one stage is the bottleneck."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.places import COSTS, make_candidate, make_evaluator, make_load
from triptych.latency import Objectives
from triptych.planning.costs.cost_model import Costs
from triptych.planning.search import bounds
from triptych.planning.workloads.demand import Demand, Item

PLACEMENTS = "1epd 2epd 1e1p1d 3e1p1d 2e1pd 1e2pd 2ep1d 1ed1p 1e1epd".split()


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(PLACEMENTS),
    st.sampled_from([(), (Item((30,)),), (Item((200, 100)), Item((50,)))]),
    st.integers(1, 60),
    st.sampled_from([300.0, 2000.0]),
    st.sampled_from([12.0, 40.0]),
    st.sampled_from([4, 64]),
)
def test_no_simulation_attains_what_is_above_the_bound(placement, media, answer, ttft_ms, tpot_ms, max_num_seqs):
    load = make_load(25, media=media, answer=answer)
    evaluator = make_evaluator(load, ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    candidate = make_candidate(placement, max_num_seqs=max_num_seqs)
    least = bounds.least_work(candidate, COSTS, load.demands, evaluator.objectives, evaluator.target)
    bound = bounds.highest_rate(candidate, least, load, evaluator.objectives)
    if not math.isinf(bound):
        assert not evaluator.attains(candidate, bound * 1.001)


def test_encoders_that_are_the_bottleneck_are_used_as_far_as_the_bound_says():
    evaluator = make_evaluator(make_load(150), ttft_ms=6000.0)
    candidate = make_candidate("2e2p1d")
    busy_s = 0.9 * 150 * 0.6 / 2 - 6.0
    assert evaluator.bound(candidate) == pytest.approx(evaluator.load.span_s / busy_s)
    assert evaluator.kept_rate(candidate) > 0.85 * evaluator.bound(candidate)


def test_the_bound_grows_with_what_serves_the_bottleneck_and_with_nothing_else():
    evaluator = make_evaluator()
    two, three = evaluator.bound(make_candidate("2e2p1d")), evaluator.bound(make_candidate("3e2p1d"))
    assert three == pytest.approx(1.5 * two, rel=0.05)
    assert evaluator.bound(make_candidate("2e2p3d")) == two


def test_work_is_what_a_lone_request_costs_in_full_steps():
    candidate = make_candidate("1e1p1d", max_num_seqs=10, max_num_batched_tokens=100)
    demand = Demand(0.0, (Item((200, 200), pixels=1000),), text_tokens=100, output_tokens=11)
    costs = Costs(
        encode_step=1.0, encode_item=0.5, encode_pixel=0.001, encode_unit=0.1, encode_row=0.01,
        prefill_step=1.0, prefill_token=0.1, prefill_pair=0.001, decode_step=1.0, decode_sequence=0.1,
        decode_context=0.001,
    )  # fmt: skip
    found = bounds.work(demand, candidate, costs, Objectives())
    assert found.encode_s == pytest.approx(2 * 200 / 1024 + 0.5 + 1.0 + 0.2 + 4.0)
    assert found.prefill_s == pytest.approx(50.0 + 0.001 * 500**2 / 2 + 5.0)
    assert found.decode_s == pytest.approx(10 * (0.1 + 0.1) + 0.001 * (10 * 500 + 45))


def test_a_pace_to_keep_bounds_the_batch():
    candidate = make_candidate("1e1p1d", max_num_seqs=1000)
    demand = Demand(0.0, text_tokens=1, output_tokens=2)
    costs = replace(COSTS, decode_context=0.0)
    found = bounds.work(demand, candidate, costs, Objectives(None, 30.0))  # 10 ms + 1 ms for each of 20
    assert found.decode_s == pytest.approx(0.01 / 20 + 0.001)


def test_media_that_caches_may_have_and_shared_beginnings_cost_nothing_here():
    candidate = make_candidate("1e1p1d")
    known = Demand(0.0, (Item((200,), name=7),), text_tokens=100, output_tokens=1, prefix=(1, 2))
    found = bounds.work(known, candidate, COSTS, Objectives())
    assert found.encode_s == 0.0
    assert found.prefill_s < 0.001
