"""Starts the instances of a placement, publishes who is there, notices who is gone, stops them all."""

import asyncio
import logging
from functools import partial
from typing import Protocol

from triptych.config import InstanceConfig
from triptych.control.instances import Cluster, Instance, State
from triptych.core import InstanceId
from triptych.engine.sockets import Post
from triptych.errors import EXIT_REFUSED, ConfigError, InstanceError
from triptych.messages import AnyMessage, Ready, Shutdown, Table

logger = logging.getLogger(__name__)

STOP_GRACE_S = 1.5  # for a worker to leave its loop; then it is killed


class Observer(Protocol):
    """Who wants to know; the frontend."""

    def handle(self, message: Table) -> None: ...
    def instance_lost(self, instance: InstanceId) -> None: ...


class Controller:
    """Lives on the event loop of the server process. One owner of the instance records and of the table version."""

    def __init__(self, cluster: Cluster, post: Post) -> None:
        self._cluster = cluster
        self._post = post
        self._frontend: Observer | None = None
        self._version = 0
        self._changed = asyncio.Event()
        self._stopping = False
        self._starting = asyncio.Lock()
        self.instances: dict[InstanceId, Instance] = {}

    async def start(self, configs: list[InstanceConfig], timeout_s: float) -> None:
        """Returns when every instance is active. Raises ConfigError or InstanceError with what a failed one said, as
        soon as one fails."""
        for config in configs:
            await self._start_worker(config)
        try:
            async with asyncio.timeout(timeout_s):
                while self._in(State.STARTING) and not self._in(State.DEAD):
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            late = [instance.config.id for instance in self._in(State.STARTING)]
            raise InstanceError(f"not ready after {timeout_s:g} s: {', '.join(late)}") from None
        for instance in self._in(State.DEAD):
            self._raise_failure(instance)

    def open(self, frontend: Observer) -> None:
        """Publishes the first table to all instances and to the frontend, which hears of every change from now on."""
        self._frontend = frontend
        self._publish()

    def ready(self, message: Ready) -> None:
        instance = self.instances.get(message.peer.id)
        if instance is None or instance.config.epoch != message.peer.epoch:
            return
        instance.peer = message.peer
        instance.state = State.ACTIVE
        logger.info("instance %s (%s) ready after %.1f s", message.peer.id, message.peer.role, message.start_s)
        self._changed.set()

    def send(self, to: InstanceId, message: AnyMessage) -> None:
        """To an instance that has been active; a message to one that is gone is dropped."""
        instance = self.instances.get(to)
        if instance is not None and instance.peer is not None and instance.state is not State.DEAD:
            self._post.send(instance.peer.address, message)

    async def stop(self) -> None:
        """Asks every worker to end, and kills those that do not."""
        self._stopping = True
        async with self._starting:  # a process that is being started right now has to be known before it can be ended
            pass
        for instance in self.instances.values():
            self.send(instance.config.id, Shutdown())
        workers = [instance.worker for instance in self.instances.values() if instance.state is not State.DEAD]
        for instance in self._in(State.STARTING):
            instance.worker.kill()
        ended = await asyncio.gather(*(worker.wait(STOP_GRACE_S) for worker in workers))
        for worker, done in zip(workers, ended, strict=True):
            if not done:
                logger.warning("worker %d did not stop in %.1f s, killing it", worker.pid, STOP_GRACE_S)
                worker.kill()
        await asyncio.gather(*(worker.wait(STOP_GRACE_S) for worker in workers))

    async def _start_worker(self, config: InstanceConfig) -> None:
        async with self._starting:
            if self._stopping:
                return
            worker = await asyncio.to_thread(self._cluster.start, config)  # the first one waits for the fork server
            self.instances[config.id] = Instance(config, worker)
            worker.watch(partial(self._exited, config.id))

    def _exited(self, instance_id: InstanceId) -> None:
        instance = self.instances[instance_id]
        was_published = instance.state is State.ACTIVE and self._frontend is not None
        instance.state = State.DEAD
        self._changed.set()
        if self._stopping:
            return
        logger.error("instance %s (pid %d) ended with %s", instance_id, instance.worker.pid, instance.worker.exit_code)
        if instance.peer is not None:
            self._post.forget(instance.peer.address)
        if was_published:
            self._publish()
            assert self._frontend is not None
            self._frontend.instance_lost(instance_id)

    def _publish(self) -> None:
        self._version += 1
        assert self._frontend is not None
        active = self._in(State.ACTIVE)
        table = Table(self._version, [i.peer for i in active if i.peer is not None])
        for instance in active:
            self.send(instance.config.id, table)
        self._frontend.handle(table)

    def _in(self, state: State) -> list[Instance]:
        return [instance for instance in self.instances.values() if instance.state is state]

    def _raise_failure(self, instance: Instance) -> None:
        said = instance.worker.failure
        if instance.worker.exit_code == EXIT_REFUSED:
            raise ConfigError(said or "")
        raise InstanceError(
            f"instance {instance.config.id} ended with {instance.worker.exit_code} while starting\n{said or ''}"
        )
