"""The simulator does what can be computed by hand, answers everything, and gives every block back."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.config import AdmissionConfig
from triptych.core import InstanceId, Placement, Role
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation.failures import Failure
from triptych.planning.simulation.frontend import Record
from triptych.planning.simulation.simulator import Options, Simulation
from triptych.planning.workloads.demand import Demand, Item, Phase, poisson

PLAIN = Costs(  # every number has its own decimal place, so that a sum says what is in it
    encode_row=0.1, prefill_token=0.01, decode_step=0.001, decode_sequence=0.0001, message=0.0, transfer=0.00001
)
ODD = Costs(  # no sum of these equals another one: nothing that matters happens at the same time by chance
    encode_row=0.100037, prefill_token=0.0100291, decode_step=0.00100113, decode_sequence=0.000100171,
    message=0.0000139, transfer=0.0000107,
)  # fmt: skip
AT_ONCE = Options(admission=AdmissionConfig(dispatch_s=1e9))  # nothing waits at the frontend
WHOLE = Sizes(streamed_prefill=False)
TEXT = Demand(0.0, text_tokens=4, output_tokens=3)
ITEMS = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(lambda rows: Item(tuple(rows)))
PICTURE = Demand(0.0, media=(Item((8,)),), text_tokens=4, output_tokens=3)


def simulate(
    placement: str, *demands: Demand, costs: Costs = PLAIN, sizes: Sizes = WHOLE, options: Options | None = None
) -> list[Record]:
    return Simulation(Placement.parse(placement), costs, sizes, options).run(demands)


def seen(records: list[Record]) -> list[tuple[float | None, float | None, int]]:
    return [(record.first_token_s, record.finished_s, record.num_tokens) for record in records]


# ---- by hand


def test_text_on_one_instance_takes_its_prefill_and_two_decode_steps():
    (record,) = simulate("1epd", TEXT)
    assert record.ttft_s == pytest.approx(0.04)
    assert record.latency_s == pytest.approx(0.04 + 2 * 0.0011)
    assert record.tpot_s == pytest.approx(0.0011)
    assert record.num_tokens == 3


def test_a_picture_on_three_instances_is_encoded_moved_prefilled_moved_and_decoded():
    (record,) = simulate("1e1p1d", PICTURE)
    assert record.ttft_s == pytest.approx(0.8 + 0.00001 + 0.12)
    assert record.latency_s == pytest.approx(0.8 + 0.00001 + 0.12 + 0.00001 + 2 * 0.0011)


def test_inside_one_instance_nothing_moves():
    (record,) = simulate("1epd", PICTURE)
    assert record.latency_s == pytest.approx(0.8 + 0.12 + 2 * 0.0011)


def test_streamed_prefill_runs_the_text_before_the_picture_is_there():
    (record,) = simulate("1e1p1d", replace(PICTURE, lead_tokens=4), sizes=Sizes())
    assert record.ttft_s == pytest.approx(0.8 + 0.00001 + 0.08)


def test_two_encoders_halve_two_equal_units_and_their_rows_come_one_after_the_other():
    halves = Demand(0.0, media=(Item((8, 8)),), text_tokens=4, output_tokens=1)
    (one,), (two,) = simulate("1e1p1d", halves), simulate("2e1p1d", halves)
    assert one.ttft_s == pytest.approx(1.6 + 2 * 0.00001 + 0.2)
    assert two.ttft_s == pytest.approx(0.8 + 2 * 0.00001 + 0.2)
    (serial,) = simulate("2e1p1d", halves, options=Options(parallel_encode=False))
    assert serial.ttft_s == pytest.approx(one.ttft_s)


def test_bytes_take_time():
    costs = Costs(prefill_token=0.01, message=0.0, kv_token_bytes=1000, bytes_per_second=1e6, transfer=0.5)
    (record,) = simulate("1e1p1d", Demand(0.0, text_tokens=4, output_tokens=2), costs=costs)
    assert record.latency_s == pytest.approx(0.04 + 0.5 + 4 * 0.001)


def test_every_message_takes_its_time():
    costs = Costs(prefill_token=0.01, message=1.0, transfer=0.0)
    (record,) = simulate("1e1p1d", Demand(0.0, text_tokens=4, output_tokens=2), costs=costs)
    assert record.ttft_s == pytest.approx(1.0 + 0.04 + 1.0)  # there and back
    assert record.latency_s == pytest.approx(1.0 + 0.04 + 1.0 + 1.0)  # from prefill to decode, and back from there


def test_sequences_that_decode_together_share_the_steps():
    pair = [Demand(0.0, text_tokens=4, output_tokens=101)] * 2
    first, second = simulate("1epd", *pair)
    assert first.finished_s == second.finished_s == pytest.approx(0.08 + 100 * 0.0012)


def test_a_request_that_arrives_while_others_decode_joins_after_the_step_that_runs():
    long, late = Demand(0.0, text_tokens=4, output_tokens=1001), Demand(0.1, text_tokens=4, output_tokens=2)
    _, record = simulate("1epd", long, late)
    num_steps = -(-(0.1 - 0.04) // 0.0011)
    assert record.first_token_s == pytest.approx(0.04 + num_steps * 0.0011 + 0.001 + 0.0001 + 0.04)


def test_what_happens_before_dispatch_delays_the_first_token():
    (record,) = simulate("1epd", TEXT, costs=Costs(arrival=2.0, prefill_token=0.01, message=0.0))
    assert record.ttft_s == pytest.approx(2.04)


# ---- in general


@st.composite
def demands(draw: st.DrawFn) -> list[Demand]:
    one = st.builds(
        Demand,
        at_s=st.floats(0.0, 2.0),
        media=st.lists(ITEMS, max_size=2).map(tuple),
        text_tokens=st.integers(1, 60),
        output_tokens=st.integers(1, 40),
    )
    return sorted(draw(st.lists(one, min_size=1, max_size=15)), key=lambda demand: demand.at_s)


def change_roles(simulation: Simulation, seed: int) -> None:
    """Of one instance after the other, at random, ten times a second."""
    rng = random.Random(seed)

    def change_a_role() -> None:
        roles = simulation.roles()
        id, role = rng.choice(sorted(roles)), rng.choice(list(Role))
        left = {stage for other in roles if other != id for stage in roles[other].stages}
        if len(left) == 3 and role != roles[id]:
            simulation.switch_role(id, role, lambda steps_s: None)

    simulation.every(0.1, change_a_role)


placements = st.sampled_from("1epd 2epd 1e1pd 1ep1d 1e1p1d 2e1p2d 2e2pd 1e1p1d1epd 1ed1p 2ep1pd".split())
SMALL = Sizes(num_kv_blocks=30, num_embedding_blocks=40, max_num_seqs=4, max_num_batched_tokens=64, heartbeat_s=0.01)


@settings(deadline=None)
@given(demands(), placements, st.integers(0, 3))
def test_every_request_is_answered_and_every_block_given_back_while_roles_change(asked, placement, seed):
    """`run` checks the books of every instance at the end."""
    simulation = Simulation(Placement.parse(placement), PLAIN, SMALL)
    change_roles(simulation, seed)
    records = simulation.run(asked)
    assert [record.num_tokens for record in records] == [demand.output_tokens for demand in asked]
    for record in records:
        assert record.demand.at_s <= record.first_token_s <= record.finished_s


failures = st.lists(
    st.builds(Failure, st.floats(0.0, 5.0), st.integers(0, 1), st.sampled_from([0.0, 0.03]), st.floats(0.01, 50.0)),
    max_size=5,
)


@settings(deadline=None)
@given(demands(), st.sampled_from("1epd 2epd 1e1pd 2e1p2d 2e2pd 1ed1p 2ep1pd".split()), failures, st.integers(0, 3))
def test_every_request_is_answered_and_every_block_given_back_while_instances_fail(asked, placement, ended, seed):
    small = replace(SMALL, prefix_caching=bool(seed % 2))
    plan = Placement.parse(placement)
    failed = tuple(replace(one, instance=one.instance % len(plan.roles)) for one in ended)
    simulation = Simulation(plan, replace(ODD, cores=2.0 if seed > 1 else math.inf), small, Options(failures=failed))
    records = simulation.run(asked)
    for record in records:
        assert record.num_tokens == record.demand.output_tokens or record.error in ("unavailable", "poison")


@settings(deadline=None, max_examples=30)
@given(demands(), placements)
def test_equal_simulations_have_equal_outcomes(asked, placement):
    assert seen(simulate(placement, *asked, sizes=SMALL)) == seen(simulate(placement, *asked, sizes=SMALL))


@settings(deadline=None, max_examples=30)
@given(demands(), st.sampled_from(["1epd", "1e1pd", "1ep1d", "1e1p1d"]), st.sampled_from([WHOLE, SMALL]))
def test_decode_steps_in_a_row_have_the_outcome_of_single_steps(asked, placement, sizes):
    """Reports change nothing with one instance of a stage and nobody waiting at the frontend; one that is due at once
    ends every row after a step."""
    rows, single = (
        simulate(placement, *asked, costs=ODD, sizes=replace(sizes, heartbeat_s=s), options=AT_ONCE)
        for s in (1000.0, 0.0)
    )
    for one, other in zip(rows, single, strict=True):
        assert one.first_token_s == pytest.approx(other.first_token_s)
        assert one.finished_s == pytest.approx(other.finished_s)


@settings(deadline=None)
@given(demands(), placements, st.integers(0, 3))
def test_tokens_that_nobody_needs_to_hear_change_nothing(asked, placement, seed):
    """All are said where an instance is to end, also if that is after the last answer."""
    costs, sizes = replace(ODD, switch_weights=0.0513), replace(SMALL, heartbeat_s=0.0317)
    seen_by = []
    for ended in ((), (Failure(1e6, 0),)):
        simulation = Simulation(Placement.parse(placement), costs, sizes, Options(failures=ended))
        change_roles(simulation, seed)
        seen_by.append((seen(simulation.run(asked)), simulation.follows_tokens))
    (silent, follows), (said, follows_all) = seen_by
    assert (follows, follows_all) == (False, True)
    assert silent == said


def test_a_request_waits_at_the_frontend_while_the_instances_have_enough():
    simulation = Simulation(Placement.parse("1e1p1d"), PLAIN, WHOLE, Options(admission=AdmissionConfig(dispatch_s=0.5)))
    waiting: list[float] = []
    simulation.every(1.0, lambda: waiting.append(sum(simulation.frontend.router.pressure().queued_s.values())))
    later = Demand(5.0, media=(Item((8,)),), text_tokens=4)  # the first one tells how long a row takes
    simulation.run([PICTURE] + [later] * 20)
    assert waiting[5] > waiting[10] > 0.0 and waiting[-1] == 0.0


# ---- caches


def test_a_picture_that_was_there_before_is_not_encoded_again():
    first = Demand(0.0, media=(Item((8,), name=7),), text_tokens=4)
    again, other = replace(first, at_s=10.0), replace(first, at_s=20.0, media=(Item((8,), name=8),))
    records = simulate("1e1p1d", first, again, other)
    assert records[1].ttft_s == pytest.approx(0.12)
    assert [records[0].ttft_s, records[2].ttft_s] == pytest.approx([0.8 + 0.00001 + 0.12] * 2)


def test_an_item_is_read_once_for_all_its_steps_and_by_every_instance_that_encodes_a_part_of_it():
    costs, slices = replace(PLAIN, encode_pixel=1e-3), Item((8,) * 6, pixels=1000)
    asked = Demand(0.0, media=(slices,), text_tokens=4, output_tokens=1)
    small = replace(WHOLE, max_encode_tokens=8)
    (one,) = simulate("1e1p1d", asked, costs=costs, sizes=small)
    assert one.ttft_s == pytest.approx(1.0 + 4.8 + 0.52, abs=0.01)
    (two,) = simulate("2e1p1d", asked, costs=costs, sizes=small)
    assert two.ttft_s == pytest.approx(1.0 + 2.4 + 0.52, abs=0.01)


def test_a_beginning_that_was_there_before_is_not_computed_again():
    first = Demand(0.0, text_tokens=40, prefix=(1, 2))
    asked = [first, replace(first, at_s=10.0), replace(first, at_s=20.0, prefix=(1, 3)), Demand(30.0, text_tokens=40)]
    records = simulate("1epd", *asked, sizes=replace(WHOLE, prefix_caching=True))
    assert [record.ttft_s for record in records] == pytest.approx([0.40, 0.08, 0.24, 0.40])


# ---- cores that are shared


def test_two_instances_on_one_core_take_twice_as_long():
    pair = [replace(TEXT, output_tokens=1)] * 2
    first, second = simulate("2epd", *pair, costs=replace(PLAIN, cores=1.0))
    assert first.ttft_s == second.ttft_s == pytest.approx(0.08)
    first, second = simulate("2epd", *pair, costs=replace(PLAIN, cores=2.0))
    assert first.ttft_s == second.ttft_s == pytest.approx(0.04)


def test_the_server_does_one_thing_after_the_other():
    costs = replace(PLAIN, cores=4.0, server_request=1.0, server_token=0.5, client_token=0.25)
    first, second = simulate("2epd", *[replace(TEXT, output_tokens=1)] * 2, costs=costs)
    assert first.ttft_s == pytest.approx(1.0 + 0.04 + 0.96 + 0.5 + 0.25), "its token waits for the second request"
    assert second.ttft_s == pytest.approx(2.0 + 0.5 + 0.5 + 0.25)


# ---- deadlines, refusals, failures


def test_a_request_whose_time_is_up_ends_and_leaves_nothing():
    late, other = replace(TEXT, text_tokens=100, timeout_s=0.5), replace(TEXT, at_s=0.1)
    ended, answered = simulate("1epd", late, other)
    assert (ended.error, ended.num_tokens) == ("deadline_exceeded", 0)
    assert answered.num_tokens == 3 and answered.ttft_s == pytest.approx(0.9 + 0.04)


def test_what_would_wait_too_long_is_refused():
    options = Options(admission=AdmissionConfig(max_queue_s=1.0, dispatch_s=0.1))
    burst = [replace(TEXT, text_tokens=50)] * 5 + [replace(TEXT, at_s=0.6, text_tokens=50)] * 40
    records = simulate("1epd", *burst, sizes=replace(WHOLE, max_num_seqs=8, max_num_batched_tokens=51), options=options)
    refused = [record for record in records if record.error == "overloaded"]
    assert refused and len(refused) < 40
    assert all(record.num_tokens == (0 if record.error else 3) for record in records)


def test_media_that_do_not_fit_into_the_server_are_refused():
    options = Options(admission=AdmissionConfig(max_media_held_bytes=10_000_000))
    asked = [replace(PICTURE, media=(Item((8,), nbytes=3_000_000),))] * 20
    refused = [record for record in simulate("1epd", *asked, options=options) if record.error == "overloaded"]
    assert 10 < len(refused) < 20


def test_a_stage_that_stays_away_too_long_ends_what_waits_for_it():
    for at_s in (0.3, 0.57, 0.6, 1.1, 1.7):
        options = Options(failures=(Failure(at_s, 0, restart_s=60.0),))
        (record,) = simulate("1epd", Demand(0.0, text_tokens=4, output_tokens=5000), options=options)
        assert record.error == "unavailable"
        assert record.failed_s == pytest.approx(at_s + 0.025 + 30.0, abs=0.01)


def test_what_was_computed_when_an_instance_ended_is_tried_one_at_a_time():
    """Both were in the same decode step, so either may be to blame: the second one waits for the first one's token."""
    both = [Demand(0.0, text_tokens=4, output_tokens=1000)] * 2
    options = Options(failures=(Failure(0.3, 0),))
    first, second = simulate("1epd", *both, options=options, sizes=replace(WHOLE, max_num_batched_tokens=4096))
    assert first.num_attempts == second.num_attempts == 2
    assert abs(first.finished_s - second.finished_s) > 0.2, "one of them was prefilled later"


