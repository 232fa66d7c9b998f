"""Prefill: reserve, pull, chunks over the ready prefix, what caches save, and the hand-over."""

import pytest
from msgspec.structs import replace

from tests.builders import (
    BLOCK_TOKENS,
    Pools,
    make_embedded,
    make_near,
    make_pools,
    make_request,
    make_stage,
    make_unit,
)
from triptych.core import Chunk, FinishReason, InstanceId, RequestId, SampledToken, Stage
from triptych.memory.kv_cache import KVCache
from triptych.messages import (
    FRONTEND,
    Abort,
    Embedded,
    Failed,
    Load,
    Located,
    Prefilled,
    Prefilling,
    Release,
    Share,
    Submit,
    Wanted,
)
from triptych.routing import RoutingTable
from triptych.stages.prefill import PrefillStage

BUDGET = 64


def make_prefill(
    kv_blocks: int = 32, embedding_blocks: int = 8, role: str = "p", state_blocks: int = 0, **options: object
) -> tuple[PrefillStage, Pools]:
    near = make_near("here", here=role, e0="e", d0="d", p1="p")
    pools = make_pools(kv_blocks, embedding_blocks, near)
    pools.kv = KVCache(kv_blocks, BLOCK_TOKENS, state_blocks=state_blocks)
    return make_stage(Stage.PREFILL, pools, **options), pools


def run(stage: PrefillStage, budget: int = BUDGET, token: int = 5) -> list[Chunk]:
    chunks = stage.schedule(budget)
    stage.commit(chunks, [SampledToken(token) for chunk in chunks if chunk.samples])
    return chunks


def lengths(chunks: list[Chunk]) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request_id, chunk.start, chunk.length) for chunk in chunks]


def pulls(pools: Pools) -> list[bytes]:
    """Takes the keys of the pulls that were begun so far."""
    begun, pools.near.out.pulls = pools.near.out.pulls, []
    return [pull.key for pull in begun]


def sent(pools: Pools, kind: type | None = None) -> list[tuple[str, object]]:
    messages, pools.near.out.messages = pools.near.out.messages, []
    return [(to, message) for to, message in messages if kind is None or isinstance(message, kind)]


def released(pools: Pools) -> list[int]:
    return [message.lease for _, message in sent(pools, Release)]


def read_all(pools: Pools) -> None:
    """Everything that was announced is pulled."""
    for lease in list(pools.leases._leases):
        pools.leases.release(lease)


def bring(stage: PrefillStage, request: Submit, lease: int = 1) -> None:
    """Everything that a started request needs is announced and pulled."""
    for unit in request.units:
        stage.embedded(make_embedded(request.request_id, unit, lease))
        if unit.hash in stage._intake.pulling:
            stage.pulled(unit.hash, None)


def leave_behind(stage: PrefillStage, pools: Pools, request: Submit) -> None:
    """A request that was prefilled, decoded elsewhere, and is gone: what it had is in the caches."""
    stage.admit(request)
    run(stage)
    bring(stage, request)
    while any(stage.queues.values()):
        run(stage)
    read_all(pools)
    pulls(pools)
    sent(pools)
    pools.near.out.tokens.clear()


def asked(pools: Pools) -> list[tuple[str, object]]:
    return [(to, message) for to, message in sent(pools) if isinstance(message, (Share, Wanted))]


def test_a_text_prompt_is_prefilled_reported_and_handed_on():
    stage, pools = make_prefill()
    stage.admit(make_request("r", text=7))
    assert lengths(run(stage)) == [("r", 0, 7)]
    [update] = pools.near.out.tokens
    assert (update.request_id, update.token_id, update.finish) == ("r", 5, None)
    (to_frontend, located), (to_decode, order) = sent(pools)
    assert (to_frontend, located) == (FRONTEND, Located(RequestId("r"), "d0", "1"))
    assert to_decode == "d0"
    assert isinstance(order, Prefilled)
    assert order.token_ids == [*range(100, 107), 5]
    assert (order.ticket.region, order.ticket.blocks, order.ticket.num_tokens) == ("kv", [0, 1], 7)
    assert pools.kv.usage().used == 2, "the KV stays until decode has it"
    pools.leases.release(order.ticket.lease)
    pools.assert_idle()


def test_a_request_that_ends_with_its_first_token_is_not_handed_on():
    stage, pools = make_prefill()
    stage.admit(make_request("r", max_tokens=1))
    run(stage)
    assert pools.near.out.tokens[0].finish is FinishReason.LENGTH
    assert sent(pools) == []
    pools.assert_idle()


def test_first_tokens_come_in_order_of_arrival():
    stage, pools = make_prefill()
    for i in range(4):
        stage.admit(make_request(f"r{i}", text=10 - i))
    for _ in range(20):
        assert sum(chunk.length for chunk in run(stage, budget=4)) <= 4
    assert not any(stage.queues.values())
    assert [update.request_id for update in pools.near.out.tokens] == ["r0", "r1", "r2", "r3"]


def test_a_long_prompt_is_cut_into_chunks_and_the_rest_of_the_budget_goes_to_the_next():
    stage, _ = make_prefill()
    stage.admit(make_request("long", text=20))
    stage.admit(make_request("short", text=5))
    assert lengths(run(stage, 16)) == [("long", 0, 16)]
    assert lengths(run(stage, 16)) == [("long", 16, 4), ("short", 0, 5)]


