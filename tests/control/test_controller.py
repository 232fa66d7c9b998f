"""The controller over workers that live and die by script: what it tells whom, and when it gives up."""

import asyncio
from collections.abc import Callable

import pytest

from triptych.config import InstanceConfig, MemoryConfig, ModelConfig, SchedulingConfig
from triptych.control.controller import Controller
from triptych.control.instances import State
from triptych.core import InstanceId, Role
from triptych.errors import ConfigError, InstanceError
from triptych.messages import AnyMessage, Peer, Ready, Shutdown, SlabDescription, Table


class ScriptedWorker:
    """A worker process that ends when it is told to, or when it is killed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.failure: str | None = None
        self.exit_code: int | None = None
        self.was_killed = False
        self._on_exit: Callable[[], None] = lambda: None
        self._ended = asyncio.Event()

    def watch(self, on_exit: Callable[[], None]) -> None:
        self._on_exit = on_exit

    def end(self, exit_code: int, failure: str | None = None) -> None:
        self.exit_code, self.failure = exit_code, failure
        self._ended.set()
        self._on_exit()

    def kill(self) -> None:
        self.was_killed = True
        self.end(-9)

    async def wait(self, seconds: float) -> bool:
        return self._ended.is_set()


class ScriptedCluster:
    def __init__(self) -> None:
        self.workers: dict[InstanceId, ScriptedWorker] = {}

    def start(self, config: InstanceConfig) -> ScriptedWorker:
        worker = self.workers[config.id] = ScriptedWorker(100 + len(self.workers))
        return worker


class RecordingPost:
    def __init__(self) -> None:
        self.sent: list[tuple[str, AnyMessage]] = []

    def send(self, address: str, message: AnyMessage) -> None:
        self.sent.append((address, message))

    def forget(self, address: str) -> None: ...


def config(instance: str, role: Role) -> InstanceConfig:
    return InstanceConfig(
        id=InstanceId(instance),
        role=role,
        epoch=f"epoch-{instance}",
        server_pid=1,
        inbox="",
        frontend="",
        threads=1,
        transfer="shm",
        model=ModelConfig(path="", name=""),
        memory=MemoryConfig(),
        scheduling=SchedulingConfig(),
    )


def ready(instance: str, role: Role, epoch: str | None = None) -> Ready:
    slab = SlabDescription({}, "host", "cpu", 0, {})
    peer = Peer(InstanceId(instance), role, epoch or f"epoch-{instance}", f"address-{instance}", slab)
    return Ready(peer, start_s=0.1)


class Scene:
    """A controller of `e0` and `pd0`, and everything around it."""

    def __init__(self) -> None:
        self.cluster, self.post = ScriptedCluster(), RecordingPost()
        self.controller = Controller(self.cluster, self.post)  # type: ignore[arg-type]
        self.tables: list[Table] = []
        self.lost: list[InstanceId] = []

    def handle(self, message: Table) -> None:
        self.tables.append(message)

    def instance_lost(self, instance: InstanceId) -> None:
        self.lost.append(instance)

    def begin(self, timeout_s: float = 5.0) -> asyncio.Task[None]:
        configs = [config("e0", Role.E), config("pd0", Role.PD)]
        return asyncio.ensure_future(self.controller.start(configs, timeout_s))

    async def until_started(self) -> None:
        while len(self.controller.instances) < 2:
            await asyncio.sleep(0)

    async def begun(self) -> None:
        starting = self.begin()
        await self.until_started()
        self.controller.ready(ready("e0", Role.E))
        self.controller.ready(ready("pd0", Role.PD))
        await starting
        self.controller.open(self)


def run(scenario: Callable[[Scene], object]) -> None:
    async def main() -> None:
        result = scenario(Scene())
        assert asyncio.iscoroutine(result)
        await result

    asyncio.run(main())


def test_the_table_is_published_to_all_once_every_instance_is_ready() -> None:
    async def scenario(scene: Scene) -> None:
        starting = scene.begin()
        await scene.until_started()
        scene.controller.ready(ready("e0", Role.E))
        await asyncio.sleep(0)
        assert not starting.done()
        scene.controller.ready(ready("pd0", Role.PD))
        await starting
        scene.controller.open(scene)
        assert [peer.id for peer in scene.tables[0].peers] == ["e0", "pd0"]
        assert [address for address, _ in scene.post.sent] == ["address-e0", "address-pd0"]

    run(scenario)


def test_a_child_that_fails_to_start_ends_the_server_with_its_traceback() -> None:
    async def scenario(scene: Scene) -> None:
        starting = scene.begin()
        await scene.until_started()
        scene.cluster.workers[InstanceId("pd0")].end(1, "Traceback: the weights are cursed")  # e0 is still loading
        with pytest.raises(InstanceError, match=r"pd0 ended with 1(.|\n)*the weights are cursed"):
            await starting

    run(scenario)


def test_a_child_that_refuses_its_configuration_is_the_users_fault() -> None:
    async def scenario(scene: Scene) -> None:
        starting = scene.begin()
        await scene.until_started()
        scene.cluster.workers[InstanceId("e0")].end(2, "dtype: no")
        with pytest.raises(ConfigError, match="dtype: no"):
            await starting

    run(scenario)


def test_a_start_that_takes_too_long_names_the_late_instance() -> None:
    async def scenario(scene: Scene) -> None:
        starting = scene.begin(timeout_s=0.05)
        await scene.until_started()
        scene.controller.ready(ready("e0", Role.E))
        with pytest.raises(InstanceError, match="pd0"):
            await starting

    run(scenario)


def test_a_ready_of_an_older_incarnation_is_ignored() -> None:
    async def scenario(scene: Scene) -> None:
        scene.begin().add_done_callback(lambda task: task.cancelled() or task.exception())
        await scene.until_started()
        scene.controller.ready(ready("e0", Role.E, epoch="older"))
        assert scene.controller.instances[InstanceId("e0")].state is State.STARTING
        await scene.controller.stop()

    run(scenario)


def test_a_lost_instance_leaves_the_table_and_the_others_are_told() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun()
        scene.post.sent.clear()
        scene.cluster.workers[InstanceId("e0")].end(-9)
        assert scene.lost == ["e0"]
        assert [peer.id for peer in scene.tables[-1].peers] == ["pd0"]
        assert scene.tables[-1].version > scene.tables[0].version
        assert [address for address, _ in scene.post.sent] == ["address-pd0"]

    run(scenario)


def test_stop_asks_first_and_kills_what_does_not_listen() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun()
        obedient, deaf = scene.cluster.workers[InstanceId("e0")], scene.cluster.workers[InstanceId("pd0")]
        obedient.end(0)
        await scene.controller.stop()
        assert ("address-pd0", Shutdown()) in scene.post.sent
        assert deaf.was_killed
        assert not obedient.was_killed

    run(scenario)