def test_an_instance_that_ended_uses_no_cores():
    """Two share one core; one of them ends in the middle of a long step, and the other one has the core alone."""
    asked = [Demand(0.0, text_tokens=400, output_tokens=1)] * 2
    options = Options(failures=(Failure(1.0, 0, found_s=100.0),))
    one, other = simulate("2epd", *asked, costs=replace(PLAIN, cores=1.0), options=options)
    assert min(one.finished_s, other.finished_s) == pytest.approx(1.0 + 3.5)


def test_an_instance_that_ended_says_nothing_to_those_who_do_not_know_yet():
    """Decode tells both that prefill how busy it is, again and again."""
    options = Options(failures=(Failure(1.0, 2, found_s=5.0),))
    simulation, heard = Simulation(Placement.parse("1e2p1d"), PLAIN, WHOLE, options), []
    for at_s in (1.1, 4.0):
        simulation.clock.at(at_s, lambda: heard.append(simulation.loads.get(InstanceId("i2"))))
    simulation.run([Demand(0.0, output_tokens=5000)])
    before, after = heard
    assert before is not None
    assert before is after


def test_kv_that_goes_to_host_memory_and_back_takes_time():
    small = replace(WHOLE, num_kv_blocks=14)
    asked = [Demand(0.0, text_tokens=10, output_tokens=100)] * 4
    free = simulate("1epd", *asked, sizes=small, costs=replace(PLAIN, kv_token_bytes=1000))
    slow = simulate("1epd", *asked, sizes=small, costs=replace(PLAIN, kv_token_bytes=1000, host_bytes_per_second=1e5))
    assert max(r.finished_s for r in slow) > max(r.finished_s for r in free) + 0.3


