"""The frontend alone, on an event loop of its own: order of tokens, choice of instances, what is sent to whom."""

import msgspec
import pytest

from tests.server.fakes import ANSWER, D, E, P, num_live, processor
from tests.server.scripted import (
    TEXT,
    ask,
    attempt_id,
    attempt_of,
    encoded,
    make_frontend,
    on_loop,
    report,
    start,
    unit,
    updates,
    without,
)
from triptych.config import KV_BLOCK_TOKENS
from triptych.core import (
    BlockHash,
    BlockHashes,
    EncodeUnit,
    InstanceId,
    Media,
    Role,
    SamplingParams,
    Span,
    UnitHash,
)
from triptych.errors import RequestError
from triptych.memory.prefix import prompt_hashes
from triptych.messages import (
    Abort,
    Encode,
    Evicted,
    Failed,
    Load,
    Located,
    Submit,
    Table,
    Tokens,
    Wanted,
)
from triptych.router.generation import PreparedPrompt


def test_tokens_that_overtake_each_other_are_put_in_order_and_repeated_ones_dropped() -> None:
    async def scenario() -> None:
        frontend, _ = make_frontend()
        generation = start(frontend)
        (output,) = generation.outputs
        first, second, *rest = updates(attempt_id(output))
        frontend.handle(Tokens(D, [second]))
        frontend.handle(Tokens(D, rest))
        assert output.num_tokens == 0
        frontend.handle(Tokens(P, [first]))
        frontend.handle(Tokens(P, [first]))
        await generation.wait()
        assert output.take_text() == ANSWER
        assert not num_live(frontend)

    on_loop(scenario)


def test_a_generation_hands_out_everything_before_it_ends() -> None:
    async def scenario() -> None:
        frontend, _ = make_frontend()
        generation = start(frontend, n=2)
        for output in generation.outputs:
            frontend.handle(Tokens(P, updates(attempt_id(output))))
        assert generation.finished
        assert [output.index async for changed in generation for output in changed] == [0, 1]

    on_loop(scenario)


def test_leaving_a_generation_aborts_wherever_the_request_may_be() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(("e0", Role.E), ("e1", Role.E), ("p0", Role.P), ("d0", Role.D), ("d1", Role.D))
        async with start(frontend, unit(1, 64), unit(2, 64)):
            pass
        assert sorted(wire.receivers(Abort)) == ["e0", "e1", "p0"]
        wire.sent.clear()
        async with start(frontend, unit(3, 64)) as generation:
            request_id = attempt_of(generation)
            frontend.handle(Tokens(P, updates(request_id)[:1]))
            frontend.handle(Located(request_id, InstanceId("d1")))
        assert sorted(wire.receivers(Abort)) == ["d1", "e0", "p0"], "a unit that P had cached may still be in E's queue"
        wire.sent.clear()
        frontend.abort(generation)
        assert wire.sent == []

    on_loop(scenario)


def test_decodes_own_token_says_that_nobody_else_holds_anything() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        async with start(frontend, unit(1, 64)) as generation:
            request_id = attempt_of(generation)
            first, second, third, *_ = updates(request_id)
            frontend.handle(Tokens(D, [second]))  # overtook: what P has to say is still to come
            frontend.handle(Located(request_id, D))
            frontend.handle(Tokens(P, [first]))
            frontend.handle(Tokens(D, [third]))
            frontend.instance_lost(E)
            frontend.instance_lost(P)
            assert num_live(frontend) == 1
        assert wire.receivers(Abort) == [D]

    on_loop(scenario)


def test_a_late_load_of_an_instance_that_is_gone_is_not_kept() -> None:
    frontend, _ = make_frontend()
    frontend.handle(Load(D, {}, {}, {"d": 1.0}, {}, {}))
    frontend.handle(Table(2, [peer for peer in frontend.table.peers.values() if peer.id != D]))
    frontend.handle(Load(D, {}, {}, {"d": 1.0}, {}, {}))
    assert D not in frontend.loads


