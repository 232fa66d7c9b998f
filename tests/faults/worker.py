"""The entry of a worker process that fails on order: the real engine, with a look at `Points` at every moment."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import triptych.engine.worker
from tests.faults.points import TRANSFERS, Arming, Fault, Fired, Moment, Points
from triptych.config import InstanceConfig
from triptych.core import Chunk, EncodeWork, Role, Stage
from triptych.engine.sockets import Inbox, Post
from triptych.messages import AnyMessage, Embedded, Prefilled, Prefilling, Tokens
from triptych.model.encoder import EncodeRunner
from triptych.model.language import LanguageRunner
from triptych.stages.decode import DecodeStage
from triptych.stages.encode import EncodeStage
from triptych.stages.prefill import PrefillStage
from triptych.transfer.base import Read, Transport
from triptych.transfer.nixl import NixlTransport
from triptych.transfer.shm import ShmTransport

DELIVERY_S = 0.02  # what a message needs to leave this process
OFFERS = {Embedded: Moment.EMBEDDING, Prefilling: Moment.KV, Prefilled: Moment.KV}


def work(folder: str, config: InstanceConfig, failures: Connection) -> None:
    """In place of `triptych.engine.worker.work`; `folder` is that of the `Points`."""
    Faults(Points(folder), config).install()
    triptych.engine.worker.work(config, failures)


class Faults:
    """The moments of one incarnation."""

    def __init__(self, points: Points, config: InstanceConfig) -> None:
        self._points = points
        self._me = Fired(config.id, config.epoch, os.getpid())
        self._role = config.role
        self._computed_a_part = False

    def install(self) -> None:
        """In the classes, before anything is built of them."""
        self._install_queues()
        self._install_runners()
        self._install_stages()
        self._install_wires()

    # ---- what happens

    def reached(self, moment: Moment) -> None:
        arming = self._armed(moment)
        if arming is not None:
            self._fail(arming)

    def _armed(self, moment: Moment) -> Arming | None:
        arming = self._points.armed()
        mine = arming is not None and arming.moment is moment and self._me.instance in arming.instances
        return arming if mine else None

    def _fail(self, arming: Arming) -> None:
        if self._points.consume(arming, self._me):
            self._carry_out(arming.fault)

    def _carry_out(self, fault: Fault) -> None:
        if fault is not Fault.BREAK:
            os.kill(os.getpid(), signal.SIGKILL if fault is Fault.KILL else signal.SIGSTOP)
            time.sleep(0.01)  # until it arrives: nothing of this thread runs beyond the moment

    def _die_if(self, is_poisoned: bool) -> None:
        if is_poisoned:
            self._points.die(self._me.instance)
            self._carry_out(Fault.KILL)

    # ---- where it may happen

    def _install_queues(self) -> None:
        stages: list[tuple[type, str]] = []
        if self._role.encodes and self._role is not Role.EPD:
            stages.append((EncodeStage, "admit"))
        if Stage.PREFILL in self._role.stages:
            stages.append((PrefillStage, "admit"))
        elif Stage.DECODE in self._role.stages:
            stages.append((DecodeStage, "admit"))
        for stage, method in stages:
            self._after(stage, method, lambda *_: self.reached(Moment.QUEUED))

    def _install_runners(self) -> None:
        self._after(EncodeRunner, "run", lambda _, works: self._encoded(works))
        self._after(LanguageRunner, "run", lambda _, chunks: self._spoke(chunks))

    def _install_stages(self) -> None:
        self._after(PrefillStage, "commit", lambda _, chunks, sampled: self._committed(chunks))
        self._before(PrefillStage, "schedule", lambda *_: self._goes_on())

    def _install_wires(self) -> None:
        self._before(Post, "send", lambda _, address, message, *__: self._sends(message))
        self._after(Post, "send", lambda _, address, message, *__: self._sent(message))
        self._before(Inbox, "receive", lambda *_, **__: self._require_sockets())
        for transport in (ShmTransport, NixlTransport):
            self._before(transport, "_start", self._reads)

    def _encoded(self, works: list[EncodeWork]) -> None:
        poison = self._points.poisoned()
        if poison is not None and poison.moment is Moment.ENCODING:
            self._die_if(any(work.media.data.endswith(poison.ending) for work in works))
        self.reached(Moment.ENCODING)

    def _spoke(self, chunks: list[Chunk]) -> None:
        real = [chunk for chunk in chunks if chunk.sequence.request_id != "warm-up"]
        prefills = [chunk for chunk in real if chunk.start < chunk.sequence.num_prompt_tokens]
        decodes = [chunk for chunk in real if chunk.start >= chunk.sequence.num_prompt_tokens]
        poison = self._points.poisoned()
        if poison is not None:
            at = {Moment.PREFILLING: prefills, Moment.DECODING: decodes}.get(poison.moment, [])
            self._die_if(any(chunk.sequence.sampling.seed == poison.seed for chunk in at))
        if prefills:
            self.reached(Moment.PREFILLING)
        arming = self._armed(Moment.DECODING)
        if arming is not None and any(chunk.sequence.num_output_tokens >= arming.num_tokens for chunk in decodes):
            self._fail(arming)

    def _committed(self, chunks: list[Chunk]) -> None:
        ends = (chunk.start + chunk.length for chunk in chunks)
        self._computed_a_part = any(
            end < chunk.sequence.num_prompt_tokens for chunk, end in zip(chunks, ends, strict=True)
        )

    def _goes_on(self) -> None:
        computed_a_part, self._computed_a_part = self._computed_a_part, False
        if computed_a_part:
            self.reached(Moment.BETWEEN)

    def _sends(self, message: AnyMessage) -> None:
        self._require_sockets()
        if _is_last(message):
            self.reached(Moment.FINISHING)

    def _sent(self, message: AnyMessage) -> None:
        if _is_last(message) and self._armed(Moment.FINISHED):
            time.sleep(DELIVERY_S)
            self.reached(Moment.FINISHED)
        moment = OFFERS.get(type(message))
        arming = None if moment is None else self._armed(moment)
        if arming is not None and self._points.wait_for(f"reading-{arming.number}"):
            self._fail(arming)

    def _reads(self, transport: Transport, read: Read) -> None:
        """Of whom fails: at this moment the read is asked for and not done. Of whom reads from one that fails: it waits
        here for that."""
        for moment, region in TRANSFERS.items():
            if transport._slab.regions.get(region) == read.target:
                self.reached(moment)
                arming = self._points.armed()
                if arming is not None and arming.moment is moment and read.peer.id in arming.instances:
                    self._points.tell(f"reading-{arming.number}")
                    self._points.wait_for(f"fired-{arming.number}")
        for instance, epoch in ((self._me.instance, self._me.epoch), (read.peer.id, read.peer.epoch)):
            if self._points.is_broken(instance, epoch):
                raise OSError(f"the transport of {instance} is broken")

    def _require_sockets(self) -> None:
        """One that neither reads nor is read from has no other transport."""
        if self._role is Role.EPD and self._points.is_broken(self._me.instance, self._me.epoch):
            raise OSError(f"the sockets of {self._me.instance} are broken")

    @staticmethod
    def _before(owner: type, method: str, look: Callable[..., None]) -> None:
        original = getattr(owner, method)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            look(*arguments, **named)
            return original(*arguments, **named)

        setattr(owner, method, wrapped)

    @staticmethod
    def _after(owner: type, method: str, look: Callable[..., None]) -> None:
        original = getattr(owner, method)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            look(*arguments, **named)
            return result

        setattr(owner, method, wrapped)


def _is_last(message: AnyMessage) -> bool:
    return isinstance(message, Tokens) and any(update.finish is not None for update in message.updates)