def test_an_instance_that_ends_costs_time_and_no_token():
    asked = Demand(0.0, text_tokens=4, output_tokens=1001)
    failure = Failure(0.5, instance=0, found_s=0.1, restart_s=1.0)
    (record,) = simulate("1epd", asked, options=Options(failures=(failure,)))
    num_before = (0.5 - 0.04) // 0.0011
    assert (record.num_tokens, record.num_attempts) == (1001, 2)
    redone = 0.01 * (4 + 1 + num_before) + 0.0011 * (1000 - num_before - 1)
    assert record.finished_s == pytest.approx(0.5 + 0.1 + 1.0 + redone, rel=0.01)


# ---- role switches


def switched(before: str, id: str, role: Role, asked: list[Demand], at_s: float, sizes: Sizes = WHOLE) -> Simulation:
    simulation = Simulation(Placement.parse(before), PLAIN, sizes)
    simulation.clock.at(at_s, simulation.switch_role, InstanceId(id), role, lambda steps_s: None)
    simulation.run(asked)
    return simulation


def test_an_idle_instance_switches_in_the_time_that_its_weights_take():
    simulation = switched("2e1p1d", "i1", Role.D, [Demand(0.0, output_tokens=5000)], at_s=1.0)
    (switch,) = simulation.switches
    assert (switch.before, switch.after, switch.steps_s["switch"]) == (Role.E, Role.D, PLAIN.switch_weights)
    assert switch.steps_s["drain"] == pytest.approx(0.0)
    assert str(simulation.placement()) == "1e1p2d"