def test_a_token_that_cannot_be_taken_ends_its_request_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        broken, sound = start(frontend), start(frontend)
        impossible = msgspec.structs.replace(updates(attempt_of(broken))[0], token_id=-1)
        frontend.handle(Tokens(P, [impossible, *updates(attempt_of(sound))]))
        with pytest.raises(RequestError, match="internal server error") as caught:
            await broken.wait()
        assert caught.value.status == 500
        await sound.wait()
        assert sound.outputs[0].take_text() == ANSWER
        assert wire.receivers(Abort) == [P]
        assert not num_live(frontend)

    on_loop(scenario)
    assert "Traceback" in caplog.text


def test_distinct_units_of_a_request_are_spread_by_cost_and_sent_once() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("e1", Role.E), ("pd0", Role.PD))
    start(frontend, unit(1, 90), unit(2, 30), unit(1, 90), unit(3, 40))
    by_unit = {
        unit.hash[0]: instance
        for instance, message in wire.sent
        if isinstance(message, Encode)
        for unit in message.units
    }
    assert len(wire.receivers(Encode)) == 3
    assert by_unit[2] == by_unit[3] != by_unit[1]
    assert wire.receivers(Submit) == ["pd0"]


def test_requests_take_turns_until_loads_are_reported() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("pd0", Role.PD), ("pd1", Role.PD))
    for _ in range(4):
        start(frontend)
    assert wire.receivers(Submit) == ["pd0", "pd1", "pd0", "pd1"]
    frontend.handle(Load(InstanceId("pd0"), {}, {}, {"d": 5.0}, {}, {}))
    frontend.handle(Load(InstanceId("pd1"), {}, {}, {"p": 0.1}, {}, {}))
    wire.sent.clear()
    start(frontend)
    assert wire.receivers(Submit) == ["pd1"]


def test_only_the_stages_that_a_request_needs_must_be_there() -> None:
    frontend, wire = make_frontend(("p0", Role.P), ("d0", Role.D))
    start(frontend)
    assert wire.receivers(Submit) == ["p0"]
    with pytest.raises(RequestError, match="encode") as caught:
        start(frontend, unit(1, 10))
    assert caught.value.status == 503
    assert num_live(frontend) == 1


def test_choices_of_one_prompt_go_to_the_same_instances() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("pd0", Role.PD), ("pd1", Role.PD))
    start(frontend, unit(1, 10), n=4)
    assert len(set(wire.receivers(Submit))) == 1
    assert all(message.prefill == wire.receivers(Submit)[0] for _, message in wire.sent if isinstance(message, Encode))


# ---- what the caches are thought to hold


def test_choices_after_the_first_order_nothing() -> None:
    frontend, wire = make_frontend()
    generation = ask(frontend, unit(1, 16), unit(2, 16), n=3)
    submits = [message for _, message in wire.sent if isinstance(message, Submit)]
    assert [len(order.ordered) for order in submits] == [2, 0, 0]
    assert {message.request_id for _, message in wire.take(Encode)} == {attempt_of(generation)}


def test_a_unit_that_prefill_seems_to_have_is_not_ordered_again() -> None:
    frontend, wire = make_frontend()
    ask(frontend, unit(1, 16), token=1)
    wire.sent.clear()
    ask(frontend, unit(1, 16), unit(2, 16), token=2)
    [(_, order)] = [(to, m) for to, m in wire.sent if isinstance(m, Submit)]
    assert (order.ordered, order.held) == ((unit(2, 16).hash,), {})
    assert encoded(wire) == [(E, 2)]


def test_a_unit_that_is_wanted_is_ordered_from_an_encode_instance_which_then_hears_of_the_end() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(("e0", Role.E), ("e1", Role.E), ("p0", Role.P), ("d0", Role.D))
        ask(frontend, unit(1, 16), token=1)
        assert encoded(wire) == [("e0", 1)]
        async with ask(frontend, unit(1, 16), token=2) as generation:
            assert encoded(wire) == []
            frontend.handle(Evicted(InstanceId("e0"), [unit(1, 16).hash], []))
            report(frontend, e0=1.0, e1=0.5)
            request_id = attempt_of(generation)
            frontend.handle(Wanted(request_id, (unit(1, 16).hash,)))
            [(to, order)] = wire.take(Encode)
            assert (to, order.request_id, order.prefill) == ("e1", request_id, "p0")
        assert sorted(wire.receivers(Abort)) == ["e1", "p0"]

    on_loop(scenario)