def test_no_budget_means_no_chunk():
    stage, _ = make_prefill()
    stage.admit(make_request("r"))
    assert run(stage, 0) == []
    assert run(stage, -3) == []


def test_embeddings_are_pulled_into_reserved_blocks_and_spliced():
    stage, pools = make_prefill()
    request = make_request("r", num_images=2)
    stage.admit(request)
    run(stage)
    for lease, unit in enumerate(request.units):
        stage.embedded(make_embedded("r", unit, lease))
    assert pulls(pools) == [unit.hash for unit in request.units]
    for unit in request.units:
        stage.pulled(unit.hash, None)
    assert released(pools) == [0, 1]
    [chunk] = run(stage)
    assert (chunk.start + chunk.length, chunk.embedding_blocks) == (25, {0: [0, 1], 1: [2, 3]})
    assert pools.cache.usage().used == 0


def test_the_ready_prefix_is_prefilled_while_later_units_are_on_their_way():
    stage, _pools = make_prefill()
    request = make_request("r", num_images=2)  # 3 text, 8 rows, 3 text, 8 rows, 3 text
    stage.admit(request)
    assert lengths(run(stage)) == [("r", 0, 3)]
    assert run(stage) == []
    first, second = request.units
    stage.embedded(make_embedded("r", second, 2))
    stage.pulled(second.hash, None)
    assert run(stage) == [], "the second picture is here, the first is not"
    stage.embedded(make_embedded("r", first, 1))
    stage.pulled(first.hash, None)
    assert lengths(run(stage)) == [("r", 3, 22)]


def test_without_streaming_nothing_runs_and_no_kv_is_held_before_all_embeddings_are_here():
    stage, pools = make_prefill(streamed=False)
    request = make_request("r", num_images=1)
    stage.admit(request)
    stage.admit(make_request("text", text=9))
    assert lengths(run(stage)) == [("text", 0, 9)]
    assert pools.kv.usage().used == 3
    stage.embedded(make_embedded("r", request.units[0]))
    stage.pulled(request.units[0].hash, None)
    assert lengths(run(stage)) == [("r", 0, 14)]


def test_a_chunk_names_only_the_embeddings_that_fall_in():
    stage, _ = make_prefill()
    request = make_request("r", num_images=2)
    stage.admit(request)
    run(stage, 1)
    for unit in request.units:
        stage.embedded(make_embedded("r", unit))
        stage.pulled(unit.hash, None)
    seen = [sorted(chunk.embedding_blocks) for _ in range(8) for chunk in run(stage, 4)]
    assert seen == [[0], [0], [0], [1], [1], [1]]


def test_whole_spans_are_never_cut():
    stage, _ = make_prefill(whole_spans=True)
    request = make_request("r", num_images=2)  # spans at 3..11 and 14..22 of 25
    stage.admit(request)
    run(stage, 1)
    for unit in request.units:
        stage.embedded(make_embedded("r", unit))
        stage.pulled(unit.hash, None)
    assert lengths(c for _ in range(9) for c in run(stage, 5)) == [
        ("r", 1, 2), ("r", 3, 8), ("r", 11, 3), ("r", 14, 8), ("r", 22, 3),
    ]  # fmt: skip


def test_equal_units_in_one_request_are_held_and_pulled_once():
    stage, pools = make_prefill()
    unit = make_unit("cat", 8)
    stage.admit(make_request("r", (unit, unit)))
    run(stage)
    assert pools.cache.usage().used == 2
    stage.embedded(make_embedded("r", unit))
    assert pulls(pools) == [unit.hash]
    stage.pulled(unit.hash, None)
    [chunk] = run(stage)
    assert chunk.embedding_blocks == {0: [0, 1], 1: [0, 1]}
    read_all(pools)
    pools.assert_idle()


def test_a_unit_that_another_request_has_here_needs_no_second_pull():
    stage, pools = make_prefill()
    unit = make_unit("cat", 8)
    for name in ("a", "b"):
        stage.admit(make_request(name, (unit,)))
    run(stage)
    stage.embedded(make_embedded("a", unit, lease=1, holder="e0"))
    stage.embedded(make_embedded("b", unit, lease=1, holder="e1"))
    assert pulls(pools) == [unit.hash]
    stage.pulled(unit.hash, None)
    assert [(to, message.lease) for to, message in sent(pools, Release)] == [("e0", 1), ("e1", 1)]
    assert [request for request, *_ in lengths(run(stage))] == ["a", "b"]


def test_a_cached_unit_is_used_before_its_ticket_comes_and_the_ticket_is_given_back():
    stage, pools = make_prefill()
    unit = make_unit("cat", 8)
    stage.admit(make_request("a", (unit,)))
    run(stage)
    stage.embedded(make_embedded("a", unit, lease=1))
    stage.pulled(unit.hash, None)
    run(stage)
    stage.admit(make_request("b", (unit,)))
    assert lengths(run(stage)) == [("b", 0, 14)]
    released(pools)
    stage.embedded(make_embedded("b", unit, lease=2))
    assert released(pools) == [2]


def test_a_ticket_that_comes_before_its_request_is_kept_for_it():
    stage, pools = make_prefill()
    request = make_request("r", num_images=1)
    stage.embedded(make_embedded("r", request.units[0]))
    assert sent(pools) == []
    stage.admit(request)
    run(stage)
    assert pulls(pools) == [request.units[0].hash]