def test_an_instance_that_ends_while_it_takes_its_role_keeps_the_old_one():
    told: list[dict[str, float] | None] = []
    failure = Failure(1.0 + 0.9 * PLAIN.switch_weights, instance=1, found_s=0.2 * PLAIN.switch_weights)
    simulation = Simulation(Placement.parse("2e1p1d"), PLAIN, WHOLE, Options(failures=(failure,)))
    simulation.clock.at(1.0, simulation.switch_role, InstanceId("i1"), Role.D, told.append)
    simulation.run([Demand(0.0, output_tokens=8000)])
    assert told == [None]
    assert not simulation.switches
    assert str(simulation.placement()) == "2e1p1d"


def test_an_instance_that_would_end_after_the_last_answer_is_told_apart():
    failure = Failure(1000.0, instance=0)
    simulation = Simulation(Placement.parse("1epd"), PLAIN, WHOLE, Options(failures=(failure,)))
    simulation.run([TEXT])
    assert (simulation.losses, simulation.unseen) == ([], [failure])


def test_prefill_and_decode_keep_their_weights():
    simulation = switched("1e2p1d", "i1", Role.D, [Demand(0.0, output_tokens=5000)], at_s=1.0)
    assert simulation.switches[0].steps_s["switch"] == pytest.approx(PLAIN.switch_books)


