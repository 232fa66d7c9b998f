"""Leaving a role: what is queued goes back, what runs is handed over or ends here. Who stays goes on as before."""

import pytest
from msgspec.structs import replace

from tests.builders import (
    BLOCK_TOKENS,
    Pools,
    make_embedded,
    make_near,
    make_order,
    make_pools,
    make_prefilled,
    make_request,
    make_stage,
    make_ticket,
    make_unit,
)
from triptych.core import BlockHashes, InstanceId, RequestId, SampledToken, Stage
from triptych.memory.kv_cache import KVCache
from triptych.memory.prefix import prompt_hashes
from triptych.messages import (
    FRONTEND,
    Abort,
    Declined,
    Embedded,
    Failed,
    Located,
    Prefilled,
    Prefilling,
    Release,
    Share,
    Wanted,
)
from triptych.routing import RoutingTable
from triptych.stages.base import reader_lost, turn_away
from triptych.stages.decode import DecodeStage
from triptych.stages.encode import EncodeStage
from triptych.stages.prefill import PrefillStage


def make_encode() -> tuple[EncodeStage, Pools]:
    pools = make_pools(near=make_near("e0", e0="e", e1="e", p0="p"))
    return make_stage(Stage.ENCODE, pools), pools


def make_prefill(role: str = "p", **others: str) -> tuple[PrefillStage, Pools]:
    pools = make_pools(32, near=make_near("here", here=role, e0="e", **(others or {"d0": "d"})))
    return make_stage(Stage.PREFILL, pools), pools


def make_decode(kv_blocks: int = 32, role: str = "d", *, state_blocks: int = 0) -> tuple[DecodeStage, Pools]:
    pools = make_pools(near=make_near("d0", d0=role, d1="d", d2="d", p0="p", x0="pd"))
    pools.kv = KVCache(kv_blocks, BLOCK_TOKENS, state_blocks=state_blocks)
    return make_stage(Stage.DECODE, pools), pools


def leaves(pools: Pools, *names: str) -> None:
    """The table says so."""
    table = pools.near.table
    gone = {InstanceId(name): replace(table.peers[InstanceId(name)], leaving=True) for name in names}
    pools.near.table = RoutingTable(table.version + 1, table.peers | gone)


def without(pools: Pools, *names: str) -> None:
    table = pools.near.table
    pools.near.table = RoutingTable(
        table.version + 1, {name: peer for name, peer in table.peers.items() if name not in names}
    )


def sent(pools: Pools, kind: type | None = None) -> list[tuple[str, object]]:
    messages, pools.near.out.messages = pools.near.out.messages, []
    return [(to, message) for to, message in messages if kind is None or isinstance(message, kind)]


def moved(pools: Pools) -> list[str]:
    """Which requests the frontend is to take up again."""
    return [message.request_id for to, message in sent(pools, Failed) if to == FRONTEND and message.retry]


def prefill(stage: PrefillStage, budget: int = 64) -> list[str]:
    chunks = stage.schedule(budget)
    stage.commit(chunks, [SampledToken(5) for chunk in chunks if chunk.samples])
    return [chunk.sequence.request_id for chunk in chunks]


def decode(stage: DecodeStage) -> list[str]:
    plan = stage.schedule()
    for sequence, blocks in plan.offloads:
        sequence.offloaded = blocks
    stage.commit(plan.chunks, [SampledToken(5) for _ in plan.chunks])
    return [chunk.sequence.request_id for chunk in plan.chunks]


def arrive(stage: DecodeStage, name: str, num_prompt_tokens: int = 7, max_tokens: int = 9) -> None:
    stage.admit(make_prefilled(name, num_prompt_tokens, max_tokens))
    stage.pulled(RequestId(name), None)


# ---- encode


def test_units_that_are_not_begun_go_back_to_who_waits_for_them_one_message_per_request():
    stage, pools = make_encode()
    stage.admit(make_order("a", make_unit("cat"), "p0"))
    works = stage.schedule(8)
    for name, unit, reader in (("a", "dog", "p0"), ("b", "cow", "p1"), ("a", "fox", "p0")):
        stage.admit(make_order(name, make_unit(unit), reader))
    stage.leave()
    assert not stage.is_empty
    assert sent(pools) == [
        ("p0", Wanted(RequestId("a"), (make_unit("dog").hash, make_unit("fox").hash))),
        ("p1", Wanted(RequestId("b"), (make_unit("cow").hash,))),
    ]
    stage.commit(works, [None])
    [(_, message)] = sent(pools)
    assert isinstance(message, Embedded), "what runs is announced as usual"
    assert stage.is_empty