def test_a_ticket_for_a_request_that_left_is_given_back():
    stage, pools = make_prefill()
    stage.abort(RequestId("r"))
    stage.embedded(make_embedded("r", lease=4))
    assert released(pools) == [4]


def test_a_second_ticket_for_the_same_unit_is_given_back():
    stage, pools = make_prefill()
    request = make_request("r", num_images=1)
    stage.admit(request)
    for lease in (1, 2):
        stage.embedded(make_embedded("r", request.units[0], lease))
    assert released(pools) == [2]


def test_a_ticket_of_a_restarted_holder_is_not_pulled():
    stage, pools = make_prefill()
    request = make_request("r", num_images=1)
    stage.admit(request)
    run(stage)
    pools.near.epoch = "2"
    stage.embedded(make_embedded("r", request.units[0], holder="here"))
    assert pulls(pools) == []


@pytest.mark.parametrize("arrives_before_the_abort", [False, True])
def test_an_abort_while_a_pull_is_writing_keeps_the_blocks_until_it_settles(arrives_before_the_abort):
    stage, pools = make_prefill(embedding_blocks=2)
    request = make_request("r", num_images=1)
    stage.admit(request)
    run(stage)
    stage.embedded(make_embedded("r", request.units[0]))
    if arrives_before_the_abort:
        stage.admit(make_request("next", num_images=1))
    stage.abort(RequestId("r"))
    assert pools.cache.usage().used == 2
    assert released(pools) == [], "the holder must keep what is being read"
    stage.pulled(request.units[0].hash, None)
    assert released(pools) == [1]
    assert pools.cache.usage().used == 0
    pools.assert_idle()


def test_an_abort_gives_back_what_a_request_holds_wherever_it_stands():
    stage, pools = make_prefill(embedding_blocks=4, max_num_seqs=1)
    started, waiting = make_request("started", num_images=1), make_request("waiting", num_images=1)
    for lease, request in enumerate((started, waiting)):
        stage.admit(request)
        stage.embedded(make_embedded(request.request_id, request.units[0], lease))
    stage.embedded(make_embedded("early", lease=7))
    for name in ("early", "waiting", "waiting", "nobody"):
        stage.abort(RequestId(name))
    assert released(pools) == [7, 1]
    run(stage)
    stage.pulled(started.units[0].hash, None)
    stage.abort(RequestId("started"))
    pools.assert_idle()
    assert stage.queues == {"prefill_waiting": 0, "prefill_running": 0}


def test_a_chunk_whose_sequence_was_aborted_is_dropped_at_commit():
    stage, pools = make_prefill()
    stage.admit(make_request("gone"))
    stage.admit(make_request("stays"))
    chunks = stage.schedule(BUDGET)
    stage.abort(RequestId("gone"))
    stage.commit(chunks, [SampledToken(1), SampledToken(2)])
    assert [(update.request_id, update.token_id) for update in pools.near.out.tokens] == [("stays", 2)]


def test_a_prompt_that_can_never_fit_is_refused_with_both_numbers():
    stage, pools = make_prefill(kv_blocks=2)
    stage.embedded(make_embedded("r", lease=3))
    stage.admit(make_request("r", text=8))
    (_, failed), (_, release) = sent(pools)
    assert isinstance(failed, Failed)
    assert failed.status == 400
    assert "9 tokens" in failed.message
    assert "has 8" in failed.message
    assert release == Release(3)
    stage.embedded(make_embedded("r", lease=4))
    assert released(pools) == [4]


def test_media_that_can_never_fit_are_refused_with_both_numbers_and_equal_ones_count_once():
    stage, pools = make_prefill(embedding_blocks=4)
    cat = make_unit("cat", 8)
    stage.admit(make_request("fits", (cat, cat, make_unit("dog", 8))))
    stage.admit(make_request("large", num_images=3))
    [(_, failed)] = sent(pools)
    assert failed.request_id == "large"
    assert "6 embedding blocks" in failed.message
    assert "has 4" in failed.message


def test_a_request_without_space_for_its_embeddings_waits_and_so_do_those_with_media_behind_it():
    stage, _pools = make_prefill(embedding_blocks=6)
    for name, num_images in (("first", 2), ("second", 2), ("third", 1)):
        stage.admit(make_request(name, num_images=num_images))
    stage.admit(make_request("text"))
    assert [name for name, *_ in lengths(run(stage))] == ["first", "text"], "text waits for nobody's embeddings"
    assert stage.queues == {"prefill_waiting": 2, "prefill_running": 1}
    stage.abort(RequestId("first"))
    assert [name for name, *_ in lengths(run(stage))] == ["second", "third"]


def test_the_oldest_request_that_is_ready_waits_for_kv_before_younger_ones():
    stage, pools = make_prefill(kv_blocks=8)
    stage.admit(make_request("first", text=20))
    stage.admit(make_request("large", text=16))
    stage.admit(make_request("small", text=4))
    assert [name for name, *_ in lengths(run(stage))] == ["first"]
    assert run(stage) == [], "first still holds 5 of 8 blocks under its lease"
    read_all(pools)
    assert [name for name, *_ in lengths(run(stage))] == ["large", "small"]


def test_more_than_max_num_seqs_do_not_start():
    stage, _ = make_prefill(max_num_seqs=2)
    for i in range(3):
        stage.admit(make_request(f"r{i}"))
    assert len(run(stage)) == 2


