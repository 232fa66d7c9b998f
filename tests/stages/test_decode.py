"""Decode: continuous batching, pulls of what is not here, KV that comes ahead, and offloading when blocks run short."""

import pytest
from msgspec.structs import replace

from tests.builders import (
    BLOCK_TOKENS,
    Pools,
    make_near,
    make_pools,
    make_prefilled,
    make_sampling,
    make_stage,
    make_ticket,
)
from triptych.core import BlockHashes, FinishReason, RequestId, SampledToken, Sequence, Stage, Status
from triptych.memory.kv_cache import KVCache
from triptych.memory.prefix import prompt_hashes
from triptych.messages import Failed, Prefilled, Prefilling, Release
from triptych.stages.base import Pull
from triptych.stages.decode import DecodePlan, DecodeStage

PROMPT = list(range(100, 200))  # its beginnings are the prompts of `make_prefilled`


def make_decode(kv_blocks: int = 16, max_num_seqs: int = 8, state_blocks: int = 0) -> tuple[DecodeStage, Pools]:
    pools = make_pools(kv_blocks, near=make_near("d0", p0="p", d0="d"))
    pools.kv = KVCache(kv_blocks, BLOCK_TOKENS, state_blocks=state_blocks)
    return make_stage(Stage.DECODE, pools, max_num_seqs=max_num_seqs), pools


def arrive(stage: DecodeStage, name: str, num_prompt_tokens: int = 7, max_tokens: int = 4) -> None:
    """Admitted, and its KV pulled at once."""
    stage.admit(make_prefilled(name, num_prompt_tokens, max_tokens))
    stage.pulled(RequestId(name), None)


def hashes_of(num_tokens: int) -> BlockHashes:
    return prompt_hashes(b"root", PROMPT[:num_tokens], (), (), BLOCK_TOKENS)


def make_hashed(name: str, num_tokens: int = 11, lease: int = 1, max_tokens: int = 4) -> Prefilled:
    """All of a prompt that may be found, with the blocks 0, 1, ... of p0."""
    order = make_prefilled(name, num_tokens, max_tokens, lease=lease)
    return replace(order, prompt_hashes=hashes_of(num_tokens))


def make_ahead(name: str, num_here: int, num_tokens: int = 11, lease: int = 1) -> Prefilling:
    """The first `num_here` tokens of that."""
    ticket = make_ticket("p0", lease, "kv", num_here)
    return Prefilling(RequestId(name), num_tokens, hashes_of(num_tokens), ticket)


def pulls(pools: Pools) -> list[Pull]:
    """Takes those that were begun so far."""
    begun, pools.near.out.pulls = pools.near.out.pulls, []
    return begun


def copied(pools: Pools) -> list[tuple[list[int], list[int]]]:
    """(blocks there, blocks here) of those."""
    return [(pull.ticket.blocks, pull.blocks) for pull in pulls(pools)]


def step(stage: DecodeStage, token: int = 5) -> DecodePlan:
    plan = stage.schedule()
    for sequence, blocks in plan.offloads:
        sequence.offloaded = blocks
    stage.commit(plan.chunks, [SampledToken(token) for _ in plan.chunks])
    return plan


def step_until(stage: DecodeStage, wanted: str) -> DecodePlan:
    """Steps until a plan has offloads or restores."""
    for _ in range(50):
        plan = step(stage)
        if getattr(plan, wanted):
            return plan
    raise AssertionError(f"no {wanted} within 50 steps")


def drain(stage: DecodeStage) -> list[str]:
    """Steps until the stage is empty; whose tokens came."""
    seen = []
    for _ in range(50):
        if not any(stage.queues.values()):
            return seen
        seen += batch(step(stage))
    raise AssertionError(f"not empty after 50 steps: {stage.queues}")


def batch(plan: DecodePlan) -> list[str]:
    return [chunk.sequence.request_id for chunk in plan.chunks]


def sent(pools: Pools) -> list[object]:
    messages, pools.near.out.messages = pools.near.out.messages, []
    return [message for _, message in messages]


def test_kv_is_pulled_into_own_blocks_and_the_lease_released_when_it_is_here():
    stage, pools = make_decode()
    stage.admit(make_prefilled("r", num_prompt_tokens=8, lease=3))  # 8 tokens of KV, and the first token
    [pull] = pools.near.out.pulls
    assert (pull.key, pull.blocks) == ("r", [0, 1])
    assert pools.kv.usage().used == 3, "the block of the next token is taken too"
    assert sent(pools) == []
    stage.pulled(RequestId("r"), None)
    assert sent(pools) == [Release(3)]


