"""Each hop over real sockets and real slabs: frontend to encode, encode to prefill, prefill to decode, and back."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.builders import make_order, make_request, make_unit
from tests.flows.engines import UNDECODABLE, expected_answer, hops
from triptych.core import FinishReason, InstanceId
from triptych.messages import Abort, Located, Tokens, Unreachable, Wanted

APART = {"e0": "e", "p0": "p", "d0": "d"}


def test_three_instances_answer_with_every_byte_in_its_place(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        order = make_request("r", num_images=3, max_tokens=6)
        cluster.ask(order, prefill="p0", encode="e0")
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)


def test_the_first_token_comes_from_prefill_and_the_rest_from_decode(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        order = make_request("r", num_images=1, max_tokens=3)
        cluster.ask(order, prefill="p0", encode="e0")
        cluster.settle()
        said = [(m.instance, u.index, u.finish) for m in cluster.received if isinstance(m, Tokens) for u in m.updates]
        assert sorted(said) == [("d0", 1, None), ("d0", 2, FinishReason.LENGTH), ("p0", 0, None)]
        assert Located(order.request_id, InstanceId("d0"), "epoch-d0") in cluster.received


def test_a_text_only_request_never_touches_encode(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        order = make_request("r", max_tokens=2)
        cluster.ask(order, prefill="p0", encode="e0")
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)
        assert cluster.counter("e0", "encode_units_computed") == 0


def test_one_token_is_answered_without_decode(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        order = make_request("r", num_images=1, max_tokens=1)
        cluster.ask(order, prefill="p0", encode="e0")
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)
        assert cluster.counter("d0", "transfer_pulls") == 0


def test_a_picture_is_encoded_once_for_two_requests(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        unit = make_unit("shared")
        orders = [make_request(name, (unit,)) for name in "ab"]
        for order in orders:
            cluster.ask(order, prefill="p0", encode="e0")
        cluster.settle()
        assert [cluster.tokens_of(order) for order in orders] == [expected_answer(order) for order in orders]
        assert cluster.counter("e0", "encode_units_computed") == 1
        assert cluster.counter("p0", "transfer_pulls") == 1


@pytest.mark.parametrize("role", ["epd", "ep", "pd"])
def test_a_hand_over_inside_an_instance_moves_no_bytes(tmp_path: Path, role: str) -> None:
    others = {"epd": {}, "ep": {"d0": "d"}, "pd": {"e0": "e"}}[role]
    with hops(tmp_path, here=role, **others) as cluster:
        order = make_request("r", num_images=2, max_tokens=5)
        cluster.ask(order, prefill="here", encode="here" if "e" in role else "e0")
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)
        pulls = {"epd": 0, "ep": 0, "pd": 2}[role]  # pd pulls its two embeddings, nobody pulls what is here already
        assert cluster.counter("here", "transfer_pulls") == pulls


def test_the_pictures_of_one_request_may_be_encoded_on_two_instances(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", e1="e", p0="pd") as cluster:
        units = (make_unit("left"), make_unit("right"))
        order = make_request("r", units)
        cluster.send("p0", order)
        for instance, unit in zip(("e0", "e1"), units, strict=True):
            cluster.send(instance, make_order("r", unit))
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)


def test_an_undecodable_picture_fails_its_request_and_no_other(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        bad, good = make_request("bad", num_images=1), make_request("good", num_images=1)
        cluster.ask(bad, prefill="p0", encode="e0", data=UNDECODABLE)
        cluster.ask(good, prefill="p0", encode="e0")
        cluster.settle()
        assert [(f.request_id, f.status, f.unit) for f in cluster.failures()] == [("bad", 400, bad.units[0].hash)]
        assert cluster.tokens_of(good) == expected_answer(good)
        for instance in APART:
            cluster.send(instance, Abort(bad.request_id))


def test_more_requests_than_the_pools_hold_are_all_answered(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        orders = [make_request(f"r{n}", num_images=3, max_tokens=9) for n in range(12)]
        for order in orders:
            cluster.ask(order, prefill="p0", encode="e0")
        cluster.settle()
        assert [cluster.tokens_of(order) for order in orders] == [expected_answer(order) for order in orders]


def test_a_request_that_can_never_fit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        order = make_request("huge", text=200)
        cluster.ask(order, prefill="p0", encode="e0")
        cluster.settle()
        assert "needs KV space for 201 tokens, the pool has 128" in cluster.failures()[0].message


def test_an_abort_frees_everything_wherever_the_request_is(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        for turns in range(12):
            order = make_request(f"r{turns}", num_images=2, max_tokens=60)
            cluster.ask(order, prefill="p0", encode="e0")
            for _ in range(turns):
                for engine in cluster.engines:
                    engine.turn(wait_s=0.001)
            for instance in APART:
                cluster.send(instance, Abort(order.request_id))
            cluster.settle()
            cluster.assert_idle()


def test_an_embedding_that_comes_too_late_is_given_back(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        order = make_request("r", num_images=1)
        cluster.send("p0", Abort(order.request_id))
        cluster.settle()
        cluster.send("e0", make_order("r", order.units[0]))


def test_an_embedding_may_overtake_the_request_that_it_is_for(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        order = make_request("r", num_images=1)
        cluster.send("e0", make_order("r", order.units[0]))
        cluster.settle()
        cluster.send("p0", order)
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)


def test_a_prefix_that_is_here_is_neither_computed_nor_encoded_nor_moved_again(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        unit = make_unit("cat")
        first, second = (make_request(name, (unit,), text=4, max_tokens=6, hashed=True) for name in "ab")
        cluster.ask(first, prefill="p0", encode="e0")
        cluster.settle()
        moved = cluster.counter("d0", "transfer_pulled_bytes")
        cluster.send("p0", replace(second, ordered=()))
        cluster.settle()
        assert [cluster.tokens_of(order) for order in (first, second)] == [expected_answer(first)] * 2
        assert cluster.counter("e0", "encode_units_computed") == 1
        assert cluster.counter("p0", "encode_units_prefix") == 1
        assert cluster.counter("p0", "prefix_hits") == 12  # of 16 tokens: the last one is always computed
        assert cluster.counter("d0", "transfer_pulled_bytes") == moved, "decode had all four blocks"


def test_other_pictures_among_the_same_tokens_are_never_mixed_up(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        orders = [
            make_request(f"r{turn}-{n}", (make_unit(f"u{n}"), make_unit(f"v{n % 2}")), text=4, hashed=True)
            for turn in range(2)
            for n in range(5)
        ]
        for order in orders:
            cluster.ask(order, prefill="p0", encode="e0")
            cluster.settle(quiet_turns=2)
        cluster.settle()
        assert [cluster.tokens_of(order) for order in orders] == [expected_answer(order) for order in orders]
        assert len({tuple(cluster.tokens_of(order)) for order in orders}) == 5


def test_a_unit_that_nobody_ordered_is_wanted_and_then_encoded(tmp_path: Path) -> None:
    with hops(tmp_path, **APART) as cluster:
        order = make_request("r", num_images=1, ordered=False)
        cluster.send("p0", order)
        cluster.settle()
        assert Wanted(order.request_id, (order.units[0].hash,)) in cluster.received
        cluster.send("e0", make_order("r", order.units[0]))
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)


def test_an_embedding_that_another_prefill_instance_holds_is_pulled_from_there(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", p0="p", p1="p", d0="d") as cluster:
        unit = make_unit("cat")
        first, second = make_request("a", (unit,)), make_request("b", (unit,), text=5, ordered=False)
        cluster.ask(first, prefill="p0", encode="e0")
        cluster.settle()
        cluster.send("p1", replace(second, held={unit.hash: InstanceId("p0")}))
        cluster.settle()
        assert cluster.tokens_of(second) == expected_answer(second)
        assert cluster.counter("e0", "encode_units_computed") == 1
        assert cluster.counter("p1", "encode_units_transferred") == 1


def test_an_instance_that_does_not_hold_what_it_is_asked_for_has_it_encoded(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", p0="p", p1="p", d0="d") as cluster:
        order = make_request("r", num_images=1, ordered=False)
        unit = order.units[0]
        cluster.send("p1", replace(order, held={unit.hash: InstanceId("p0")}))
        cluster.settle()
        assert Wanted(order.request_id, (unit.hash,)) in cluster.received
        cluster.send("e0", make_order("r", unit, "p1"))
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)


def test_a_step_that_takes_long_accuses_nobody_whose_bytes_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hops(tmp_path, **APART) as cluster:
        monkeypatch.setattr("triptych.transfer.select.PULL_DEADLINE_S", 0.05)
        order = make_request("r", num_images=2, max_tokens=4)
        cluster.ask(order, prefill="p0", encode="e0")
        cluster.hold_up("p0", 0.1)  # every step of it
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)
        assert not [message for message in cluster.received if isinstance(message, Unreachable)]
