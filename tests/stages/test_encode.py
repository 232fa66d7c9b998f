"""Encode: FCFS batches, nothing encoded twice, tickets for what is here."""

import pytest

from tests.builders import Pools, make_media, make_near, make_order, make_pools, make_stage, make_unit
from triptych.core import EncodeWork, InstanceId, RequestId, Stage
from triptych.errors import RequestError
from triptych.messages import FRONTEND, Embedded, Encode, Failed
from triptych.stages.encode import EncodeStage


def make_encode(embedding_blocks: int = 8) -> tuple[EncodeStage, Pools]:
    pools = make_pools(embedding_blocks=embedding_blocks, near=make_near("e0", e0="e", p0="p", d0="d"))
    return make_stage(Stage.ENCODE, pools), pools


def encode(stage: EncodeStage, budget: int = 16) -> list[EncodeWork]:
    works = stage.schedule(budget)
    stage.commit(works, [None] * len(works))
    return works


def sent(pools: Pools) -> list[tuple[str, object]]:
    """Takes what was sent so far."""
    messages, pools.near.out.messages = pools.near.out.messages, []
    return messages


def test_an_encoded_unit_is_announced_to_its_prefill_instance_under_a_lease():
    stage, pools = make_encode()
    unit = make_unit("cat", 9)
    stage.admit(make_order("r", unit, "p0"))
    assert [(work.unit, work.blocks) for work in encode(stage)] == [(unit, [0, 1, 2])]
    [(to, message)] = sent(pools)
    assert to == "p0"
    assert isinstance(message, Embedded)
    assert (message.request_id, message.unit) == ("r", unit.hash)
    ticket = message.ticket
    assert (ticket.holder, ticket.epoch, ticket.region, ticket.blocks, ticket.num_tokens) == (
        "e0", "1", "embedding", [0, 1, 2], 9,
    )  # fmt: skip
    assert pools.cache.usage().used == 3
    pools.leases.release(ticket.lease)
    assert (pools.cache.usage().used, pools.cache.usage().cached) == (0, 3)
    pools.assert_idle()


def test_batches_are_cut_at_the_token_budget_in_order_of_arrival():
    stage, _ = make_encode(embedding_blocks=20)
    for i in range(5):
        stage.admit(make_order(f"r{i}", make_unit(f"u{i}", 7)))
    assert [len(encode(stage)) for _ in range(4)] == [2, 2, 1, 0]


def test_a_unit_larger_than_the_budget_goes_alone():
    stage, _ = make_encode(embedding_blocks=20)
    for name, size in (("small", 4), ("large", 40), ("last", 4)):
        stage.admit(make_order(name, make_unit(name, size)))
    assert [[work.unit.num_tokens for work in encode(stage)] for _ in range(3)] == [[4], [40], [4]]


def test_a_cached_unit_is_announced_without_being_encoded_again():
    stage, pools = make_encode()
    stage.admit(make_order("first"))
    encode(stage)
    stage.admit(make_order("second"))
    assert encode(stage) == []
    assert [message.request_id for _, message in sent(pools)] == ["first", "second"]
    assert (stage.num_computed, pools.cache.num_hits) == (1, 1)
    assert len(pools.leases) == 2


def test_equal_units_of_one_batch_are_encoded_once_and_announced_to_each():
    stage, pools = make_encode()
    stage.admit(make_order("a", prefill="p0"))
    stage.admit(make_order("b", prefill="p1"))
    assert len(encode(stage)) == 1
    assert [(to, message.request_id) for to, message in sent(pools)] == [("p0", "a"), ("p1", "b")]


def test_embeddings_that_nobody_pulls_stop_the_schedule_until_a_lease_is_released():
    stage, pools = make_encode(embedding_blocks=4)
    for i in range(3):
        stage.admit(make_order(f"r{i}", make_unit(f"u{i}", 8)))
    assert len(encode(stage)) == 2
    assert encode(stage) == []
    assert stage.queues == {"encode_waiting": 1, "encode_running": 0}
    pools.leases.release(sent(pools)[0][1].ticket.lease)
    assert len(encode(stage)) == 1


def test_a_unit_that_is_too_large_for_the_pool_fails_with_both_numbers():
    stage, pools = make_encode(embedding_blocks=2)
    stage.admit(make_order("r", make_unit("huge", 9)))
    [(to, message)] = sent(pools)
    assert to == FRONTEND
    assert isinstance(message, Failed)
    assert "3 embedding blocks" in message.message
    assert "has 2" in message.message


def test_an_undecodable_picture_fails_every_request_that_has_it_and_no_other():
    stage, pools = make_encode()
    bad, good = make_unit("bad", 4), make_unit("good", 4)
    for name, unit in (("a", bad), ("b", bad), ("c", good)):
        stage.admit(make_order(name, unit))
    works = stage.schedule(16)
    stage.commit(works, [RequestError("not a picture", code="bad_media"), None])
    failed = [message for _, message in sent(pools) if isinstance(message, Failed)]
    assert [(m.request_id, m.status, m.code, m.unit) for m in failed] == [
        ("a", 400, "bad_media", bad.hash),
        ("b", 400, "bad_media", bad.hash),
    ]
    assert pools.cache.find(bad.hash) is None
    assert len(pools.leases) == 1
    assert stage.num_computed == 1


