"""Who does what: picks instances for a sequence and sends them their orders. Knows who is there, how busy they are and
what they seem to hold; knows no client and no queue."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from triptych.config import KV_BLOCK_TOKENS
from triptych.core import BlockHashes, EncodeUnit, InstanceId, Stage, UnitHash, distinct, units_behind
from triptych.memory.prefix import prompt_hashes
from triptych.messages import Abort, AnyMessage, Encode, Evicted, Load, Submit, Table
from triptych.router.attempts import Attempt, Task
from triptych.router.directory import Directory
from triptych.router.generation import PreparedPrompt
from triptych.router.waiting import Work
from triptych.routing import RoutingTable, assign_units, pick
from triptych.stages.base import foreseen

UNKNOWN_PACE_S = 1e-4  # per token or row, of an instance that has not reported its own yet


class Wire(Protocol):
    """How messages leave. `send` never blocks and never raises for an instance that is gone."""

    def send(self, instance: InstanceId, message: AnyMessage, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Route:
    """Where a sequence would go now, and what there would be to do for it."""

    prefill: InstanceId | None  # None: nobody prefills at the moment
    num_cached: int  # leading tokens whose KV it seems to have
    needed: dict[UnitHash, EncodeUnit]  # units behind those
    missing: list[EncodeUnit]  # those of them that somebody has to encode, or has encoded
    held: dict[UnitHash, InstanceId]  # those that only an instance which does not encode seems to hold
    work: Work


class Dispatcher:
    """Keeps what the instances say about themselves, and gives them work."""

    def __init__(self, wire: Wire, identity: bytes, *, parallel_encode: bool, prefix_caching: bool) -> None:
        """`identity` stands for the model in hashes of prompts. `parallel_encode`: the units of a sequence are spread
        over all encode instances; else one encodes them all."""
        self.table = RoutingTable()
        self.loads: dict[InstanceId, Load] = {}
        self._wire = wire
        self._identity = identity
        self._parallel_encode = parallel_encode
        self._prefix_caching = prefix_caching
        self._directory = Directory()
        self._unreported_s: dict[InstanceId, float] = {}
        self._serials = itertools.count(1)
        self._newest_serial = 0
        self._epochs: dict[InstanceId, str] = {}
        self._restarted_at: dict[InstanceId, int] = {}  # the newest serial when the newest incarnation appeared

    # ---- what instances say

    def take_table(self, message: Table) -> bool:
        """False for an older one."""
        if message.version <= self.table.version:
            return False
        before, self.table = self.table, RoutingTable.of(message)
        for old in before.peers.values():
            new = self.table.peers.get(old.id)
            # Gone, started anew, or back after it left its role: its caches are empty.
            if new is None or new.epoch != old.epoch or (old.leaving and not new.leaving) or new.role != old.role:
                self._directory.forget(old.id)
                self.loads.pop(old.id, None)
                self._unreported_s.pop(old.id, None)
        for peer in message.peers:
            if self._epochs.setdefault(peer.id, peer.epoch) != peer.epoch:
                self._epochs[peer.id] = peer.epoch
                self._restarted_at[peer.id] = self._newest_serial
        return True

    def take_load(self, message: Load) -> None:
        peer = self.table.peers.get(message.instance)
        if peer is not None and message.epoch in ("", peer.epoch):  # else its last words; a new one says it again soon
            self.loads[message.instance] = message
            self._unreported_s.pop(message.instance, None)

    def take_evicted(self, message: Evicted) -> None:
        self._directory.evicted(message)

    def could_not_encode(self, unit: UnitHash) -> None:
        for instance in list(self._directory.holders(unit)):
            self._directory.drop_unit(unit, instance)

    # ---- what is known

    def num_serving(self) -> dict[Stage, int]:
        return {stage: len(self.table.serving(stage)) for stage in Stage}

    def returning_stages(self) -> frozenset[Stage]:
        """Of instances that change their role just now: whoever is to serve these stages then, serves them soon."""
        return frozenset(stage for peer in self.table.peers.values() if peer.leaving for stage in peer.role.stages)

    def has_reached(self, instance: InstanceId, attempt: Attempt, epoch: str = "") -> bool:
        """Whether what was handed to an instance for an attempt is sure to have come to its present incarnation: that
        of `epoch`, if the sender said so."""
        peer = self.table.peers.get(instance)
        if peer is None:
            return False
        return peer.epoch == epoch if epoch else self._restarted_at.get(instance, 0) < attempt.serial

    def room(self) -> dict[InstanceId, int]:
        """KV blocks that instances which decode could take, as they last said."""
        pools = {
            peer.id: self.loads[peer.id].pools.get("kv")
            for peer in self.table.serving(Stage.DECODE)
            if peer.id in self.loads
        }
        return {id: pool.free + pool.cached for id, pool in pools.items() if pool is not None}

    def hashes(self, prompt: PreparedPrompt) -> BlockHashes:
        if not self._prefix_caching:
            return BlockHashes()
        return prompt_hashes(self._identity, prompt.token_ids, prompt.units, prompt.spans, KV_BLOCK_TOKENS)

    def route(self, task: Task, num_sequences: int = 1) -> Route:
        """For a task, and for as many choices of its prompt together. Changes nothing."""
        prefill = self._pick_prefill(task)
        num_cached = 0 if prefill is None else self._num_cached(prefill, task.hashes)
        needed = units_behind(task.prompt.units, task.prompt.spans, num_cached)
        missing: list[EncodeUnit] = []
        held: dict[UnitHash, InstanceId] = {}
        num_rows = 0
        for hash_, unit in needed.items():
            holders = self._holders(hash_)
            if prefill in holders:
                continue
            encoders = [holder for holder in holders if self.table.peers[holder].role.encodes]
            if holders and not encoders:
                held[hash_] = min(holders)
                continue
            missing.append(unit)
            num_rows += 0 if encoders else unit.num_tokens
        work = Work(
            num_rows * self._usual_pace_s(Stage.ENCODE),
            max(task.num_tokens - num_cached, 1) * self._usual_pace_s(Stage.PREFILL, prefill),
            num_sequences * foreseen(task.output.sampling, task.output.num_tokens) * self._usual_pace_s(Stage.DECODE),
        )
        return Route(prefill, num_cached, needed, missing, held, work)

    # ---- orders

    def send(self, tasks: Sequence[Task], route: Route) -> list[Attempt]:
        """One attempt for each of the tasks, which are choices of one prompt, on a route that was found just now."""
        assert route.prefill is not None, "sent without an instance that prefills"
        first = tasks[0]
        self._add_work(route.prefill, Stage.PREFILL, first.num_tokens - route.num_cached)
        self._directory.add_blocks(route.prefill, first.hashes.blocks)
        encoders = self._assign_units(route.missing, first.prompt)
        for hash_ in route.needed:
            self._directory.add_unit(hash_, route.prefill)
        attempts = []
        for task in tasks:
            # The other choices use what the first one ordered; if it is gone by then, they ask for it.
            leads = task is first
            self._newest_serial = next(self._serials)
            attempt = task.begin(route.prefill, self._newest_serial)
            attempt.num_cached = route.num_cached
            if leads:
                attempt.order(encoders)
            self._submit(attempt, tuple(encoders) if leads else (), route.held if leads else {})
            attempts.append(attempt)
        self._order_units(attempts[0], encoders)
        return attempts

    def encode(self, attempt: Attempt, units: set[UnitHash]) -> None:
        """Orders units that an attempt was thought to find somewhere. Raises RequestError(503) if nobody encodes."""
        prompt = attempt.task.prompt
        encoders = self._assign_units([unit for unit in distinct(prompt.units) if unit.hash in units], prompt)
        attempt.order(encoders)
        self._order_units(attempt, encoders)

    def withdraw(self, attempt: Attempt) -> None:
        """Takes it back from whoever may know of it."""
        for instance in attempt.holders:
            self._wire.send(instance, Abort(attempt.request_id))

    def forget_orders(self, attempt: Attempt) -> None:
        """What was ordered for an attempt that is withdrawn may never come to its prefill instance."""
        if not attempt.has_answered:
            for unit in attempt.ordered:
                self._directory.drop_unit(unit, attempt.prefill)
            blocks = attempt.task.hashes.blocks[attempt.num_cached // KV_BLOCK_TOKENS :]
            self._directory.drop_blocks(attempt.prefill, blocks)

    # ---- inside

    def _pick_prefill(self, task: Task) -> InstanceId | None:
        """Who would have this prompt's KV first: busy with other work, less what its prefix cache saves."""
        if not self.table.serving(Stage.PREFILL):
            return None
        busy = self._busy_s(Stage.PREFILL)
        for peer in self.table.serving(Stage.PREFILL):
            num_cached = self._num_cached(peer.id, task.hashes)
            busy[peer.id] += (task.num_tokens - num_cached) * self._pace_s(peer.id, Stage.PREFILL)
        return pick(self.table, Stage.PREFILL, busy).id

    def _num_cached(self, instance: InstanceId, hashes: BlockHashes) -> int:
        return self._directory.num_cached_blocks(instance, hashes) * KV_BLOCK_TOKENS

    def _holders(self, unit: UnitHash) -> set[InstanceId]:
        """Who seems to hold it and can be asked: not one that leaves its role, which would have to wait for it."""
        peers = self.table.peers
        return {id for id in self._directory.holders(unit) if id in peers and not peers[id].leaving}

    def _assign_units(self, units: Sequence[EncodeUnit], prompt: PreparedPrompt) -> dict[UnitHash, InstanceId]:
        if not units:
            return {}
        paces = [self._pace_s(peer.id, Stage.ENCODE) for peer in self.table.serving(Stage.ENCODE)]
        encoders = assign_units(
            self.table,
            units,
            self._busy_s(Stage.ENCODE),
            max(paces, default=UNKNOWN_PACE_S),
            items={unit.hash: prompt.media[unit.hash].hash for unit in units},
            holders={unit.hash: self._directory.holders(unit.hash) for unit in units},
            spread=self._parallel_encode,
        )
        for unit in units:
            if encoders[unit.hash] not in self._directory.holders(unit.hash):
                self._add_work(encoders[unit.hash], Stage.ENCODE, unit.num_tokens)
            self._directory.add_unit(unit.hash, encoders[unit.hash])
        return encoders

    def _submit(self, attempt: Attempt, ordered: tuple[UnitHash, ...], held: dict[UnitHash, InstanceId]) -> None:
        task, prompt = attempt.task, attempt.task.prompt
        order = Submit(
            attempt.request_id,
            [*prompt.token_ids, *task.output.token_ids],
            len(prompt.token_ids),
            prompt.units,
            prompt.spans,
            task.output.sampling,
            prompt.position_arguments,
            task.hashes,
            ordered,
            held,
        )
        self._wire.send(attempt.prefill, order)

    def _order_units(self, attempt: Attempt, encoders: dict[UnitHash, InstanceId]) -> None:
        """One order for the units of one item that one instance encodes, in the order of the prompt."""
        prompt = attempt.task.prompt
        orders: dict[tuple[InstanceId, bytes], list[EncodeUnit]] = {}
        for unit in distinct(prompt.units):
            if unit.hash in encoders:
                orders.setdefault((encoders[unit.hash], prompt.media[unit.hash].hash), []).append(unit)
        for (encoder, _), units in orders.items():
            media = prompt.media[units[0].hash]
            self._wire.send(encoder, Encode(attempt.request_id, media, tuple(units), attempt.prefill))

    def _busy_s(self, stage: Stage) -> dict[InstanceId, float]:
        """Predicted work of each instance that serves the stage, of all its stages together (one loop does them all),
        with what it has not reported yet."""
        busy: dict[InstanceId, float] = {}
        for peer in self.table.serving(stage):
            load = self.loads.get(peer.id)
            reported_s = 0.0 if load is None else sum(load.work_s.values())
            busy[peer.id] = reported_s + self._unreported_s.get(peer.id, 0.0)
        return busy

    def _pace_s(self, instance: InstanceId, stage: Stage) -> float:
        """Never 0, which is what an instance reports before its first step: work that costs nothing is not spread."""
        load = self.loads.get(instance)
        return (load.pace_s.get(stage) if load is not None else None) or UNKNOWN_PACE_S

    def _usual_pace_s(self, stage: Stage, instance: InstanceId | None = None) -> float:
        """Of one instance, or of all that serve the stage."""
        if instance is not None:
            return self._pace_s(instance, stage)
        paces = [self._pace_s(peer.id, stage) for peer in self.table.serving(stage)]
        return sum(paces) / len(paces) if paces else UNKNOWN_PACE_S

    def _add_work(self, instance: InstanceId, stage: Stage, num_tokens: int) -> None:
        seconds = num_tokens * self._pace_s(instance, stage)
        self._unreported_s[instance] = self._unreported_s.get(instance, 0.0) + seconds
