"""A request that is taken up again: behind its prompt stand the tokens that its client has, and it goes on behind
them."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.builders import BLOCK_TOKENS, Pools, make_near, make_pools, make_request, make_stage, make_unit
from triptych.core import FinishReason, RequestId, SampledToken, Stage
from triptych.memory.kv_cache import KVCache
from triptych.memory.prefix import prompt_hashes
from triptych.messages import Embedded, Failed, Prefilled, Prefilling, Submit, TokenUpdate
from triptych.stages.decode import DecodeStage
from triptych.stages.prefill import PrefillStage

SAID = (7, 8, 9, 7, 8, 9, 7)


def make_prefill(kv_blocks: int = 32, **options: object) -> tuple[PrefillStage, Pools]:
    pools = make_pools(kv_blocks, near=make_near("here", here="p", e0="e", d0="d"))
    return make_stage(Stage.PREFILL, pools, **options), pools


def again(request: Submit, said: tuple[int, ...] = SAID, **sampling: object) -> Submit:
    """The next attempt, after the client got these tokens."""
    return replace(
        request,
        request_id=RequestId(f"{request.request_id}.again"),
        token_ids=[*request.token_ids, *said],
        sampling=replace(request.sampling, **sampling),
    )


def prefill(stage: PrefillStage, budget: int = 64, token: int = 5) -> list[tuple[int, int]]:
    chunks = stage.schedule(budget)
    stage.commit(chunks, [SampledToken(token) for chunk in chunks if chunk.samples])
    return [(chunk.start, chunk.length) for chunk in chunks]


def sent(pools: Pools, kind: type) -> list[object]:
    messages, pools.near.out.messages = pools.near.out.messages, []
    return [message for _, message in messages if isinstance(message, kind)]


def read_all(pools: Pools) -> None:
    for lease in list(pools.leases._leases):
        pools.leases.release(lease)


def test_its_next_token_has_the_index_that_the_lost_one_would_have_had():
    stage, pools = make_prefill()
    stage.admit(again(make_request("r", text=7, max_tokens=20)))
    assert prefill(stage) == [(0, 14)]
    [update] = pools.near.out.tokens
    assert (update.index, update.finish) == (7, None)
    [order] = sent(pools, Prefilled)
    assert (order.token_ids[7:], order.num_prompt_tokens, order.ticket.num_tokens) == ([*SAID, 5], 7, 14)
    assert len(order.ticket.blocks) == 4


@pytest.mark.parametrize("said", [0, 1, 2, 7])
def test_the_prefix_that_is_known_ends_within_the_prompt(said):
    """Its last token is computed, and so is what was said: nobody hashed that."""
    stage, pools = make_prefill()
    request = make_request("r", text=8, max_tokens=20, hashed=True)
    stage.admit(again(request, ()))
    prefill(stage)
    read_all(pools)
    pools.near.out.tokens.clear()
    stage.admit(replace(again(request, SAID[:said]), request_id=RequestId("once more")))
    assert prefill(stage) == [(4, 4 + said)]
    [update] = pools.near.out.tokens
    assert update.num_cached == 4


def test_what_is_computed_of_it_is_found_by_the_next_turn_of_the_conversation():
    stage, pools = make_prefill()
    request = make_request("r", text=7, max_tokens=20, hashed=True)
    stage.admit(again(request))
    prefill(stage)
    token_ids = [*request.token_ids, *SAID, 1, 2, 3]
    found = pools.kv.find(prompt_hashes(b"root", token_ids, (), (), BLOCK_TOKENS), len(token_ids))
    [order] = sent(pools, Prefilled)
    assert found == order.ticket.blocks[:3]


def test_a_picture_at_the_end_of_its_prompt_is_a_part_of_what_the_block_that_follows_stands_for():
    stage, pools = make_prefill()
    for number, name in enumerate(("cat", "dog")):
        unit = make_unit(name, 6)
        request = make_request(name, (unit,), text=0, max_tokens=20, hashed=True)
        stage.admit(again(request))
        pools.cache.hold(unit).ready = True
        assert prefill(stage) == [(0, 13)], "neither is found for the other, though all tokens are equal"
        assert pools.kv.usage().used == 4 * (number + 1)


def test_units_that_a_prefix_covers_are_not_needed_and_the_others_are_asked_for_again():
    stage, pools = make_prefill()
    cat, dog = make_unit("cat"), make_unit("dog")
    request = make_request("r", (cat, dog), text=4, max_tokens=20, hashed=True)
    for unit in (cat, dog):
        pools.cache.hold(unit).ready = True
    stage.admit(request)
    prefill(stage, 24)
    stage.abort(RequestId("r"))
    sent(pools, Embedded)
    stage.admit(again(request))
    assert prefill(stage) == [(24, 4 + 7)]
    assert stage.num_units == {"prefix": 2}


def test_its_beginning_is_sent_ahead_chunk_by_chunk_over_the_end_of_the_prompt():
    stage, pools = make_prefill()
    stage.admit(again(make_request("r", text=7, max_tokens=20, hashed=True)))
    for _ in range(2):
        prefill(stage, 6)
    assert [(m.num_tokens, m.ticket.num_tokens) for m in sent(pools, Prefilling)] == [(14, 4), (14, 12)]
    prefill(stage, 6)
    [order] = sent(pools, Prefilled)
    assert order.ticket.num_tokens == 14


@pytest.mark.parametrize(("max_tokens", "ahead"), [(8, 0), (9, 1)])
def test_nothing_is_sent_ahead_for_its_last_token(max_tokens, ahead):
    stage, pools = make_prefill()
    stage.admit(again(make_request("r", text=7, max_tokens=max_tokens)))
    prefill(stage, 12)
    assert len(sent(pools, Prefilling)) == ahead


@pytest.mark.parametrize(("sampling", "finish"), [
    ({"max_tokens": 8}, FinishReason.LENGTH), ({"max_tokens": 9}, None),
    ({"max_tokens": 20, "stop_token_ids": (5,)}, FinishReason.STOP),
    ({"max_tokens": 20, "stop_token_ids": (5,), "min_tokens": 8}, FinishReason.STOP),
    ({"max_tokens": 20, "stop_token_ids": (5,), "min_tokens": 9}, None),
])  # fmt: skip
def test_limits_count_what_was_said_before(sampling, finish):
    stage, pools = make_prefill()
    stage.admit(again(make_request("r", text=7), **sampling))
    prefill(stage)
    assert [update.finish for update in pools.near.out.tokens] == [finish]


def test_the_length_of_the_model_counts_what_was_said_before():
    stage, pools = make_prefill()
    pools.near.max_model_len = 15
    stage.admit(again(make_request("r", text=7, max_tokens=100)))
    prefill(stage)
    assert [update.finish for update in pools.near.out.tokens] == [FinishReason.LENGTH]


@pytest.mark.parametrize(("said", "fits"), [(8, True), (9, False)])
def test_its_last_token_may_fill_the_pool(said, fits):
    stage, pools = make_prefill(kv_blocks=4)
    pools.near.max_model_len = 16
    stage.admit(again(make_request("r", text=7, max_tokens=100), (5,) * said))
    prefill(stage)
    assert len(pools.near.out.tokens) == fits
    assert len(sent(pools, Failed)) == (not fits)
    pools.assert_idle()


# ---- the whole way


@dataclass
class Pair:
    """A prefill and a decode instance side by side; tokens are what their position says."""

    prefill: PrefillStage
    decode: DecodeStage
    pools: tuple[Pools, Pools]

    def step(self) -> list[TokenUpdate]:
        """Everything that is due at both; what they said."""
        here, there = self.pools
        chunks = self.prefill.schedule(5)
        self.prefill.commit(chunks, [token_at(len(c.sequence.token_ids)) for c in chunks if c.samples])
        for message in [m for _, m in here.near.out.messages]:
            if isinstance(message, Prefilling):
                self.decode.prefilling(message)
            elif isinstance(message, Prefilled):
                self.decode.admit(message)
        here.near.out.messages.clear()
        while there.near.out.pulls:
            self.decode.pulled(there.near.out.pulls.pop().key, None)
        plan = self.decode.schedule()
        self.decode.commit(plan.chunks, [token_at(len(c.sequence.token_ids)) for c in plan.chunks])
        said = [*here.near.out.tokens, *there.near.out.tokens]
        here.near.out.tokens, there.near.out.tokens = [], []
        return said


def token_at(position: int) -> SampledToken:
    return SampledToken(position * 7 % 11)


def make_pair(*, prefix_caching: bool, state_blocks: int) -> Pair:
    both = []
    for name in ("p0", "d0"):
        pools = make_pools(near=make_near(name, p0="p", d0="d"))
        pools.kv = KVCache(40, BLOCK_TOKENS, prefix_caching=prefix_caching, state_blocks=state_blocks)
        both.append(pools)
    return Pair(make_stage(Stage.PREFILL, both[0]), make_stage(Stage.DECODE, both[1]), (both[0], both[1]))


@given(
    st.integers(1, 13),
    st.integers(1, 25),
    st.lists(st.integers(1, 12), max_size=4),
    st.booleans(),
    st.sampled_from([0, 2]),
)
@settings(max_examples=200, deadline=None)
def test_however_often_it_is_lost_the_answer_is_the_same(text, max_tokens, losses, prefix_caching, state_blocks):
    pair = make_pair(prefix_caching=prefix_caching, state_blocks=state_blocks)
    request = make_request("r", text=text, max_tokens=max_tokens, hashed=True)
    said: list[int] = []
    finish = None
    for attempt, num_steps in enumerate([*losses, 100]):
        name = RequestId(f"r.{attempt}")
        pair.prefill.admit(replace(request, request_id=name, token_ids=[*request.token_ids, *said]))
        for _ in range(num_steps):
            for update in sorted(pair.step(), key=lambda update: update.index):
                assert update.index == len(said), "neither lost nor twice"
                said.append(update.token_id)
                finish = update.finish
            if finish is not None:
                break
        pair.prefill.abort(name)
        pair.decode.abort(name)
        for pools in pair.pools:
            read_all(pools)
            pools.assert_idle()
        if finish is not None:
            break
    assert finish is FinishReason.LENGTH
    assert said == [token_at(text + i).token_id for i in range(max_tokens)]
