"""Looks after instances that serve or start, and kills those that hang. What follows a kill is not its business."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from triptych.control.instances import Instance, State, Worker
from triptych.control.liveness import TICK_S, Liveness
from triptych.core import InstanceId
from triptych.messages import Alive, Unreachable

logger = logging.getLogger(__name__)

END_SHOWS_S = 0.2  # in which the end of a process that breaks a pull is known
KILL_GRACE_S = 2.0  # for a killed process to end; one that hangs in the kernel is given up then


class Watch:
    """`run` keeps it going."""

    def __init__(
        self,
        instances: Mapping[InstanceId, Instance],
        gone: Callable[[Instance, Worker], None],
        start_timeout_s: float,
    ) -> None:
        """`gone` is told of a process that was killed and should have ended by now, whether it has or not."""
        self._instances = instances
        self._gone = gone
        self._start_timeout_s = start_timeout_s
        self._liveness = Liveness()

    def begin(self, instance: Instance) -> None:
        """It serves from now on, so it has to say that it is alive."""
        self._liveness.watch(instance.id)

    def end(self, instance: Instance) -> None:
        self._liveness.forget(instance.id)

    def alive(self, message: Alive) -> None:
        """One that loads has to go on as soon as it has begun: before that it imports libraries for as long as it
        takes."""
        instance = self._instances.get(message.instance)
        if instance is None or instance.config is None or instance.config.epoch != message.epoch:
            return
        if _loads(instance) and not self._liveness.is_watched(instance.id):
            self._liveness.watch(instance.id, loads=True)
        self._liveness.alive(message.instance, message.turning_s)

    def unreachable(self, message: Unreachable) -> None:
        """A pull failed. Who is to blame is not asked at once: the end of a process breaks pulls before it is seen."""
        if self._is_news(message):
            logger.warning("%s cannot read from %s: %s", message.reader, message.holder, message.error)
            asyncio.get_running_loop().call_later(END_SHOWS_S, self._judge, message)

    def _is_news(self, message: Unreachable) -> bool:
        """Not of an incarnation that is gone, nor of one of whom somebody is being killed."""
        reader, holder = self._instances.get(message.reader), self._instances.get(message.holder)
        if holder is None or holder.peer is None or holder.peer.epoch != message.epoch:
            return False
        if reader is None or reader.peer is None:
            return False
        return holder.accusation is None and reader.accusation is None

    def _judge(self, message: Unreachable) -> None:
        if not self._is_news(message):
            return
        blamed = self._liveness.unreachable(message.reader, message.holder)
        if blamed is not None:
            self._instances[blamed].is_out_of_reach = True
            reason = f"{message.reader} cannot read from {message.holder}: {message.error}"
            self.accuse(self._instances[blamed], reason)

    def accuse(self, instance: Instance, reason: str) -> None:
        """Kills it; what follows is the same as if it had died by itself."""
        assert instance.worker is not None, f"instance {instance.id} has no process to kill"
        if instance.accusation is not None:
            return
        instance.accusation = reason
        logger.error("instance %s (pid %d): %s; killing it", instance.id, instance.worker.pid, reason)
        asyncio.get_running_loop().call_later(KILL_GRACE_S, self._gone, instance, instance.worker)
        instance.worker.kill()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._tick()
            except Exception:  # the boundary of a tick: the next one may find what this one could not
                logger.exception("a look at the instances failed")

    def _tick(self) -> None:
        leaving = {id for id, instance in self._instances.items() if instance.state is State.LEAVING}
        for id, reason in self._liveness.tick(may_take_long=leaving).items():
            self.accuse(self._instances[id], reason)
        now = time.monotonic()
        for instance in list(self._instances.values()):
            if _loads(instance) and now - instance.since > self._start_timeout_s:
                self.accuse(instance, f"not ready after {self._start_timeout_s:g} s")


def _loads(instance: Instance) -> bool:
    """While its process is being made there is nobody to watch; that has a limit of its own."""
    return instance.state is State.STARTING and instance.worker is not None
