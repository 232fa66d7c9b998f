"""The control plane as the server sees it: keeps the instances of a placement up and changes them on request."""

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from triptych.config import ControlConfig
from triptych.control.adaptive import Adaptive, Watched
from triptych.control.changes import Change, Changes
from triptych.control.events import Event
from triptych.control.fleet import Configure, Fleet, Observer
from triptych.control.instances import Cluster, Instance
from triptych.core import InstanceId, Placement, Role
from triptych.engine.sockets import Post
from triptych.errors import RequestError, shutting_down
from triptych.messages import Alive, AnyMessage, Ready, Switched, Unreachable
from triptych.planning.allocator import Decision

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0

Result = TypeVar("Result")


class Controller:
    """Lives on the event loop of the server process."""

    def __init__(
        self,
        cluster: Cluster,
        post: Post,
        configure: Configure,
        config: ControlConfig,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._fleet = Fleet(cluster, post, configure, start_timeout_s)
        self._changes = Changes(self._fleet, config.switch_timeout_s)
        self._adaptive: Adaptive | None = None
        self._under_way: set[asyncio.Task[Any]] = set()
        self.draining = False

    @property
    def instances(self) -> Mapping[InstanceId, Instance]:
        return self._fleet.instances

    @property
    def events(self) -> Iterable[Event]:
        """The newest ones of each sort, in order."""
        return self._fleet.events

    @property
    def decision(self) -> Decision | None:
        """The latest one about roles that follow the load."""
        return None if self._adaptive is None else self._adaptive.latest

    # ---- life cycle

    async def start(self, roles: Sequence[Role]) -> None:
        """Returns when every instance is active. Raises ConfigError or InstanceError with what a failed one said, as
        soon as one fails."""
        await self._fleet.start(roles)

    def open(self, frontend: Observer) -> None:
        """Publishes the first table to all instances and to the frontend, which hears of every change from now on.

        From now on instances that are lost are replaced. Raises what `start` raises if one has failed since then.
        """
        self._fleet.open(frontend)

    def adapt(self, frontend: Watched, max_num_seqs: int) -> None:
        """After `open`: roles follow the load from now on. `max_num_seqs`: that an instance decodes together."""
        self._adaptive = Adaptive(frontend, self, max_num_seqs=max_num_seqs)
        self._adaptive.start()

    async def drain(self) -> None:
        """The server is about to stop: roles stay as they are."""
        self.draining = True
        if self._adaptive is not None:
            await self._adaptive.stop()

    async def stop(self) -> None:
        """Asks every worker to end, and kills those that do not."""
        await self.drain()
        for task in self._under_way:
            task.cancel()
        await self._fleet.stop()

    # ---- messages

    def handle(self, message: Ready | Switched | Alive | Unreachable) -> None:
        try:
            match message:
                case Ready():
                    self._fleet.ready(message)
                case Alive():
                    self._fleet.watch.alive(message)
                case Unreachable():
                    self._fleet.watch.unreachable(message)
                case Switched():
                    self._changes.answered(message)
        except Exception:  # the boundary of a message: those that came with it are handled
            logger.exception("cannot take %s", type(message).__name__)

    def send(self, to: InstanceId, message: AnyMessage) -> None:
        """To an instance that is in the table; a message to one that is gone is dropped."""
        self._fleet.send(to, message)

    # ---- requests of operators

    async def switch_role(self, id: InstanceId, role: Role) -> dict[str, float]:
        """Seconds of each step; see `Changes.switch_role`."""
        return await self._to_the_end(self._changes.switch_role(id, role))

    async def place(self, placement: Placement) -> list[Change]:
        """What was done to which instance; see `Changes.place`."""
        return await self._to_the_end(self._changes.place(placement))

    def note(self, event: Event) -> None:
        """Into the log and `events`."""
        self._fleet.note(event)

    async def _to_the_end(self, change: Coroutine[Any, Any, Result]) -> Result:
        """A change that has begun goes on when whoever asked for it leaves. Raises RequestError(503) while the server
        stops."""
        if self.draining:
            change.close()
            raise shutting_down()
        task = asyncio.get_running_loop().create_task(change)
        self._under_way.add(task)
        task.add_done_callback(self._over)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise shutting_down() from None
            raise

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, RequestError):
            logger.error("a change failed", exc_info=error)
