"""The controller is asked for what the allocator decides, one switch at a time, and failures are survived."""

import asyncio
from dataclasses import dataclass, field

import msgspec

from tests.builders import make_peer
from tests.planning.loads import make_load
from triptych.control.adaptive import Adaptive
from triptych.control.events import Event
from triptych.core import InstanceId, Role, Stage
from triptych.errors import RequestError
from triptych.messages import Load
from triptych.routing import RoutingTable


@dataclass
class Pressure:
    queued_s: dict[Stage, float] = field(default_factory=dict)
    decode_ahead_s: float = 0.0
    ttft_s: float | None = None
    tpot_s: float | None = None
    ttft_slack_s: float | None = None
    tpot_slack_s: float | None = None


class Server:
    """Frontend, controller and clock: prefill gets `prefill_demand` seconds of work per second, and does 1."""

    def __init__(self, prefill_demand: float = 3.0, **roles: str) -> None:
        roles = roles or {"e0": "e", "e1": "e", "e2": "e", "p0": "p", "d0": "d"}
        self.table = RoutingTable(1, {InstanceId(id): make_peer(id, role) for id, role in roles.items()})
        self.prefill_demand = prefill_demand
        self.now = 0.0
        self.answers = Pressure()
        self.events: list[Event] = []
        self.asked: list[tuple[InstanceId, Role]] = []
        self.outcome: asyncio.Future[dict[str, float]] | None = None

    @property
    def loads(self) -> dict[InstanceId, Load]:
        backlog = max(0.0, self.prefill_demand - 1.0) * self.now
        done = min(1.0, self.prefill_demand) * self.now
        loads = {id: make_load(id, peer.role.stages[0]) for id, peer in self.table.peers.items()}
        self.answers.queued_s = {Stage.PREFILL: backlog}
        return loads | {InstanceId("p0"): make_load("p0", Stage.PREFILL, done=done / 0.01)}

    def pressure(self) -> Pressure:
        self.loads  # noqa: B018 - brings the answers up to date
        return self.answers

    async def switch_role(self, id: InstanceId, role: Role) -> dict[str, float]:
        self.asked.append((id, role))
        self.outcome = asyncio.get_running_loop().create_future()
        return await self.outcome

    def note(self, event: Event) -> None:
        self.events.append(event)

    def clock(self) -> float:
        return self.now


def make_adaptive(server: Server, **options: object) -> Adaptive:
    return Adaptive(server, server, max_num_seqs=64, clock=server.clock, **options)


async def look(adaptive: Adaptive, server: Server, times: int) -> None:
    for _ in range(times):
        server.now += 1.0
        adaptive.look()
        await asyncio.sleep(0)


def test_a_stage_that_cannot_keep_up_gets_an_instance_and_the_decision_is_noted():
    async def scene() -> None:
        server = Server()
        adaptive = make_adaptive(server)
        await look(adaptive, server, 10)
        assert server.asked == [("e0", Role.P)]
        (event,) = [event for event in server.events if event.what == "adapt"]
        assert (event.what, event.instance) == ("adapt", "e0")
        assert "e0 from e to p" in event.text
        assert event.numbers["gain_s"] - event.numbers["cost_s"] >= event.numbers["needed_s"] > 0
        assert msgspec.to_builtins(adaptive.latest)["switch"]["after"] == "p"
        await adaptive.stop()

    asyncio.run(scene())


def test_what_keeps_up_is_left_alone():
    async def scene() -> None:
        server = Server(prefill_demand=0.9)
        adaptive = make_adaptive(server)
        await look(adaptive, server, 60)
        assert server.asked == []
        assert adaptive.latest.reason == "keeps up within 30 s"
        assert {event.what for event in server.events} == {"considered"}
        assert "keeps up within 30 s" in server.events[-1].text
        assert server.events[-1].numbers.keys() >= {"clear_s", "gain_s", "demand_p", "backlog_p_s"}
        assert len(server.events) < 6, "60 looks: only what is new is told, the numbers always are"

    asyncio.run(scene())


def test_one_switch_at_a_time_and_a_rest_behind_it():
    async def scene() -> None:
        server = Server()
        adaptive = make_adaptive(server)
        await look(adaptive, server, 30)
        assert len(server.asked) == 1
        server.outcome.set_result({"drain": 0.1, "weights": 0.4})
        await look(adaptive, server, 2)
        assert len(server.asked) == 1
        await look(adaptive, server, 3)
        assert len(server.asked) == 2
        await adaptive.stop()

    asyncio.run(scene())


def test_a_switch_that_fails_is_noted_and_tried_again_later():
    async def scene() -> None:
        server = Server()
        adaptive = make_adaptive(server)
        await look(adaptive, server, 10)
        server.outcome.set_exception(RequestError("a change is under way", status=409, code="busy"))
        await look(adaptive, server, 5)
        told = [event for event in server.events if event.what != "considered"]
        assert [event.what for event in told] == ["adapt", "adapt_failed"]
        assert "a change is under way" in told[-1].text
        assert len(server.asked) == 1
        await look(adaptive, server, 10)
        assert len(server.asked) == 2
        await adaptive.stop()

    asyncio.run(scene())


def test_a_surprise_in_a_switch_ends_neither_the_server_nor_the_watching(caplog):
    async def scene() -> None:
        server = Server()
        adaptive = make_adaptive(server)
        await look(adaptive, server, 10)
        server.outcome.set_exception(ValueError("a bug"))
        await look(adaptive, server, 20)
        assert len(server.asked) == 2
        await adaptive.stop()

    asyncio.run(scene())
    assert "a bug" in caplog.text


def test_an_objective_that_is_missed_counts():
    async def scene() -> None:
        server = Server(prefill_demand=0.95)
        server.answers.ttft_s, server.answers.ttft_slack_s = 2.0, -1.0
        adaptive = make_adaptive(server)
        await look(adaptive, server, 20)
        assert server.asked == [("e0", Role.P)]
        await adaptive.stop()

    asyncio.run(scene())


def test_an_instance_that_leaves_is_not_counted():
    async def scene() -> None:
        server = Server(e0="e", e1="e", p0="p", d0="d")
        adaptive = make_adaptive(server)
        leaving = msgspec.structs.replace(server.table.peers["e1"], leaving=True)
        server.table = RoutingTable(2, server.table.peers | {"e1": leaving})
        await look(adaptive, server, 20)
        assert server.asked == [], "e0 is the only one left that encodes"

    asyncio.run(scene())


def test_it_looks_by_itself_until_it_is_stopped():
    async def scene() -> None:
        server = Server()
        adaptive = make_adaptive(server, interval_s=0.001)
        adaptive.start()
        async with asyncio.timeout(10):
            while not server.asked:
                server.now += 1.0
                await asyncio.sleep(0.002)
        await adaptive.stop()
        assert server.outcome.cancelled()
        adaptive.latest = None
        await asyncio.sleep(0.01)
        assert adaptive.latest is None

    asyncio.run(scene())


def test_a_look_that_fails_is_not_the_last(caplog):
    async def scene() -> None:
        server = Server()
        adaptive = make_adaptive(server, interval_s=0.001)
        table, server.table = server.table, None
        adaptive.start()
        async with asyncio.timeout(10):
            while "a look at the load failed" not in caplog.text:
                await asyncio.sleep(0.002)
            server.table = table
            while adaptive.latest is None:
                await asyncio.sleep(0.002)
        await adaptive.stop()

    asyncio.run(scene())
