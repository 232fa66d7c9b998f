"""The frontend alone, on an event loop of its own: order of tokens, choice of instances, what is sent to whom."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from tests.server.fakes import ANSWER, D, E, P, end_id, ids, num_live, processor
from triptych.core import EncodeUnit, FinishReason, InstanceId, Media, RequestId, Role, SamplingParams, Span, UnitHash
from triptych.errors import RequestError
from triptych.messages import (
    Abort,
    AnyMessage,
    Encode,
    Load,
    Located,
    Peer,
    SlabDescription,
    Submit,
    Table,
    Tokens,
    TokenUpdate,
)
from triptych.server.frontend import Frontend, Generation, PreparedPrompt
from triptych.telemetry import Telemetry


class Wire:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[InstanceId, AnyMessage]] = []

    def send(self, instance: InstanceId, message: AnyMessage) -> None:
        self.sent.append((instance, message))

    def receivers(self, kind: type[Any]) -> list[InstanceId]:
        return [instance for instance, message in self.sent if isinstance(message, kind)]


def make_frontend(*placement: tuple[str, Role]) -> tuple[Frontend, Wire]:
    wire = Wire()
    frontend = Frontend(processor(), wire, Telemetry("m"))
    slab = SlabDescription({}, "", "cpu", 0, {})
    peers = [Peer(InstanceId(name), role, "epoch", "", slab) for name, role in placement]
    frontend.handle(
        Table(
            1,
            peers
            or [
                Peer(id, role, "epoch", "", slab) for id, role in zip((E, P, D), (Role.E, Role.P, Role.D), strict=True)
            ],
        )
    )
    return frontend, wire


def start(frontend: Frontend, *units: EncodeUnit, n: int = 1) -> Generation:
    spans = tuple(Span(i, unit.num_tokens, i, 0) for i, unit in enumerate(units))
    prompt = PreparedPrompt([1] * 100, units, spans, {unit.hash: media(unit) for unit in units}, {})
    return frontend.generate([prompt], [SamplingParams(max_tokens=50, seed=1)], n)


def media(unit: EncodeUnit) -> Media:
    """A picture of its own for each unit."""
    return Media(unit.hash, unit.modality, b"x")


def unit(name: int, num_tokens: int) -> EncodeUnit:
    return EncodeUnit(UnitHash(bytes([name] * 16)), "image", num_tokens)


def updates(request_id: RequestId) -> list[TokenUpdate]:
    tokens = [*ids(ANSWER), end_id()]
    ends = [None] * (len(tokens) - 1) + [FinishReason.STOP]
    return [TokenUpdate(request_id, token, i, end) for i, (token, end) in enumerate(zip(tokens, ends, strict=True))]


def on_loop(scenario: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await scenario()

    asyncio.run(run())


def test_tokens_that_overtake_each_other_are_put_in_order_and_repeated_ones_dropped() -> None:
    async def scenario() -> None:
        frontend, _ = make_frontend()
        generation = start(frontend)
        (output,) = generation.outputs
        first, second, *rest = updates(output.request_id)
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
            frontend.handle(Tokens(P, updates(output.request_id)))
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
            request_id = generation.outputs[0].request_id
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
            request_id = generation.outputs[0].request_id
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


@pytest.mark.parametrize("lost", [E, P, D])
def test_before_decodes_own_token_the_loss_of_any_instance_ends_the_request(lost: InstanceId) -> None:
    async def scenario() -> None:
        frontend, _ = make_frontend()
        generation = start(frontend, unit(1, 64))
        request_id = generation.outputs[0].request_id
        frontend.handle(Tokens(P, updates(request_id)[:1]))
        frontend.handle(Tokens(D, updates(request_id)[2:3]))  # one is missing, so this proves nothing yet to the client
        frontend.handle(Located(request_id, D))
        frontend.instance_lost(lost)
        with pytest.raises(RequestError, match=f"{lost} was lost") as caught:
            await generation.wait()
        assert (caught.value.status, caught.value.code) == (503, "instance_lost")

    on_loop(scenario)


def test_a_request_that_was_handed_to_an_instance_that_is_lost_ends() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        generation = start(frontend)
        request_id = generation.outputs[0].request_id
        frontend.instance_lost(D)
        frontend.handle(Table(2, [peer for peer in frontend.table.peers.values() if peer.id != D]))
        frontend.handle(Tokens(P, updates(request_id)[:1]))
        frontend.handle(Located(request_id, D))
        with pytest.raises(RequestError, match="d0 was lost") as caught:
            await generation.wait()
        assert (caught.value.status, caught.value.code) == (503, "instance_lost")
        assert P in wire.receivers(Abort)

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
        impossible = msgspec.structs.replace(updates(broken.outputs[0].request_id)[0], token_id=-1)
        frontend.handle(Tokens(P, [impossible, *updates(sound.outputs[0].request_id)]))
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
