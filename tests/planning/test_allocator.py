"""A switch is proposed where it is worth it, and never otherwise."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.loads import make_estimate, make_load, make_roles
from triptych.core import InstanceId, Role, Stage
from triptych.messages import Load
from triptych.planning.allocator import PURE, Allocator, Decision, Policy
from triptych.planning.estimator import Estimate, Observation

BUSY_DECODE = make_estimate({"e": 0.5, "p": 0.5, "d": 4.0})


def decide(
    estimate: Estimate,
    roles: dict[InstanceId, Role],
    at_s: float = 100.0,
    allocator: Allocator | None = None,
    loads: dict[InstanceId, Load] | None = None,
) -> Decision:
    return (allocator or Allocator()).decide(estimate, Observation(at_s, roles, loads or {}))


def test_an_instance_goes_from_where_there_is_little_to_where_there_is_too_much():
    decision = decide(BUSY_DECODE, make_roles(e=4, p=1, d=2))
    assert (decision.switch.before, decision.switch.after) == (Role.E, Role.D)
    assert decision.switch.now_s == pytest.approx(60.0)
    assert decision.switch.then_s == pytest.approx(40.0)
    assert decision.switch.gain_s == pytest.approx(20.0)
    assert decision.switch.cost_s == pytest.approx((0.5 + 0.7) / 3)  # drain and weights, of a third of decode


def test_a_placement_that_keeps_up_is_left_alone_however_uneven():
    decision = decide(make_estimate({"e": 0.01, "p": 0.01, "d": 1.9}), make_roles(e=5, p=1, d=2))
    assert decision.switch is None
    assert decision.reason == "keeps up within 30 s"


def test_a_backlog_that_clears_within_the_horizon_is_left_alone():
    estimate = make_estimate({"e": 0.5, "p": 0.5, "d": 0.2}, queued={"d": 20.0})
    assert decide(estimate, make_roles(e=4, p=1, d=1)).switch is None


def test_a_backlog_alone_is_reason_enough():
    estimate = make_estimate(queued={"p": 90.0})
    assert decide(estimate, make_roles(e=2, p=1, d=1)).switch.after is Role.P


def test_no_stage_loses_its_last_instance():
    decision = decide(make_estimate({"d": 9.0}), make_roles(e=1, p=1, d=1))
    assert decision.candidates == []
    assert decision.reason == "no instance can be spared"


def test_what_would_only_move_the_shortage_is_not_done():
    estimate = make_estimate({"e": 3.9, "p": 0.5, "d": 2.4})
    assert decide(estimate, make_roles(e=4, p=1, d=2)).switch is None


def test_noise_in_the_demand_is_no_reason():
    certain = make_estimate({"e": 0.5, "p": 0.5, "d": 2.6})
    noisy = make_estimate({"e": 0.5, "p": 0.5, "d": 2.6}, noise={"d": 0.3})
    assert decide(certain, make_roles(e=4, p=1, d=2)).switch is not None
    assert decide(noisy, make_roles(e=4, p=1, d=2)).switch is None


def test_who_may_need_its_instances_soon_keeps_them():
    roles = make_roles(e=3, p=1, d=2)
    spare = make_estimate({"e": 1.8, "p": 0.5, "d": 4.0})
    unsure = make_estimate({"e": 1.8, "p": 0.5, "d": 4.0}, noise={"e": 1.0})
    assert decide(spare, roles).switch.before is Role.E
    assert decide(unsure, roles).switch is None


def test_errors_of_both_sides_are_not_expected_together_at_their_largest():
    """Encoders might need 37.5 s then, or decode only 42 s now. Both would be too little gain, and are too unlikely."""
    estimate = make_estimate({"e": 1.4, "p": 0.1, "d": 4.0}, noise={"e": 0.55, "d": 0.6})
    switch = decide(estimate, make_roles(e=3, p=1, d=2)).switch
    assert switch is not None and (switch.now_s, switch.then_s) == pytest.approx((42.0, 28.0))


def test_errors_of_both_sides_that_are_smaller_together_than_either_could_be_count():
    roles, demand = make_roles(e=3, p=1, d=2), {"e": 1.6, "p": 0.1, "d": 4.0}
    assert decide(make_estimate(demand, noise={"e": 0.9}), roles).switch is not None
    assert decide(make_estimate(demand, noise={"d": 0.75}), roles).switch is not None
    assert decide(make_estimate(demand, noise={"e": 0.9, "d": 0.75}), roles).switch is None


def test_work_that_instances_have_already_gains_nothing_from_a_new_one():
    decision = decide(make_estimate(held={"d": 200.0}), make_roles(e=4, p=1, d=2))
    assert (decision.switch, decision.reason) == (None, "no switch would help")
    assert decide(make_estimate(queued={"d": 200.0}), make_roles(e=4, p=1, d=2)).switch is not None


def test_the_instance_with_least_to_give_up_goes():
    roles = make_roles(e=3, p=1, d=1)
    loads = {id: make_load(id, Stage.ENCODE, queued=n) for id, n in (("e0", 50.0), ("e1", 5.0), ("e2", 20.0))}
    assert decide(BUSY_DECODE, roles, loads=loads).switch.instance == "e1"


def test_a_hybrid_counts_for_each_of_its_stages_but_only_once():
    """Three `pd` do 1 of prefill and 4 of decode: 150 s of work by three."""
    estimate = make_estimate({"e": 0.5, "p": 1.0, "d": 4.0})
    assert decide(estimate, make_roles(e=2, pd=3)).clear_s == pytest.approx(50.0)
    assert decide(estimate, make_roles(ep=1, pd=1, ed=1)).clear_s == pytest.approx(60.0)  # two for 120 s of decode
    assert decide(estimate, make_roles(e=1, p=3, d=1)).clear_s == pytest.approx(120.0)


def test_an_instance_becomes_a_hybrid_only_where_the_placement_has_them():
    roles = make_roles(e=3, p=1, d=1)
    estimate = make_estimate({"e": 0.5, "p": 1.6, "d": 1.6})
    assert decide(estimate, roles).switch is None, "whoever it went to, the other would be as short as before"
    with_hybrids = Allocator(roles=PURE | {Role.PD})
    assert decide(estimate, roles, allocator=with_hybrids).switch.after is Role.PD


def test_after_a_switch_it_rests():
    allocator = Allocator(Policy(cool_down_s=3.0))
    roles = make_roles(e=4, p=1, d=2)
    made = decide(BUSY_DECODE, roles, allocator=allocator).switch
    allocator.switched(made, {"drain": 0.1, "weights": 0.5}, at_s=101.0)
    resting = decide(BUSY_DECODE, roles, 103.0, allocator)
    assert resting.switch is None and resting.reason.startswith("rests for 1.0 s more")
    assert decide(BUSY_DECODE, roles, 104.0, allocator).switch is not None


def test_after_a_failure_it_rests_for_longer():
    allocator = Allocator(Policy(failure_cool_down_s=10.0))
    allocator.failed(at_s=100.0)
    assert decide(BUSY_DECODE, make_roles(e=4, p=1, d=2), 109.0, allocator).switch is None
    assert decide(BUSY_DECODE, make_roles(e=4, p=1, d=2), 110.0, allocator).switch is not None


def test_to_undo_the_last_switch_takes_a_larger_gain():
    allocator = Allocator()
    made = decide(BUSY_DECODE, make_roles(e=4, p=1, d=2), allocator=allocator).switch
    allocator.switched(made, {"drain": 0.0, "weights": 0.7}, at_s=100.0)
    roles, back = make_roles(e=1, p=1, d=3), make_estimate({"e": 1.3, "p": 0.5, "d": 0.5})
    assert decide(back, roles, 150.0, allocator).switch is None
    assert decide(back, roles, 250.0, allocator).switch.after is Role.E, "later it is no reversal any more"
    assert decide(make_estimate({"e": 2.0, "p": 0.5, "d": 0.5}), roles, 150.0, allocator).switch is not None


def test_what_switches_cost_is_measured():
    allocator = Allocator()
    made = decide(BUSY_DECODE, make_roles(e=4, p=1, d=2), allocator=allocator).switch
    allocator.switched(made, {"drain": 5.0, "weights": 3.0, "pools": 0.5, "total": 9.0}, at_s=100.0)
    again = decide(BUSY_DECODE, make_roles(e=4, p=1, d=2), 200.0, allocator)
    assert again.switch.cost_s == pytest.approx(9.0 / 3)


def test_a_switch_that_takes_longer_than_it_saves_is_not_made():
    allocator = Allocator(Policy(drain_s=60.0))
    decision = decide(make_estimate({"e": 0.5, "p": 0.5, "d": 2.5}), make_roles(e=4, p=1, d=2), allocator=allocator)
    assert decision.switch is None and decision.candidates[0].gain_s > 0


def test_decodes_that_fit_nowhere_else_have_to_end_first():
    roles, work = make_roles(e=1, p=1, d=2), {"demand": {"e": 3.0, "p": 0.5, "d": 0.1}, "held": {"d": 20.0}}
    roomy, full = make_estimate(**work, memory_pressure=0.4), make_estimate(**work, memory_pressure=0.6)
    assert decide(roomy, roles).switch.cost_s == pytest.approx((0.5 + 0.7) / 2)
    assert decide(full, roles).candidates[0].cost_s == pytest.approx((10.0 + 0.7) / 2)


def test_while_a_stage_has_lost_its_last_instance_roles_stay_as_they_are():
    decision = decide(BUSY_DECODE, make_roles(e=3, d=1))
    assert (decision.switch, decision.reason) == (None, "a stage has no instance")
    assert msgspec.json.encode(decision) and decision.line()


def test_a_stage_that_violates_its_objective_is_helped_earlier():
    roles, demand = make_roles(e=4, p=1, d=2), {"e": 0.5, "p": 0.5, "d": 1.8}
    assert decide(make_estimate(demand), roles).switch is None
    assert decide(make_estimate(demand, slack={"d": 0.4}), roles).switch is None
    assert decide(make_estimate(demand, slack={"d": -0.5}), roles).switch.after is Role.D


def test_nothing_is_done_before_enough_was_seen():
    estimate = make_estimate({"d": 9.0}, num_samples=2)
    assert decide(estimate, make_roles(e=4, p=1, d=2)).reason == "too little was seen yet"


def test_a_decision_explains_itself_in_one_line_and_as_json():
    decision = decide(BUSY_DECODE, make_roles(e=4, p=1, d=2))
    line = decision.line()
    assert "\n" not in line
    assert "4e1p2d" in line and "e0 from e to d: 60.0 s become 40.0 s, gain 20.0 s, cost 0.4 s" in line
    plain = msgspec.json.decode(msgspec.json.encode(decision))
    assert plain["estimate"]["stages"]["d"]["demand"] == 4.0
    assert plain["switch"]["instance"] == "e0" and len(plain["candidates"]) > 1


work = st.dictionaries(st.sampled_from(list("epd")), st.floats(0.0, 1000.0))
placements = st.lists(st.sampled_from(list(Role)), min_size=1, max_size=8).filter(
    lambda roles: {stage for role in roles for stage in role.stages} == set(Stage)
)


@settings(deadline=None)
@given(placements, work, work, work, work)
def test_whatever_the_load_a_switch_is_legal_and_pays(roles, demand, noise, queued, held):
    named = {InstanceId(f"i{number}"): role for number, role in enumerate(roles)}
    allocator = Allocator(roles=frozenset(Role))
    decision = decide(make_estimate(demand, noise=noise, queued=queued, held=held), named, allocator=allocator)
    for candidate in decision.candidates:
        after = {**named, candidate.instance: candidate.after}
        assert named[candidate.instance] == candidate.before != candidate.after
        assert {stage for role in after.values() for stage in role.stages} == set(Stage)
        assert candidate.cost_s >= 0.0
    if decision.switch is not None:
        assert decision.switch.gain_s - decision.switch.cost_s >= decision.switch.needed_s > 0


@settings(deadline=None)
@given(placements, work)
def test_the_time_to_clear_is_reached_by_some_division_of_the_work(roles, demand):
    """Instances take from their stages in small pieces, always from the one that is furthest from done: no better
    division can be much faster, so the time is neither too short nor too long."""
    counts = {InstanceId(f"i{number}"): role for number, role in enumerate(roles)}
    clear_s = decide(make_estimate(demand), counts).clear_s
    left = {stage: 30.0 * demand.get(stage, 0.0) for stage in Stage}
    step = clear_s / 300
    for _ in range(330):
        for role in sorted(roles, key=lambda role: len(role.stages)):
            budget = step
            for stage in sorted(role.stages, key=lambda stage: -_urgency(stage, left, roles)):
                taken = min(budget, left[stage])
                left[stage], budget = left[stage] - taken, budget - taken
    assert sum(left.values()) <= 1e-6 + 0.1 * clear_s * len(roles)


def _urgency(stage: Stage, left: dict[Stage, float], roles: list[Role]) -> float:
    return left[stage] / sum(stage in role.stages for role in roles)
