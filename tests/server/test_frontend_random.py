"""The frontend over a network in random order, with instances that are lost, restarted, leave their role and fail for a
while: every request gets its answer token for token, and afterwards nothing is held for anybody."""

import asyncio
import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from tests.server.fakes import num_live, processor
from tests.server.scripted import SAMPLING, media, unit
from triptych.config import AdmissionConfig
from triptych.core import FinishReason, InstanceId, RequestId, Role, Span, Stage, UnitHash
from triptych.messages import (
    Abort,
    AnyMessage,
    Encode,
    Failed,
    Load,
    Located,
    Peer,
    SlabDescription,
    Submit,
    Table,
    Tokens,
    TokenUpdate,
    Wanted,
)
from triptych.router import router as router_module
from triptych.router.generation import Generation, PreparedPrompt
from triptych.server.frontend import Frontend
from triptych.telemetry import Telemetry

FRONTEND = InstanceId("frontend")
PLACEMENTS = ("e e p p d d", "e p d", "e pd pd", "e e p d d", "epd epd")


@dataclass(frozen=True)
class Embedded:
    request_id: RequestId
    unit: UnitHash


@dataclass(frozen=True)
class Prefilled:
    request_id: RequestId
    seed: int
    tokens: list[int]  # of the answer so far


def right_token(seed: int, index: int) -> int:
    return random.Random(f"{seed} {index}").randrange(ord("a"), ord("z"))


def length_of(seed: int) -> int:
    return 1 + seed % 9


@dataclass
class Actor:
    """One incarnation of an instance."""

    role: Role
    epoch: str
    leaving: bool = False
    prefilling: dict[RequestId, Submit] = field(default_factory=dict)
    missing: dict[RequestId, set[UnitHash]] = field(default_factory=dict)
    early: set[tuple[RequestId, UnitHash]] = field(default_factory=set)
    units: set[UnitHash] = field(default_factory=set)
    decoding: dict[RequestId, Prefilled] = field(default_factory=dict)


