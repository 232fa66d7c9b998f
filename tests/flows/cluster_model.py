"""A whole cluster of real stages without a model, whose instances are killed, started again and given other roles.

The network keeps messages of one pair in order and nothing else, but a message waits until the receiver has the table
that its sender had. Pulls copy some blocks when they begin and the rest when they settle. A step runs when something
arrived or the last step did something: a missed wake-up is a deadlock.
"""

import heapq
import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from msgspec.structs import replace

from tests.builders import BLOCK_TOKENS, make_config, make_media, make_prompt
from tests.flows.model_instance import EOS, GARBAGE, Ask, Chain, Instance, Scenario, Turn, picture, sample, slots
from triptych import messages
from triptych.core import (
    BlockHash,
    BlockHashes,
    EncodeUnit,
    FinishReason,
    InstanceId,
    Placement,
    RequestId,
    Role,
    SamplingParams,
    Span,
    Stage,
    UnitHash,
)
from triptych.memory.prefix import prompt_hashes
from triptych.messages import (
    FRONTEND,
    Abort,
    AnyMessage,
    Embedded,
    Encode,
    Evicted,
    Failed,
    Located,
    Peer,
    Prefilled,
    Prefilling,
    Share,
    Submit,
    Switched,
    SwitchRole,
    Table,
    Tokens,
    Wanted,
)
from triptych.router.directory import Directory
from triptych.routing import RoutingTable, assign_units, pick
from triptych.stages.base import Pull

SLOW = 80  # events that something takes at most: to notice a death, to start again, to give a message up


@dataclass(slots=True, eq=False)
class Flight:
    """A pull on its way: which of its blocks are still to be copied."""

    reader: Instance
    holder: Instance | None
    pull: Pull
    left: list[tuple[int, int]]  # (block there, block here)
    failure: Exception | None


@dataclass
class Answer:
    """What the frontend knows about one sequence, and about the attempt that is made of it now."""

    ask: int
    prompt: list[int]
    units: tuple[EncodeUnit, ...]
    spans: tuple[Span, ...]
    hashes: BlockHashes
    sampling: SamplingParams
    attempt: RequestId | None = None  # None: waits to be dispatched
    num_attempts: int = 0
    num_before: int = 0  # tokens when the attempt began
    prefill: InstanceId | None = None
    holders: set[InstanceId] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    ahead: dict[int, messages.TokenUpdate] = field(default_factory=dict)  # came before an earlier token
    finish: FinishReason | None = None
    failure: Failed | None = None
    aborted: bool = False

    @property
    def live(self) -> bool:
        return self.finish is None and self.failure is None and not self.aborted