def test_a_sequence_gets_one_token_per_step_until_it_ends_and_leaves_nothing():
    stage, pools = make_decode()
    arrive(stage, "r", max_tokens=4)
    assert drain(stage) == ["r"] * 3
    assert [update.finish for update in pools.near.out.tokens] == [None, None, FinishReason.LENGTH]
    pools.assert_idle()


def test_sequences_join_and_leave_a_running_batch():
    stage, _ = make_decode()
    arrive(stage, "a", max_tokens=3)
    assert batch(step(stage)) == ["a"]
    arrive(stage, "b", max_tokens=3)
    assert batch(step(stage)) == ["a", "b"]
    assert batch(step(stage)) == ["b"]
    assert batch(step(stage)) == []


def test_no_more_than_max_num_seqs_run_together_and_the_first_come_first():
    stage, _ = make_decode(max_num_seqs=2)
    for name in "abc":
        arrive(stage, name, max_tokens=3)
    assert batch(step(stage)) == ["a", "b"]
    step(stage)
    assert batch(step(stage)) == ["c"]


def test_sequences_that_do_not_fit_wait_in_order_at_their_prefill_instance():
    stage, pools = make_decode(kv_blocks=5)
    for i, name in enumerate("abc"):
        stage.admit(make_prefilled(name, num_prompt_tokens=8, lease=i))
    assert [pull.key for pull in pools.near.out.pulls] == ["a"]
    assert stage.queues == {"decode_waiting": 3, "decode_running": 0}
    stage.abort(RequestId("b"))
    assert sent(pools) == [Release(1)]


def test_a_hand_over_inside_the_instance_moves_no_block():
    stage, pools = make_decode()
    sequence = Sequence(RequestId("r"), list(range(8)), 7, make_sampling(), num_computed=7)
    pools.kv.hold(sequence, 7)
    lease = pools.leases.grant(pools.near.instance, sequence, lambda: pools.kv.free(sequence))
    ticket = pools.near.ticket(lease, "kv", sequence.block_table, 7)
    order = Prefilled(RequestId("r"), sequence.token_ids, 7, sequence.sampling, 0, BlockHashes(), ticket)
    stage.admit(order)
    stage.admit(order)
    assert pools.near.out.pulls == []
    [chunk] = step(stage).chunks
    assert chunk.sequence is sequence
    assert sequence.block_table == [0, 1]


def test_a_hand_over_of_a_sequence_that_is_gone_is_nothing():
    stage, _ = make_decode()
    stage.admit(make_prefilled("r", holder="d0"))
    assert batch(step(stage)) == []


def test_a_failed_pull_has_the_request_taken_up_again_and_gives_everything_back():
    stage, pools = make_decode()
    stage.admit(make_prefilled("r", lease=9))
    stage.pulled(RequestId("r"), RuntimeError("link down"))
    release, failed = sent(pools)
    assert release == Release(9)
    assert isinstance(failed, Failed)
    assert (failed.status, failed.code, failed.retry) == (503, "transfer_failed", True)
    pools.assert_idle()


@pytest.mark.parametrize("error", [None, RuntimeError("link down")])
def test_an_abort_while_a_pull_is_writing_keeps_the_blocks_until_it_settles(error):
    stage, pools = make_decode()
    stage.admit(make_prefilled("r", lease=9))
    stage.abort(RequestId("r"))
    assert pools.kv.usage().used == 2
    assert sent(pools) == []
    stage.pulled(RequestId("r"), error)
    assert sent(pools) == [Release(9)], "and nobody is told of a failure"
    pools.assert_idle()


def test_an_abort_frees_a_sequence_wherever_it_stands():
    stage, pools = make_decode(kv_blocks=6, max_num_seqs=1)
    arrive(stage, "running", max_tokens=9)
    step(stage)
    arrive(stage, "here")
    stage.admit(make_prefilled("waiting", num_prompt_tokens=20))
    sent(pools)
    for name in ("waiting", "here", "running", "running", "nobody"):
        stage.abort(RequestId(name))
    assert len(sent(pools)) == 1
    pools.assert_idle()
    assert stage.queues == {"decode_waiting": 0, "decode_running": 0}