def test_a_failed_pull_is_tried_again_with_another_request_s_ticket():
    stage, pools = make_prefill()
    unit = make_unit("cat", 8)
    for lease, name in enumerate(("a", "b")):
        stage.admit(make_request(name, (unit,)))
        stage.embedded(make_embedded(name, unit, lease))
    run(stage)
    assert pulls(pools) == [unit.hash]
    stage.pulled(unit.hash, RuntimeError("link down"))
    assert pulls(pools) == [unit.hash]
    stage.pulled(unit.hash, None)
    assert released(pools) == [0, 1]
    assert len(run(stage)) == 2


def test_a_failed_pull_without_another_ticket_has_the_requests_taken_up_again_that_had_theirs():
    stage, pools = make_prefill()
    unit = make_unit("cat", 8)
    for name in ("had", "expects"):
        stage.admit(make_request(name, (unit,)))
    run(stage)
    stage.embedded(make_embedded("had", unit, 1))
    stage.pulled(unit.hash, RuntimeError("link down"))
    messages = sent(pools)
    [failed] = [message for _, message in messages if isinstance(message, Failed)]
    assert (failed.request_id, failed.status, failed.code, failed.retry) == ("had", 503, "transfer_failed", True)
    assert [message.lease for _, message in messages if isinstance(message, Release)] == [1]
    pulls(pools)
    stage.embedded(make_embedded("expects", unit, 2))
    assert pulls(pools) == [unit.hash]
    stage.pulled(unit.hash, None)
    assert [name for name, *_ in lengths(run(stage))] == ["expects"]


def test_a_ticket_is_used_when_the_local_encode_step_that_was_to_fill_the_unit_failed():
    stage, pools = make_prefill(role="ep")
    unit = make_unit("cat", 8)
    stage.admit(make_request("r", (unit,)))
    run(stage)
    entry = pools.cache.find(unit.hash)
    entry.writing = True  # encode works on it for another request
    stage.embedded(make_embedded("r", unit))
    assert pulls(pools) == []
    entry.writing = False  # and could not decode it
    run(stage)
    assert pulls(pools) == [unit.hash]


def test_requests_that_miss_embeddings_give_their_kv_up_to_an_older_one_and_begin_again():
    stage, pools = make_prefill(kv_blocks=9)
    stage.admit(make_request("done", text=16))
    run(stage)
    older, younger = make_request("older", num_images=1, text=7), make_request("younger", num_images=1)
    for request in (older, younger):  # 6 and 4 blocks, of 5 that are free
        stage.admit(request)
    assert lengths(run(stage)) == [("younger", 0, 3)]
    read_all(pools)
    bring(stage, older)
    assert lengths(run(stage)) == [("older", 0, 22)]
    bring(stage, younger)
    read_all(pools)
    assert lengths(run(stage)) == [("younger", 0, 14)]


def test_without_a_decode_instance_the_request_is_to_be_taken_up_again():
    stage, pools = make_prefill()
    pools.near.table = make_near("here", here="p").table
    stage.admit(make_request("r"))
    run(stage)
    [(to, failed)] = sent(pools)
    assert (to, failed.status, failed.retry) == (FRONTEND, 503, True)
    pools.assert_idle()


def test_sequences_are_spread_over_decode_instances_by_what_they_will_cost():
    stage, pools = make_prefill()
    pools.near.table = make_near("here", here="p", d0="d", d1="d").table
    pools.near.decode_pace_s = 0.1
    stage.admit(make_request("long", max_tokens=100))
    for i in range(3):
        stage.admit(make_request(f"short{i}", max_tokens=10))
    run(stage)
    assert [to for to, _ in sent(pools, Prefilled)] == ["d0", "d1", "d1", "d1"]


def test_sequences_are_spread_before_anybody_has_decoded_a_token():
    stage, pools = make_prefill()
    pools.near.table = make_near("here", here="p", d0="d", d1="d").table
    for instance in ("d0", "d1"):
        pools.near.take_load(Load(InstanceId(instance), {}, {}, {"decode": 0.0}, {}, {"decode": 0.0}))
    for i in range(4):
        stage.admit(make_request(f"r{i}"))
    run(stage)
    assert sorted(to for to, _ in sent(pools, Prefilled)) == ["d0", "d0", "d1", "d1"]


def test_a_resubmitted_request_goes_on_behind_its_output():
    stage, pools = make_prefill()
    request = make_request("r", text=6, max_tokens=3)
    stage.admit(type(request)(RequestId("r"), [*request.token_ids, 1, 2], 6, (), (), request.sampling))
    assert lengths(run(stage)) == [("r", 0, 8)]
    assert pools.near.out.tokens[0].finish is FinishReason.LENGTH


def test_queued_tokens_are_prompt_tokens_still_to_be_computed():
    stage, _ = make_prefill()
    for i in range(2):
        stage.admit(make_request(f"r{i}", text=10))
    run(stage, 4)
    assert stage.queued_tokens == 16


# ---- what the KV cache saves


def test_a_request_with_a_cached_prefix_starts_behind_it_and_says_so():
    stage, pools = make_prefill()
    leave_behind(stage, pools, make_request("a", text=10, hashed=True))
    stage.admit(make_request("b", text=13, hashed=True))
    assert lengths(run(stage)) == [("b", 8, 5)]
    assert pools.near.out.tokens[0].num_cached == 8
    assert (stage.num_prompt_tokens, stage.num_cached_tokens) == (23, 8)