class Cluster:
    """Frontend and controller, the network and the instances, driven by one random stream."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed)
        self.instances: dict[InstanceId, Instance] = {}  # that are alive
        self.processes: dict[str, Instance] = {}  # those that ever were
        self.chains: dict[RequestId, Chain] = {}
        self.table = RoutingTable()
        self.wires: dict[tuple[str, str], deque[tuple[int, bytes]]] = defaultdict(deque)
        self.flights: list[Flight] = []
        self.directory = Directory()
        self.answers: dict[str, Answer] = {}
        self.attempts: dict[RequestId, Answer] = {}  # the present ones
        self.queue: deque[str] = deque()  # answers that wait to be dispatched
        self.sent: dict[Stage, defaultdict[InstanceId, float]] = {stage: defaultdict(float) for stage in Stage}
        self.orders: dict[InstanceId, int] = {}  # the newest one of each instance that leaves its role
        self.order_numbers = count(1)
        self.process_numbers = count(1)
        self.timers: list[tuple[int, int, Callable[[], None]]] = []
        self.num_timers = 0
        self.num_events = 0
        self.seen: defaultdict[str, int] = defaultdict(int)  # how often what happened
        numbers: dict[Role, count] = defaultdict(count)
        for role in Placement.parse(scenario.placement).roles:
            self._start(InstanceId(f"{role}{next(numbers[role])}"), role)
        for index, ask in enumerate(scenario.asks):
            self._at(ask.at, partial(self._ask, index, ask))
            if ask.abort_at is not None:
                self._at(ask.abort_at, partial(self._leave, index))
        for turn in scenario.turns:
            self.turn_later(turn)

    # ---- running

    def run(self, max_events: int = 50_000) -> None:
        """Until nothing happens any more. Raises AssertionError where that is too early, or never."""
        while True:
            self.num_events += 1
            assert self.num_events < max_events, f"no end after {max_events} events\n{self.picture()}"
            while self.timers and self.timers[0][0] <= self.num_events:
                heapq.heappop(self.timers)[2]()
            if not self._event():
                if self.timers:
                    self.num_events = max(self.num_events, self.timers[0][0] - 1)
                elif self.queue and not self.orders:
                    self._start(InstanceId(f"extra{len(self.processes)}"), Role.EPD)
                else:
                    break
        stuck = [name for name, answer in self.answers.items() if answer.live]
        assert not stuck, f"{stuck} wait for ever\n{self.picture()}"
        assert not self.orders, f"{self.orders} are never carried out\n{self.picture()}"
        for instance in self.instances.values():
            assert instance.order is None
            instance.assert_idle()

    def turn_later(self, turn: Turn) -> None:
        self._at(turn.at, partial(self._turn, turn))

    def _at(self, event: int, action: Callable[[], None]) -> None:
        self.num_timers += 1
        heapq.heappush(self.timers, (event, self.num_timers, action))

    def _soon(self, action: Callable[[], None]) -> None:
        self._at(self.num_events + self.rng.randint(1, SLOW), action)

    def _event(self) -> bool:
        choices: list[tuple[Callable[..., None], object]] = [
            (self._deliver, pair) for pair, wire in self.wires.items() if wire and self._can_deliver(pair, wire[0][0])
        ]
        choices += [(self._settle, flight) for flight in self.flights]
        choices += [(self._step, instance) for instance in self.instances.values() if instance.awake]
        if not choices:
            return False
        action, subject = self.rng.choice(choices)
        action(subject)
        return True

    def _step(self, instance: Instance) -> None:
        instance.awake = instance.step()
        self._flush(instance)
        if instance.order is not None and instance.is_drained and not self.wires[instance.process, instance.process]:
            instance.carry_out()
            self.seen["switched"] += 1
            self._flush(instance)
            if instance.ended:
                self._gone(instance)

    # ---- network

    def _can_deliver(self, pair: tuple[str, str], version: int) -> bool:
        """A message waits for the table that its sender had, so that its receiver knows whom it is about."""
        if pair[1] == FRONTEND or pair[0] == FRONTEND:
            return True
        return version <= self.processes[pair[1]].near.table.version

    def _deliver(self, pair: tuple[str, str]) -> None:
        _, encoded = self.wires[pair].popleft()
        message = messages.decode(encoded)
        if pair[1] == FRONTEND:
            self._frontend(message)
            return
        instance = self.processes[pair[1]]
        if pair[0] in instance.lost_processes:
            return
        instance.handle(message)
        self._flush(instance)
        instance.check_integrity()

    def _flush(self, instance: Instance) -> None:
        out = instance.near.out
        if out.tokens:
            self._send(instance, FRONTEND, Tokens(instance.id, list(out.tokens)))
        sent, out.messages = out.messages, []
        for to, message in sent:
            self._send(instance, to, message)
        for pull in out.pulls:
            self._begin(instance, pull)
        units, blocks = instance.cache.evicted, instance.kv.evicted
        if (units or blocks) and self.rng.random() < 0.5:  # told late, with the next heartbeat
            instance.cache.evicted, instance.kv.evicted = [], []
            self._send(instance, FRONTEND, Evicted(instance.id, units, blocks))
        out.pulls.clear()
        out.tokens.clear()

    def _send(self, sender: Instance, to: InstanceId, message: AnyMessage) -> None:
        """As the engine does it: to the address that its table has."""
        self.seen[type(message).__name__] += 1
        peer = sender.near.table.peers.get(to)
        if to == sender.id:
            self._post(sender.process, sender.process, sender.near.table.version, message)
        elif to == FRONTEND:
            self._post(sender.process, FRONTEND, 0, message)
        elif peer is not None:
            self._post(sender.process, peer.address, sender.near.table.version, message)
        else:
            if isinstance(message, (Embedded, Prefilling, Prefilled)):
                sender.leases.release(message.ticket.lease)
            if isinstance(message, Share):
                self._send(sender, FRONTEND, Wanted(message.request_id, (message.unit.hash,)))
            if isinstance(message, Prefilled):
                self._send(sender, FRONTEND, Failed(message.request_id, f"{to} was lost", 503, retry=True))

    def _post(self, sender: str, to: str, version: int, message: AnyMessage) -> None:
        if to == FRONTEND or self._is_alive(to):
            self.wires[sender, to].append((version, messages.encode(message)))

    def _is_alive(self, process: str) -> bool:
        instance = self.processes[process]
        return self.instances.get(instance.id) is instance

    # ---- transfer

    def _begin(self, reader: Instance, pull: Pull) -> None:
        ticket = pull.ticket
        assert len(pull.blocks) == len(ticket.blocks)
        assert ticket.holder != reader.id, "a hand-over inside an instance moves no bytes"
        peer = reader.near.table.peers.get(ticket.holder)
        failure = RuntimeError("link down") if self.rng.random() < self.scenario.pull_failures else None
        if peer is None or peer.epoch != ticket.epoch:
            failure = RuntimeError("not connected, or as somebody else")
        flight = Flight(reader, None if failure or peer is None else self.processes[peer.address], pull, [], failure)
        for pair in zip(ticket.blocks, pull.blocks, strict=True):
            if self.rng.random() < 0.5:
                self._copy(flight, *pair)
            else:
                flight.left.append(pair)
        self.flights.append(flight)
        reader.num_pulls += 1

    def _settle(self, flight: Flight) -> None:
        self.flights.remove(flight)
        holder = flight.holder
        if holder is not None and not self._is_alive(holder.process) and self.rng.random() < 0.5:
            flight.failure = RuntimeError("holder is gone")
            self.seen["pull from the dead"] += 1
        for pair in flight.left:
            self._copy(flight, *pair)
        flight.reader.settled(flight.pull, flight.failure)
        self._flush(flight.reader)
        flight.reader.check_integrity()

    def _copy(self, flight: Flight, there: int, here: int) -> None:
        kv = flight.pull.ticket.region == "kv"
        target = flight.reader.kv_content if kv else flight.reader.row_content
        source: dict[int, object] = {}
        if flight.holder is not None:
            assert flight.holder.near.epoch == flight.pull.ticket.epoch, "read from a slab that was carved anew"
            source = flight.holder.kv_content if kv else flight.holder.row_content
        for slot_there, slot_here in zip(slots(there), slots(here), strict=True):
            target[slot_here] = GARBAGE if flight.failure else source.get(slot_there)

    # ---- controller

    def _start(self, name: InstanceId, role: Role) -> None:
        number = next(self.process_numbers)
        instance = Instance(name, number, role, self.scenario, self.rng, self.chains)
        self.instances[name] = self.processes[instance.process] = instance
        self._publish(self.table.peers | {name: instance.peer})

    def _publish(self, peers: dict[InstanceId, Peer]) -> None:
        before = {peer.epoch for peer in self.table.peers.values()}
        after = {peer.epoch for peer in peers.values()}
        for peer in self.table.peers.values():
            if peer.epoch not in after:
                self.directory.forget(peer.id)
        assert before or after
        self.table = RoutingTable(self.table.version + 1, dict(peers))
        for peer in peers.values():
            self._order(peer.id, Table(self.table.version, list(peers.values())))
        self._dispatch()

    def _order(self, to: InstanceId, message: AnyMessage) -> None:
        """What frontend and controller send goes over one wire."""
        peer = self.table.peers.get(to)
        if peer is not None:
            self._post(FRONTEND, peer.address, 0, message)

    def _turn(self, turn: Turn) -> None:
        here = sorted(self.instances)
        if not here:
            return
        instance = self.instances[here[turn.subject % len(here)]]
        if turn.what == "kill":
            self._kill(instance)
        elif turn.what == "stay":
            if instance.id in self.orders:
                self._order_switch(instance, self.table.peers[instance.id].role)
        elif instance.id in self.table.peers:
            self._order_switch(instance, None if turn.what == "end" else Role(turn.what))

    def _order_switch(self, instance: Instance, role: Role | None) -> None:
        number = self.orders[instance.id] = next(self.order_numbers)
        own = self.table.peers[instance.id]
        self._publish(self.table.peers | {own.id: replace(own, leaving=True)})
        room = {}
        for peer in self.table.serving(Stage.DECODE):
            if peer.id in self.instances:
                usage = self.instances[peer.id].kv.usage()
                room[peer.id] = usage.free + usage.cached + self.rng.choice([0, 0, 4, 100])
        config = None if role is None else make_config(instance.id, role)
        self._order(instance.id, SwitchRole(number, config, room))

    def _kill(self, instance: Instance) -> None:
        """It vanishes with what it said last."""
        self.seen["kill"] += 1
        self._gone(instance)
        self.flights = [flight for flight in self.flights if flight.reader is not instance]

    def _gone(self, instance: Instance) -> None:
        del self.instances[instance.id]
        for (sender, to), wire in self.wires.items():
            if to == instance.process:
                wire.clear()
            elif sender == instance.process and not instance.ended:
                for _ in range(self.rng.randint(0, len(wire))):
                    wire.pop()
        self._soon(partial(self._notice, instance))

    def _notice(self, instance: Instance) -> None:
        self.orders.pop(instance.id, None)
        peers = {id: peer for id, peer in self.table.peers.items() if id != instance.id}
        self._publish(peers)
        for name, answer in list(self.answers.items()):
            if answer.attempt is not None and instance.id in answer.holders:
                self._retry(name, answer)
        if not instance.ended:
            self._soon(partial(self._start, instance.id, instance.role))

    def _switched(self, message: Switched) -> None:
        known = self.table.peers.get(message.instance)
        if known is None or known.address != message.peer.address or self.orders.get(known.id) != message.order:
            return
        del self.orders[known.id]
        self._publish(self.table.peers | {known.id: message.peer})

    # ---- frontend

    def _ask(self, index: int, ask: Ask) -> None:
        units = tuple(picture(number) for number in ask.pictures)
        prompt, spans = make_prompt(units, ask.text)
        if self.scenario.more_kv_blocks and len(prompt) >= self.scenario.max_model_len:
            return  # refused here; without more blocks, prefill itself has to
        hashes = prompt_hashes(b"root", prompt, units, spans, BLOCK_TOKENS)
        for choice in range(ask.n):
            sampling = SamplingParams(max_tokens=ask.max_tokens, seed=index, choice=choice)
            name = f"{index}.{choice}"
            self.answers[name] = Answer(index, prompt, units, spans, hashes, sampling)
            self.queue.append(name)
        self._dispatch()

    def _dispatch(self) -> None:
        while self.queue and self.table.complete:
            name = self.queue.popleft()
            if self.answers[name].live:
                self._submit(name, self.answers[name])

    def _submit(self, name: str, answer: Answer) -> None:
        """One attempt: the prompt, and what is known of the answer."""
        attempt = answer.attempt = RequestId(f"{name}/{answer.num_attempts}")
        answer.num_attempts += 1
        answer.num_before = len(answer.tokens)
        answer.ahead.clear()
        prefill = answer.prefill = pick(self.table, Stage.PREFILL, self.sent[Stage.PREFILL]).id
        self.sent[Stage.PREFILL][prefill] += len(answer.prompt)
        first = answer.sampling.choice == 0 or answer.num_attempts > 1  # the other choices use what that one orders
        missing, held = self._look_up(prefill, answer) if first else ({}, {})
        encoders = self._assign(list(missing.values()))
        answer.holders = {prefill, *encoders.values()}
        self.attempts[attempt] = answer
        submit = Submit(
            attempt,
            answer.prompt + answer.tokens,
            len(answer.prompt),
            answer.units,
            answer.spans,
            answer.sampling,
            prompt_hashes=answer.hashes,
            ordered=tuple(encoders),
            held=held,
        )
        self.chains[attempt] = Chain(submit)
        self._order(prefill, submit)
        self._order_units(attempt, missing, prefill, encoders)

    def _retry(self, name: str, answer: Answer) -> None:
        self.seen["retry"] += 1
        self._abort_everywhere(answer)
        if answer.live:
            self.queue.append(name)
            self._dispatch()

    def _abort_everywhere(self, answer: Answer) -> None:
        if answer.attempt is not None:
            for holder in sorted(answer.holders):
                self._order(holder, Abort(answer.attempt))
            del self.attempts[answer.attempt]
            answer.attempt = None

    def _look_up(
        self, prefill: InstanceId, answer: Answer
    ) -> tuple[dict[UnitHash, EncodeUnit], dict[UnitHash, InstanceId]]:
        """As the frontend does it, with a directory that may be wrong."""
        missing, held = {}, {}
        peers = self.table.peers
        for hash_, unit in {unit.hash: unit for unit in answer.units}.items():
            if self.rng.random() < self.scenario.lies:
                self.directory.add_unit(hash_, self.rng.choice(sorted(peers)))
            holders = self.directory.holders(hash_) & peers.keys()
            if prefill in holders:
                continue
            if holders and not any(Stage.ENCODE in peers[holder].role.stages for holder in holders):
                held[hash_] = min(holders)
            else:
                missing[hash_] = unit
            self.directory.add_unit(hash_, prefill)
        blocks: tuple[BlockHash, ...] = answer.hashes.blocks
        self.directory.add_blocks(prefill, blocks)
        return missing, held

    def _assign(self, units: list[EncodeUnit]) -> dict[UnitHash, InstanceId]:
        holders = {unit.hash: self.directory.holders(unit.hash) for unit in units}
        encoders = assign_units(self.table, units, self.sent[Stage.ENCODE], 1.0, holders=holders)
        for unit in units:
            self.sent[Stage.ENCODE][encoders[unit.hash]] += unit.num_tokens
            self.directory.add_unit(unit.hash, encoders[unit.hash])
        return encoders

    def _order_units(
        self,
        attempt: RequestId,
        units: dict[UnitHash, EncodeUnit],
        prefill: InstanceId,
        encoders: dict[UnitHash, InstanceId],
    ) -> None:
        for encoder in sorted(set(encoders.values())):
            mine = tuple(unit for hash_, unit in units.items() if encoders[hash_] == encoder)
            self._order(encoder, Encode(attempt, make_media(), mine, prefill))

    def _leave(self, ask: int) -> None:
        for answer in self.answers.values():
            if answer.ask == ask and answer.live:
                answer.aborted = True
                self._abort_everywhere(answer)

    def _frontend(self, message: AnyMessage) -> None:
        match message:
            case Tokens():
                for update in message.updates:
                    self._token(message.instance, update)
            case Located():
                if message.request_id in self.attempts:
                    self._located(message)
                else:
                    self._order(message.decode, Abort(message.request_id))
            case Wanted():
                if message.request_id in self.attempts:
                    self._wanted(message)
            case Evicted():
                self.directory.evicted(message)
            case Failed():
                if message.request_id in self.attempts:
                    self._failed(message)
            case Switched():
                self._switched(message)

    def _located(self, message: Located) -> None:
        answer = self.attempts[message.request_id]
        answer.holders.add(message.decode)
        peer = self.table.peers.get(message.decode)
        if peer is None or peer.epoch != message.epoch:
            self._retry(_name(message.request_id), answer)

    def _wanted(self, message: Wanted) -> None:
        answer = self.attempts[message.request_id]
        if len(answer.tokens) > answer.num_before:  # it went on without
            return
        if not self.table.serving(Stage.ENCODE):
            self._retry(_name(message.request_id), answer)
            return
        units = {unit.hash: unit for unit in answer.units if unit.hash in message.units}
        encoders = self._assign(list(units.values()))
        answer.holders.update(encoders.values())
        assert answer.prefill is not None
        self._order_units(message.request_id, units, answer.prefill, encoders)

    def _failed(self, message: Failed) -> None:
        answer = self.attempts[message.request_id]
        if message.retry:
            self._retry(_name(message.request_id), answer)
        elif message.unit is None or len(answer.tokens) == answer.num_before:  # else it went on without that unit
            answer.failure = message
            self._abort_everywhere(answer)

    def _token(self, instance: InstanceId, update: messages.TokenUpdate) -> None:
        answer = self.attempts.get(update.request_id)
        if answer is None:
            if update.finish is None:
                self._order(instance, Abort(update.request_id))
            return
        answer.holders.add(instance)
        assert update.index not in answer.ahead
        assert update.index >= len(answer.tokens), "a token came twice"
        answer.ahead[update.index] = update  # the first token comes from prefill, on another wire than the rest
        while (following := answer.ahead.pop(len(answer.tokens), None)) is not None:
            assert answer.finish is None, f"{update.request_id} goes on after its end"
            answer.tokens.append(following.token_id)
            answer.finish = following.finish
        if answer.finish is not None:
            del self.attempts[update.request_id]
            answer.attempt = None
        elif answer.num_before < update.index == len(answer.tokens) - 1:  # who decodes it has pulled everything
            answer.holders = {instance}

    # ---- oracles

    def expected(self, answer: Answer) -> tuple[list[int], FinishReason]:
        tokens: list[int] = []
        while True:
            length = len(answer.prompt) + len(tokens)
            tokens.append(sample(answer.sampling, length))
            if tokens[-1] == EOS:
                return tokens, FinishReason.STOP
            if len(tokens) >= answer.sampling.max_tokens or length + 1 >= self.scenario.max_model_len:
                return tokens, FinishReason.LENGTH

    def fits(self, answer: Answer) -> bool:
        rows = {unit.hash: -(-unit.num_tokens // BLOCK_TOKENS) for unit in answer.units}
        return len(answer.prompt) < self.scenario.max_model_len and sum(rows.values()) <= self.scenario.embedding_blocks

    def check_answers(self) -> None:
        """Everything that was not aborted, and of which no unit failed to be encoded, is complete and exact."""
        for name, answer in self.answers.items():
            tokens, finish = self.expected(answer)
            assert answer.tokens == tokens[: len(answer.tokens)], f"{name}: {answer.tokens} instead of {tokens}"
            if answer.failure is not None and self.fits(answer):
                assert self.scenario.encode_failures and answer.failure.unit, f"{name}: {answer.failure}"
            if answer.failure is None and not answer.aborted:
                assert self.fits(answer), f"{name} was accepted and cannot fit"
                assert (answer.tokens, answer.finish) == (tokens, finish), name

    def picture(self) -> str:
        lines = [
            f"{i.id}: awake={i.awake} leaves={i.order is not None} kv={i.kv.usage()} embeddings={i.cache.usage()} "
            f"leases={len(i.leases)} reserve={i.kv.growth_reserve} version={i.near.table.version} "
            + " ".join(str(stage.queues) for stage in i.stages)
            for i in self.instances.values()
        ]
        lines += [
            f"{name}: {a.attempt} at {a.holders}, {len(a.tokens)} tokens" for name, a in self.answers.items() if a.live
        ]
        lines += [f"{pair}: {len(wire)}" for pair, wire in self.wires.items() if wire]
        return "\n".join([f"table {self.table.version}, {len(self.queue)} queued", *lines])


def _name(attempt: RequestId) -> str:
    return attempt.partition("/")[0]


def play(scenario: Scenario) -> Cluster:
    cluster = Cluster(scenario)
    cluster.run()
    cluster.check_answers()
    return cluster
