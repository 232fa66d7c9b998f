"""Role switches of real engines over real sockets and slabs: what was begun is finished or handed over, never lost."""

from itertools import permutations
from pathlib import Path

import pytest

from tests.builders import make_request
from tests.flows.engines import NUM_BLOCKS, Hops, expected_answer, hops
from triptych.core import InstanceId, Role
from triptych.messages import Failed, Located, Submit, Tokens, Wanted

SPARE = {"e1": "e", "p1": "p", "d1": "d"}


def begun(cluster: Hops, order: Submit, num_tokens: int) -> None:
    """Asks, and turns until that many tokens of the answer were said."""
    cluster.ask(order, prefill="p0", encode="e0")
    cluster.turn_until(lambda: len(cluster.tokens_of(order)) >= num_tokens)


def said_by(cluster: Hops, instance: str) -> int:
    """How many tokens."""
    return sum(len(m.updates) for m in cluster.received if isinstance(m, Tokens) and m.instance == instance)


@pytest.mark.parametrize(("old", "new"), list(permutations(Role, 2)))
def test_an_idle_instance_serves_its_new_role_at_once(tmp_path: Path, old: Role, new: Role) -> None:
    with hops(tmp_path, x=old, **SPARE) as cluster:
        cluster.order_switch("x", new)
        cluster.settle()
        switched = cluster.take_up("x")
        assert switched.error is None
        assert switched.peer.role is new
        order = make_request("r", num_images=2, max_tokens=5)
        cluster.ask(order, prefill="x" if "p" in new else "p1", encode="x" if "e" in new else "e1")
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)


def test_running_decodes_go_on_elsewhere_where_there_is_room(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", p0="p", d0="d") as cluster:
        order = make_request("r", num_images=1, max_tokens=30)
        begun(cluster, order, 5)
        cluster.add("d1", "d")
        cluster.order_switch("d0", "p", room={"d1": NUM_BLOCKS})
        cluster.settle()
        assert cluster.take_up("d0").peer.role is Role.P
        assert cluster.tokens_of(order) == expected_answer(order)
        assert Located(order.request_id, InstanceId("d1"), "epoch-d1") in cluster.received
        assert said_by(cluster, "d1") > 15


def test_running_decodes_without_room_elsewhere_are_finished_first(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", p0="p", d0="d") as cluster:
        order = make_request("r", max_tokens=30)
        begun(cluster, order, 5)
        cluster.add("d1", "d")
        cluster.order_switch("d0", "p", room={"d1": 1})
        cluster.settle()
        assert cluster.take_up("d0").peer.role is Role.P
        assert cluster.tokens_of(order) == expected_answer(order)
        assert said_by(cluster, "d1") == 0


def test_what_prefill_has_not_begun_is_given_back_and_what_it_has_is_finished(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", p0="p", d0="d", p1="p") as cluster:
        orders = [make_request(f"r{i}", text=20, max_tokens=4) for i in range(12)]  # more than start at once
        for order in orders:
            cluster.ask(order, prefill="p0", encode="e0")
        cluster.turn(1)
        cluster.order_switch("p0", "d")
        cluster.settle()
        assert cluster.take_up("p0").peer.role is Role.D
        given_back = {m.request_id for m in cluster.received if isinstance(m, Failed) and m.retry}
        for order in orders:
            answered = cluster.tokens_of(order) == expected_answer(order)
            assert answered != (order.request_id in given_back)
        assert 0 < len(given_back) < len(orders)


def test_units_that_are_not_begun_are_given_back_by_name(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", e1="e", p0="p", d0="d") as cluster:
        order = make_request("r", num_images=3, max_tokens=2)
        cluster.order_switch("e0", "p")
        cluster.ask(order, prefill="p0", encode="e0")  # sent before the frontend knew
        cluster.settle()
        wanted = [unit for m in cluster.received if isinstance(m, Wanted) for unit in m.units]
        assert sorted(wanted) == sorted(unit.hash for unit in order.units)
        cluster.take_up("e0")
        cluster.ask(order, prefill="p0", encode="e1")
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)


def test_an_order_for_the_old_role_makes_an_instance_stay(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", p0="p", d0="d") as cluster:
        order = make_request("r", max_tokens=40)
        begun(cluster, order, 3)
        cluster.order_switch("d0", "p")
        cluster.turn(3)
        cluster.order_switch("d0", "d")
        cluster.turn(3)
        assert cluster.take_up("d0").peer.role is Role.D
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)


def test_a_role_that_cannot_be_fitted_leaves_the_old_one_working(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", p0="p", d0="d") as cluster:
        cluster.refuse_to_fit("e0", Role.P)
        cluster.order_switch("e0", "p")
        cluster.settle()
        switched = cluster.take_up("e0")
        assert switched.error is not None
        assert "no memory" in switched.error
        assert switched.peer.role is Role.E
        order = make_request("r", num_images=2)
        cluster.ask(order, prefill="p0", encode="e0")
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)


def test_an_instance_that_is_to_end_ends_when_it_is_empty(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", p0="p", d0="d") as cluster:
        order = make_request("r", max_tokens=20)
        begun(cluster, order, 3)
        cluster.order_switch("d0", None)
        cluster.turn(3)
        assert not cluster.has_ended("d0")
        cluster.settle()
        assert cluster.has_ended("d0")
        assert cluster.tokens_of(order) == expected_answer(order)
