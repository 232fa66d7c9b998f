"""The one owner of the instance records and of the routing table: starts processes, notices who is gone, starts anew.

Lives on the event loop of the server process. Knows nothing of why a role changes (`changes` does).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from functools import partial
from itertools import count
from typing import Any, Protocol

import msgspec

from triptych.config import InstanceConfig
from triptych.control.events import Event, EventLog
from triptych.control.instances import Cluster, Instance, State, Worker
from triptych.control.launch import launch
from triptych.control.remains import cause_of_death, remove_files, suspects
from triptych.control.watch import Watch
from triptych.core import InstanceId, RequestId, Role
from triptych.engine.sockets import Post
from triptych.errors import EXIT_REFUSED, ConfigError, InstanceError
from triptych.messages import AnyMessage, Peer, Ready, Shutdown, Table

logger = logging.getLogger(__name__)

STOP_GRACE_S = 1.5  # for a worker to leave its loop; then it is killed

_ALARMING = frozenset({"lost", "switch_failed"})


class Observer(Protocol):
    """Who wants to know; the frontend."""

    def handle(self, message: Table, /) -> None: ...
    def instance_lost(
        self, instance: InstanceId, suspects: Collection[RequestId] = (), *, as_asked: bool = False
    ) -> None: ...
    def room(self) -> dict[InstanceId, int]: ...


class Configure(Protocol):
    """Makes the configuration of a new incarnation: new epoch, new addresses, and its share of cores and devices
    among instances of these `roles`, its own one of them."""

    def __call__(self, id: InstanceId, slot: int, role: Role, roles: Sequence[Role]) -> InstanceConfig: ...


class Fleet:
    """Whatever goes wrong with a process, `_lost` is where it ends up, once for each."""

    def __init__(self, cluster: Cluster, post: Post, configure: Configure, start_timeout_s: float) -> None:
        """`start_timeout_s`: how long an instance may take to start, the first time and again."""
        self._cluster = cluster
        self._post = post
        self._configure = configure
        self._start_timeout_s = start_timeout_s
        self._observer: Observer | None = None
        self._version = 0
        self._numbers = count()
        self._changed = asyncio.Event()
        self._launching = asyncio.Lock()
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.instances: dict[InstanceId, Instance] = {}
        self.events = EventLog()
        self.watch = Watch(self.instances, self._exited, start_timeout_s)

    # ---- start and end

    async def start(self, roles: Sequence[Role]) -> None:
        """Returns when every instance is active. Raises ConfigError or InstanceError with what a failed one said, as
        soon as one fails."""
        for instance in [self._add(role) for role in roles]:
            await self._launch(instance)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self.until(lambda: bool(self._in(State.DEAD)) or not self._in(State.STARTING))
        except TimeoutError:
            late = [instance.id for instance in self._in(State.STARTING)]
            raise InstanceError(f"not ready after {self._start_timeout_s:g} s: {', '.join(late)}") from None
        self._raise_failures()

    def open(self, observer: Observer) -> None:
        """Publishes the first table to all instances and to the observer, which hears of every change from now on.
        Instances that fail from now on are replaced. Raises what `start` raises for one that has failed since."""
        self._raise_failures()
        self._observer = observer
        for instance in self._in(State.ACTIVE):
            self.watch.begin(instance)
        self.publish()
        self._spawn(self.watch.run())

    async def stop(self) -> None:
        """Asks every worker to end, and kills those that do not."""
        self._stopping = True
        # A process that is being made right now has to be known before it can be ended. One that takes longer than
        # that, because the fork server hangs, ends by itself when it finds its server gone.
        try:
            async with asyncio.timeout(STOP_GRACE_S), self._launching:
                pass
        except TimeoutError:
            logger.warning("stopping while a process is still being started")
        for task in self._tasks:
            task.cancel()
        for instance in self.instances.values():
            self.send(instance.id, Shutdown())
        workers = [instance.worker for instance in self.instances.values() if instance.worker is not None]
        for instance in self._in(State.STARTING):
            if instance.worker is not None:
                instance.worker.kill()
        ended = await asyncio.gather(*(worker.wait(STOP_GRACE_S) for worker in workers))
        for worker, done in zip(workers, ended, strict=True):
            if not done:
                logger.warning("worker %d did not stop in %.1f s, killing it", worker.pid, STOP_GRACE_S)
                worker.kill()
        await asyncio.gather(*(worker.wait(STOP_GRACE_S) for worker in workers))

    # ---- what others may do

    def send(self, to: InstanceId, message: AnyMessage) -> None:
        """To an instance that is in the table; a message to one that is gone is dropped."""
        instance = self.instances.get(to)
        if instance is not None and instance.peer is not None:
            self._post.send(instance.peer.address, message)

    def note(self, event: Event) -> None:
        """Into the log and the list that operators see."""
        self.events.add(event)
        numbers = " ".join(f"{name}={value:.4g}" for name, value in event.numbers.items())
        parts = [part for part in (event.instance, event.what, event.text, numbers) if part]
        logger.log(logging.WARNING if event.what in _ALARMING else logging.INFO, "%s", " ".join(parts))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Looks at it again after every change of any instance."""
        while not condition():
            await self._changed.wait()

    def serving(self) -> dict[InstanceId, Role]:
        """The instances that take new work."""
        return {instance.id: instance.role for instance in self._in(State.ACTIVE)}

    def room(self) -> dict[InstanceId, int]:
        """KV blocks that instances which take new work could still hold."""
        assert self._observer is not None
        active = self.serving()
        return {id: num_blocks for id, num_blocks in self._observer.room().items() if id in active}

    def config_for(self, instance: Instance, role: Role) -> InstanceConfig:
        """Of the present incarnation in another role: its share changes, its epoch and its addresses do not."""
        assert instance.config is not None
        roles = [role if other is instance else other.role for other in self.instances.values()]
        config = self._configure(instance.id, instance.slot, role, roles)
        had = instance.config
        return msgspec.structs.replace(config, epoch=had.epoch, inbox=had.inbox, black_box=had.black_box)

    def leave(self, instance: Instance) -> None:
        """Takes its new work from it; what it has, it finishes."""
        instance.move_to(State.LEAVING)
        self.publish()
        self._notify()

    def arrived(self, instance: Instance, peer: Peer) -> None:
        """It serves `peer.role` from now on."""
        assert instance.config is not None
        instance.move_to(State.ACTIVE)
        instance.peer, instance.role = peer, peer.role
        instance.config = msgspec.structs.replace(instance.config, role=peer.role)
        self.publish()
        self._notify()

    async def enlist(self, role: Role) -> Instance:
        """A new instance, once it is active. Raises InstanceError if it fails to start, and forgets it then."""
        instance = self._add(role)
        instance.disposable = True
        await self._try_launch(instance)
        await self.until(lambda: instance.state in (State.ACTIVE, State.DEAD))
        if instance.state is State.DEAD:
            raise InstanceError(f"a new instance for {role} did not start: {instance.last_failure}")
        return instance

    def dismiss(self, instance: Instance) -> None:
        """Gives up an instance that serves nothing, because it is being restarted."""
        assert instance.peer is None, f"instance {instance.id} is {instance.state}"
        instance.disposable = True
        instance.move_to(State.DEAD)
        self.watch.end(instance)
        del self.instances[instance.id]
        if instance.worker is not None:
            instance.worker.kill()
        self.note(Event(what="stopped", instance=instance.id, text=f"as {instance.role}, while it was restarted"))
        self._notify()

    def ready(self, message: Ready) -> None:
        instance = self.instances.get(message.peer.id)
        if instance is None or instance.config is None or instance.config.epoch != message.peer.epoch:
            return
        if instance.state is not State.STARTING:
            return
        now = time.monotonic()
        instance.active_since = now
        instance.disposable = False
        numbers = {"start_s": message.start_s}
        if instance.lost_at is not None:
            numbers["away_s"] = now - instance.lost_at
        instance.peer = message.peer
        instance.move_to(State.ACTIVE)
        what = "started" if instance.lost_at is None else "restarted"
        self.note(Event(what=what, instance=instance.id, text=f"as {instance.role}", numbers=numbers))
        instance.lost_at = None
        if self._observer is not None:
            self.watch.begin(instance)
            self.publish()
        self._notify()

    # ---- processes

    def _add(self, role: Role) -> Instance:
        taken = {instance.slot for instance in self.instances.values()}
        slot = next(number for number in count() if number not in taken)
        id = InstanceId(f"i{next(self._numbers)}")
        instance = self.instances[id] = Instance(id, slot, role)
        return instance

    async def _launch(self, instance: Instance) -> None:
        """Raises InstanceError if it took too long, and whatever else kept a process from being made."""
        try:
            async with asyncio.timeout(self._start_timeout_s), self._launching:
                await self._make_process(instance)
        except TimeoutError:
            raise InstanceError(f"no process after {self._start_timeout_s:g} s") from None

    async def _make_process(self, instance: Instance) -> None:
        if self._stopping:
            return
        roles = [other.role for other in self.instances.values()]
        config = instance.config = self._configure(instance.id, instance.slot, instance.role, roles)
        instance.accusation, instance.is_out_of_reach, instance.started_at = None, False, time.time()
        worker = await launch(self._cluster, config)  # the first one waits for the fork server
        instance.worker = worker
        worker.watch(partial(self._exited, instance, worker))
        if instance.state is State.DEAD or self._stopping:  # dismissed meanwhile
            worker.kill()

    async def _try_launch(self, instance: Instance) -> None:
        try:
            await self._launch(instance)
        except Exception as error:  # a process boundary: no memory, no process numbers, the fork server died, ...
            if instance.state is State.DEAD:  # dismissed meanwhile
                return
            logger.exception("cannot start a process for instance %s", instance.id)
            self._lost(instance, f"cannot start a process: {type(error).__name__}: {error}", [])

    async def _restart(self, instance: Instance, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        if instance.state is State.DEAD:  # dismissed meanwhile
            return
        instance.move_to(State.STARTING)
        instance.num_restarts += 1
        self._notify()
        await self._try_launch(instance)

    def _exited(self, instance: Instance, worker: Worker) -> None:
        """May come twice, or late: a process that was killed and does not end counts as gone."""
        if self._stopping or instance.worker is not worker:
            return
        assert instance.config is not None, f"instance {instance.id} has a process, but no configuration"
        if instance.state is State.DEAD:
            remove_files(instance.config)
        else:
            suspected = [] if instance.is_out_of_reach else suspects(instance.config)
            self._lost(instance, instance.accusation or cause_of_death(worker), suspected)

    def _lost(self, instance: Instance, reason: str, suspected: Collection[RequestId]) -> None:
        """Its process is gone: nobody shall rely on it any more, and there shall be a new one."""
        peer, instance.peer = instance.peer, None
        served_s = 0.0 if instance.active_since is None else time.monotonic() - instance.active_since
        instance.active_since = None
        instance.last_failure = reason
        instance.lost_at = instance.lost_at or time.monotonic()
        self.watch.end(instance)
        if instance.config is not None:
            remove_files(instance.config)
        restarts = self._observer is not None and not instance.disposable
        instance.move_to(State.RESTARTING if restarts else State.DEAD)
        numbers = {"served_s": served_s, "suspects": float(len(suspected))}
        if restarts:
            instance.worker = None
            numbers["restart_in_s"] = wait_s = instance.back_off.next_s(served_s)
            self._spawn(self._restart(instance, wait_s))
        as_asked = instance.disposable and peer is not None
        self.note(Event(what="stopped" if as_asked else "lost", instance=instance.id, text=reason, numbers=numbers))
        if instance.answer is not None and not instance.answer.done():
            instance.answer.set_exception(InstanceError(reason))
        if self._observer is not None:
            if not restarts:
                del self.instances[instance.id]
            if peer is not None:
                self._post.forget(peer.address)
                self.publish()
                self._observer.instance_lost(instance.id, suspected, as_asked=as_asked)
        self._notify()

    # ---- inside

    def publish(self) -> None:
        """The table as it is now, to everybody. Before `open` nobody gets one."""
        if self._observer is None:
            return
        self._version += 1
        serving = [instance for instance in self.instances.values() if instance.serves]
        table = Table(self._version, [_row(instance) for instance in serving])
        for instance in serving:
            self.send(instance.id, table)
        self._observer.handle(table)

    def _in(self, state: State) -> list[Instance]:
        return [instance for instance in self.instances.values() if instance.state is state]

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _raise_failures(self) -> None:
        for instance in self._in(State.DEAD):
            worker = instance.worker
            said = "" if worker is None else worker.failure or ""
            if worker is not None and worker.exit_code == EXIT_REFUSED:
                raise ConfigError(said)
            code = None if worker is None else worker.exit_code
            raise InstanceError(f"instance {instance.id} ended with {code} while starting\n{said}")


def _row(instance: Instance) -> Peer:
    assert instance.peer is not None, f"instance {instance.id} is {instance.state} and has no row"
    return msgspec.structs.replace(instance.peer, leaving=instance.state is State.LEAVING)