def test_an_order_that_comes_while_encode_leaves_goes_back_and_one_that_comes_when_it_stays_is_taken():
    stage, pools = make_encode()
    stage.leave()
    stage.admit(make_order("r"))
    assert sent(pools) == [("p0", Wanted(RequestId("r"), (make_unit().hash,)))]
    assert stage.is_empty
    stage.stay()
    stage.admit(make_order("r"))
    assert len(stage.schedule(8)) == 1


def test_what_was_ordered_for_a_prefill_instance_that_is_lost_is_forgotten():
    stage, pools = make_encode()
    for name, unit in (("a", "cat"), ("b", "dog")):
        stage.admit(make_order(name, make_unit(unit), "p0"))
    works = stage.schedule(8)
    stage.lost(InstanceId("p0"))
    stage.commit(works, [None])
    assert sent(pools) == []
    assert stage.is_empty
    pools.assert_idle()


# ---- prefill


def test_requests_that_have_not_started_are_given_back_with_their_tickets():
    stage, pools = make_prefill()
    pools.share.max_blocks = 2
    for name in "ab":
        stage.admit(make_request(name, num_images=1, text=0))
    stage.embedded(make_embedded("b", make_unit("b-0"), lease=3))
    prefill(stage)
    stage.leave()
    assert sent(pools) == [
        (FRONTEND, Failed(RequestId("b"), "instance here leaves its role", 503, "moved", retry=True)),
        ("e0", Release(3)),
        (FRONTEND, Failed(RequestId("a"), "instance here leaves its role", 503, "moved", retry=True)),
    ]
    assert stage.is_empty
    pools.assert_idle()


def test_a_request_of_which_a_part_is_computed_goes_on_to_its_end():
    stage, pools = make_prefill()
    request = make_request("r", num_images=1)
    stage.admit(request)
    assert prefill(stage) == ["r"], "the text before its picture"
    stage.leave()
    assert moved(pools) == []
    stage.embedded(make_embedded("r", request.units[0]))
    stage.pulled(request.units[0].hash, None)
    assert prefill(stage) == ["r"]
    assert [to for to, _ in sent(pools, Prefilled)] == ["d0"]
    assert stage.is_empty
    assert len(pools.leases) == 1


def test_what_a_request_had_in_transfer_when_it_was_given_back_settles_first():
    stage, pools = make_prefill()
    request = make_request("r", num_images=1, text=0)
    stage.admit(request)
    prefill(stage)
    stage.embedded(make_embedded("r", request.units[0], lease=4))
    stage.leave()
    assert moved(pools) == ["r"]
    assert not stage.is_empty, "its blocks are being written"
    stage.pulled(request.units[0].hash, None)
    assert sent(pools) == [("e0", Release(4))]
    assert stage.is_empty
    pools.assert_idle()


def test_what_was_computed_and_had_to_be_given_up_is_given_back_too():
    stage, pools = make_prefill()
    stage.admit(make_request("r", num_images=1))
    prefill(stage)
    stage.leave()
    assert not stage.is_empty
    assert pools.kv.reclaim_waiting()
    prefill(stage)
    assert moved(pools) == ["r"]
    pools.assert_idle()


def test_a_submit_or_a_ticket_that_comes_while_prefill_leaves_goes_back():
    stage, pools = make_prefill()
    stage.leave()
    stage.embedded(make_embedded("r", make_unit("r-0"), lease=2))
    stage.admit(make_request("r", num_images=1))
    stage.embedded(make_embedded("r", make_unit("r-0"), lease=3))
    assert [message.lease for _, message in sent(pools, Release)] == [2, 3]
    stage.admit(make_request("s"))
    assert moved(pools) == ["s"]


def test_a_request_whose_ticket_was_given_back_before_it_came_is_not_taken_in_without():
    stage, pools = make_prefill()
    stage.embedded(make_embedded("before", make_unit("before-0"), lease=2))
    stage.leave()
    stage.embedded(make_embedded("while", make_unit("while-0"), lease=3))
    assert [message.lease for _, message in sent(pools, Release)] == [2, 3]
    stage.stay()
    for name in ("before", "while", "after"):
        stage.admit(make_request(name, num_images=1))
    assert moved(pools) == ["before", "while"]
    prefill(stage)
    assert stage.queues["prefill_running"] == 1