@pytest.mark.parametrize("holder", ["p0", "d0"])
def test_a_hand_over_that_its_abort_overtook_is_given_back(holder):
    stage, pools = make_decode()
    stage.abort(RequestId("r"))
    stage.admit(make_prefilled("r", holder=holder, lease=6))
    assert pools.near.out.pulls == []
    (_, failed), release = pools.near.out.messages
    assert isinstance(failed, Failed)
    assert failed.retry, "nobody cares, unless it was prefill that gave the request up here for a while"
    assert release == (holder, Release(6))
    assert stage.queues == {"decode_waiting": 0, "decode_running": 0}


def test_a_token_of_a_sequence_that_was_aborted_during_the_step_is_dropped():
    stage, pools = make_decode()
    for name in "ab":
        arrive(stage, name)
    plan = stage.schedule()
    stage.abort(RequestId("a"))
    stage.commit(plan.chunks, [SampledToken(1), SampledToken(2)])
    assert [update.request_id for update in pools.near.out.tokens] == ["b"]


def test_a_sequence_that_can_never_fit_is_refused_with_both_numbers():
    stage, pools = make_decode(kv_blocks=2)
    stage.admit(make_prefilled("r", num_prompt_tokens=8, lease=2))
    failed, release = sent(pools)
    assert "9 tokens" in failed.message
    assert "has 8" in failed.message
    assert release == Release(2)


def test_short_of_blocks_the_youngest_is_offloaded_and_comes_back_when_there_is_room():
    stage, pools = make_decode(kv_blocks=5)
    arrive(stage, "old", num_prompt_tokens=7, max_tokens=6)  # 2 blocks, 4 in the end
    arrive(stage, "young", num_prompt_tokens=7, max_tokens=8)
    assert batch(step(stage)) == ["old", "young"]
    plan = step(stage)  # both need a third block, there is one
    assert batch(plan) == ["old"]
    [(young, saved)] = plan.offloads
    assert (young.request_id, young.status, saved) == ("young", Status.OFFLOADED, [2, 3])
    plan = step_until(stage, "restores")
    [(back, blocks)] = plan.restores
    assert back is young
    assert len(blocks) == len(saved)
    assert batch(plan) == ["young"]
    drain(stage)
    assert [u.request_id for u in pools.near.out.tokens if u.finish] == ["old", "young"]
    pools.assert_idle()
    assert stage.num_offloads == 1


def test_a_restore_gets_as_many_blocks_as_were_saved_even_where_the_next_token_needs_one_more():
    stage, _pools = make_decode(kv_blocks=3)
    arrive(stage, "a", num_prompt_tokens=3, max_tokens=9)  # 1 block, full with the next token
    arrive(stage, "b", num_prompt_tokens=3, max_tokens=9)
    [(sequence, saved)] = step_until(stage, "offloads").offloads
    assert len(saved) * 4 == sequence.num_computed
    stage.abort(RequestId("a"))
    [(_, blocks)] = step(stage).restores
    assert len(blocks) == len(saved)
    assert len(sequence.block_table) == len(saved) + 1


def test_sequences_that_are_here_but_do_not_run_are_offloaded_before_running_ones():
    stage, _ = make_decode(kv_blocks=5, max_num_seqs=1)
    arrive(stage, "running", num_prompt_tokens=7, max_tokens=8)
    step(stage)
    arrive(stage, "here", num_prompt_tokens=7)
    plan = step_until(stage, "offloads")
    assert [sequence.request_id for sequence, _ in plan.offloads] == ["here"]
    assert batch(plan) == ["running"]


def test_newcomers_are_not_pulled_while_a_sequence_waits_in_host_memory():
    stage, pools = make_decode(kv_blocks=5)
    for name in ("old", "young"):
        arrive(stage, name, num_prompt_tokens=7, max_tokens=12)
    step_until(stage, "offloads")
    pools.near.out.pulls.clear()
    stage.admit(make_prefilled("new", num_prompt_tokens=2))
    step(stage)
    assert pools.near.out.pulls == []


def test_a_single_sequence_may_grow_until_it_fills_the_pool():
    stage, pools = make_decode(kv_blocks=3)
    pools.near.max_model_len = pools.kv.max_tokens
    arrive(stage, "r", num_prompt_tokens=7, max_tokens=100)
    assert set(drain(stage)) == {"r"}
    assert pools.near.out.tokens[-1].finish is FinishReason.LENGTH
    assert len(pools.near.out.tokens) == 12 - 8
    pools.assert_idle()


