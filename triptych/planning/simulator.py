"""A cluster on simulated time: requests in, one record per request out. Deterministic; no process, no tensor.

The stages, the memory and the routing are those of the engine; the frontend is the part of the real one that decides
who gets which work: one queue, from which instances are given a little in advance.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from triptych.core import (
    EncodeUnit,
    FinishReason,
    InstanceId,
    Media,
    Placement,
    RequestId,
    Role,
    SamplingParams,
    Span,
    Stage,
    UnitHash,
)
from triptych.messages import (
    FRONTEND,
    Abort,
    AnyMessage,
    Encode,
    Failed,
    Load,
    Peer,
    SlabDescription,
    Submit,
    Tokens,
    Wanted,
)
from triptych.planning.clock import Clock
from triptych.planning.cost_model import Costs
from triptych.planning.instance import Leave, SimulatedInstance, Sizes
from triptych.planning.workload import Demand
from triptych.routing import RoutingTable, assign_units, pick
from triptych.stages.base import Pull

UNKNOWN_PACE_S = 1e-4  # per token or row, of an instance that has not reported its own yet, as the frontend
FEW_SEQUENCES = 4  # that each prefill instance is given in advance, however long they take
NO_SLAB = SlabDescription(transports={}, host="", device="", base=0, regions={})


@dataclass(slots=True, eq=False)
class Record:
    """What a client saw of one request."""

    demand: Demand
    first_token_s: float | None = None
    finished_s: float | None = None
    num_tokens: int = 0
    num_attempts: int = 0

    @property
    def latency_s(self) -> float:
        assert self.finished_s is not None
        return self.finished_s - self.demand.at_s

    @property
    def ttft_s(self) -> float:
        assert self.first_token_s is not None
        return self.first_token_s - self.demand.at_s

    @property
    def tpot_s(self) -> float | None:
        if self.num_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.num_tokens - 1)


@dataclass(slots=True, eq=False)
class _Attempt:
    """A request that was dispatched, as the frontend remembers it."""

    record: Record
    request_id: RequestId
    units: dict[UnitHash, tuple[EncodeUnit, Media]]
    prefill: InstanceId
    ahead_s: dict[Stage, float]  # predicted work before its first token
    holders: set[InstanceId]
    num_before: int  # tokens that earlier attempts gave


@dataclass(slots=True)
class SwitchOrder:
    """A role switch under way."""

    role: Role
    done: Callable[[dict[str, float]], None]
    began_s: float
    drain_s: float = 0.0


@dataclass(slots=True)
class Switch:
    """A role switch that was made, and how long each step took."""

    at_s: float
    instance: InstanceId
    before: Role
    after: Role
    steps_s: dict[str, float] = field(default_factory=dict)


class Simulation:
    """Instances of a placement, a frontend and a network. `run` plays a workload to its end."""

    def __init__(
        self,
        placement: Placement,
        costs: Costs,
        sizes: Sizes | None = None,
        *,
        parallel_encode: bool = True,
        dispatch_s: float = 1.0,
    ) -> None:
        self.clock = Clock()
        self.costs = costs
        self.sizes = sizes or Sizes()
        self.records: list[Record] = []
        self.switches: list[Switch] = []
        self.loads: dict[InstanceId, Load] = {}
        self.table = RoutingTable()
        self._parallel_encode = parallel_encode
        self._dispatch_s = dispatch_s
        self._unreported_s: dict[InstanceId, float] = {}
        self._waiting: deque[Record] = deque()
        self._live: dict[RequestId, _Attempt] = {}
        self._attempts = itertools.count()
        self._unit_numbers = itertools.count(1)
        self._num_finished = 0
        self._num_ahead = 0
        self._ahead_s = {Stage.ENCODE: 0.0, Stage.PREFILL: 0.0}
        self._orders: dict[InstanceId, SwitchOrder] = {}
        self._link_free_at: dict[InstanceId, float] = {}
        self.instances: dict[InstanceId, SimulatedInstance] = {}
        for number, role in enumerate(placement.roles):
            id = InstanceId(f"i{number}")
            self.instances[id] = SimulatedInstance(id, role, costs, self.sizes, self.clock, self)
        self._publish()

    def run(self, demands: Sequence[Demand]) -> list[Record]:
        """One record per request, in their order. The instances are at rest afterwards, and their books are checked."""
        self.records = [Record(demand) for demand in demands]
        for record in self.records:
            self.clock.at(record.demand.at_s + self.costs.arrival, self._arrive, record)
        self.clock.run(until=lambda: self.is_finished)
        assert self.is_finished, f"{len(demands) - self._num_finished} requests wait for ever"
        self._settle()
        return self.records

    @property
    def is_finished(self) -> bool:
        return self._num_finished == len(self.records)

    def every(self, seconds: float, action: Callable[[], None]) -> None:
        """As long as requests are unfinished."""

        def tick() -> None:
            if not self.is_finished:
                action()
                self.clock.after(seconds, tick)

        self.clock.after(seconds, tick)

    def roles(self) -> dict[InstanceId, Role]:
        """Of those that take new work."""
        return {peer.id: peer.role for peer in self.table.peers.values() if not peer.leaving}

    def placement(self) -> Placement:
        order = list(Role)
        return Placement(tuple(sorted((instance.role for instance in self.instances.values()), key=order.index)))

    def queued_s(self) -> dict[Stage, float]:
        """Predicted seconds of one instance's work that wait at the frontend."""
        tokens = dict.fromkeys(Stage, 0)
        for record in self._waiting:
            rows = sum(map(sum, record.demand.media))
            tokens[Stage.ENCODE] += rows
            tokens[Stage.PREFILL] += rows + record.demand.text_tokens
            tokens[Stage.DECODE] += record.demand.output_tokens
        return {stage: number * self._pace_s(stage) for stage, number in tokens.items()}

    # ---- role switches

    def switch_role(self, id: InstanceId, role: Role, done: Callable[[dict[str, float]], None]) -> None:
        """No new work for the instance; it leaves its role, takes the new one, and `done` gets the steps."""
        assert id not in self._orders, f"{id} changes its role already"
        self._orders[id] = SwitchOrder(role, done, self.clock.now)
        self._publish()
        leave = Leave(self._room(), lambda: self._drained(self.instances[id]))
        self.clock.after(self.costs.message, self.instances[id].leave, leave)

    def _drained(self, instance: SimulatedInstance) -> None:
        order = self._orders[instance.id]
        order.drain_s = self.clock.now - order.began_s
        self.clock.after(self.costs.switch_s(instance.role, order.role), self._switched, instance)

    def _switched(self, instance: SimulatedInstance) -> None:
        order = self._orders.pop(instance.id)
        before = instance.role
        instance.become(order.role)
        self.loads.pop(instance.id, None)
        self._publish()
        steps_s = {"drain": order.drain_s, "switch": self.clock.now - order.began_s - order.drain_s}
        self.switches.append(Switch(order.began_s, instance.id, before, order.role, steps_s))
        order.done(steps_s)
        self._dispatch()

    def _room(self) -> dict[InstanceId, int]:
        """KV blocks that instances which decode could take, as they last said."""
        serving = [peer.id for peer in self.table.serving(Stage.DECODE)]
        pools = {id: self.instances[id].kv.usage() for id in serving}
        return {id: pool.free + pool.cached for id, pool in pools.items()}

    def _publish(self) -> None:
        peers = {
            id: Peer(id, instance.role, instance.near.epoch, "", NO_SLAB, leaving=id in self._orders)
            for id, instance in self.instances.items()
        }
        self.table = RoutingTable(self.table.version + 1, peers)
        for instance in self.instances.values():
            instance.near.table = self.table

    # ---- network

    def send(self, sender: InstanceId, to: InstanceId, message: AnyMessage) -> None:
        deliver = self._handle if to == FRONTEND else self.instances[to].deliver
        self.clock.after(self.costs.message, deliver, message)

    def pull(self, reader: SimulatedInstance, pull: Pull) -> None:
        """Bytes into one instance come one pull after the other."""
        begins = max(self.clock.now, self._link_free_at.get(reader.id, 0.0))
        ends = begins + self.costs.pull_s(pull.ticket.region, pull.ticket.num_tokens)
        self._link_free_at[reader.id] = ends
        self.clock.at(ends, reader.settled, pull)

    # ---- frontend

    def _arrive(self, record: Record) -> None:
        self._waiting.append(record)
        self._dispatch()

    def _dispatch(self) -> None:
        """First come, first served, while little of what is with the instances has no first token yet."""
        while self._waiting and self._has_room(self._waiting[0].demand):
            self._start(self._waiting.popleft())

    def _has_room(self, demand: Demand) -> bool:
        num_prefill = len(self.table.serving(Stage.PREFILL))
        if self._num_ahead < FEW_SEQUENCES * num_prefill:
            return True
        stages = (Stage.ENCODE, Stage.PREFILL) if demand.media else (Stage.PREFILL,)
        return all(self._ahead_s[stage] < self._dispatch_s * len(self.table.serving(stage)) for stage in stages)

    def _start(self, record: Record) -> None:
        demand, busy = record.demand, self._busy_s()
        prefill = pick(self.table, Stage.PREFILL, busy).id
        request_id = RequestId(f"r{next(self._attempts)}")
        media, units, spans, num_tokens = self._prompt(demand)
        pace_s = self._pace_s(Stage.ENCODE)
        encoders = assign_units(self.table, units, busy, pace_s, spread=self._parallel_encode)
        ahead_s = {
            Stage.ENCODE: sum(unit.num_tokens for unit in units) * pace_s,
            Stage.PREFILL: num_tokens * self._pace_s(Stage.PREFILL),
        }
        record.num_attempts += 1
        attempt = self._live[request_id] = _Attempt(
            record, request_id, media, prefill, ahead_s, {prefill}, record.num_tokens
        )
        self._num_ahead += 1
        for stage, seconds in ahead_s.items():
            self._ahead_s[stage] += seconds
        self._add_work(prefill, Stage.PREFILL, num_tokens)
        left = demand.output_tokens - record.num_tokens
        sampling = SamplingParams(max_tokens=left, seed=0, ignore_eos=True)
        order = Submit(request_id, [0] * num_tokens, num_tokens, units, spans, sampling, ordered=tuple(encoders))
        self.send(FRONTEND, prefill, order)
        self._order(attempt, encoders)

    def _is_ahead_no_more(self, attempt: _Attempt) -> None:
        """Its first token is here, or it waits again."""
        if attempt.ahead_s:
            self._num_ahead -= 1
            for stage, seconds in attempt.ahead_s.items():
                self._ahead_s[stage] -= seconds
            attempt.ahead_s = {}

    def _order(self, attempt: _Attempt, encoders: dict[UnitHash, InstanceId]) -> None:
        orders: dict[tuple[InstanceId, bytes], list[EncodeUnit]] = {}
        for hash_, encoder in encoders.items():
            unit, item = attempt.units[hash_]
            orders.setdefault((encoder, item.hash), []).append(unit)
            attempt.holders.add(encoder)
            self._add_work(encoder, Stage.ENCODE, unit.num_tokens)
        for (encoder, _), units in orders.items():
            item = attempt.units[units[0].hash][1]
            in_order = tuple(sorted(units, key=lambda unit: unit.index))
            self.send(FRONTEND, encoder, Encode(attempt.request_id, item, in_order, attempt.prefill))

    def _prompt(
        self, demand: Demand
    ) -> tuple[dict[UnitHash, tuple[EncodeUnit, Media]], tuple[EncodeUnit, ...], tuple[Span, ...], int]:
        """The text, then the rows of all media."""
        media: dict[UnitHash, tuple[EncodeUnit, Media]] = {}
        spans: list[Span] = []
        position = demand.text_tokens
        for rows in demand.media:
            item = Media(next(self._unit_numbers).to_bytes(16, "big"), "image", b"")
            for index, num_rows in enumerate(rows):
                hash_ = UnitHash(next(self._unit_numbers).to_bytes(16, "big"))
                spans.append(Span(position, num_rows, len(media), 0))
                media[hash_] = (EncodeUnit(hash_, "image", num_rows, index), item)
                position += num_rows
        return media, tuple(unit for unit, _ in media.values()), tuple(spans), position

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case Tokens():
                self._tokens(message)
            case Load():
                self.loads[message.instance] = message
                self._unreported_s.pop(message.instance, None)
            case Wanted():
                self._wanted(message)
            case Failed():
                self._failed(message)

    def _tokens(self, message: Tokens) -> None:
        for update in message.updates:
            attempt = self._live.get(update.request_id)
            if attempt is None:
                continue
            record = attempt.record
            record.num_tokens = max(record.num_tokens, attempt.num_before + update.index + 1)
            if update.index == 0:
                self._is_ahead_no_more(attempt)
                self._dispatch()
                if record.first_token_s is None:
                    record.first_token_s = self.clock.now
            if update.finish is not None:
                assert update.finish is FinishReason.LENGTH
                record.finished_s = self.clock.now
                del self._live[update.request_id]
                self._num_finished += 1

    def _wanted(self, message: Wanted) -> None:
        attempt = self._live.get(message.request_id)
        if attempt is not None:
            units = [attempt.units[hash_][0] for hash_ in message.units]
            pace_s = self._pace_s(Stage.ENCODE)
            self._order(attempt, assign_units(self.table, units, self._busy_s(), pace_s))

    def _failed(self, message: Failed) -> None:
        """Only what is taken up again fails on simulated time."""
        attempt = self._live.pop(message.request_id, None)
        assert message.retry, f"{message.request_id}: {message.message}"
        if attempt is not None:
            for holder in sorted(attempt.holders):
                self.send(FRONTEND, holder, Abort(message.request_id))
            self._is_ahead_no_more(attempt)
            self._waiting.appendleft(attempt.record)
            self._dispatch()

    def _busy_s(self) -> dict[InstanceId, float]:
        reported = {id: sum(load.work_s.values()) for id, load in self.loads.items()}
        return {id: reported.get(id, 0.0) + self._unreported_s.get(id, 0.0) for id in self.table.peers}

    def _add_work(self, id: InstanceId, stage: Stage, num_tokens: int) -> None:
        load = self.loads.get(id)
        pace_s = (load.pace_s.get(stage) if load is not None else None) or self._pace_s(stage)
        self._unreported_s[id] = self._unreported_s.get(id, 0.0) + num_tokens * pace_s

    def _pace_s(self, stage: Stage) -> float:
        """The mean of what instances reported."""
        paces = [load.pace_s[stage] for load in self.loads.values() if load.pace_s.get(stage)]
        return sum(paces) / len(paces) if paces else UNKNOWN_PACE_S

    def _settle(self) -> None:
        """Lets what is on its way arrive, then checks the books."""
        self.clock.run(until=lambda: False)
        for instance in self.instances.values():
            instance.check_integrity()