def test_an_instance_that_leaves_shares_nothing_more():
    stage, pools = make_prefill()
    unit = make_unit()
    pools.cache.hold(unit).ready = True
    stage.leave()
    stage.share(Share(RequestId("r"), unit, InstanceId("p1")))
    assert sent(pools) == [(FRONTEND, Wanted(RequestId("r"), (unit.hash,)))]
    stage.stay()
    stage.share(Share(RequestId("r"), unit, InstanceId("p1")))
    assert [type(message) for _, message in sent(pools)] == [Embedded]


def test_nobody_who_leaves_is_asked_to_share():
    stage, pools = make_prefill(d0="d", p1="p")
    leaves(pools, "p1")
    request = make_request("r", num_images=1, ordered=False)
    unit = request.units[0].hash
    stage.admit(replace(request, held={unit: InstanceId("p1")}))
    prefill(stage)
    assert sent(pools) == [(FRONTEND, Wanted(RequestId("r"), (unit,)))]


def test_units_that_an_encode_instance_gives_back_are_asked_for_when_the_turn_of_their_request_comes():
    """Not before: whoever encodes them then does so behind the orders of younger requests."""
    stage, pools = make_prefill()
    pools.share.max_blocks = 2
    for name in "ab":
        stage.admit(make_request(name, num_images=1, text=1))
    prefill(stage)
    for name in "ab":
        stage.wanted(Wanted(RequestId(name), (make_unit(f"{name}-0").hash,)))
    assert sent(pools) == [(FRONTEND, Wanted(RequestId("a"), (make_unit("a-0").hash,)))]
    stage.embedded(make_embedded("a", make_unit("a-0")))
    stage.pulled(make_unit("a-0").hash, None)
    prefill(stage)
    sent(pools)
    prefill(stage)
    assert sent(pools, Wanted) == [(FRONTEND, Wanted(RequestId("b"), (make_unit("b-0").hash,)))]


def test_units_that_are_given_back_before_their_request_comes_are_asked_for_too():
    stage, pools = make_prefill()
    stage.wanted(Wanted(RequestId("r"), (make_unit("r-0").hash,)))
    stage.admit(make_request("r", num_images=1))
    prefill(stage)
    assert sent(pools, Wanted) == [(FRONTEND, Wanted(RequestId("r"), (make_unit("r-0").hash,)))]
    stage.abort(RequestId("r"))
    stage.wanted(Wanted(RequestId("r"), (make_unit("r-0").hash,)))
    assert sent(pools) == []


def test_a_request_does_not_go_to_a_decode_instance_that_leaves_and_the_beginning_that_is_there_is_given_up():
    stage, pools = make_prefill(d0="d", d1="d")
    stage.admit(make_request("r", text=15))
    prefill(stage, 8)
    assert [to for to, _ in sent(pools, Prefilling)] == ["d0"]
    leaves(pools, "d0")
    prefill(stage, 8)
    assert [(to, type(message)) for to, message in sent(pools)] == [
        ("d0", Abort), (FRONTEND, Located), ("d1", Prefilled),
    ]  # fmt: skip


def test_an_instance_that_decodes_too_keeps_what_it_prefills_while_it_leaves_if_nobody_else_decodes():
    stage, pools = make_prefill("pd", x0="e")
    stage.admit(make_request("r", text=15))
    prefill(stage, 8)
    leaves(pools, "here")
    stage.leave()
    prefill(stage, 8)
    assert [to for to, _ in sent(pools, Prefilled)] == ["here"]


def test_kv_that_is_declined_goes_to_another_decode_instance():
    stage, pools = make_prefill(d0="d", d1="d")
    stage.admit(make_request("r", text=7))
    prefill(stage)
    [(to, order)] = sent(pools, Prefilled)
    leaves(pools, to)
    pools.leases.decline(order.ticket.lease)
    (_, located), (other, again) = sent(pools)
    assert (to, other) == ("d0", "d1")
    assert located == Located(RequestId("r"), "d1", "1")
    assert replace(again, ticket=order.ticket) == order
    assert again.ticket.blocks == order.ticket.blocks
    pools.leases.decline(order.ticket.lease)
    assert sent(pools) == [], "it is another lease now"
    pools.leases.release(again.ticket.lease)
    pools.assert_idle()