def test_the_last_token_is_always_computed():
    stage, pools = make_prefill()
    for name in "ab":
        leave_behind(stage, pools, make_request(name, text=8, hashed=True))
    stage.admit(make_request("c", text=8, hashed=True))
    assert lengths(run(stage)) == [("c", 4, 4)]


def test_the_kv_of_another_picture_is_not_used_though_all_tokens_are_equal():
    stage, pools = make_prefill()
    leave_behind(stage, pools, make_request("a", (make_unit("cat"),), text=4, hashed=True))
    other = make_request("b", (make_unit("dog"),), text=4, hashed=True)
    stage.admit(other)
    assert lengths(run(stage)) == [], "the text before it is here already"
    bring(stage, other)
    assert lengths(run(stage)) == [("b", 4, 12)]


def test_a_unit_that_a_cached_prefix_covers_is_neither_fetched_nor_waited_for_and_counts_as_prefix():
    stage, pools = make_prefill(embedding_blocks=2)
    leave_behind(stage, pools, make_request("a", (make_unit("cat"),), text=4, hashed=True))
    leave_behind(stage, pools, make_request("other", (make_unit("dog"),), text=4))
    assert pools.cache.find(make_unit("cat").hash) is None, "it needed the space"
    stage.num_units.clear()
    stage.admit(make_request("b", (make_unit("cat"),), text=4, hashed=True, ordered=False))
    [chunk] = run(stage)
    assert (chunk.start, chunk.length, chunk.embedding_blocks) == (12, 4, {})
    assert pulls(pools) == []
    assert asked(pools) == []
    assert dict(stage.num_units) == {"prefix": 1}


@pytest.mark.parametrize("early", [True, False])
def test_a_ticket_for_a_unit_that_a_cached_prefix_covers_is_given_back(early):
    stage, pools = make_prefill()
    unit = make_unit("cat")
    leave_behind(stage, pools, make_request("a", (unit,), text=4, hashed=True))
    stage.admit(make_request("b", (unit,), text=4, hashed=True))
    if early:
        stage.embedded(make_embedded("b", unit, lease=8))
        run(stage)
    else:
        run(stage, budget=1)
        stage.embedded(make_embedded("b", unit, lease=8))
    assert released(pools) == [8]
    assert pulls(pools) == []


def test_a_unit_that_a_cached_prefix_covers_in_part_is_still_needed():
    stage, pools = make_prefill()
    unit = make_unit("cat")  # tokens 3..11: the second block of the picture is shared with the text behind it
    leave_behind(stage, pools, make_request("a", (unit,), text=3, hashed=True))
    request = make_request("b", (unit,), text=3, hashed=True)
    stage.admit(replace(request, token_ids=[*request.token_ids[:-3], 7, 7, 7], prompt_hashes=_cut(request, 2)))
    [chunk] = run(stage)
    assert (chunk.start, chunk.length, list(chunk.embedding_blocks)) == (8, 6, [0])


def test_a_prefix_that_becomes_known_while_a_request_waits_for_embeddings_is_used_too():
    stage, pools = make_prefill(streamed=False)
    cat, dog = make_unit("cat"), make_unit("dog")
    first = make_request("first", (cat,), text=4, hashed=True)  # 16 tokens, and second begins with them
    second = make_request("second", (cat, dog), text=4, hashed=True)
    stage.admit(first)
    stage.admit(second)
    run(stage)
    bring(stage, first)
    assert lengths(run(stage)) == [("first", 0, 16)]
    stage.embedded(make_embedded("second", dog))
    stage.pulled(dog.hash, None)
    assert lengths(run(stage)) == [("second", 16, 12)]
    assert pools.near.out.tokens[1].num_cached == 16


def test_a_request_that_gave_its_prefix_up_takes_a_second_ticket_for_what_was_evicted_meanwhile():
    stage, pools = make_prefill(embedding_blocks=4)
    cat, dog = make_unit("cat"), make_unit("dog")
    leave_behind(stage, pools, make_request("a", (cat,), text=4, hashed=True))
    request = make_request("b", (cat, dog), text=4, hashed=True)
    stage.admit(request)
    run(stage, 0)
    stage.embedded(make_embedded("b", dog, lease=1))
    pulls(pools)
    assert pools.kv.reclaim_waiting()
    stage.pulled(dog.hash, RuntimeError("link down"))
    sent(pools)
    run(stage)
    assert Wanted(RequestId("b"), (dog.hash,)) in [m for _, m in sent(pools)]
    stage.embedded(make_embedded("b", dog, lease=2))
    assert pulls(pools) == [dog.hash], "it had one before, and lost what came of it"


def test_a_request_that_gives_its_prefix_up_while_the_next_one_starts_is_the_next_one():
    stage, pools = make_prefill(kv_blocks=10, embedding_blocks=8, streamed=False)
    cat, dog = make_unit("cat"), make_unit("dog")
    leave_behind(stage, pools, make_request("a", (cat,), text=4, hashed=True))
    old, young = make_request("old", num_images=1, text=10), make_request("young", (cat, dog), text=4, hashed=True)
    for request in (old, young):  # 7 blocks, and 7 of which 4 are here
        stage.admit(request)
    run(stage)
    stage.admit(make_request("next", text=1))
    bring(stage, old)
    assert lengths(run(stage)) == [("old", 0, 28)]
    assert stage.queues == {"prefill_waiting": 2, "prefill_running": 0}
    read_all(pools)
    names = [name for name, *_ in lengths(run(stage))]
    for unit in (cat, dog):
        stage.embedded(make_embedded("young", unit, 2))
    if dog.hash in stage._intake.pulling:
        stage.pulled(dog.hash, None)
    names += [name for _ in range(3) for name, *_ in lengths(run(stage))]
    assert sorted(names) == ["next", "young"]


