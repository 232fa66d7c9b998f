"""The loop inside a worker: take messages, schedule, run, commit, send. One `step` serves every role."""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import zmq

from triptych.config import InstanceConfig
from triptych.core import Chunk, InstanceId, RequestId, Stage
from triptych.engine.black_box import BlackBox
from triptych.engine.equipment import Equipment, Runners
from triptych.engine.pace import CpuTime, Metronome, Pace
from triptych.engine.reports import load_of
from triptych.engine.screening import contradiction
from triptych.engine.sockets import Inbox, Post
from triptych.errors import InstanceError
from triptych.messages import (
    FRONTEND,
    AnyMessage,
    Evicted,
    Failed,
    Load,
    Peer,
    Shutdown,
    Step,
    Steps,
    Switched,
    SwitchRole,
    Table,
    Tokens,
    Unreachable,
)
from triptych.routing import RoutingTable
from triptych.stages.base import Surroundings

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Leave:
    """A role switch that waits until nothing is left here of the old role."""

    order: SwitchRole
    began: float


def _cannot_refit(config: InstanceConfig) -> Equipment:
    raise InstanceError(f"{config.id} was not made to change its role")


class Engine:
    """One instance at work. Everything happens on the thread that calls `run`."""

    def __init__(
        self,
        near: Surroundings,
        equipment: Equipment,
        inbox: Inbox,
        post: Post,
        *,
        black_box: BlackBox | None = None,
        refit: Callable[[InstanceConfig], Equipment] = _cannot_refit,
    ) -> None:
        """`refit` makes the equipment of another role."""
        self._near = near
        self._inbox = inbox
        self._post = post
        self._addresses = {FRONTEND: equipment.config.frontend}
        self._heartbeat_s = equipment.config.heartbeat_s
        self._black_box = black_box
        self._refit = refit
        self._leave: _Leave | None = None
        self._newest_order = 0
        self._pace = Pace()
        self._cpu = CpuTime()
        self.turn_began = time.monotonic()  # of the turn that runs now; other threads read it
        self._to_self: deque[AnyMessage] = deque()
        self._stopping = False
        self._reported_at = 0.0
        self._was_busy = False
        self._unchecked = False  # whether anything happened since the books were checked
        self._num_steps = 0
        self._untold: list[Step] | None = [] if equipment.config.timeline else None
        self._install(equipment)

    @property
    def has_ended(self) -> bool:
        """Whether it was told to stop, and has nothing left to do."""
        return self._stopping

    def run(self) -> None:
        """Until it has ended."""
        busy = False
        while not self._stopping:
            busy = self.turn(wait_s=0.0 if busy else min(self._heartbeat_s, self._decode_wait_s()))

    def turn(self, wait_s: float) -> bool:
        """Takes what arrived, waiting for it at most that long, makes one step, reports. False: nothing was done."""
        received = self._receive(wait_s)
        busy = self.step()
        self._report(busy or self._holds_decode_back)
        if self._leave is not None and self._is_drained:
            self._carry_out(self._leave)
        self._cpu.lap(None)
        return busy or received

    def step(self) -> bool:
        """One turn: an encode batch if one is due, then a language batch if one is due. False: there was nothing."""
        ran = self._step_encode()
        self._flush()
        if ran is not None:
            self._cpu.lap(ran)
        spoke = self._step_language()
        self._flush()
        if spoke is not None:
            self._cpu.lap(spoke)
        return ran is not None or spoke is not None or bool(self._to_self)

    # ---- messages

    def _receive(self, wait_s: float) -> bool:
        if wait_s > 0:
            self._poller.poll(max(1, int(wait_s * 1000)))
        self.turn_began = time.monotonic()
        results, messages = self._transfers.completed(), self._inbox.receive(self._near.table.version)
        for result in results:
            if result.error is not None:
                logger.warning("%s: pull failed: %s", self._near.instance, result.error)
            self._stages.pulled(result.key, result.error)
        self._complain()  # here, because what settled during a long step is known only now
        for message in messages:
            self._handle(message)
        local = len(self._to_self)
        for _ in range(local):
            self._handle(self._to_self.popleft())
        return bool(results or messages or local)

    def _handle(self, message: AnyMessage) -> None:
        request_id: RequestId | None = getattr(message, "request_id", None)
        fault = contradiction(message)
        if fault is not None:
            self._refuse(message, request_id, fault)
            return
        with self._recorded(() if request_id is None else (request_id,)):
            self._dispatch(message)

    def _refuse(self, message: AnyMessage, request_id: RequestId | None, fault: str) -> None:
        """A bug of the sender's: one request suffers, and the instance does not."""
        logger.error("%s: a %s %s: %s", self._near.instance, type(message).__name__, request_id or "", fault)
        if request_id is not None:
            self._send(FRONTEND, Failed(request_id, "internal server error", status=500, code="internal_error"))

    def _dispatch(self, message: AnyMessage) -> None:
        handler = self._handlers.get(type(message))
        if handler is not None:
            handler(message)
        elif not self._stages.take(message):
            logger.warning("%s: nothing here takes a %s", self._near.instance, type(message).__name__)

    def _take_table(self, message: Table) -> None:
        near = self._near
        if message.version <= near.table.version:
            return
        here = {peer.address for peer in message.peers}  # an address is that of one process; an epoch may change
        before, near.table = near.table, RoutingTable.of(message)
        gone = [p.id for p in before.peers.values() if p.address not in here and p.id != near.instance]
        for instance in gone:
            self._transfers.disconnect(instance)
            near.decode_loads.pop(instance, None)
            self._post.forget(self._addresses.pop(instance))  # with what it never read
        for peer in message.peers:
            if peer.id != near.instance:
                self._addresses[peer.id] = peer.address
                self._transfers.connect(peer)
        self._stages.table_changed(before)
        for instance in gone:  # last, because what was theirs goes to somebody of the new table
            self._stages.lost(instance)

    def _shut_down(self, message: Shutdown) -> None:
        self._stopping = True

    def _flush(self) -> None:
        """Carries out what the stages want: tokens first (a client waits), then messages, then pulls."""
        out = self._near.out
        if out.tokens:
            self._send(FRONTEND, Tokens(self._near.instance, out.tokens))
            out.tokens = []
        messages, out.messages = out.messages, []
        for to, message in messages:
            self._send(to, message)
        pulls, out.pulls = out.pulls, []
        for pull in pulls:
            self._transfers.pull(pull.key, pull.ticket, pull.blocks)

    def _send(self, to: InstanceId, message: AnyMessage) -> None:
        if to == self._near.instance:
            self._to_self.append(message)
        elif to in self._addresses:
            self._post.send(self._addresses[to], message, self._near.table.version)
        else:
            logger.warning("%s: %s is gone, dropped a %s", self._near.instance, to, type(message).__name__)
            for other, instead in self._stages.undelivered(message):
                self._send(other, instead)

    def _complain(self) -> None:
        for complaint in self._transfers.complaints():
            holder, epoch = complaint.holder, complaint.epoch
            self._send(FRONTEND, Unreachable(self._near.instance, holder, epoch, complaint.error))

    # ---- role

    def _install(self, equipment: Equipment) -> None:
        self._equipment = equipment
        self._pools, self._stages, self._runners = equipment.pools, equipment.stages, equipment.runners
        self._transfers, self._set_threads = equipment.transfers, equipment.set_threads
        self._scheduling = equipment.config.scheduling
        # While a request here waits for encoders that share the cores, answers keep to a pace: each step that is not
        # made is time for them.
        self._metronome = Metronome((self._scheduling.decode_interval_ms or 0.0) / 1e3)
        self._poller = zmq.Poller()
        self._poller.register(self._inbox.socket, zmq.POLLIN)
        self._poller.register(self._transfers.wake_fd, zmq.POLLIN)
        self._handlers: dict[type, Callable[..., None]] = {
            Table: self._take_table,
            Load: self._near.take_load,
            SwitchRole: self._order_switch,
            Shutdown: self._shut_down,
        }

    @property
    def peer(self) -> Peer:
        """The row of this instance in the routing table."""
        near, config = self._near, self._equipment.config
        return Peer(near.instance, config.role, near.epoch, self._inbox.address, self._transfers.describe())

    def _order_switch(self, order: SwitchRole) -> None:
        if order.order <= self._newest_order:
            return
        self._newest_order = order.order
        if order.config is not None and order.config.role is self._equipment.config.role:
            self._leave = None
            self._stages.stay()
            self._say_switched(order, {}, None)
            return
        self._leave = _Leave(order, time.monotonic())
        self._stages.leave(order.room)

    @property
    def _is_drained(self) -> bool:
        """Whether nobody relies on this instance in its present role: no work, no lease, no pull, nothing unsaid."""
        out = self._near.out
        return not (
            not self._stages.is_empty
            or self._transfers.num_under_way
            or self._to_self
            or out.tokens
            or out.messages
            or out.pulls
        )

    def _carry_out(self, leave: _Leave) -> None:
        """Nothing of the old role is left: becomes the new one, or, if that fails, the old one again."""
        self._leave, order = None, leave.order
        drain_s = time.monotonic() - leave.began
        self._report_evicted()
        if order.config is None:
            self._stopping = True
            return
        self.check_integrity()
        old, error = self._equipment.config, None
        self._let_go()
        try:
            equipment = self._refit(order.config)
        except Exception as raised:  # a library's, or memory that is not there: whatever it is, the old role goes on
            logger.exception("%s cannot become %s, stays %s", self._near.instance, order.config.role, old.role)
            error = f"{type(raised).__name__}: {raised}"
            equipment = self._refit(old)
        self._install(equipment)
        for peer in self._near.table.peers.values():
            if peer.id != self._near.instance:
                self._transfers.connect(peer)
        self._say_switched(order, {"drain": drain_s} | equipment.steps_s, error)

    def _let_go(self) -> None:
        """Of what refers to weights and memory, so that they can be given back."""
        self._runners = self._equipment.runners = Runners()

    def _say_switched(self, order: SwitchRole, steps_s: dict[str, float], error: str | None) -> None:
        self._send(FRONTEND, Switched(self._near.instance, order.order, self.peer, steps_s, error))

    # ---- work

    def _step_encode(self) -> Stage | None:
        works = self._stages.schedule_encode(self._pace.of(Stage.ENCODE), self._scheduling.max_encode_tokens)
        if not works:
            return None
        assert self._stages.encode is not None and self._runners.encode is not None
        self._flush()  # what is known already need not wait for the forward
        with self._recorded(self._stages.encode.running_requests):
            began = time.monotonic()
            errors = self._runners.encode.run(works)
            num_tokens = sum(work.unit.num_tokens for work in works)
            self._pace.observe(Stage.ENCODE, num_tokens, self._computed("encode", began, len(works)))
            self._stages.encode.commit(works, errors)
        return Stage.ENCODE

    @contextlib.contextmanager
    def _recorded(self, requests: Iterable[RequestId]) -> Iterator[None]:
        """Should what happens inside end this process, whoever comes after knows what it was working on: so the record
        stays when an exception passes."""
        if self._black_box is None:
            yield
            return
        self._black_box.record(requests)
        yield
        self._black_box.record(())

    def _step_language(self) -> Stage | None:
        """Decodes and prefill chunks of all sequences in one forward; decodes come first, chunks fill the budget."""
        decodes = self._schedule_decode()
        budget = self._scheduling.max_num_batched_tokens - len(decodes)
        chunks = self._stages.prefill.schedule(budget) if self._stages.prefill is not None else []
        if not decodes and not chunks:
            return None
        assert self._runners.language is not None
        self._flush()  # pulls among it: their blocks are free, also those that were offloaded just now
        self._set_threads(self._awaits_embeddings)
        with self._recorded(chunk.sequence.request_id for chunk in [*decodes, *chunks]):
            began = time.monotonic()
            sampled = self._runners.language.run(decodes + chunks)
            self._observe_language(decodes, chunks, began)
            if self._stages.decode is not None:
                self._stages.decode.commit(decodes, sampled[: len(decodes)])
            if self._stages.prefill is not None:
                self._stages.prefill.commit(chunks, sampled[len(decodes) :])
        self._num_steps += 1
        return Stage.PREFILL if chunks else Stage.DECODE

    def _schedule_decode(self) -> list[Chunk]:
        if self._stages.decode is None or self._holds_decode_back:
            return []
        plan = self._stages.decode.schedule()
        self._metronome.stepped((chunk.sequence.request_id for chunk in plan.chunks), time.monotonic())
        if plan.offloads or plan.restores:
            assert self._runners.language is not None
            with self._recorded(sequence.request_id for sequence, _ in [*plan.offloads, *plan.restores]):
                for sequence, blocks in plan.offloads:
                    sequence.offloaded = self._runners.language.offload(blocks)
                for sequence, blocks in plan.restores:
                    self._runners.language.restore(sequence.offloaded, blocks)
                    sequence.offloaded = None
        return plan.chunks

    def _decode_wait_s(self) -> float:
        """How long the next decode step is held back, 0 if it is not; infinite if there is none to be made."""
        decode = self._stages.decode
        if decode is None or not decode.num_running:
            return math.inf
        return max(0.0, self._metronome.wait_s(time.monotonic())) if self._awaits_embeddings else 0.0

    @property
    def _holds_decode_back(self) -> bool:
        return 0.0 < self._decode_wait_s() < math.inf

    @property
    def _awaits_embeddings(self) -> bool:
        return self._stages.prefill is not None and self._stages.prefill.awaits_embeddings

    def _observe_language(self, decodes: list[Chunk], chunks: list[Chunk], began: float) -> None:
        what = "decode" if not chunks else "mixed" if decodes else "prefill"
        seconds = self._computed(what, began, len(decodes) + len(chunks))
        if chunks:
            self._pace.observe(Stage.PREFILL, len(decodes) + sum(chunk.length for chunk in chunks), seconds)
        else:
            self._pace.observe(Stage.DECODE, len(decodes), seconds)

    def _computed(self, what: str, began: float, size: int) -> float:
        """How long the step took that ended just now."""
        ended = time.monotonic()
        if self._untold is not None:
            self._untold.append(Step(what, began, ended, size))
        return ended - began

    # ---- reports

    def _report(self, busy: bool) -> None:
        """Once a heartbeat, and at once when the last work is done. The first heartbeat of an idle instance checks its
        books."""
        now = time.monotonic()
        fell_idle, self._was_busy = self._was_busy and not busy, busy
        self._unchecked |= busy
        due = now - self._reported_at >= self._heartbeat_s
        if not fell_idle and not due:
            return
        load = self.load()
        self._send(FRONTEND, load)
        self._report_evicted()
        self._report_steps()
        if Stage.DECODE in load.work_s:
            self._near.take_load(load)
            for peer in self._near.table.serving(Stage.PREFILL):
                if peer.id != self._near.instance:
                    self._send(peer.id, load)
        if due:
            self._reported_at = now
            if self._unchecked and not busy:
                self._unchecked = False
                self.check_integrity()

    def _report_evicted(self) -> None:
        units, blocks = self._pools.take_evicted_units(), self._pools.take_evicted_blocks()
        if units or blocks:
            self._send(FRONTEND, Evicted(self._near.instance, units, blocks))

    def _report_steps(self) -> None:
        if self._untold:
            self._send(FRONTEND, Steps(self._near.instance, self._untold))
            self._untold = []

    def load(self) -> Load:
        done = {"steps": float(self._num_steps)}
        counters = self._equipment.counters | self._pace.counters | self._cpu.counters | done
        return load_of(self._near, self._stages, self._pools, self._pace, counters)

    @property
    def num_pulls(self) -> int:
        """That are under way."""
        return self._transfers.num_under_way

    def close(self) -> None:
        """After `run`: ends the threads and sockets of this instance."""
        self._transfers.close()
        self._post.close()
        self._inbox.close()

    def check_integrity(self) -> None:
        self._pools.check_integrity()
