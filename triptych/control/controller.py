"""Starts the instances of a placement, publishes who is there, notices who is gone, stops them all."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from triptych.config import InstanceConfig
from triptych.control.instances import Cluster, Instance, State
from triptych.core import InstanceId, Placement
from triptych.engine.sockets import Post
from triptych.errors import ConfigError, InstanceError
from triptych.messages import AnyMessage, Ready, Shutdown, Table

logger = logging.getLogger(__name__)

STOP_GRACE_S = 1.5  # for a worker to leave its loop; then it is killed
EXIT_REFUSED = 2


class Controller:
    """Lives on the event loop of the server process. One owner of the instance records and of the table version."""

    def __init__(self, cluster: Cluster, post: Post) -> None:
        self._cluster = cluster
        self._post = post
        self.on_table: Callable[[Table], None] = _ignore  # who else wants to know every new table
        self.on_lost: Callable[[InstanceId], None] = _ignore  # and every instance that ended by itself
        self._version = 0
        self._changed = asyncio.Event()
        self._stopping = False
        self._starting = asyncio.Lock()
        self.instances: dict[InstanceId, Instance] = {}

    @property
    def placement(self) -> str:
        """The roles of the instances that live, as a placement."""
        return str(Placement(tuple(i.config.role for i in self.instances.values() if i.state is not State.DEAD)))

    async def start(self, configs: list[InstanceConfig], timeout_s: float) -> None:
        """Returns when every instance is active. Raises ConfigError or InstanceError with what a failed one said."""
        for config in configs:
            await self._start_worker(config)
        try:
            async with asyncio.timeout(timeout_s):
                while any(instance.state is State.STARTING for instance in self.instances.values()):
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            late = [i.config.id for i in self.instances.values() if i.state is State.STARTING]
            raise InstanceError(f"not ready after {timeout_s:.0f} s: {', '.join(late)}") from None
        for instance in self.instances.values():
            if instance.state is State.DEAD:
                self._raise_failure(instance)
        self._publish()

    def ready(self, message: Ready) -> None:
        instance = self.instances.get(message.peer.id)
        if instance is None or instance.config.epoch != message.peer.epoch:
            return
        instance.peer = message.peer
        instance.state = State.ACTIVE
        instance.start_s = message.start_s
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
        starting = [i.worker for i in self.instances.values() if i.state is State.STARTING]
        for worker in starting:
            worker.kill()
        ended = await asyncio.gather(*(worker.wait(STOP_GRACE_S) for worker in workers))
        for worker, done in zip(workers, ended, strict=True):
            if not done:
                logger.warning("worker %d did not stop in %.0f s, killing it", worker.pid, STOP_GRACE_S)
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
        was_active = instance.state is State.ACTIVE
        instance.state = State.DEAD
        self._changed.set()
        if self._stopping:
            return
        logger.error("instance %s (pid %d) ended with %s", instance_id, instance.worker.pid, instance.worker.exit_code)
        if instance.peer is not None:
            self._post.forget(instance.peer.address)
        if was_active:
            self._publish()
            self.on_lost(instance_id)

    def _publish(self) -> None:
        self._version += 1
        active = [i for i in self.instances.values() if i.state is State.ACTIVE]
        table = Table(self._version, [i.peer for i in active if i.peer is not None])
        for instance in active:
            self.send(instance.config.id, table)
        self.on_table(table)

    def _raise_failure(self, instance: Instance) -> None:
        said = instance.worker.failure
        if instance.worker.exit_code == EXIT_REFUSED:
            raise ConfigError(said or "")
        raise InstanceError(
            f"instance {instance.config.id} ended with {instance.worker.exit_code} while starting\n{said or ''}"
        )


def _ignore(_: object) -> None:
    return