def test_a_unit_that_is_wanted_by_a_request_that_is_gone_is_not_encoded() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        async with ask(frontend, unit(1, 16)) as generation:
            request_id = attempt_of(generation)
        wire.sent.clear()
        frontend.handle(Wanted(request_id, (unit(1, 16).hash,)))
        assert wire.sent == []

    on_loop(scenario)


def test_what_was_evicted_is_ordered_again_from_who_still_has_it_first() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("e1", Role.E), ("p0", Role.P), ("d0", Role.D))
    report(frontend, e0=1.0, e1=0.0)
    one = unit(1, 16)
    ask(frontend, one, token=1)
    assert encoded(wire) == [("e1", 1)]
    frontend.handle(Evicted(InstanceId("p0"), [one.hash], []))
    report(frontend, e0=0.0, e1=9.0)
    ask(frontend, one, token=2)
    assert encoded(wire) == [("e1", 1)], "it costs nothing there"
    for instance in ("p0", "e1"):
        frontend.handle(Evicted(InstanceId(instance), [one.hash], []))
    ask(frontend, one, token=3)
    assert encoded(wire) == [("e0", 1)]


def test_a_unit_that_only_another_prefill_instance_holds_is_said_to_be_held_there() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("p0", Role.P), ("p1", Role.P), ("d0", Role.D))
    report(frontend, p0=0.0, p1=1.0)
    one = unit(1, 16)
    ask(frontend, one, token=1)
    frontend.handle(Evicted(InstanceId("e0"), [one.hash], []))
    report(frontend, p0=1.0, p1=0.0)
    wire.sent.clear()
    ask(frontend, one, token=2)
    assert wire.receivers(Encode) == []
    [(to, order)] = wire.take(Submit)
    assert (to, order.ordered, order.held) == ("p1", (), {one.hash: "p0"})
    without(frontend, InstanceId("p0"), InstanceId("p1"))


def test_a_unit_that_could_not_be_encoded_is_thought_to_be_nowhere() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        generation = ask(frontend, unit(1, 16))
        frontend.handle(Failed(attempt_of(generation), "bad", 400, "invalid_image", unit(1, 16).hash))
        with pytest.raises(RequestError, match="bad"):
            await generation.wait()
        wire.sent.clear()
        ask(frontend, unit(1, 16), token=2)
        assert encoded(wire) == [(E, 1)]

    on_loop(scenario)


@pytest.mark.parametrize("reported", [True, False])
@pytest.mark.parametrize("gap", [True, False])
def test_an_instance_that_was_restarted_is_thought_to_hold_nothing(reported: bool, gap: bool) -> None:
    frontend, wire = make_frontend()
    if reported:
        report(frontend, **{P: 0.0, E: 0.0})
    ask(frontend, unit(1, 16), token=1)
    peers = list(frontend.table.peers.values())
    if gap:
        without(frontend, P, E)
    frontend.handle(Table(9, [msgspec.structs.replace(peer, epoch="later") for peer in peers]))
    wire.sent.clear()
    ask(frontend, unit(1, 16), token=1)
    assert encoded(wire) == [(E, 1)]


def test_without_parallel_encode_one_instance_gets_all_units_of_a_request() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("e1", Role.E), ("pd0", Role.PD), parallel_encode=False)
    report(frontend, e0=0.5, e1=0.0)
    ask(frontend, *(unit(i, 160) for i in range(1, 6)))
    assert {instance for instance, _ in encoded(wire)} == {"e1"}
    ask(frontend, *(unit(i, 16) for i in range(6, 9)), token=2)
    assert len({instance for instance, _ in encoded(wire)}) == 1