def test_an_aborted_request_is_forgotten_while_it_waits():
    stage, _ = make_encode()
    stage.admit(make_order("r"))
    stage.abort(RequestId("r"))
    stage.abort(RequestId("r"))
    assert encode(stage) == []


@pytest.mark.parametrize("error", [None, RequestError("not a picture")])
def test_an_aborted_request_is_not_answered_but_what_was_encoded_is_kept(error):
    stage, pools = make_encode()
    stage.admit(make_order("r"))
    works = stage.schedule(16)
    stage.abort(RequestId("r"))
    stage.commit(works, [error])
    assert sent(pools) == []
    pools.assert_idle()
    assert pools.cache.usage().cached == (2 if error is None else 0)


def test_the_next_batch_waits_for_the_commit_of_the_last():
    stage, _ = make_encode()
    stage.admit(make_order("r"))
    stage.schedule(16)
    with pytest.raises(AssertionError, match="1 units of the last batch were not committed"):
        stage.schedule(16)


def test_a_unit_that_is_being_pulled_into_this_cache_is_waited_for():
    stage, pools = make_encode()
    unit = make_unit()
    entry = pools.cache.hold(unit)
    entry.writing = True
    stage.admit(make_order("r", unit))
    assert encode(stage) == []
    entry.writing, entry.ready = False, True
    assert encode(stage) == []
    assert [type(message) for _, message in sent(pools)] == [Embedded]
    assert pools.cache.num_hits == 1


def test_space_that_prefill_reserved_here_is_what_encode_fills():
    stage, pools = make_encode()
    unit = make_unit()
    reserved = pools.cache.hold(unit)
    stage.admit(make_order("r", unit, "e0"))
    assert encode(stage)[0].blocks == reserved.blocks
    assert reserved.ready


def test_the_leases_of_a_dead_prefill_instance_free_the_cache():
    stage, pools = make_encode()
    stage.admit(make_order("r", prefill="p0"))
    encode(stage)
    pools.leases.release_reader(InstanceId("p0"))
    pools.assert_idle()


def test_queued_tokens_are_rows_still_to_be_encoded():
    stage, _ = make_encode()
    for i in range(2):
        stage.admit(make_order(f"r{i}", make_unit(f"u{i}", 8)))
    assert stage.queued_tokens == 16
    works = stage.schedule(8)
    assert stage.queued_tokens == 16
    stage.commit(works, [None])
    assert stage.queued_tokens == 8


def test_the_units_of_an_order_are_encoded_and_announced_one_by_one():
    stage, pools = make_encode()
    units = tuple(make_unit(f"tile-{i}", 8) for i in range(3))
    stage.admit(Encode(RequestId("r"), make_media(), units, InstanceId("p0")))
    assert [work.unit for work in encode(stage, budget=16)] == list(units[:2])
    assert [message.unit for _, message in sent(pools)] == [units[0].hash, units[1].hash]
    assert [work.unit for work in encode(stage, budget=16)] == [units[2]]


def test_who_gets_a_unit_is_told_whether_it_was_encoded_for_that_order():
    stage, pools = make_encode()
    for name in "ab":
        stage.admit(make_order(name))
    encode(stage)
    stage.admit(make_order("c"))
    encode(stage)
    assert [(m.request_id, m.computed) for _, m in sent(pools)] == [("a", True), ("b", False), ("c", False)]
    assert (stage.num_computed, pools.cache.num_hits) == (1, 1)


def test_a_unit_that_was_evicted_is_encoded_again():
    stage, pools = make_encode(embedding_blocks=2)
    for name in ("cat", "dog", "cat"):
        stage.admit(make_order(name, make_unit(name)))
        assert len(encode(stage)) == 1
        pools.leases.release(sent(pools)[0][1].ticket.lease)
    assert pools.cache.evicted == [make_unit("cat").hash, make_unit("dog").hash]
    assert stage.num_computed == 3


def test_a_unit_that_somebody_reads_is_not_evicted_for_the_next():
    stage, pools = make_encode(embedding_blocks=2)
    for name in ("cat", "dog"):
        stage.admit(make_order(name, make_unit(name)))
    assert len(encode(stage)) == 1
    assert encode(stage) == []
    pools.leases.release(sent(pools)[0][1].ticket.lease)
    assert [work.unit for work in encode(stage)] == [make_unit("dog")]


def test_a_tile_that_is_too_large_fails_the_request_and_is_named():
    stage, pools = make_encode(embedding_blocks=2)
    units = (make_unit("small", 8), make_unit("huge", 9))
    stage.admit(Encode(RequestId("r"), make_media(), units, InstanceId("p0")))
    [(to, failed)] = sent(pools)
    assert (to, failed.unit, failed.code) == (FRONTEND, units[1].hash, "request_too_large")
    assert stage.queues["encode_waiting"] == 1
