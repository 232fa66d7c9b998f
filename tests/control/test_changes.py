"""Role switches and placements on request: who is told what, in which order, and what happens when they fail."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.control.scripted import Scene, run
from triptych.control import changes
from triptych.control.changes import Change
from triptych.control.instances import State
from triptych.core import InstanceId, Placement, Role
from triptych.errors import RequestError
from triptych.messages import Table


def switching(scene: Scene, id: str, role: Role) -> "asyncio.Task[dict[str, float]]":
    return asyncio.ensure_future(scene.controller.switch_role(InstanceId(id), role))


def placing(scene: Scene, placement: str) -> "asyncio.Task[list[Change]]":
    return asyncio.ensure_future(scene.controller.place(Placement.parse(placement)))


def serving(table: Table) -> dict[str, str]:
    """Who takes work."""
    return {peer.id: peer.role.value for peer in table.peers if not peer.leaving}


# ---- one instance


def test_a_switch_takes_the_new_work_away_before_it_orders_and_gives_it_back_when_it_is_done(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.kv_room = {InstanceId("i1"): 9, InstanceId("i2"): 7, InstanceId("i3"): 5}
        await scene.begun("1e2p1d")
        scene.post.sent.clear()
        task = switching(scene, "i1", Role.D)
        order = await scene.ordered("i1")
        assert scene.table == {"i0": "e", "i1": "p*", "i2": "p", "i3": "d"}
        mine = [m for address, m in scene.post.sent if address == scene.worker("i1").config.inbox]
        assert mine == [scene.tables[-1], order], "it hears first that it leaves, as everybody does"
        assert order.room == {"i2": 7, "i3": 5}, "where others could take over what it runs"
        scene.carry_out("i1")
        steps_s = await task
        assert steps_s.keys() == {"drain", "weights", "total"}
        assert scene.table == {"i0": "e", "i1": "d", "i2": "p", "i3": "d"}
        assert scene.instance("i1").role is Role.D
        assert scene.lost == []
        assert list(scene.controller.events)[-1].what == "switched"

    run(tmp_path, scenario)


def test_a_switch_keeps_the_incarnation_and_shares_the_host_out_anew(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        had = scene.worker("i1").config
        task = switching(scene, "i1", Role.E)
        order = await scene.ordered("i1")
        assert order.config is not None
        assert (order.config.epoch, order.config.inbox, order.config.black_box) == (had.epoch, had.inbox, had.black_box)
        assert order.config.role is Role.E
        assert list(scene.shares.values())[-1] == [Role.E, Role.E, Role.P, Role.D]
        scene.carry_out("i1")
        await task

    run(tmp_path, scenario)


def test_a_switched_instance_that_dies_comes_back_in_its_new_role(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        task = switching(scene, "i1", Role.D)
        await scene.ordered("i1")
        scene.carry_out("i1")
        await task
        scene.worker("i1").end(-9)
        await scene.restarted("i1")
        assert scene.table["i1"] == "d"

    run(tmp_path, scenario)


def test_a_role_that_it_has_needs_no_order(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1p1d")
        assert await switching(scene, "i1", Role.P) == {}
        assert scene.orders() == []

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("placement", "id", "role", "status", "said"),
    [
        ("1e1p1d", "i7", Role.P, 404, "there is no instance 'i7'; there are i0, i1, i2"),
        ("1e1p1d", "i1", Role.D, 400, "role: with i1 as d no instance would serve prefill"),
        ("1e1pd", "i1", Role.E, 400, "no instance would serve prefill or decode"),
    ],
)
def test_what_cannot_be_is_refused_and_nobody_is_touched(
    tmp_path: Path, placement: str, id: str, role: Role, status: int, said: str
) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun(placement)
        with pytest.raises(RequestError, match=said) as refused:
            await switching(scene, id, role)
        assert refused.value.status == status
        assert len(scene.tables) == 1

    run(tmp_path, scenario)


def test_a_stage_may_be_unserved_while_the_switch_lasts_if_it_is_served_after_it(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1epd")
        task = switching(scene, "i1", Role.PD)
        await scene.ordered("i1")
        assert serving(scene.tables[-1]) == {"i0": "e"}
        scene.carry_out("i1")
        await task
        assert scene.table == {"i0": "e", "i1": "pd"}

    run(tmp_path, scenario)


def test_an_instance_that_is_being_restarted_cannot_be_switched_yet(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        scene.worker("i1").end(-9)
        with pytest.raises(RequestError, match=r"i1 is \w+, only an active one") as refused:
            await switching(scene, "i1", Role.D)
        assert refused.value.status == 409
        assert refused.value.retry_after_s

    run(tmp_path, scenario)


def test_two_changes_never_overlap(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e3p1d")
        first, second = switching(scene, "i1", Role.D), switching(scene, "i2", Role.D)
        await scene.ordered("i1")
        third = switching(scene, "i3", Role.D)
        await asyncio.sleep(0.01)
        assert scene.orders("i2") == []
        scene.carry_out("i1")
        await scene.ordered("i2")
        scene.carry_out("i2")
        await asyncio.gather(first, second)
        with pytest.raises(RequestError, match="no instance would serve prefill"):  # judged by what is there by then
            await third

    run(tmp_path, scenario)


def test_a_change_goes_on_when_whoever_asked_for_it_leaves(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        task = switching(scene, "i1", Role.D)
        await scene.ordered("i1")
        task.cancel()
        scene.carry_out("i1")
        await scene.until(lambda: scene.instance("i1").state is State.ACTIVE)
        assert scene.table["i1"] == "d"

    run(tmp_path, scenario)


# ---- what fails


def test_a_role_that_cannot_be_taken_leaves_the_old_one_and_tells_why(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        task = switching(scene, "i1", Role.D)
        await scene.ordered("i1")
        scene.carry_out("i1", error="ConfigError: no memory")
        with pytest.raises(RequestError, match="i1 could not become d and stays p: ConfigError: no memory") as failed:
            await task
        assert failed.value.status == 500
        assert scene.table == {"i0": "e", "i1": "p", "i2": "p", "i3": "d"}
        record = scene.instance("i1").switch
        assert record is not None
        assert record.is_over
        assert "no memory" in (record.error or "")

    run(tmp_path, scenario)


def test_an_instance_that_dies_while_it_switches_comes_back_in_its_old_role(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        task = switching(scene, "i1", Role.D)
        await scene.ordered("i1")
        scene.worker("i1").end(-9)
        with pytest.raises(RequestError, match=r"i1 was lost meanwhile .* as p: killed by SIGKILL") as failed:
            await task
        assert failed.value.status == 500
        assert scene.lost == ["i1"]
        await scene.restarted("i1")
        assert scene.table["i1"] == "p"

    run(tmp_path, scenario)


def test_an_instance_that_cannot_finish_in_time_is_told_to_stay(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        task = switching(scene, "i1", Role.D)
        order = await scene.ordered("i1", 2)
        assert order.config == scene.worker("i1").config
        assert order.order > scene.orders("i1")[0].order
        scene.carry_out("i1")
        with pytest.raises(RequestError, match=r"i1 did not finish its work in 0\.05 s and stays p") as failed:
            await task
        assert (failed.value.status, failed.value.retry_after_s) == (503, 0.05)
        assert scene.table["i1"] == "p"
        assert scene.lost == []

    run(tmp_path, scenario, switch_timeout_s=0.05)


def test_an_instance_that_does_not_even_stay_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "STAY_TIMEOUT_S", 0.05)

    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        deaf = scene.worker("i1")
        task = switching(scene, "i1", Role.D)
        with pytest.raises(RequestError, match=r"i1 was lost meanwhile .* as p: no answer to an order"):
            await task
        assert deaf.was_killed
        await scene.restarted("i1")
        assert scene.table["i1"] == "p"

    run(tmp_path, scenario, switch_timeout_s=0.05)


def test_an_instance_that_dies_right_after_its_answer_comes_back_in_its_old_role(tmp_path: Path) -> None:
    """Both are heard of in the same turn of the loop."""

    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        task = switching(scene, "i1", Role.D)
        await scene.ordered("i1")
        scene.carry_out("i1")
        scene.worker("i1").end(-9)
        with pytest.raises(RequestError, match=r"i1 was lost meanwhile .* as p: killed by SIGKILL") as failed:
            await task
        assert (failed.value.status, failed.value.code) == (500, "instance_lost")
        assert scene.instance("i1").peer is None
        await scene.restarted("i1")
        assert scene.worker("i1").config.role is Role.P
        assert scene.table["i1"] == "p"

    run(tmp_path, scenario)


@pytest.mark.parametrize("to_end", [False, True])
def test_an_instance_that_dies_as_it_runs_out_of_time_is_not_asked_to_stay(tmp_path: Path, to_end: bool) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        task = placing(scene, "1e1p1d") if to_end else switching(scene, "i2", Role.D)
        await scene.ordered("i2")
        asyncio.get_running_loop().call_later(0.05, scene.worker("i2").end, -9)  # due behind the timeout ...
        time.sleep(0.07)  # ... and in the same turn
        async with asyncio.timeout(1):
            if to_end:
                await task
                assert list(scene.controller.instances) == ["i0", "i1", "i3"]
                return
            with pytest.raises(RequestError, match=r"i2 was lost meanwhile .* as p: killed by SIGKILL"):
                await task
        await scene.restarted("i2")
        assert len(scene.orders()) == 1

    run(tmp_path, scenario, switch_timeout_s=0.05)


def test_an_answer_to_an_order_that_was_replaced_is_no_answer(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        task = switching(scene, "i1", Role.D)
        await scene.ordered("i1")
        late = list(scene.post.sent)
        await scene.ordered("i1", 2)
        scene.post.sent = late  # it carried out the first one after all, before it read the second
        scene.carry_out("i1")
        assert scene.instance("i1").state is State.LEAVING
        scene.worker("i1").end(-9)
        with pytest.raises(RequestError):
            await task

    run(tmp_path, scenario, switch_timeout_s=0.05)


def test_a_server_that_stops_refuses_changes_and_ends_those_under_way(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        task = switching(scene, "i1", Role.D)
        await scene.ordered("i1")
        await scene.controller.drain()
        with pytest.raises(RequestError, match="shutting down") as refused:
            await scene.controller.place(Placement.parse("1epd"))
        assert refused.value.status == 503
        await scene.controller.stop()
        with pytest.raises(RequestError, match="shutting down"):
            await task

    run(tmp_path, scenario)


# ---- placements


async def obey(scene: Scene) -> None:
    """Every instance does what it is told, and every new process becomes ready."""
    answered = 0
    while True:
        for instance in list(scene.controller.instances.values()):
            if instance.state is State.STARTING and instance.worker is not None:
                scene.ready(instance.id)
        orders = scene.orders()
        for order in orders[answered:]:
            id = next(i.id for i in scene.controller.instances.values() if i.order == order.order)
            if order.config is None:
                scene.worker(id).end(0)
            else:
                scene.carry_out(id)
        answered = len(orders)
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1e1p1d", "2e1p1d"),
        ("1e1p1d", "1epd"),
        ("1epd", "1e1p1d"),
        ("3e1p1d", "1e2p2d"),
        ("2e2p2d", "1e1pd"),
        ("1e1pd", "1ed1p"),
        ("1e1p1d", "1e1p1d"),
    ],
)
def test_a_placement_is_reached_with_every_stage_served_all_the_time(tmp_path: Path, before: str, after: str) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun(before)
        obeying = asyncio.ensure_future(obey(scene))
        changes = await placing(scene, after)
        obeying.cancel()
        assert sorted(serving(scene.tables[-1]).values()) == sorted(Placement.parse(after).roles)
        for table in scene.tables:
            stages = "".join(serving(table).values())
            assert set("epd") <= set(stages), f"only {stages} served in version {table.version}"
        assert len(scene.controller.instances) == len(Placement.parse(after).roles)
        assert all(change.steps_s["total"] >= 0 for change in changes)

    run(tmp_path, scenario)


def test_new_instances_get_new_names_and_the_lowest_free_slot(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("2e1p1d")
        obeying = asyncio.ensure_future(obey(scene))
        await placing(scene, "1e1p1d")
        assert list(scene.controller.instances) == ["i0", "i2", "i3"]
        (change,) = await placing(scene, "1e1p2d")
        obeying.cancel()
        assert (change.instance, change.before, change.after) == ("i4", None, Role.D)
        assert scene.instance("i4").slot == 1

    run(tmp_path, scenario)


def test_an_instance_that_is_stopped_is_not_started_again(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("2e1pd")
        obeying = asyncio.ensure_future(obey(scene))
        (change,) = await placing(scene, "1e1pd")
        await asyncio.sleep(0.02)
        obeying.cancel()
        assert (change.instance, change.before, change.after) == ("i1", Role.E, None)
        assert len(scene.cluster.started) == 3
        assert list(scene.controller.events)[-1].what == "stopped"

    run(tmp_path, scenario)


def test_a_new_instance_that_does_not_start_is_told_and_forgotten(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1p1d")
        task = placing(scene, "2e1p1d")
        await scene.until(lambda: scene.num_processes("i3"))
        await scene.until(lambda: scene.instance("i3").worker is not None)
        scene.worker("i3").end(2, "kv_cache_bytes: too little")
        with pytest.raises(
            RequestError, match=r"for e did not start: exit code 2: kv_cache_bytes: too little"
        ) as failed:
            await task
        assert failed.value.status == 500
        assert list(scene.controller.instances) == ["i0", "i1", "i2"]
        assert scene.lost == []

    run(tmp_path, scenario)


def test_a_placement_that_fails_half_way_tells_what_was_done(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        task = placing(scene, "2e1p2d")
        await scene.until(lambda: scene.num_processes("i4"))
        await scene.until(lambda: scene.instance("i4").worker is not None)
        scene.ready("i4")
        await scene.ordered("i2")
        scene.carry_out("i2", error="no")
        with pytest.raises(RequestError, match=r"stays p: no \(done before that: i4 new -> e\)"):
            await task

    run(tmp_path, scenario)


def test_a_placement_waits_for_instances_that_are_being_restarted(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        scene.worker("i3").end(-9)
        task = placing(scene, "1e1p2d")
        await scene.restarted("i3")
        await scene.ordered("i2")
        scene.carry_out("i2")
        await task
        assert scene.table == {"i0": "e", "i1": "p", "i2": "d", "i3": "d"}

    run(tmp_path, scenario)


@pytest.mark.parametrize("moment", ["waiting", "being launched", "loading"])
def test_an_instance_that_keeps_failing_and_is_not_wanted_is_given_up(tmp_path: Path, moment: str) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1p2d")
        scene.worker("i3").end(-9)
        if moment == "being launched":
            await scene.until(lambda: scene.instance("i3").state is State.STARTING)
        if moment == "loading":
            await scene.until(lambda: scene.instance("i3").worker is not None)
        (change,) = await placing(scene, "1e1p1d")
        assert (change.instance, change.after) == ("i3", None)
        await asyncio.sleep(0.02)
        assert list(scene.controller.instances) == ["i0", "i1", "i2"]
        assert all(worker.exit_code == -9 for worker in scene.cluster.started if worker.config.id == "i3")
        assert scene.table == {"i0": "e", "i1": "p", "i2": "d"}

    run(tmp_path, scenario)


def test_a_placement_can_replace_a_stage_that_fails(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e1p1d")
        scene.worker("i2").end(-9)
        task = placing(scene, "1e1pd")
        await scene.until(lambda: scene.num_processes("i3"))
        await scene.until(lambda: scene.instance("i3").worker is not None)
        scene.ready("i3")
        await scene.ordered("i1")
        scene.worker("i1").end(0)
        done = await task
        assert [(c.instance, c.before, c.after) for c in done] == [
            ("i2", Role.D, None),
            ("i3", None, Role.PD),
            ("i1", Role.P, None),
        ]
        assert scene.table == {"i0": "e", "i3": "pd"}

    run(tmp_path, scenario)


def test_a_placement_does_not_wait_for_ever(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1e2p1d")
        scene.worker("i3").end(-9)
        with pytest.raises(RequestError, match=r"waited 0\.05 s .* i3 \(d\) is starting") as failed:
            await placing(scene, "2e2p1d")
        assert failed.value.status == 503

    run(tmp_path, scenario, switch_timeout_s=0.05)


def test_a_switch_of_a_placement_waits_until_the_others_serve_every_stage(tmp_path: Path) -> None:
    """One that was needed is lost while another is being switched."""

    async def scenario(scene: Scene) -> None:
        await scene.begun("1e4p1d")
        task = placing(scene, "1e2p3d")
        await scene.ordered("i4")
        scene.worker("i0").end(-9)
        scene.carry_out("i4")
        await asyncio.sleep(0.01)
        assert len(scene.orders()) == 1
        await scene.restarted("i0")
        await scene.ordered("i3")
        scene.carry_out("i3")
        await task

    run(tmp_path, scenario)


def test_an_absurd_placement_is_refused(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.begun("1epd")
        with pytest.raises(RequestError, match="placement: 33 instances, at most 32") as refused:
            await scene.controller.place(Placement((Role.EPD,) * 33))
        assert refused.value.status == 400

    run(tmp_path, scenario)


def test_a_placement_that_needs_more_open_files_than_there_may_be_is_refused_with_the_number_that_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "most_peers", lambda: 19)

    async def scenario(scene: Scene) -> None:
        await scene.begun("1epd")
        with pytest.raises(RequestError, match=r"20 instances, at most 19, by the files that") as refused:
            await scene.controller.place(Placement((Role.EPD,) * 20))
        assert refused.value.status == 400
        assert len(scene.cluster.started) == 1

    run(tmp_path, scenario)
