"""Decode: continuous batching, pulls that fit, and offloading when blocks run short."""

import pytest

from tests.builders import Pools, make_near, make_pools, make_prefilled, make_sampling, make_stage
from triptych.core import BlockHashes, FinishReason, RequestId, SampledToken, Sequence, Stage, Status
from triptych.messages import Failed, Prefilled, Release
from triptych.stages.decode import DecodePlan, DecodeStage


def make_decode(kv_blocks: int = 16, max_num_seqs: int = 8) -> tuple[DecodeStage, Pools]:
    pools = make_pools(kv_blocks, near=make_near("d0", p0="p", d0="d"))
    return make_stage(Stage.DECODE, pools, max_num_seqs=max_num_seqs), pools


def arrive(stage: DecodeStage, name: str, num_prompt_tokens: int = 7, max_tokens: int = 4) -> None:
    """Admitted, and its KV pulled at once."""
    stage.admit(make_prefilled(name, num_prompt_tokens, max_tokens))
    stage.pulled(RequestId(name), None)


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


def test_a_failed_pull_fails_the_request_and_gives_everything_back():
    stage, pools = make_decode()
    stage.admit(make_prefilled("r", lease=9))
    stage.pulled(RequestId("r"), RuntimeError("link down"))
    release, failed = sent(pools)
    assert release == Release(9)
    assert isinstance(failed, Failed)
    assert (failed.status, failed.code) == (500, "transfer_failed")
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
    assert pools.near.out.messages == [(holder, Release(6))]
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