def test_what_an_encoder_has_not_begun_is_encoded_by_another():
    asked = [Demand(0.0, media=(Item((8,)),) * 6, text_tokens=4, output_tokens=1)]
    simulation = switched("2e1p1d", "i1", Role.D, asked, at_s=0.1)
    assert simulation.switches[0].steps_s["drain"] < 3.0, "it ends its batch and no more"
    assert simulation.records[0].num_tokens == 1


def test_sequences_of_a_decode_instance_go_on_elsewhere():
    """Two instances decode two sequences each; the one that leaves hands its two over at once."""
    asked = [Demand(0.0, text_tokens=4, output_tokens=2000)] * 4
    simulation = switched("1e1p2d", "i3", Role.P, asked, at_s=1.0)
    assert simulation.switches[0].steps_s["drain"] < 0.01
    assert all(record.num_tokens == 2000 and record.num_attempts == 1 for record in simulation.records)


def test_those_that_wait_for_a_full_decode_instance_go_to_one_that_joins():
    """One instance has room for three of the nine at a time, a second one for three more."""
    sizes = dict.fromkeys(Role, WHOLE) | {Role.D: replace(WHOLE, num_kv_blocks=3 * 7)}
    slow = replace(PLAIN, prefill_token=0.0001, decode_step=0.1, switch_weights=0.3)
    asked = [Demand(0.0, text_tokens=90, output_tokens=20)] * 9

    def last(*, joined: bool) -> float:
        simulation = Simulation(Placement.parse("2e1p1d"), slow, sizes)
        if joined:
            simulation.clock.at(0.1, simulation.switch_role, InstanceId("i1"), Role.D, lambda steps_s: None)
        return max(record.finished_s for record in simulation.run(asked))

    assert last(joined=True) < 0.8 * last(joined=False)


def test_what_prefill_has_not_begun_is_taken_up_again_by_another():
    asked = [Demand(0.0, text_tokens=400, output_tokens=2)] * 6
    simulation = switched("1e2p1d", "i2", Role.D, asked, at_s=0.1, sizes=Sizes(max_num_seqs=2))
    assert max(record.num_attempts for record in simulation.records) == 2
    assert all(record.num_tokens == 2 for record in simulation.records)


# ---- workloads


def test_a_poisson_workload_has_its_phases_and_its_rate():
    asked = poisson([Phase(1000, 5), Phase(1000, 7, (Item((3,)),), 9)], rate=4.0, seed=1)
    assert [demand.output_tokens for demand in asked] == [5] * 1000 + [7] * 1000
    assert asked[-1].media == (Item((3,)),) and asked[-1].text_tokens == 9
    assert asked[-1].at_s == pytest.approx(500.0, rel=0.1)
    assert asked == poisson([Phase(1000, 5), Phase(1000, 7, (Item((3,)),), 9)], rate=4.0, seed=1)