class Network:
    """Keeps the order between two, and no other."""

    def __init__(self, rng: random.Random, placement: str) -> None:
        self.rng = rng
        self.version = 0
        self.epochs = 0
        self.queues: dict[tuple[InstanceId, InstanceId], deque[object]] = {}
        self.actors: dict[InstanceId, Actor] = {}
        self.roles = {InstanceId(f"i{i}"): Role(role) for i, role in enumerate(placement.split())}
        self.failures: dict[str, int] = {}
        self.frontend = Frontend(
            processor(), self, Telemetry("m"), admission=AdmissionConfig(dispatch_s=rng.choice([1e-6, 1.0]))
        )
        for id in self.roles:
            self.restore(id, publish=False)
        self.publish()

    def send(self, instance: InstanceId, message: AnyMessage) -> None:
        self.post(FRONTEND, instance, message)

    def post(self, source: InstanceId, to: InstanceId, message: object) -> None:
        if to == FRONTEND or to in self.actors:
            self.queues.setdefault((source, to), deque()).append(message)

    def publish(self) -> None:
        self.version += 1
        slab = SlabDescription({}, "", "cpu", 0, {})
        peers = [Peer(id, a.role, a.epoch, "", slab, a.leaving) for id, a in self.actors.items()]
        self.frontend.handle(Table(self.version, peers))

    # ---- what happens

    def step(self) -> bool:
        """One message or one step of an instance. False: there is nothing."""
        choices: list[tuple[InstanceId, InstanceId] | InstanceId] = [
            pair for pair, queue in self.queues.items() if queue
        ]
        choices += [id for id, actor in self.actors.items() if actor.decoding or self.ready(actor)]
        if not choices:
            return False
        chosen = self.rng.choice(choices)
        if isinstance(chosen, tuple):
            self.deliver(*chosen)
        else:
            self.work(chosen)
        return True

    def deliver(self, source: InstanceId, to: InstanceId) -> None:
        message = self.queues[source, to].popleft()
        if to == FRONTEND:
            self.frontend.handle(message)  # type: ignore[arg-type]
            return
        actor = self.actors[to]
        match message:
            case Submit() if actor.leaving:
                self.post(to, FRONTEND, Failed(message.request_id, "moved", 503, "moved", retry=True))
            case Submit():
                here = {unit for id, unit in actor.early if id == message.request_id}
                missing = {unit.hash for unit in message.units} - actor.units - here
                actor.prefilling[message.request_id] = message
                actor.missing[message.request_id] = missing
                wanted = tuple(missing - set(message.ordered))
                if wanted:
                    self.post(to, FRONTEND, Wanted(message.request_id, wanted))
            case Encode() if actor.leaving:
                self.post(to, FRONTEND, Wanted(message.request_id, tuple(unit.hash for unit in message.units)))
            case Encode():
                for each in message.units:
                    self.post(to, message.prefill, Embedded(message.request_id, each.hash))
            case Embedded():
                actor.units.add(message.unit)
                actor.early.add((message.request_id, message.unit))
                for missing in actor.missing.values():
                    missing.discard(message.unit)
            case Prefilled():
                actor.decoding[message.request_id] = message
            case Abort():
                actor.prefilling.pop(message.request_id, None)
                actor.missing.pop(message.request_id, None)
                actor.decoding.pop(message.request_id, None)

    def ready(self, actor: Actor) -> list[RequestId]:
        return [id for id in actor.prefilling if not actor.missing[id]]

    def work(self, id: InstanceId) -> None:
        actor = self.actors[id]
        ready = self.ready(actor)
        if ready and (not actor.decoding or self.rng.random() < 0.5):
            self.prefill(id, actor, self.rng.choice(ready))
        elif actor.decoding:
            self.decode(id, actor, self.rng.choice(list(actor.decoding)))

    def prefill(self, id: InstanceId, actor: Actor, request_id: RequestId) -> None:
        order = actor.prefilling.pop(request_id)
        del actor.missing[request_id]
        seed, said = order.sampling.seed, order.token_ids[order.num_prompt_tokens :]
        if self.fails_for_now(request_id):
            self.post(id, FRONTEND, Failed(request_id, "no luck", 500, "transfer_failed", retry=True))
            return
        decoders = [to for to, a in self.actors.items() if Stage.DECODE in a.role.stages and not a.leaving]
        last = len(said) + 1 == length_of(seed)
        if not decoders and not last:
            self.post(id, FRONTEND, Failed(request_id, "nobody decodes", 503, "unavailable", retry=True))
            return
        tokens = [*said, right_token(seed, len(said))]
        self.tell(id, request_id, tokens, last)
        if not last:
            to = id if id in decoders else self.rng.choice(decoders)
            epoch = self.rng.choice(["", self.actors[to].epoch])
            self.post(id, FRONTEND, Located(request_id, to, epoch))
            self.post(id, to, Prefilled(request_id, seed, tokens))

    def decode(self, id: InstanceId, actor: Actor, request_id: RequestId) -> None:
        job = actor.decoding[request_id]
        others = [to for to, a in self.actors.items() if Stage.DECODE in a.role.stages and not a.leaving and to != id]
        if actor.leaving and others:
            to = self.rng.choice(others)
            del actor.decoding[request_id]
            self.post(id, FRONTEND, Located(request_id, to, self.actors[to].epoch))
            self.post(id, to, job)
            return
        job.tokens.append(right_token(job.seed, len(job.tokens)))
        last = len(job.tokens) == length_of(job.seed)
        self.tell(id, request_id, job.tokens, last)
        if last:
            del actor.decoding[request_id]

    def tell(self, id: InstanceId, request_id: RequestId, tokens: list[int], last: bool) -> None:
        finish = FinishReason.LENGTH if last else None
        self.post(id, FRONTEND, Tokens(id, [TokenUpdate(request_id, tokens[-1], len(tokens) - 1, finish)]))

    def fails_for_now(self, request_id: RequestId) -> bool:
        sequence = request_id.rpartition(".")[0]
        self.failures[sequence] = self.failures.get(sequence, 0) + 1
        return self.failures[sequence] < 5 and self.rng.random() < 0.1

    # ---- what goes wrong

    def lose(self, id: InstanceId) -> None:
        actor = self.actors.pop(id)
        suspects = [each for each in [*actor.prefilling, *actor.decoding] if self.rng.random() < 0.2]
        blamed = {attempt.request_id for attempt in self.frontend._router.attempts.values() if attempt.task.num_blames}
        for source, to in list(self.queues):
            if to == id or (source == id and (to != FRONTEND or self.rng.random() < 0.5)):
                del self.queues[source, to]
        self.publish()
        self.frontend.instance_lost(id, [each for each in suspects if each not in blamed])

    def restore(self, id: InstanceId, *, publish: bool = True) -> None:
        self.epochs += 1
        self.actors[id] = Actor(self.roles[id], f"epoch{self.epochs}")
        if publish:
            self.publish()

    def leave(self, id: InstanceId) -> None:
        """What waits is given back, what decodes is handed over."""
        actor = self.actors[id]
        actor.leaving = True
        self.publish()
        for request_id in list(actor.prefilling):
            del actor.prefilling[request_id], actor.missing[request_id]
            self.post(id, FRONTEND, Failed(request_id, "moved", 503, "moved", retry=True))

    def come_back(self, id: InstanceId) -> None:
        """With empty caches, once nothing is left of its old role."""
        actor = self.actors[id]
        busy = actor.decoding or any(queue and id in pair for pair, queue in self.queues.items())
        if not busy:
            actor.leaving = False
            actor.units.clear()
            self.publish()

    def trouble(self) -> None:
        id = self.rng.choice(list(self.roles))
        actor = self.actors.get(id)
        if actor is None:
            self.restore(id)
        elif actor.leaving:
            self.come_back(id)
        elif self.rng.random() < 0.5:
            self.lose(id)
        else:
            self.leave(id)

    def ask(self, seed: int) -> Generation | None:
        units = [unit(self.rng.randrange(1, 6), 8) for _ in range(self.rng.choice([0, 0, 1, 3]))]
        spans = tuple(Span(8 * i, 8, i, 0) for i in range(len(units)))
        prompt = PreparedPrompt([seed] * 64, tuple(units), spans, {each.hash: media(each) for each in units}, {})
        sampling = type(SAMPLING)(max_tokens=length_of(seed), seed=seed)
        if any(not self.frontend.table.serving(stage) for stage in Stage):
            return None
        return self.frontend.generate([prompt], [sampling], self.rng.choice([1, 1, 2]))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("block", range(4))
