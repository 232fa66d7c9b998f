"""Prefill: reserve, pull, chunks over the ready prefix, and the hand-over."""

import pytest

from tests.builders import Pools, make_embedded, make_near, make_pools, make_request, make_stage, make_unit
from triptych.core import Chunk, FinishReason, RequestId, SampledToken, Stage
from triptych.messages import FRONTEND, Failed, Located, Prefilled, Release
from triptych.stages.decode import DecodeStage
from triptych.stages.prefill import PrefillStage

BUDGET = 64


def make_prefill(
    kv_blocks: int = 32, embedding_blocks: int = 8, role: str = "p", **options: object
) -> tuple[PrefillStage, Pools]:
    near = make_near("here", here=role, e0="e", d0="d")
    pools = make_pools(kv_blocks, embedding_blocks, near)
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


def test_a_text_prompt_is_prefilled_reported_and_handed_on():
    stage, pools = make_prefill()
    stage.admit(make_request("r", text=7))
    assert lengths(run(stage)) == [("r", 0, 7)]
    [update] = pools.near.out.tokens
    assert (update.request_id, update.token_id, update.finish) == ("r", 5, None)
    (to_frontend, located), (to_decode, order) = sent(pools)
    assert (to_frontend, located) == (FRONTEND, Located(RequestId("r"), "d0"))
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
    pools.leases.release_reader("d0")
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


def test_a_request_without_space_for_its_embeddings_waits_and_so_do_those_behind_it():
    stage, _pools = make_prefill(embedding_blocks=4)
    first, second = make_request("first", num_images=2), make_request("second", num_images=1)
    for request in (first, second):
        stage.admit(request)
    stage.admit(make_request("text"))
    run(stage)
    assert stage.queues == {"prefill_waiting": 2, "prefill_running": 1}
    stage.abort(RequestId("first"))
    assert [name for name, *_ in lengths(run(stage))] == ["second", "text"]


def test_the_oldest_request_that_is_ready_waits_for_kv_before_younger_ones():
    stage, pools = make_prefill(kv_blocks=8)
    stage.admit(make_request("first", text=20))
    stage.admit(make_request("large", text=16))
    stage.admit(make_request("small", text=4))
    assert [name for name, *_ in lengths(run(stage))] == ["first"]
    assert run(stage) == [], "first still holds 5 of 8 blocks under its lease"
    pools.leases.release_reader("d0")
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


def test_a_failed_pull_without_another_ticket_fails_the_requests_that_had_theirs():
    stage, pools = make_prefill()
    unit = make_unit("cat", 8)
    for name in ("had", "expects"):
        stage.admit(make_request(name, (unit,)))
    run(stage)
    stage.embedded(make_embedded("had", unit, 1))
    stage.pulled(unit.hash, RuntimeError("link down"))
    messages = sent(pools)
    [failed] = [message for _, message in messages if isinstance(message, Failed)]
    assert (failed.request_id, failed.status, failed.code) == ("had", 500, "transfer_failed")
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


def test_requests_that_miss_embeddings_leave_room_for_the_decodes_of_their_instance():
    stage, pools = make_prefill(kv_blocks=12, role="pd")
    pools.near.max_model_len = 24
    DecodeStage(pools.near, pools.kv, pools.leases, max_num_seqs=4)
    for i in range(2):
        stage.admit(make_request(f"r{i}", num_images=1))  # 14 tokens, 4 blocks each
    assert [name for name, *_ in lengths(run(stage))] == ["r0"]
    assert pools.kv.usage().used == 4, "a second one would leave less than 24 tokens for decode"
    stage.admit(make_request("text", text=20))
    assert [name for name, *_ in lengths(run(stage))] == ["text"], "it waits for nobody"


def test_without_a_decode_instance_the_request_fails_with_503():
    stage, pools = make_prefill()
    pools.near.table = make_near("here", here="p").table
    stage.admit(make_request("r"))
    run(stage)
    [(to, failed)] = sent(pools)
    assert (to, failed.status) == (FRONTEND, 503)
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
