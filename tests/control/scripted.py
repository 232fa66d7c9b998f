"""A controller over workers that live and die by script, and everything around it."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from tests.builders import make_config, make_peer
from triptych.config import ControlConfig, InstanceConfig
from triptych.control.controller import Controller
from triptych.control.instances import Instance, State
from triptych.core import InstanceId, Placement, RequestId, Role
from triptych.messages import Alive, AnyMessage, Peer, Ready, Switched, SwitchRole, Table

PATIENCE_S = 5.0

T = TypeVar("T")


class ScriptedWorker:
    """A worker process that ends when it is told to, or when it is killed."""

    def __init__(self, pid: int, config: InstanceConfig) -> None:
        self.pid = pid
        self.config = config
        self.failure: str | None = None
        self.exit_code: int | None = None
        self.was_killed = False
        self.survives_kill = False
        self._on_exit: Callable[[], None] = lambda: None
        self._ended = asyncio.Event()

    def watch(self, on_exit: Callable[[], None]) -> None:
        self._on_exit = on_exit
        if self.exit_code is not None:  # it was faster
            asyncio.get_running_loop().call_soon(on_exit)

    def end(self, exit_code: int, failure: str | None = None) -> None:
        self.exit_code, self.failure = exit_code, failure
        self._ended.set()
        self._on_exit()

    def kill(self) -> None:
        self.was_killed = True
        if not self.survives_kill and self.exit_code is None:
            self.end(-9)

    async def wait(self, seconds: float) -> bool:
        """Scripted time is short."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds / 50)
        return self._ended.is_set()


class ScriptedCluster:
    """`refusals` are raised, one by one, instead of starting a process. While `hangs`, nothing comes back."""

    def __init__(self) -> None:
        self.started: list[ScriptedWorker] = []
        self.refusals: list[Exception] = []
        self.hangs = False

    def start(self, config: InstanceConfig) -> ScriptedWorker:
        while self.hangs:
            time.sleep(0.001)
        if self.refusals:
            raise self.refusals.pop(0)
        self.started.append(ScriptedWorker(100 + len(self.started), config))
        return self.started[-1]


class RecordingPost:
    def __init__(self) -> None:
        self.sent: list[tuple[str, AnyMessage]] = []
        self.forgotten: list[str] = []

    def send(self, address: str, message: AnyMessage) -> None:
        self.sent.append((address, message))

    def forget(self, address: str) -> None:
        self.forgotten.append(address)


class Scene:
    """Instances i0, i1, ... in the roles of a placement. It is the frontend too: it hears of tables and losses."""

    def __init__(self, folder: Path, control: ControlConfig, start_timeout_s: float) -> None:
        self.folder = folder
        self.cluster, self.post = ScriptedCluster(), RecordingPost()
        self.controller = Controller(
            self.cluster,  # type: ignore[arg-type]
            self.post,  # type: ignore[arg-type]
            self.configure,
            control,
            start_timeout_s=start_timeout_s,
        )
        self.heard: list[Table | tuple[str, tuple[RequestId, ...]]] = []
        self.kv_room: dict[InstanceId, int] = {}
        self.shares: dict[str, list[Role]] = {}  # by epoch: among whom the host was shared out
        self.num_epochs = 0

    def configure(self, id: InstanceId, slot: int, role: Role, roles: Sequence[Role]) -> InstanceConfig:
        epoch = f"epoch{self.num_epochs}"
        self.num_epochs += 1
        self.shares[epoch] = list(roles)
        path = self.folder / f"{id}-{epoch}"
        return replace(
            make_config(id, role), epoch=epoch, inbox=f"ipc://{path}", black_box=f"{path}.box", threads=len(roles)
        )

    # ---- the frontend

    def handle(self, message: Table) -> None:
        self.heard.append(message)

    def instance_lost(
        self, instance: InstanceId, suspects: Collection[RequestId] = (), *, as_asked: bool = False
    ) -> None:
        self.heard.append((instance, tuple(suspects)))

    def room(self) -> dict[InstanceId, int]:
        return self.kv_room

    @property
    def tables(self) -> list[Table]:
        return [message for message in self.heard if isinstance(message, Table)]

    @property
    def table(self) -> dict[str, str]:
        """The newest: id -> role, with a star where it leaves."""
        return {peer.id: f"{peer.role}{'*' * peer.leaving}" for peer in self.tables[-1].peers}

    @property
    def lost(self) -> list[str]:
        return [message[0] for message in self.heard if not isinstance(message, Table)]

    # ---- the instances

    def instance(self, id: str) -> Instance:
        return self.controller.instances[InstanceId(id)]

    def worker(self, id: str) -> ScriptedWorker:
        """The newest process of an instance."""
        return next(worker for worker in reversed(self.cluster.started) if worker.config.id == id)

    def num_processes(self, id: str) -> int:
        return sum(worker.config.id == id for worker in self.cluster.started)

    def peer(self, id: str, role: Role | None = None) -> Peer:
        config = self.worker(id).config
        return replace(make_peer(id, role or config.role, config.epoch), address=config.inbox)

    def ready(self, id: str) -> None:
        self.controller.handle(Ready(self.peer(id), start_s=0.1))

    def alive(self, *ids: str) -> None:
        for id in ids:
            self.controller.handle(Alive(InstanceId(id), self.worker(id).config.epoch, 0.0))

    def orders(self, id: str | None = None) -> list[SwitchRole]:
        """What was ordered from an instance, or from anybody."""
        inbox = None if id is None else self.worker(id).config.inbox
        return [m for address, m in self.post.sent if isinstance(m, SwitchRole) and inbox in (None, address)]

    def carry_out(self, id: str, error: str | None = None) -> None:
        """The newest order, or its failure."""
        order = self.orders(id)[-1]
        assert order.config is not None
        role = self.instance(id).role if error is not None else order.config.role
        peer = self.peer(id, role)
        self.controller.handle(Switched(InstanceId(id), order.order, peer, {"drain": 0.5, "weights": 0.25}, error))

    # ---- the script

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.001)

    async def begin(self, placement: str) -> "asyncio.Task[None]":
        roles = Placement.parse(placement).roles
        starting = asyncio.ensure_future(self.controller.start(roles))
        await self.until(lambda: len(self.cluster.started) == len(roles))
        return starting

    async def begun(self, placement: str) -> None:
        """A server of that placement is open."""
        starting = await self.begin(placement)
        for worker in self.cluster.started:
            self.ready(worker.config.id)
        await starting
        self.controller.open(self)

    async def restarted(self, id: str, num_processes: int = 2) -> None:
        """It has been started again, and is ready."""
        await self.until(lambda: self.num_processes(id) == num_processes)
        await self.until(lambda: self.instance(id).worker is self.worker(id))
        self.ready(id)
        assert self.instance(id).state is State.ACTIVE

    async def ordered(self, id: str, number: int = 1) -> SwitchRole:
        """Once it was told that many times."""
        await self.until(lambda: len(self.orders(id)) >= number)
        return self.orders(id)[-1]


def run(
    folder: Path,
    scenario: Callable[[Scene], Awaitable[None]],
    *,
    start_timeout_s: float = PATIENCE_S,
    **control: float,
) -> None:
    """Plays it on an event loop of its own, which must not be told of any error that nobody looked at."""
    unseen: list[object] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
        scene = Scene(folder, ControlConfig(**control), start_timeout_s)
        try:
            await scenario(scene)
        finally:
            await scene.controller.stop()

    asyncio.run(main())
    assert unseen == []