def test_the_units_of_one_item_go_to_one_instance_in_one_order() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("e1", Role.E), ("pd0", Role.PD))
    tiles = tuple(EncodeUnit(UnitHash(bytes([i] * 16)), "image", 16, i) for i in range(1, 7))
    spans = tuple(Span(16 * i, 16, i, 0) for i in range(6))
    item = Media(b"item", "image", b"x")
    prompt = PreparedPrompt([1] * 100, tiles, spans, {tile.hash: item for tile in tiles}, {})
    frontend.generate([prompt], [SamplingParams(max_tokens=5, seed=1)])
    orders = wire.take(Encode)
    assert sorted(to for to, _ in orders) == ["e0", "e1"]
    assert all(
        [unit.index for unit in order.units] == sorted(unit.index for unit in order.units) for _, order in orders
    )
    assert sum(len(order.units) for _, order in orders) == 6


# ---- where a prefix is


def test_a_prompt_goes_to_the_prefill_instance_that_has_its_beginning() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("pd0", Role.PD), ("pd1", Role.PD))
    report(frontend, pd0=1.0, pd1=0.0)
    ask(frontend, token=1)
    report(frontend, pd0=0.0, pd1=0.0)
    ask(frontend, token=1)
    ask(frontend, token=2)
    assert wire.receivers(Submit) == ["pd1", "pd1", "pd0"]


def test_unless_it_is_busier_than_the_prefix_is_worth() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("pd0", Role.PD), ("pd1", Role.PD))
    report(frontend, pd0=1.0, pd1=0.0)
    ask(frontend, token=1)  # of 64 tokens, each 0.1 ms as long as nobody reports his pace
    wire.sent.clear()
    for busy, expected in ((0.0060, "pd1"), (0.0068, "pd0")):
        report(frontend, pd0=0.0, pd1=busy)
        ask(frontend, token=1)
        assert [to for to, _ in wire.take(Submit)] == [expected]
        frontend.handle(Evicted(InstanceId("pd0"), [], [*_hashes(1)]))


def test_a_prefix_that_was_evicted_attracts_nobody() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("pd0", Role.PD), ("pd1", Role.PD))
    report(frontend, pd0=1.0, pd1=0.0)
    ask(frontend, token=1)
    frontend.handle(Evicted(InstanceId("pd1"), [], [*_hashes(1)]))
    report(frontend, pd0=0.0, pd1=0.0)
    wire.sent.clear()
    ask(frontend, token=1)
    assert wire.receivers(Submit) == ["pd0"]


def test_units_that_a_cached_prefix_covers_are_not_ordered_even_if_nobody_holds_them_any_more() -> None:
    frontend, wire = make_frontend()
    one = unit(1, 16)
    ask(frontend, one)
    for instance in (E, P):
        frontend.handle(Evicted(instance, [one.hash], []))
    wire.sent.clear()
    ask(frontend, one)
    assert encoded(wire) == []


def test_another_picture_among_the_same_tokens_is_another_prefix() -> None:
    frontend, wire = make_frontend()
    ask(frontend, unit(1, 16))
    ask(frontend, unit(2, 16))
    one, other = [order.prompt_hashes.blocks for _, order in wire.take(Submit)]
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, False, False]


def test_without_prefix_caching_no_prompt_is_hashed_and_none_attracted() -> None:
    frontend, wire = make_frontend(("e0", Role.E), ("pd0", Role.PD), ("pd1", Role.PD), prefix_caching=False)
    report(frontend, pd0=1.0, pd1=0.0)
    ask(frontend, token=1)
    report(frontend, pd0=0.0, pd1=0.0)
    ask(frontend, token=1)
    assert [(to, order.prompt_hashes) for to, order in wire.take(Submit)] == [
        ("pd1", BlockHashes()),
        ("pd0", BlockHashes()),
    ]


def _hashes(token: int) -> tuple[BlockHash, ...]:
    return prompt_hashes(processor().identity, [token] * 2 * TEXT, (), (), KV_BLOCK_TOKENS).blocks