def test_a_request_with_a_cached_prefix_waits_for_the_blocks_of_the_rest():
    stage, pools = make_prefill(kv_blocks=6)
    leave_behind(stage, pools, make_request("a", text=9, hashed=True))
    stage.admit(make_request("other", text=12))
    stage.admit(make_request("b", text=20, hashed=True))
    assert [name for name, *_ in lengths(run(stage))] == ["other"], "the older one is first served"
    assert stage.queues == {"prefill_waiting": 1, "prefill_running": 0}
    read_all(pools)
    assert lengths(run(stage)) == [("b", 8, 12)]


def test_what_was_computed_is_found_even_if_its_request_was_aborted():
    stage, pools = make_prefill()
    stage.admit(make_request("a", text=20, hashed=True))
    run(stage, 9)
    stage.abort(RequestId("a"))
    read_all(pools)
    assert (pools.kv.usage().used, pools.kv.usage().cached) == (0, 2)
    stage.admit(make_request("b", text=20, hashed=True))
    assert lengths(run(stage)) == [("b", 8, 12)]


def test_with_recurrent_states_no_prefix_is_shared_and_no_chunk_goes_ahead():
    stage, pools = make_prefill(state_blocks=2)
    for name in "ab":
        stage.admit(make_request(name, text=9, hashed=True))
        assert lengths(run(stage, 6) + run(stage, 6)) == [(name, 0, 6), (name, 6, 3)]
        kinds = sent(pools)
        assert [type(message) for _, message in kinds] == [Located, Prefilled]
        assert len(kinds[1][1].ticket.blocks) == 2 + 3
        read_all(pools)
    assert pools.kv.usage().cached == 0
    assert stage.num_cached_tokens == 0


# ---- units that nobody is about to announce


def test_a_unit_that_nobody_ordered_is_asked_for_once_when_its_request_starts():
    stage, pools = make_prefill(max_num_seqs=1)
    stage.admit(make_request("first", num_images=1))
    request = make_request("r", num_images=1, ordered=False)
    stage.admit(request)
    run(stage)
    assert asked(pools) == [], "there may be no space for it yet"
    stage.abort(RequestId("first"))
    for _ in range(3):
        run(stage)
    assert asked(pools) == [(FRONTEND, Wanted(RequestId("r"), (request.units[0].hash,)))]
    bring(stage, request)
    assert lengths(run(stage)) == [("r", 3, 11)]


def test_a_unit_is_asked_for_from_the_instance_that_seems_to_hold_it():
    stage, pools = make_prefill()
    request = make_request("r", num_images=1, ordered=False)
    unit = request.units[0]
    stage.admit(replace(request, held={unit.hash: InstanceId("p1")}))
    run(stage)
    assert asked(pools) == [("p1", Share(RequestId("r"), unit, InstanceId("here")))]
    stage.embedded(replace(make_embedded("r", unit, holder="p1"), computed=False))
    assert pulls(pools) == [unit.hash]
    stage.pulled(unit.hash, None)
    run(stage)
    assert dict(stage.num_units) == {"transferred": 1}


@pytest.mark.parametrize("holder", ["here", "p9"])
def test_a_holder_that_is_this_instance_or_gone_is_not_asked(holder):
    stage, pools = make_prefill()
    request = make_request("r", num_images=1, ordered=False)
    stage.admit(replace(request, held={request.units[0].hash: InstanceId(holder)}))
    run(stage)
    assert asked(pools) == [(FRONTEND, Wanted(RequestId("r"), (request.units[0].hash,)))]


def test_what_an_instance_was_asked_for_that_is_gone_now_has_to_be_encoded():
    stage, pools = make_prefill()
    request = make_request("r", num_images=2, ordered=False)
    one = request.units[0]
    stage.admit(replace(request, held={one.hash: InstanceId("p1")}))
    run(stage)
    assert [type(message) for _, message in asked(pools)] == [Share, Wanted]
    stage.lost(InstanceId("p1"))
    stage.lost(InstanceId("p1"))
    assert asked(pools) == [(FRONTEND, Wanted(RequestId("r"), (one.hash,)))]


def test_a_unit_that_is_coming_for_an_older_request_is_not_asked_for_until_that_one_is_gone():
    stage, pools = make_prefill()
    unit = make_unit("cat")
    stage.admit(make_request("older", (unit,)))
    stage.admit(make_request("younger", (unit,), ordered=False))
    run(stage)
    assert asked(pools) == []
    stage.abort(RequestId("older"))
    run(stage)
    assert asked(pools) == [(FRONTEND, Wanted(RequestId("younger"), (unit.hash,)))]


def test_a_stale_ticket_is_given_back_and_the_unit_asked_for():
    stage, pools = make_prefill()
    request = make_request("r", num_images=1)
    stage.admit(request)
    run(stage)
    message = make_embedded("r", request.units[0], lease=3)
    stage.embedded(replace(message, ticket=replace(message.ticket, epoch="0")))
    assert released(pools) == [3]
    run(stage)
    assert asked(pools) == [(FRONTEND, Wanted(RequestId("r"), (request.units[0].hash,)))]