def test_an_aborted_offloaded_sequence_never_comes_back():
    stage, pools = make_decode(kv_blocks=5)
    for name in ("old", "young"):
        arrive(stage, name, num_prompt_tokens=7, max_tokens=9)
    step_until(stage, "offloads")
    stage.abort(RequestId("young"))
    assert set(drain(stage)) == {"old"}
    pools.assert_idle()


def test_newcomers_leave_a_block_for_each_sequence_that_just_joined_and_none_when_all_are_gone():
    stage, pools = make_decode()
    arrive(stage, "r", max_tokens=3)
    step(stage)
    assert pools.kv.growth_reserve == 1
    step(stage)
    assert batch(step(stage)) == []
    assert pools.kv.growth_reserve == 0


# ---- what is here already


def test_only_blocks_that_are_not_here_are_pulled():
    stage, pools = make_decode()
    stage.admit(make_hashed("a", 11))
    stage.pulled(RequestId("a"), None)
    pulls(pools)
    stage.admit(make_hashed("b", 18, lease=2))
    assert copied(pools) == [([2, 3, 4], [3, 4, 5])]
    stage.pulled(RequestId("b"), None)
    plan = step(stage)
    assert plan.chunks[1].sequence.block_table == [0, 1, 3, 4, 5]
    assert [m.lease for m in sent(pools)] == [1, 2]


def test_a_sequence_of_which_all_is_here_joins_at_once_and_gives_its_ticket_back():
    stage, pools = make_decode()
    for lease, name in enumerate(("a", "b")):
        stage.admit(make_hashed(name, 8, lease))
        if name == "a":
            stage.pulled(RequestId("a"), None)
            pulls(pools)
    assert pulls(pools) == []
    assert [m.lease for m in sent(pools)] == [0, 1]
    assert batch(step(stage)) == ["a", "b"]


def test_the_kv_of_an_answer_is_found_by_the_next_turn_of_the_conversation():
    stage, pools = make_decode()
    stage.admit(make_hashed("a", 7, max_tokens=7))
    stage.pulled(RequestId("a"), None)
    while any(stage.queues.values()):
        step(stage, token=5)
    pulls(pools)
    token_ids = [*make_hashed("a", 7).token_ids, *[5] * 6, 1, 2]  # 8 + 6 + 2, of which 13 had their KV computed
    hashes = prompt_hashes(b"root", token_ids, (), (), BLOCK_TOKENS)
    order = replace(make_prefilled("b", 15), token_ids=token_ids, prompt_hashes=hashes)
    stage.admit(order)
    assert [there for there, _ in copied(pools)] == [[3]]


def test_a_block_is_not_found_while_it_is_still_being_pulled():
    stage, pools = make_decode()
    stage.admit(make_hashed("a"))
    stage.admit(make_hashed("b", lease=2))
    assert [there for there, _ in copied(pools)] == [[0, 1, 2], [0, 1, 2]]


def test_a_failed_pull_leaves_no_block_to_be_found():
    stage, pools = make_decode()
    stage.admit(make_hashed("a"))
    stage.pulled(RequestId("a"), RuntimeError("link down"))
    pulls(pools)
    assert pools.kv.usage().cached == 0
    stage.admit(make_hashed("b"))
    assert [there for there, _ in copied(pools)] == [[0, 1, 2]]


def test_recurrent_states_are_pulled_with_all_blocks_every_time():
    stage, pools = make_decode(state_blocks=2)
    for name in "ab":
        order = make_hashed(name, 8)
        stage.admit(replace(order, ticket=replace(order.ticket, blocks=[7, 8, 3, 4])))
        [(there, here)] = copied(pools)
        assert (there, len(here)) == ([7, 8, 3, 4], 4)
        stage.pulled(RequestId(name), None)
    drain(stage)
    pools.assert_idle()
    assert pools.kv.usage().cached == 0


# ---- KV that comes while the rest is computed


def test_blocks_that_come_ahead_are_pulled_into_the_sequence_s_own_and_the_tail_at_the_end():
    stage, pools = make_decode()
    stage.prefilling(make_ahead("r", 4, lease=1))
    assert copied(pools) == [([0], [0])]
    assert pools.kv.usage().used == 3, "space for the whole prompt and the first token"
    stage.pulled(RequestId("r"), None)
    stage.prefilling(make_ahead("r", 8, lease=2))
    assert copied(pools) == [([1], [1])]
    stage.pulled(RequestId("r"), None)
    assert batch(step(stage)) == []
    stage.admit(make_hashed("r", lease=3))
    assert copied(pools) == [([2], [2])]
    stage.pulled(RequestId("r"), None)
    assert [m.lease for m in sent(pools)] == [1, 2, 3]
    assert batch(step(stage)) == ["r"]
    drain(stage)
    pools.assert_idle()