def test_kv_that_is_declined_where_nobody_else_decodes_is_freed_and_the_request_taken_up_again():
    stage, pools = make_prefill()
    stage.admit(make_request("r", text=7))
    prefill(stage)
    [(_, order)] = sent(pools, Prefilled)
    leaves(pools, "d0")
    pools.leases.decline(order.ticket.lease)
    assert moved(pools) == ["r"]
    pools.assert_idle()


def test_requests_whose_kv_nobody_will_read_any_more_are_taken_up_again():
    stage, pools = make_prefill()
    stage.admit(make_request("r", text=7))
    prefill(stage)
    sent(pools)
    reader_lost(pools.near, pools.leases, InstanceId("d0"))
    assert moved(pools) == ["r"]
    pools.assert_idle()


# ---- decode


def test_sequences_go_where_room_is_the_youngest_first_and_the_others_end_here():
    stage, pools = make_decode()
    for name in ("old", "young"):
        arrive(stage, name)
    decode(stage)
    sent(pools)
    leaves(pools, "d0")
    stage.leave({InstanceId("d1"): 2, InstanceId("d2"): 4})  # 9 tokens: 3 blocks and one more
    assert decode(stage) == ["old"]
    (to_frontend, located), (to, order) = sent(pools)
    assert (to_frontend, located) == (FRONTEND, Located(RequestId("young"), "d2", "1"))
    assert to == "d2"
    assert isinstance(order, Prefilled)
    assert order.token_ids == [*range(100, 108), 5]
    assert (order.num_prompt_tokens, order.ticket.num_tokens, len(order.ticket.blocks)) == (7, 8, 2)
    while not stage.is_empty:
        assert decode(stage) == ["old"]
    assert sent(pools) == []
    assert pools.kv.usage().used == 2
    pools.leases.release(order.ticket.lease)
    pools.assert_idle()


def test_a_sequence_in_a_batch_that_is_not_committed_is_handed_over_after_it():
    stage, pools = make_decode()
    arrive(stage, "r")
    plan = stage.schedule()
    sent(pools)
    stage.leave({InstanceId("d1"): 9})
    assert sent(pools) == []
    stage.commit(plan.chunks, [SampledToken(5)])
    assert decode(stage) == []
    [(_, order)] = sent(pools, Prefilled)
    assert len(order.token_ids) == 9