def test_while_somebody_asks_the_tickets_of_waiting_requests_go_back_and_are_asked_for_in_their_turn():
    stage, pools = make_prefill(embedding_blocks=2)
    asking = make_request("asking", num_images=1, ordered=False)
    waiting = make_request("waiting", (make_unit("waiting-0"),))
    late = make_request("late", (make_unit("late-0"),))
    for request in (asking, waiting, late):
        stage.admit(request)
    stage.embedded(make_embedded("waiting", waiting.units[0], lease=1))
    assert released(pools) == []
    run(stage)
    messages = sent(pools)
    assert [m for _, m in messages if isinstance(m, Wanted)] == [Wanted(RequestId("asking"), (asking.units[0].hash,))]
    assert [m.lease for _, m in messages if isinstance(m, Release)] == [1]
    stage.embedded(make_embedded("late", late.units[0], lease=2))
    assert released(pools) == [2], "this one comes while the question is open"
    bring(stage, asking, lease=3)
    run(stage)
    assert released(pools) == [3]
    run(stage)
    assert asked(pools) == [(FRONTEND, Wanted(RequestId("waiting"), (waiting.units[0].hash,)))]
    bring(stage, waiting)
    run(stage)
    run(stage)
    assert asked(pools) == [(FRONTEND, Wanted(RequestId("late"), (late.units[0].hash,)))]


def test_a_ticket_that_was_given_back_and_comes_again_is_used():
    stage, pools = make_prefill(max_num_seqs=1)
    asking, waiting = make_request("asking", num_images=1, ordered=False), make_request("waiting", num_images=1)
    for request in (asking, waiting):
        stage.admit(request)
    stage.embedded(make_embedded("waiting", waiting.units[0], lease=1))
    run(stage)
    stage.abort(RequestId("asking"))
    run(stage)
    pulls(pools)
    stage.embedded(make_embedded("waiting", waiting.units[0], lease=2))
    assert pulls(pools) == [waiting.units[0].hash]


# ---- sharing with other instances


def test_a_unit_that_is_here_is_shared_by_a_ticket_that_keeps_it():
    stage, pools = make_prefill(embedding_blocks=2)
    unit = make_unit("cat")
    leave_behind(stage, pools, make_request("a", (unit,)))
    stage.share(Share(RequestId("b"), unit, InstanceId("p1")))
    [(to, answer)] = sent(pools)
    assert to == "p1"
    assert isinstance(answer, Embedded)
    assert (answer.request_id, answer.unit, answer.computed) == ("b", unit.hash, False)
    assert answer.ticket.blocks == pools.cache.find(unit.hash).blocks
    assert not pools.cache.can_hold([make_unit("dog")]), "it cannot be evicted while it is read"
    pools.leases.release(answer.ticket.lease)
    assert pools.cache.can_hold([make_unit("dog")])


def test_a_unit_that_is_not_here_or_not_complete_is_not_shared_but_wanted():
    stage, pools = make_prefill()
    unit = make_unit("cat")
    wanted = [(FRONTEND, Wanted(RequestId("b"), (unit.hash,)))]
    stage.share(Share(RequestId("b"), unit, InstanceId("p1")))
    assert sent(pools) == wanted
    stage.admit(make_request("a", (unit,)))
    run(stage)
    stage.embedded(make_embedded("a", unit))
    stage.share(Share(RequestId("b"), unit, InstanceId("p1")))
    assert asked(pools) == wanted, "it is being written"
    stage.pulled(unit.hash, RuntimeError("link down"))
    sent(pools)
    stage.share(Share(RequestId("b"), unit, InstanceId("p1")))
    assert asked(pools) == wanted, "nothing came"


def test_a_unit_for_whose_lease_there_is_no_space_in_the_share_is_wanted():
    stage, pools = make_prefill(embedding_blocks=2)
    cat = make_unit("cat")
    leave_behind(stage, pools, make_request("a", (cat,)))
    pools.share.max_blocks = 1
    stage.share(Share(RequestId("b"), cat, InstanceId("p1")))
    assert sent(pools) == [(FRONTEND, Wanted(RequestId("b"), (cat.hash,)))]


def test_units_are_counted_by_where_they_came_from():
    stage, pools = make_prefill(embedding_blocks=16)
    here, covered, encoded, lent = (make_unit(name) for name in ("here", "covered", "encoded", "lent"))
    leave_behind(stage, pools, make_request("a", (covered,), text=4, hashed=True))
    leave_behind(stage, pools, make_request("b", (here,), text=4, hashed=True))
    stage.num_units.clear()
    request = make_request("c", (covered, here, encoded, encoded, lent), text=4, hashed=True)
    stage.admit(request)
    run(stage)
    stage.embedded(make_embedded("c", encoded))
    stage.pulled(encoded.hash, None)
    stage.embedded(replace(make_embedded("c", lent), computed=False))
    stage.pulled(lent.hash, None)
    run(stage)
    assert dict(stage.num_units) == {"prefix": 1, "cached": 1, "computed": 1, "transferred": 1}


def test_units_of_requests_that_were_aborted_are_not_counted():
    stage, _ = make_prefill()
    request = make_request("r", num_images=1)
    stage.admit(request)
    run(stage)
    bring(stage, request)
    stage.abort(RequestId("r"))
    assert not stage.num_units


# ---- KV on its way while the rest is computed


