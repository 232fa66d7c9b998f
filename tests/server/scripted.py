"""A frontend alone, with instances that are played by the test: what they are sent is kept, what they say is said."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

from tests.server.fakes import ANSWER, D, E, P, end_id, ids, processor
from triptych.config import KV_BLOCK_TOKENS, AdmissionConfig
from triptych.core import (
    EncodeUnit,
    FinishReason,
    InstanceId,
    Media,
    RequestId,
    Role,
    SamplingParams,
    Span,
    Stage,
    UnitHash,
)
from triptych.messages import (
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
from triptych.router.generation import Generation, PreparedPrompt
from triptych.router.output import Output
from triptych.server.frontend import Frontend
from triptych.telemetry import Telemetry

M = TypeVar("M")
TEXT = 2 * KV_BLOCK_TOKENS
SAMPLING = SamplingParams(max_tokens=50, seed=1)


class Wire:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[InstanceId, AnyMessage]] = []

    def send(self, instance: InstanceId, message: AnyMessage) -> None:
        self.sent.append((instance, message))

    def receivers(self, kind: type[Any]) -> list[InstanceId]:
        return [instance for instance, message in self.sent if isinstance(message, kind)]

    def take(self, kind: type[M]) -> list[tuple[InstanceId, M]]:
        """What was sent since, of one kind; all the rest is forgotten."""
        sent, self.sent = self.sent, []
        return [(instance, message) for instance, message in sent if isinstance(message, kind)]


def make_frontend(
    *placement: tuple[str, Role], admission: AdmissionConfig | None = None, **options: bool
) -> tuple[Frontend, Wire]:
    """Of one E, P and D, unless a placement is given."""
    wire = Wire()
    frontend = Frontend(processor(), wire, Telemetry("m"), admission=admission, **options)
    publish(frontend, *(placement or ((E, Role.E), (P, Role.P), (D, Role.D))))
    return frontend, wire


def publish(frontend: Frontend, *placement: tuple[str, Role], epoch: str = "epoch", leaving: str = "") -> None:
    """The next routing table."""
    slab = SlabDescription({}, "", "cpu", 0, {})
    peers = [Peer(InstanceId(name), role, epoch, "", slab, leaving=name == leaving) for name, role in placement]
    frontend.handle(Table(frontend.table.version + 1, peers))


def start(
    frontend: Frontend,
    *units: EncodeUnit,
    n: int = 1,
    num_tokens: int = 100,
    stop: tuple[str, ...] = (),
    arrived_at: float | None = None,
    timeout_s: float | None = None,
    sampling: SamplingParams = SAMPLING,
) -> Generation:
    spans = tuple(Span(i, unit.num_tokens, i, 0) for i, unit in enumerate(units))
    prompt = PreparedPrompt([1] * num_tokens, units, spans, {unit.hash: media(unit) for unit in units}, {})
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    return frontend.generate([prompt], [sampling], n, stop, arrived_at=arrived_at, deadline=deadline)


def ask(frontend: Frontend, *units: EncodeUnit, token: int = 1, n: int = 1) -> Generation:
    """A prompt of two blocks of text, the pictures, and two blocks of text again."""
    spans, start = [], TEXT
    for index, unit in enumerate(units):
        spans.append(Span(start, unit.num_tokens, index, 0))
        start += unit.num_tokens
    medias = {unit.hash: media(unit) for unit in units}
    prompt = PreparedPrompt([token] * (start + TEXT), units, tuple(spans), medias, {})
    return frontend.generate([prompt], [SAMPLING], n)


def report(frontend: Frontend, **work_s: float) -> None:
    """Loads of instances, by name."""
    for name, seconds in work_s.items():
        frontend.handle(Load(InstanceId(name), {}, {}, {"p": seconds}, {}, {}))


def encoded(wire: Wire) -> list[tuple[InstanceId, int]]:
    """Who was told to encode which unit since it was last asked."""
    return [(instance, unit.hash[0]) for instance, order in wire.take(Encode) for unit in order.units]


def lose(frontend: Frontend, *gone: InstanceId, suspects: Collection[RequestId] = ()) -> None:
    """As the controller tells it: the table first."""
    without(frontend, *gone)
    for instance in gone:
        frontend.instance_lost(instance, suspects)


def without(frontend: Frontend, *gone: InstanceId) -> None:
    """The next routing table."""
    peers = [peer for peer in frontend.table.peers.values() if peer.id not in gone]
    frontend.handle(Table(frontend.table.version + 1, peers))


def media(unit: EncodeUnit) -> Media:
    """A picture of its own for each unit."""
    return Media(unit.hash, unit.modality, b"x")


def unit(name: int, num_tokens: int, modality: str = "image") -> EncodeUnit:
    return EncodeUnit(UnitHash(bytes([name] * 16)), modality, num_tokens)


def updates(request_id: RequestId) -> list[TokenUpdate]:
    tokens = [*ids(ANSWER), end_id()]
    ends = [None] * (len(tokens) - 1) + [FinishReason.STOP]
    return [TokenUpdate(request_id, token, i, end) for i, (token, end) in enumerate(zip(tokens, ends, strict=True))]


def attempt_id(output: Output, number: int = 1) -> RequestId:
    """Under which the instances know it."""
    return RequestId(f"{output.request_id}.{number}")


def attempt_of(generation: Generation, number: int = 1) -> RequestId:
    return attempt_id(generation.outputs[0], number)


def num_attempts(wire: Wire, generation: Generation) -> int:
    return max(len(orders(wire, output)) for output in generation.outputs)


def orders(wire: Wire, output: Output) -> list[Submit]:
    """All that were sent for it, oldest first."""
    submits = (message for _, message in wire.sent if isinstance(message, Submit))
    return [order for order in submits if order.request_id.rpartition(".")[0] == output.request_id]


def answer(frontend: Frontend, wire: Wire, output: Output, *, upto: int | None = None) -> None:
    """Its newest attempt is prefilled and decoded, up to a number of tokens: the rest of `ANSWER`."""
    order = orders(wire, output)[-1]
    rest = updates(order.request_id)[len(order.token_ids) - order.num_prompt_tokens : upto]
    decode = next(peer.id for peer in frontend.table.serving(Stage.DECODE))
    prefill = next(to for to, message in wire.sent if message is order)
    for update in rest:
        frontend.handle(Tokens(prefill if update is rest[0] else decode, [update]))
        if update is rest[0] and update.finish is None:
            frontend.handle(Located(order.request_id, decode))


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.002)


def on_loop(scenario: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await scenario()

    asyncio.run(run())
