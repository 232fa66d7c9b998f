"""What arrives and waits is estimated as work, whatever moves where meanwhile."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.builders import make_table
from tests.planning.loads import make_load, make_observation
from triptych.core import Stage
from triptych.planning.estimator import LEAST_SAMPLES, Estimate, Estimator, Observation
from triptych.router.pressure import Pressure


def play(*observations: object) -> Estimate:
    estimator = Estimator(64)
    return [estimator.observe(seen) for seen in observations][-1]


def test_a_steady_flow_is_found_exactly_and_without_noise():
    """40 rows a second at 0.01 s each keep 0.4 instances busy."""
    estimate = play(*(make_observation(t, make_load("e0", Stage.ENCODE, done=40.0 * t)) for t in range(20)))
    encode = estimate.stages[Stage.ENCODE]
    assert encode.demand == pytest.approx(0.4)
    assert encode.noise == pytest.approx(0.0, abs=1e-6)
    assert estimate.stages[Stage.PREFILL].demand == 0.0


def test_what_is_queued_counts_as_arrived_before_it_is_done():
    estimate = play(
        *(make_observation(t, make_load("e0", Stage.ENCODE, done=10.0 * t, queued=30.0 * t)) for t in range(20))
    )
    assert estimate.stages[Stage.ENCODE].demand == pytest.approx(0.4)
    assert estimate.stages[Stage.ENCODE].held_s == pytest.approx(0.01 * 30 * 19)


def test_work_that_goes_from_the_frontend_to_an_instance_arrives_once():
    waiting = [make_observation(t, make_load("e0", Stage.ENCODE), queued_s={Stage.ENCODE: 1.0 * t}) for t in range(5)]
    moved = [make_observation(t, make_load("e0", Stage.ENCODE, queued=100.0 * t)) for t in range(5, 10)]
    estimate = play(*waiting, *moved)
    assert estimate.stages[Stage.ENCODE].demand == pytest.approx(1.0)


def test_an_answer_is_work_for_decode_from_when_it_is_asked_for_and_arrives_once():
    """A hundred tokens are asked for each second; all are on their way for five seconds, and then with decode."""
    table, observations = make_table(d0="d"), []
    for t in range(10):
        ahead_s, queued = (1.0 * t, 0.0) if t < 5 else (0.0, 100.0 * t)
        load = make_load("d0", Stage.DECODE, queued=queued, done=64.0, num_steps=1.0)
        pressure = Pressure(dict.fromkeys(Stage, 0.0), ahead_s, {}, {}, None, None, None, None)
        observations.append(Observation.of(t, table, {load.instance: load}, pressure))
    assert play(*observations[:5]).stages[Stage.DECODE].demand == pytest.approx(1.0)
    assert play(*observations[:5]).stages[Stage.DECODE].queued_s == pytest.approx(4.0)
    assert play(*observations).stages[Stage.DECODE].demand == pytest.approx(1.0)
    assert play(*observations).stages[Stage.DECODE].queued_s == 0.0


def test_a_faster_instance_makes_the_same_tokens_less_work_and_nothing_arrives_by_that():
    slow = [make_observation(t, make_load("p0", Stage.PREFILL, queued=1000.0, pace_s=0.01)) for t in range(10)]
    fast = [make_observation(t, make_load("p0", Stage.PREFILL, queued=1000.0, pace_s=0.005)) for t in range(10, 20)]
    prefill = play(*slow, *fast).stages[Stage.PREFILL]
    assert prefill.held_s == pytest.approx(5.0)
    assert prefill.demand == pytest.approx(0.0, abs=1e-6)


def test_an_instance_that_starts_anew_counts_from_nothing():
    before = [make_observation(t, make_load("e0", Stage.ENCODE, done=1000.0 * t)) for t in range(3)]
    after = [make_observation(t, make_load("e0", Stage.ENCODE, done=0.0, epoch="2")) for t in range(3, 60)]
    assert play(*before, *after).stages[Stage.ENCODE].demand == pytest.approx(0.0, abs=0.2)


def test_noise_is_that_of_the_arrivals():
    """Poisson arrivals of 50 rows, 2 a second, seen through a mean of 12 s: sqrt(2 * 50^2 / 24 s) rows a second."""
    rng, done, estimator, estimates = random.Random(1), 0.0, Estimator(64), []
    for t in range(2000):
        estimates.append(estimator.observe(make_observation(t, make_load("e0", Stage.ENCODE, done=done))))
        done += 50.0 * sum(1 for _ in iter(lambda: rng.random() < 2 / 3, False))  # geometric, mean 2, variance 6
    demands = [estimate.stages[Stage.ENCODE].demand for estimate in estimates[100:]]
    noises = [estimate.stages[Stage.ENCODE].noise for estimate in estimates[100:]]
    mean = sum(demands) / len(demands)
    spread = math.sqrt(sum((demand - mean) ** 2 for demand in demands) / len(demands))
    assert mean == pytest.approx(1.0, rel=0.1)
    assert sum(noises) / len(noises) == pytest.approx(spread, rel=0.25)


def test_nothing_is_settled_before_enough_was_seen():
    assert not play(*(make_observation(t) for t in range(LEAST_SAMPLES))).is_settled
    assert play(*(make_observation(t) for t in range(LEAST_SAMPLES + 1))).is_settled


def test_a_new_slab_is_no_new_start():
    before = [make_observation(t, make_load("e0", Stage.ENCODE, done=1000.0 * t)) for t in range(3)]
    after = [make_observation(t, make_load("e0", Stage.ENCODE, done=2000.0, epoch="1.2")) for t in range(3, 60)]
    assert play(*before, *after).stages[Stage.ENCODE].demand < 0.5


def test_books_that_begin_anew_with_a_role_are_no_new_start():
    """Totals of pools and stages go back to 0 with every role, what was computed does not."""
    load = make_load("e0", Stage.ENCODE, done=2000.0)
    hits = [replace(load, counters=load.counters | {"embedding_hits": count}) for count in (50.0, 0.0)]
    estimate = play(*(make_observation(t, hits[t > 10]) for t in range(30)))
    assert estimate.stages[Stage.ENCODE].demand == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None)
@given(step_s=st.floats(0.001, 0.1), sequence_s=st.floats(0.0001, 0.01), batches=st.lists(st.integers(1, 60)))
def test_what_a_decode_step_costs_is_learned_from_different_batches(step_s, sequence_s, batches):
    estimator, tokens, busy_s, steps = Estimator(64), 0.0, 0.0, 0.0
    for t, batch in enumerate([2, 40, *batches]):
        tokens, busy_s, steps = tokens + 10 * batch, busy_s + 10 * (step_s + batch * sequence_s), steps + 10
        load = make_load("d0", Stage.DECODE, done=tokens, num_steps=steps)
        load.counters["decode_busy_s"] = busy_s
        estimate = estimator.observe(make_observation(t, load))
    assert estimate.decode_sequence_s == pytest.approx(sequence_s, rel=0.1)
    assert estimate.decode_step_s == pytest.approx(step_s, rel=0.1, abs=0.1 * 60 * sequence_s)


def test_equal_batches_say_nothing_about_the_cost_of_a_sequence():
    loads = [make_load("d0", Stage.DECODE, done=8.0 * t, num_steps=float(t)) for t in range(20)]
    estimate = play(*(make_observation(t, load) for t, load in enumerate(loads)))
    assert estimate.decode_sequence_s == pytest.approx(0.0, abs=1e-9)
    assert estimate.decode_step_s == pytest.approx(0.08)


def test_a_full_pool_bounds_the_batch_and_so_makes_tokens_dearer():
    """8 sequences fill 80 of 100 blocks: 10 would fill the pool, and each pays a tenth of a step's fixed part."""
    loads = [make_load("d0", Stage.DECODE, done=8.0 * t, num_steps=float(t), running=8, used=80) for t in range(20)]
    estimate = play(*(make_observation(t, load) for t, load in enumerate(loads)))
    assert estimate.memory_pressure == pytest.approx(0.8)
    assert estimate.full_batch == pytest.approx(10.0)
    assert estimate.stages[Stage.DECODE].demand == pytest.approx(8.0 * 0.08 / 10)