def test_whatever_happens_every_request_gets_its_answer(
    block: int, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "LONGEST_PAUSE_S", 0.0)
    for seed in range(10 * block, 10 * block + 10):
        asyncio.run(play(random.Random(f"{placement} {seed}"), placement))


async def play(rng: random.Random, placement: str) -> None:
    network = Network(rng, placement)
    asked: list[tuple[int, Generation]] = []
    for _ in range(600):
        if rng.random() < 0.06:
            generation = network.ask(len(asked))
            asked += [] if generation is None else [(len(asked), generation)]
        if rng.random() < 0.03:
            network.trouble()
        if asked and rng.random() < 0.005:
            network.frontend.abort(asked.pop(rng.randrange(len(asked)))[1])
        network.step()
    for id in network.roles:
        if id not in network.actors:
            network.restore(id)
    while network.step() or any(actor.leaving for actor in network.actors.values()):
        for id, actor in network.actors.items():
            if actor.leaving:
                network.come_back(id)
    for seed, generation in asked:
        right = [right_token(seed, index) for index in range(length_of(seed))]
        for output in generation.outputs:
            assert output.token_ids == right, (seed, output.request_id, output.token_ids)
        await asyncio.wait_for(generation.wait(), 1)
    check_nothing_is_held(network.frontend)


def check_nothing_is_held(frontend: Frontend) -> None:
    assert not num_live(frontend)
    assert not frontend._router.attempts
    assert not frontend._router.backlog._wanting
    assert frontend._router.backlog._quarantine.next() is None
    frontend.ledger.check_integrity()
    assert frontend.ledger.num_bytes == 0
    for line in frontend._router.room._lines.values():
        assert (line.num_waiting, line.num_ahead) == (0, 0)
    frontend.handle(Load(InstanceId("i0"), {}, {}, {}, {}, {}))