def test_while_a_pull_is_under_way_only_the_newest_ticket_is_kept():
    stage, pools = make_decode()
    stage.prefilling(make_ahead("r", 4, num_tokens=19, lease=1))
    stage.prefilling(make_ahead("r", 8, num_tokens=19, lease=2))
    assert sent(pools) == []
    stage.prefilling(make_ahead("r", 16, num_tokens=19, lease=3))
    assert sent(pools) == [Release(2)]
    pulls(pools)
    stage.pulled(RequestId("r"), None)
    assert copied(pools) == [([1, 2, 3], [1, 2, 3])]
    stage.admit(make_hashed("r", 19, lease=4))
    stage.pulled(RequestId("r"), None)
    assert copied(pools) == [([4], [4])]
    stage.pulled(RequestId("r"), None)
    assert [m.lease for m in sent(pools)] == [1, 3, 4]
    assert batch(step(stage)) == ["r"]


def test_of_what_comes_ahead_too_only_what_is_not_here_is_pulled():
    stage, pools = make_decode()
    stage.admit(make_hashed("a", 8))
    stage.pulled(RequestId("a"), None)
    pulls(pools)
    stage.prefilling(make_ahead("b", 8, num_tokens=15, lease=7))
    assert pulls(pools) == []
    assert sent(pools)[-1] == Release(7)
    stage.prefilling(make_ahead("b", 12, num_tokens=15))
    assert [there for there, _ in copied(pools)] == [[2]]


def test_what_came_ahead_can_be_found_by_others_before_the_rest_is_here():
    stage, pools = make_decode()
    stage.prefilling(make_ahead("a", 8))
    stage.pulled(RequestId("a"), None)
    pulls(pools)
    stage.admit(make_hashed("b", 11, lease=2))
    assert [there for there, _ in copied(pools)] == [[2]]


@pytest.mark.parametrize("kv_blocks", [2, 5])
def test_what_comes_ahead_is_given_back_where_the_whole_sequence_has_no_room(kv_blocks):
    stage, pools = make_decode(kv_blocks)
    if kv_blocks == 5:
        stage.admit(make_prefilled("other", 11, lease=1))
        pulls(pools)
    stage.prefilling(make_ahead("r", 8, lease=2))
    assert pulls(pools) == []
    assert sent(pools) == [Release(2)]


def test_what_comes_ahead_is_given_back_while_others_wait_for_space():
    stage, pools = make_decode(kv_blocks=5)
    for lease, num_tokens in enumerate((7, 15)):
        stage.admit(make_prefilled(f"r{lease}", num_tokens, lease=lease))
    pulls(pools)
    stage.prefilling(make_ahead("ahead", 4, num_tokens=5, lease=9))
    assert sent(pools) == [Release(9)]
    assert pulls(pools) == []


def test_a_running_sequence_takes_room_that_is_held_in_advance_and_the_other_comes_again_as_a_whole():
    stage, pools = make_decode(kv_blocks=5)
    arrive(stage, "running", num_prompt_tokens=7, max_tokens=9)
    stage.prefilling(make_ahead("ahead", 8, lease=2))
    stage.pulled(RequestId("ahead"), None)
    assert pools.kv.usage().free == 0
    step(stage)
    assert batch(step(stage)) == ["running"], "it grew"
    assert stage.num_offloads == 0
    assert stage.queues == {"decode_waiting": 0, "decode_running": 1}
    pulls(pools)
    stage.prefilling(make_ahead("ahead", 8, lease=3))
    assert sent(pools)[-1] == Release(3)
    stage.abort(RequestId("running"))
    stage.admit(make_hashed("ahead", lease=4))
    assert len(pulls(pools)) == 1


def test_a_sequence_that_was_handed_over_takes_room_that_is_held_in_advance_from_the_youngest():
    stage, pools = make_decode(kv_blocks=9)
    for lease, name in enumerate(("old", "young")):
        stage.prefilling(replace(make_ahead(name, 4, lease=lease), prompt_hashes=BlockHashes()))
        stage.pulled(RequestId(name), None)
    assert pools.kv.usage().free == 3
    pulls(pools)
    stage.admit(make_prefilled("whole", 15))
    assert [pull.key for pull in pulls(pools)] == ["whole"]
    stage.prefilling(replace(make_ahead("old", 8, lease=5), prompt_hashes=BlockHashes()))
    assert [pull.key for pull in pulls(pools)] == ["old"], "it kept its place"


