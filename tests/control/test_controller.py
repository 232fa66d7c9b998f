"""Instances that start, die, hang and come back: what the controller tells whom, and when it gives up."""

import asyncio
from pathlib import Path

import pytest

from tests.builders import make_peer
from tests.control.scripted import Scene, run
from triptych.control import fleet, watch
from triptych.control.instances import Instance, State
from triptych.control.liveness import LOADING_SILENT_TICKS, SILENT_TICKS
from triptych.core import InstanceId, Role
from triptych.engine.black_box import BlackBox
from triptych.errors import ConfigError, InstanceError
from triptych.messages import Alive, Ready, Shutdown, Switched, Unreachable

TICK_S = 0.005


@pytest.fixture
def _fast_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TICK_S", TICK_S)


@pytest.fixture
def _ends_show_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "END_SHOWS_S", TICK_S)


# ---- start and stop


def test_the_table_is_published_to_all_once_every_instance_is_ready(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        starting = await scene.begin("1e1pd")
        scene.ready("i0")
        await asyncio.sleep(0)
        assert not starting.done()
        scene.ready("i1")
        await starting
        assert scene.heard == []
        scene.controller.open(scene)
        assert scene.table == {"i0": "e", "i1": "pd"}
        assert [address for address, _ in scene.post.sent] == [scene.worker(id).config.inbox for id in ("i0", "i1")]

    run(tmp_path, scenario)


def test_a_child_that_fails_to_start_ends_the_server_with_its_traceback(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        starting = await scene.begin("1e1pd")
        scene.worker("i1").end(1, "Traceback: the weights are cursed")  # i0 is still loading
        with pytest.raises(InstanceError, match=r"i1 ended with 1(.|\n)*the weights are cursed"):
            await starting
        assert scene.num_processes("i1") == 1

    run(tmp_path, scenario)


def test_a_child_that_refuses_its_configuration_is_the_users_fault(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        starting = await scene.begin("1e1pd")
        scene.worker("i0").end(2, "dtype: no")
        with pytest.raises(ConfigError, match="dtype: no"):
            await starting

    run(tmp_path, scenario)


def test_a_child_that_dies_before_the_first_table_ends_the_server_too(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        starting = await scene.begin("1epd")
        scene.ready("i0")
        await starting
        scene.worker("i0").end(-9)
        with pytest.raises(InstanceError, match="i0 ended with -9"):
            scene.controller.open(scene)
        assert scene.heard == []

    run(tmp_path, scenario)


def test_a_start_that_takes_too_long_names_the_late_instance(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        starting = await scene.begin("1e1pd")
        scene.ready("i0")
        with pytest.raises(InstanceError, match=r"not ready after 0\.05 s: i1$"):
            await starting

    run(tmp_path, scenario, start_timeout_s=0.05)


def test_stop_asks_first_and_kills_what_does_not_listen(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        obedient, deaf = scene.worker("i0"), scene.worker("i1")
        stopping = asyncio.ensure_future(scene.controller.stop())
        await scene.until(lambda: (deaf.config.inbox, Shutdown()) in scene.post.sent)
        obedient.end(0)
        await stopping
        assert deaf.was_killed
        assert not obedient.was_killed
        assert scene.lost == []

    run(tmp_path, scenario)


def test_a_stopping_server_starts_nobody_again(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        scene.worker("i0").end(-9)  # its restart is due at once
        await scene.controller.stop()
        await asyncio.sleep(0.01)
        assert len(scene.cluster.started) == 2

    run(tmp_path, scenario)


# ---- losses


def test_a_lost_instance_leaves_the_table_before_the_frontend_is_told_of_its_loss(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        scene.post.sent.clear()
        inbox = scene.worker("i0").config.inbox
        scene.worker("i0").end(-9)
        assert scene.table == {"i1": "pd"}
        assert scene.heard[-2:] == [scene.tables[-1], ("i0", ())]
        assert [address for address, _ in scene.post.sent] == [scene.worker("i1").config.inbox]
        assert scene.post.forgotten == [inbox]

    run(tmp_path, scenario)


def test_a_lost_instance_comes_back_as_another_incarnation_under_the_same_name(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        first = scene.worker("i1")
        first.end(-9)
        assert scene.instance("i1").state is State.RESTARTING
        await scene.restarted("i1")
        second = scene.worker("i1").config
        assert scene.table == {"i0": "e", "i1": "pd"}
        assert (second.role, second.id) == (first.config.role, first.config.id)
        assert second.epoch != first.config.epoch
        assert second.inbox != first.config.inbox
        assert second.black_box != first.config.black_box
        assert scene.instance("i1").num_restarts == 1
        assert scene.instance("i1").last_failure == "killed by SIGKILL"
        assert [event.what for event in scene.controller.events] == ["started", "started", "lost", "restarted"]

    run(tmp_path, scenario)


def test_the_requests_of_the_step_in_which_it_died_are_suspects(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        config = scene.worker("i1").config
        assert config.black_box is not None
        BlackBox(config.black_box).record(["r1.1", "r2.1"])  # type: ignore[list-item]
        Path(config.inbox.removeprefix("ipc://")).touch()
        scene.worker("i1").end(-11)
        assert scene.heard[-1] == ("i1", ("r1.1", "r2.1"))
        assert list(tmp_path.iterdir()) == [], "files of the dead incarnation"

    run(tmp_path, scenario)


def test_an_instance_that_keeps_failing_is_tried_again_ever_later(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        scene.worker("i1").end(2, "kv_cache_bytes: no memory now")  # also what would be refused at the first start
        await scene.until(lambda: scene.num_processes("i1") == 2)
        await scene.until(lambda: scene.instance("i1").worker is not None)
        scene.worker("i1").end(1, "Traceback\n  somewhere\nMemoryError")
        assert scene.instance("i1").last_failure == "exit code 1: MemoryError"
        lost = [event for event in scene.controller.events if event.what == "lost"]
        assert [event.numbers["restart_in_s"] for event in lost] == [0.0, 0.5]
        assert scene.lost == ["i1"], "the second time nobody knew of it"
        await scene.restarted("i1", 3)
        assert scene.table == {"i0": "e", "i1": "pd"}
        assert scene.instance("i1").num_restarts == 2

    run(tmp_path, scenario)


@pytest.mark.parametrize("error", [OSError("no more processes"), RuntimeError("can't start new thread")], ids=repr)
def test_a_host_that_can_make_no_process_now_is_asked_again(tmp_path: Path, error: Exception) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        scene.cluster.refusals = [error]
        scene.worker("i1").end(-9)
        await scene.restarted("i1")
        assert scene.instance("i1").last_failure == f"cannot start a process: {type(error).__name__}: {error}"

    run(tmp_path, scenario)


def test_a_host_that_hangs_while_it_makes_a_process_is_asked_again(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        scene.cluster.hangs = True
        scene.worker("i1").end(-9)
        await scene.until(lambda: scene.instance("i1").state is State.STARTING)
        await scene.until(lambda: scene.instance("i1").state is State.RESTARTING)
        assert scene.instance("i1").last_failure == "cannot start a process: InstanceError: no process after 0.05 s"
        scene.cluster.hangs = False
        await scene.until(lambda: scene.num_processes("i1") == 2)
        late = scene.worker("i1")
        await scene.until(lambda: late.was_killed)
        await scene.restarted("i1", 3)

    run(tmp_path, scenario, start_timeout_s=0.05)


def test_a_server_stops_while_a_process_is_being_made_that_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "STOP_GRACE_S", 0.05)

    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        scene.cluster.hangs = True
        scene.worker("i1").end(-9)
        await scene.until(lambda: scene.instance("i1").state is State.STARTING)
        async with asyncio.timeout(1):
            await scene.controller.stop()
        scene.cluster.hangs = False
        await scene.until(lambda: scene.num_processes("i1") == 2)
        late = scene.worker("i1")
        await scene.until(lambda: late.was_killed)

    run(tmp_path, scenario)


@pytest.mark.usefixtures("_fast_ticks")
def test_a_restart_that_takes_too_long_is_killed_and_tried_again(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        living = asyncio.ensure_future(keep_alive(scene, "i0"))
        scene.worker("i1").end(-9)
        await scene.until(lambda: scene.num_processes("i1") == 2)
        slow = scene.worker("i1")
        await scene.restarted("i1", 3)
        assert slow.was_killed
        assert scene.instance("i1").last_failure == "not ready after 0.1 s"
        living.cancel()

    run(tmp_path, scenario, start_timeout_s=0.1)


# ---- hangs


async def keep_alive(scene: Scene, *ids: str) -> None:
    while True:
        scene.alive(*ids)
        await asyncio.sleep(0.001)


@pytest.mark.usefixtures("_fast_ticks")
def test_an_instance_that_falls_silent_is_killed_and_replaced(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        living = asyncio.ensure_future(keep_alive(scene, "i0"))
        hung = scene.worker("i1")
        await scene.until(lambda: hung.was_killed)
        assert scene.lost == ["i1"]
        assert scene.instance("i1").last_failure == f"no sign of life for {SILENT_TICKS * 0.25:g} s"
        await scene.restarted("i1")
        assert not scene.worker("i0").was_killed
        living.cancel()

    run(tmp_path, scenario)


@pytest.mark.usefixtures("_fast_ticks")
def test_an_instance_that_is_loading_is_not_expected_to_say_anything(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        living = asyncio.ensure_future(keep_alive(scene, "i0"))
        scene.worker("i1").end(-9)
        await scene.until(lambda: scene.num_processes("i1") == 2)
        await asyncio.sleep(TICK_S * SILENT_TICKS * 4)
        assert not scene.worker("i1").was_killed
        living.cancel()

    run(tmp_path, scenario)


@pytest.mark.usefixtures("_fast_ticks")
def test_an_instance_that_falls_silent_while_it_loads_is_killed_long_before_the_start_is_given_up(
    tmp_path: Path,
) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1pd")
        living = asyncio.ensure_future(keep_alive(scene, "i0"))
        stale = Alive(InstanceId("i1"), scene.worker("i1").config.epoch, 0.0)
        scene.worker("i1").end(-9)
        await scene.until(lambda: scene.num_processes("i1") == 2)
        await scene.until(lambda: scene.instance("i1").worker is not None)
        hung = scene.worker("i1")
        scene.controller.handle(stale)
        scene.alive("i1")
        await scene.until(lambda: hung.was_killed)
        assert scene.instance("i1").last_failure == f"no sign of life for {LOADING_SILENT_TICKS * 0.25:g} s"
        await scene.restarted("i1", 3)
        living.cancel()

    run(tmp_path, scenario)


@pytest.mark.usefixtures("_fast_ticks")
def test_a_process_that_even_a_kill_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "KILL_GRACE_S", 0.02)

    async def scenario(scene: Scene) -> None:
        await scene.begun("1epd")
        undead = scene.worker("i0")
        undead.survives_kill = True
        await scene.restarted("i0")
        undead.end(-9)  # at last; the new one has nothing to do with that
        assert scene.instance("i0").state is State.ACTIVE
        assert scene.lost == ["i0"]

    run(tmp_path, scenario)


@pytest.mark.usefixtures("_ends_show_soon")
def test_an_instance_that_nobody_can_read_from_is_killed(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1p2d")
        epoch = scene.worker("i1").config.epoch
        scene.controller.handle(Unreachable(InstanceId("i2"), InstanceId("i1"), epoch, "timed out"))
        await asyncio.sleep(4 * TICK_S)
        assert scene.lost == []
        scene.controller.handle(Unreachable(InstanceId("i3"), InstanceId("i1"), epoch, "timed out"))
        await scene.until(lambda: scene.lost)
        assert scene.lost == ["i1"]
        assert scene.instance("i1").last_failure == "i3 cannot read from i1: timed out"
        for _ in range(2):  # about the incarnation that is gone already
            scene.controller.handle(Unreachable(InstanceId("i3"), InstanceId("i1"), epoch, "timed out"))
        await asyncio.sleep(4 * TICK_S)
        assert scene.lost == ["i1"]

    run(tmp_path, scenario)


@pytest.mark.usefixtures("_ends_show_soon")
def test_nobody_is_to_blame_for_a_pull_that_the_end_of_its_holder_broke(tmp_path: Path) -> None:
    """The reader may hear of it first; that it was struck before must not cost it its life."""

    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        for holder in ("i1", "i2"):
            epoch = scene.worker(holder).config.epoch
            scene.controller.handle(Unreachable(InstanceId("i3"), InstanceId(holder), epoch, "disconnected"))
            scene.worker(holder).end(-9)
        await asyncio.sleep(4 * TICK_S)
        assert scene.lost == ["i1", "i2"]
        assert not scene.worker("i3").was_killed

    run(tmp_path, scenario)


@pytest.mark.usefixtures("_ends_show_soon")
def test_a_holder_is_not_to_blame_for_readers_that_end(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1p2d")
        epoch = scene.worker("i1").config.epoch
        for reader in ("i2", "i3"):
            scene.controller.handle(Unreachable(InstanceId(reader), InstanceId("i1"), epoch, "disconnected"))
            scene.worker(reader).end(-9)
        await asyncio.sleep(4 * TICK_S)
        assert scene.lost == ["i2", "i3"]
        assert not scene.worker("i1").was_killed

    run(tmp_path, scenario)


@pytest.mark.usefixtures("_ends_show_soon")
def test_what_an_instance_was_working_on_is_not_suspected_of_its_broken_transport(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1p2d")
        config = scene.worker("i1").config
        assert config.black_box is not None
        BlackBox(config.black_box).record(["r1.1"])  # type: ignore[list-item]
        for reader in ("i2", "i3"):
            complaint = Unreachable(InstanceId(reader), InstanceId("i1"), config.epoch, "timed out")
            scene.controller.handle(complaint)
        await scene.until(lambda: scene.lost)
        assert scene.heard[-1] == ("i1", ())

    run(tmp_path, scenario)


@pytest.mark.usefixtures("_ends_show_soon")
def test_complaints_about_one_that_is_being_killed_do_not_count_against_who_makes_them(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1p2d")
        config = scene.worker("i1").config
        scene.worker("i1").survives_kill = True  # it takes its time
        complaint = Unreachable(InstanceId("i2"), InstanceId("i1"), config.epoch, "timed out")
        for _ in range(6):
            scene.controller.handle(complaint)
        await scene.until(lambda: scene.worker("i1").was_killed)
        await asyncio.sleep(4 * TICK_S)
        assert not scene.worker("i2").was_killed

    run(tmp_path, scenario)


# ---- messages that should not be there


def test_messages_of_older_incarnations_and_of_strangers_change_nothing(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        starting = await scene.begin("1e1pd")
        scene.controller.handle(Ready(make_peer("i0", "e", "older"), 0.1))
        assert scene.instance("i0").state is State.STARTING
        for id in ("i0", "i1", "i1"):
            scene.ready(id)
        await starting
        scene.controller.open(scene)
        before = list(scene.heard)
        stranger = InstanceId("i9")
        scene.ready("i1")
        scene.controller.handle(Ready(make_peer("i9", "e"), 0.1))
        scene.controller.handle(Alive(stranger, "1", 1e9))
        scene.controller.handle(Alive(InstanceId("i0"), "older", 1e9))
        scene.controller.handle(Unreachable(stranger, stranger, "1", ""))
        scene.controller.handle(Unreachable(stranger, InstanceId("i0"), scene.worker("i0").config.epoch, ""))
        scene.controller.handle(Switched(stranger, 1, make_peer("i9"), {}))
        scene.controller.handle(Switched(InstanceId("i0"), 7, make_peer("i0", "d"), {}))
        assert scene.heard == before
        assert scene.instance("i0").role is Role.E

    run(tmp_path, scenario)


def test_a_record_refuses_a_step_that_makes_no_sense() -> None:
    instance = Instance(InstanceId("i0"), 0, Role.E)
    with pytest.raises(AssertionError, match="i0 is starting, it cannot become leaving"):
        instance.move_to(State.LEAVING)