def test_a_pool_that_is_almost_empty_says_nothing_about_the_batch():
    load = make_load("d0", Stage.DECODE, done=8.0, num_steps=1.0, running=1, used=2)
    assert play(make_observation(0.0, load)).full_batch == 64.0


def test_a_report_from_an_earlier_role_is_not_counted_for_the_new_one():
    load = make_load("i0", Stage.ENCODE, queued=1000.0)
    seen = make_observation(1.0, load)
    seen.roles[load.instance] = make_observation(0.0, make_load("i0", Stage.DECODE)).roles[load.instance]
    assert play(seen).stages[Stage.ENCODE].backlog_s == 0.0


numbers = st.floats(0.0, 1e6)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(Stage)), numbers, numbers, st.floats(1e-6, 1.0), st.sampled_from("ab")),
        max_size=20,
    )
)
def test_whatever_is_reported_the_estimate_is_finite_and_not_negative(reports):
    estimator = Estimator(64)
    for t, (stage, queued, done, pace_s, epoch) in enumerate(reports):
        load = make_load("i0", stage, queued=queued, done=done, pace_s=pace_s, epoch=epoch, num_steps=done / 3)
        estimate = estimator.observe(make_observation(float(t), load))
        for of in estimate.stages.values():
            assert all(math.isfinite(x) and x >= 0.0 for x in (of.demand, of.noise, of.backlog_s))
        assert 0.0 < estimate.full_batch <= 64.0