def test_kv_is_announced_after_every_chunk_that_filled_a_block_and_whole_at_the_end():
    stage, pools = make_prefill()
    request = make_request("r", text=15, hashed=True)
    stage.admit(request)
    run(stage, 6)
    (to_frontend, located), (to, first) = sent(pools)
    assert (to_frontend, located) == (FRONTEND, Located(RequestId("r"), "d0", "1"))
    assert (to, type(first)) == ("d0", Prefilling)
    assert (first.num_tokens, first.prompt_hashes) == (15, request.prompt_hashes)
    assert (first.ticket.region, first.ticket.blocks, first.ticket.num_tokens) == ("kv", [0], 4)
    run(stage, 1)
    assert sent(pools) == [], "no further block is full"
    run(stage, 6)
    [(to, second)] = sent(pools)
    assert (to, second.ticket.blocks, second.ticket.num_tokens) == ("d0", [0, 1, 2], 12)
    run(stage, 6)
    [(to, last)] = sent(pools)
    assert (to, type(last)) == ("d0", Prefilled)
    assert (last.ticket.blocks, last.ticket.num_tokens) == ([0, 1, 2, 3], 15)
    for message in (first, second, last):
        pools.leases.release(message.ticket.lease)
    pools.assert_idle()


def test_found_blocks_are_announced_with_the_first_chunk():
    stage, pools = make_prefill()
    leave_behind(stage, pools, make_request("a", text=9, hashed=True))
    stage.admit(make_request("b", text=17, hashed=True))
    assert lengths(run(stage, 1)) == [("b", 8, 1)]
    [(_, order)] = sent(pools, Prefilling)
    assert order.ticket.num_tokens == 8


@pytest.mark.parametrize(
    ("role", "max_tokens", "options"),
    [("p", 1, {}), ("pd", 4, {}), ("p", 4, {"chunked_transfer": False})],
    ids=["one token", "decoded here", "as a whole"],
)
def test_nothing_goes_ahead_where_it_is_of_no_use(role, max_tokens, options):
    stage, pools = make_prefill(role=role, **options)
    pools.near.decode_loads["d0"] = 1.0
    stage.admit(make_request("r", text=15, max_tokens=max_tokens))
    run(stage, 8)
    assert sent(pools) == []
    run(stage, 8)
    assert sent(pools, Prefilling) == []


def test_an_aborted_prefill_does_not_free_the_blocks_that_are_read():
    stage, pools = make_prefill(kv_blocks=4)
    stage.admit(make_request("r", text=15))
    run(stage, 8)
    [(_, order)] = sent(pools, Prefilling)
    stage.abort(RequestId("r"))
    assert pools.kv.usage().used == 2
    stage.admit(make_request("next", text=12))
    assert run(stage) == [], "it would be written over what is read"
    pools.leases.release(order.ticket.lease)
    assert lengths(run(stage)) == [("next", 0, 12)]
    read_all(pools)
    pools.assert_idle()


def test_a_request_that_ends_with_its_first_token_tells_decode():
    stage, pools = make_prefill()
    pools.near.eos_token_ids = frozenset({5})
    stage.admit(make_request("r", text=15))
    run(stage, 8)
    sent(pools)
    run(stage, 8, token=5)
    assert pools.near.out.tokens[0].finish is FinishReason.STOP
    assert sent(pools) == [("d0", Abort(RequestId("r")))]
    read_all(pools)
    pools.assert_idle()


def test_a_request_whose_kv_went_ahead_is_located_once_and_goes_where_its_beginning_is():
    stage, pools = make_prefill()
    pools.near.table = make_near("here", here="p", d0="d", d1="d").table
    stage.admit(make_request("r", text=15))
    run(stage, 8)
    pools.near.decode_loads |= {"d0": 9.0, "d1": 0.0}
    run(stage, 8)
    assert [(to, type(message)) for to, message in sent(pools)] == [
        (FRONTEND, Located), ("d0", Prefilling), ("d0", Prefilled),
    ]  # fmt: skip


def test_another_decode_instance_gets_everything_where_the_first_one_is_gone():
    stage, pools = make_prefill()
    pools.near.table = make_near("here", here="p", d0="d", d1="d").table
    stage.admit(make_request("r", text=15))
    run(stage, 8)
    sent(pools)
    pools.near.table = make_near("here", here="p", d1="d").table
    read_all(pools)
    run(stage, 8)
    (_, located), (to, order) = sent(pools)
    assert located == Located(RequestId("r"), "d1", "1")
    assert (to, len(order.ticket.blocks)) == ("d1", 4)


def test_a_decode_instance_that_leaves_hears_that_nobody_takes_what_went_ahead_to_it():
    stage, pools = make_prefill()
    stage.admit(make_request("r", text=15))
    run(stage, 8)
    sent(pools)
    table = pools.near.table
    leaving = replace(table.peers[InstanceId("d0")], leaving=True)
    pools.near.table = RoutingTable(table.version + 1, table.peers | {leaving.id: leaving})
    run(stage, 8)
    (to, failed), aborted = sent(pools)
    assert (to, failed.code, failed.retry) == (FRONTEND, "unavailable", True)
    assert aborted == ("d0", Abort(RequestId("r")))
    read_all(pools)
    pools.assert_idle()


def _cut(request: Submit, num_blocks: int) -> object:
    return replace(request.prompt_hashes, blocks=request.prompt_hashes.blocks[:num_blocks])