def test_what_was_handed_over_goes_on_exactly_where_it_was():
    """Over any number of instances, with the same token indices and the same hashes as without."""
    tokens = []
    order = replace(make_prefilled("r", 7, 20), prompt_hashes=prompt_hashes(b"root", range(100, 107), (), (), 4))
    for _ in range(4):
        stage, pools = make_decode()
        stage.admit(order)
        stage.pulled(RequestId("r"), None)
        for _ in range(4):
            decode(stage)
        tokens += [update.index for update in pools.near.out.tokens]
        sent(pools)
        stage.leave({InstanceId("d1"): 99})
        decode(stage)
        [(_, order)] = sent(pools, Prefilled)
        order = replace(order, ticket=replace(order.ticket, holder=InstanceId("d2")))
        found = pools.kv.find(prompt_hashes(b"root", order.token_ids, (), (), BLOCK_TOKENS), order.ticket.num_tokens)
        assert found == order.ticket.blocks[: order.ticket.num_tokens // BLOCK_TOKENS]
    assert tokens == list(range(1, 17))
    assert order.token_ids == [*range(100, 108), *[5] * 16]


def test_recurrent_states_move_with_the_sequence():
    stage, pools = make_decode(state_blocks=2)
    order = make_prefilled("r", 7)
    stage.admit(replace(order, ticket=replace(order.ticket, blocks=[9, 8, 7, 6])))
    stage.pulled(RequestId("r"), None)
    stage.leave({InstanceId("d1"): 5})
    assert decode(stage) == []
    [(_, order)] = sent(pools, Prefilled)
    assert (order.ticket.blocks, order.ticket.num_tokens) == ([0, 1, 2, 3], 7)


def test_an_instance_that_leaves_or_is_gone_is_handed_nothing():
    stage, pools = make_decode()
    for name in "ab":
        arrive(stage, name)
    leaves(pools, "d1")
    without(pools, "d2")
    stage.leave({InstanceId("d1"): 99, InstanceId("d2"): 99})
    sent(pools)
    assert decode(stage) == ["a", "b"]
    assert sent(pools) == []


def test_what_waits_for_space_is_declined_and_goes_on_waiting_where_nobody_else_decodes():
    stage, pools = make_decode(kv_blocks=5)
    for lease, name in enumerate("abc"):
        stage.admit(make_prefilled(name, 8, lease=lease))
    stage.pulled(RequestId("a"), None)
    sent(pools)
    others = pools.near.table
    without(pools, "d1", "d2", "x0")
    stage.leave({})
    decode(stage)
    assert sent(pools) == []
    pools.near.table = RoutingTable(9, others.peers)
    decode(stage)
    assert sent(pools) == [("p0", Declined(1)), ("p0", Declined(2))]
    stage.admit(make_prefilled("d", 8, lease=3))
    assert sent(pools) == [("p0", Declined(3))]
    stage.stay()
    stage.admit(make_prefilled("d", 8, lease=4))
    assert stage.queues == {"decode_waiting": 1, "decode_running": 1}


def test_kv_that_came_ahead_is_given_up_even_if_it_is_being_written():
    stage, pools = make_decode()
    for lease, name in enumerate(("here", "coming")):
        ticket = make_ticket("p0", lease, "kv", 4)
        stage.prefilling(Prefilling(RequestId(name), 11, BlockHashes(), ticket))
    stage.pulled(RequestId("here"), None)
    stage.leave({})
    decode(stage)
    assert [*stage._arriving] == ["coming"]
    stage.pulled(RequestId("coming"), None)
    decode(stage)
    assert stage.is_empty
    sent(pools)
    stage.prefilling(Prefilling(RequestId("more"), 11, BlockHashes(), make_ticket("p0", 7, "kv", 4)))
    assert sent(pools) == [("p0", Release(7))]
    pools.assert_idle()


def test_what_is_on_its_way_is_handed_over_when_it_is_here():
    stage, pools = make_decode()
    stage.admit(make_prefilled("r"))
    stage.leave({InstanceId("d1"): 9})
    assert decode(stage) == []
    assert sent(pools) == []
    stage.pulled(RequestId("r"), None)
    assert decode(stage) == []
    assert [to for to, _ in sent(pools, Prefilled)] == ["d1"]


def test_an_offloaded_sequence_comes_back_and_is_handed_over_then():
    stage, pools = make_decode(kv_blocks=5)
    for name in ("old", "young"):
        arrive(stage, name, max_tokens=12)
    while not stage.num_offloads:
        decode(stage)
    sent(pools)
    stage.leave({InstanceId("d1"): 5})
    decode(stage)
    [(_, order)] = sent(pools, Prefilled)
    assert order.request_id == "old"
    pools.leases.release(order.ticket.lease)
    stage.leave({InstanceId("d1"): 5})
    assert decode(stage) == ["young"], "restored"
    decode(stage)
    [(_, order)] = sent(pools, Prefilled)
    assert order.request_id == "young"
    pools.leases.release(order.ticket.lease)
    assert stage.is_empty
    pools.assert_idle()


def test_what_is_declined_goes_on_here_and_its_decliner_is_given_nothing_more():
    stage, pools = make_decode()
    for name in "ab":
        arrive(stage, name)
    stage.leave({InstanceId("d1"): 4})
    sent(pools)
    assert decode(stage) == ["b"]
    [(_, order)] = sent(pools, Prefilled)
    pools.leases.decline(order.ticket.lease)
    assert decode(stage) == ["b", "a"]
    assert sent(pools) == []


def test_what_is_declined_after_its_request_was_aborted_is_freed():
    stage, pools = make_decode()
    arrive(stage, "r")
    stage.leave({InstanceId("d1"): 4})
    decode(stage)
    [(_, order)] = sent(pools, Prefilled)
    stage.abort(RequestId("r"))
    assert pools.kv.usage().used, "it may be read at this moment"
    pools.leases.decline(order.ticket.lease)
    pools.assert_idle()


def test_nothing_waits_here_for_space_while_kv_of_this_instance_waits_for_others():
    """Else two instances that leave and stay by turns could wait for each other for ever."""
    stage, pools = make_decode(kv_blocks=5)
    arrive(stage, "r")
    stage.leave({InstanceId("d1"): 9})
    decode(stage)
    [(_, order)] = sent(pools, Prefilled)
    stage.stay()
    stage.admit(make_prefilled("large", 12, lease=2))
    assert sent(pools) == [("p0", Declined(2))]
    stage.admit(make_prefilled("small", 3, lease=3))
    assert sent(pools) == []
    assert [pull.key for pull in pools.near.out.pulls] == ["r", "small"]
    pools.leases.release(order.ticket.lease)
    stage.admit(make_prefilled("large", 12, lease=4))
    assert stage.queues["decode_waiting"] == 2


@pytest.mark.parametrize(("role", "holder", "leaving", "waits"), [
    ("d", "p0", False, True), ("d", "x0", False, True), ("d", "x0", True, False), ("d", "p0", True, True),
    ("pd", "p0", False, True), ("pd", "x0", False, False),
])  # fmt: skip
def test_who_may_wait_here_for_space(role, holder, leaving, waits):
    stage, pools = make_decode(5, role)
    arrive(stage, "r", num_prompt_tokens=12)
    sent(pools)
    if leaving:
        leaves(pools, holder)
    stage.admit(make_prefilled("next", 12, lease=7, holder=holder))
    assert sent(pools) == ([] if waits else [(holder, Declined(7))])


def test_what_waits_for_kv_of_an_instance_that_is_lost_is_taken_up_again_and_what_came_ahead_forgotten():
    stage, pools = make_decode(kv_blocks=10)
    arrive(stage, "r", num_prompt_tokens=12)
    stage.prefilling(Prefilling(RequestId("ahead"), 11, BlockHashes(), make_ticket("x0", 7, "kv", 4)))
    stage.admit(make_prefilled("next", 32, lease=8, holder="x0"))
    stage.admit(make_prefilled("other", 32, lease=9))
    sent(pools)
    without(pools, "x0")
    stage.lost(InstanceId("x0"))
    assert moved(pools) == ["next"]
    stage.pulled(RequestId("ahead"), RuntimeError("gone"))
    assert moved(pools) == []
    assert stage.queues == {"decode_waiting": 2, "decode_running": 0}


def test_a_ticket_of_a_former_incarnation_is_not_pulled_but_its_request_taken_up_again():
    stage, pools = make_decode()
    order = make_prefilled("r", lease=4)
    stage.admit(replace(order, ticket=replace(order.ticket, epoch="0")))
    assert [type(message) for _, message in sent(pools)] == [Failed, Release]
    assert pools.near.out.pulls == []
    assert stage.is_empty


# ---- stages that are not here


def test_what_is_for_a_stage_that_is_not_served_here_goes_back():
    near = make_near("x", x="e")
    unit = make_unit()
    request, order, embedded = make_request("r"), make_prefilled("r", lease=3), make_embedded("r", lease=4)
    for message in (
        request,
        make_order("r", unit, "p0"),
        Share(RequestId("r"), unit, InstanceId("p0")),
        embedded,
        order,
    ):
        assert turn_away(near, message)
    assert turn_away(near, Wanted(RequestId("r"), (unit.hash,)))
    assert not turn_away(near, Abort(RequestId("r")))
    failed, wanted, shared, released, declined = near.out.messages
    assert (failed[0], failed[1].retry, failed[1].status) == (FRONTEND, True, 503)
    assert wanted == ("p0", Wanted(RequestId("r"), (unit.hash,)))
    assert shared == (FRONTEND, Wanted(RequestId("r"), (unit.hash,)))
    assert (released, declined) == (("e0", Release(4)), ("p0", Declined(3)))


def test_who_left_is_remembered_while_the_instance_has_another_role():
    """What is late for a former life must not wait for requests that never come."""
    near = make_near("x0", x0="pd", p0="p", e0="e")
    pools = make_pools(near=near)
    for stage in (Stage.PREFILL, Stage.DECODE):
        make_stage(stage, pools).abort(RequestId("r"))
    new = make_pools(near=near)
    prefill_again, decode_again = make_stage(Stage.PREFILL, new), make_stage(Stage.DECODE, new)
    prefill_again.embedded(make_embedded("r", lease=4))
    decode_again.prefilling(Prefilling(RequestId("r"), 11, BlockHashes(), make_ticket("p0", 7, "kv", 4)))
    assert near.out.messages == [("e0", Release(4)), ("p0", Release(7))]
    assert near.out.pulls == []