def test_room_that_is_being_written_to_is_not_given_away():
    stage, pools = make_decode(kv_blocks=4)
    stage.prefilling(make_ahead("ahead", 4))
    stage.admit(make_prefilled("whole", 8, lease=3))
    assert [pull.key for pull in pulls(pools)] == ["ahead"]
    stage.pulled(RequestId("ahead"), None)
    step(stage)
    assert [pull.key for pull in pulls(pools)] == ["whole"]


def test_a_pull_ahead_that_got_lost_is_read_again_with_the_rest():
    stage, pools = make_decode()
    stage.prefilling(make_ahead("r", 8, lease=1))
    stage.admit(make_hashed("r", lease=2))
    pulls(pools)
    stage.pulled(RequestId("r"), RuntimeError("link down"))
    assert copied(pools) == [([0, 1, 2], [0, 1, 2])]
    stage.pulled(RequestId("r"), None)
    assert [m for m in sent(pools) if isinstance(m, Failed)] == []
    assert batch(step(stage)) == ["r"]


def test_a_pull_ahead_that_got_lost_with_nothing_behind_it_is_forgotten_and_nobody_told():
    stage, pools = make_decode()
    stage.prefilling(make_ahead("r", 8, lease=1))
    stage.pulled(RequestId("r"), RuntimeError("link down"))
    assert sent(pools) == [Release(1)]
    pools.assert_idle()
    pulls(pools)
    stage.admit(make_hashed("r", lease=2))
    assert [there for there, _ in copied(pools)] == [[0, 1, 2]]


def test_when_the_last_pull_is_lost_the_request_fails():
    stage, pools = make_decode()
    stage.prefilling(make_ahead("r", 8))
    stage.pulled(RequestId("r"), None)
    stage.admit(make_hashed("r", lease=2))
    stage.pulled(RequestId("r"), RuntimeError("link down"))
    assert [m.code for m in sent(pools) if isinstance(m, Failed)] == ["transfer_failed"]
    pools.assert_idle()


def test_a_request_that_ended_in_prefill_leaves_what_came_ahead_of_it():
    stage, pools = make_decode()
    stage.prefilling(make_ahead("r", 4, lease=1))
    stage.prefilling(make_ahead("r", 8, lease=2))
    stage.abort(RequestId("r"))
    assert pools.kv.usage().used == 3, "it is still being written to"
    stage.prefilling(make_ahead("r", 8, lease=3))
    stage.pulled(RequestId("r"), None)
    assert sorted(m.lease for m in sent(pools)) == [1, 2, 3]
    pools.assert_idle()
    assert stage.queues == {"decode_waiting": 0, "decode_running": 0}
    stage.prefilling(make_ahead("r", 8, lease=4))
    assert sent(pools) == [Release(4)]


def test_sequences_that_are_still_prefilled_are_no_decode_work_yet():
    stage, _ = make_decode()
    stage.prefilling(make_ahead("r", 8))
    assert stage.queued_tokens == 0
    stage.admit(make_hashed("r", max_tokens=4))
    assert stage.queued_tokens == 3


def test_an_offloaded_sequence_comes_back_into_blocks_of_its_own():
    """Those that it left may be found by others; what is restored is written to blocks that nobody finds."""
    stage, pools = make_decode(kv_blocks=6)
    for name, num_tokens in (("old", 11), ("young", 7)):
        stage.admit(replace(make_prefilled(name, num_tokens, 12), prompt_hashes=hashes_of(num_tokens)))
        if name in stage._arriving:
            stage.pulled(RequestId(name), None)
    [(young, _)] = step_until(stage, "offloads").offloads
    assert young.request_id == "young"
    for _ in range(50):
        plan = stage.schedule()
        if plan.restores:
            break
        stage.commit(plan.chunks, [SampledToken(5) for _ in plan.chunks])
    [(_, blocks)] = plan.restores
    assert not pools.kv._hash_of.keys() & set(blocks)
    stage.commit(plan.chunks, [SampledToken(5) for _ in plan.chunks])
    drain(stage)
    pools.assert_idle()
