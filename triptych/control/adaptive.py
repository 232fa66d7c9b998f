"""Roles that follow the load: once a second it looks, asks the allocator, and makes at most one switch at a time."""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from triptych.control.events import Event
from triptych.core import InstanceId, Role
from triptych.errors import InstanceError, RequestError
from triptych.messages import Load
from triptych.planning.allocator import PURE, Allocator, Candidate, Decision, Policy
from triptych.planning.estimator import Estimator, Observation
from triptych.router.pressure import Pressure
from triptych.routing import RoutingTable

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0


class Watched(Protocol):
    """Who knows the load; the frontend."""

    @property
    def table(self) -> RoutingTable: ...
    @property
    def loads(self) -> Mapping[InstanceId, Load]: ...
    def pressure(self) -> Pressure: ...


class Controls(Protocol):
    """Who can change it; the controller."""

    async def switch_role(self, id: InstanceId, role: Role) -> dict[str, float]: ...
    def note(self, event: Event) -> None: ...


class Adaptive:
    """Lives on the event loop of the server process, from `start` to `stop`."""

    def __init__(
        self,
        frontend: Watched,
        controller: Controls,
        *,
        max_num_seqs: int,
        policy: Policy | None = None,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_num_seqs`: that an instance decodes together. Instances get pure roles, and those that the table has
        now."""
        self.latest: Decision | None = None
        self._frontend = frontend
        self._controller = controller
        self._interval_s = interval_s
        self._clock = clock
        self._estimator = Estimator(max_num_seqs)
        self._allocator = Allocator(policy, PURE | {peer.role for peer in frontend.table.peers.values()})
        self._noted: tuple[object, ...] | None = None  # what the newest note is about
        self._task: asyncio.Task[None] | None = None
        self._switching: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """No further switch begins. One that is under way goes on in the controller."""
        tasks = [task for task in (self._task, self._switching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                self.look()
            except Exception:  # the boundary of a look: the next one may find what this one could not
                logger.exception("a look at the load failed")

    def look(self) -> None:
        """Decides, and begins the switch that was decided on. While one is under way it only watches."""
        frontend = self._frontend
        seen = Observation.of(self._clock(), frontend.table, frontend.loads, frontend.pressure())
        estimate = self._estimator.observe(seen)
        if self._switching is not None or not seen.roles:
            return
        decision = self.latest = self._allocator.decide(estimate, seen)
        if decision.switch is not None:
            self._note("adapt", decision.switch.instance, decision.line(), _numbers(decision))
            self._switching = asyncio.get_running_loop().create_task(self._switch(decision.switch))
        elif _gist(decision) != self._noted:
            self._note("considered", None, decision.line(), _numbers(decision))
        else:
            logger.debug("%s", decision.line())
        self._noted = _gist(decision)

    async def _switch(self, made: Candidate) -> None:
        try:
            steps_s = await self._controller.switch_role(made.instance, made.after)
            self._allocator.switched(made, steps_s, self._clock())
        except (RequestError, InstanceError) as error:
            self._allocator.failed(self._clock())
            self._note("adapt_failed", made.instance, f"{made.before} stays: {error}", {})
        except Exception:  # the boundary of a switch: roles stay as they are for a while
            self._allocator.failed(self._clock())
            logger.exception("%s did not become %s", made.instance, made.after)
        finally:
            self._switching = None

    def _note(self, what: str, instance: InstanceId | None, text: str, numbers: dict[str, float]) -> None:
        self._controller.note(Event(what=what, instance=instance, text=text, numbers=numbers))


def _gist(decision: Decision) -> tuple[object, ...]:
    """What has to differ for a decision to be news: the kind of its reason, and the best switch. Numbers always do."""
    best = decision.candidates[0] if decision.candidates else None
    kind = re.sub(r"[0-9.]+", "", decision.reason.partition(":")[0])
    return kind, best and (best.before, best.after)


def _numbers(decision: Decision) -> dict[str, float]:
    best = decision.candidates[0] if decision.candidates else None  # the one that is made, if any is
    stages = decision.estimate.stages.items()
    return {
        "clear_s": decision.clear_s,
        **({} if best is None else {"gain_s": best.gain_s, "cost_s": best.cost_s, "needed_s": best.needed_s}),
        **{f"demand_{stage}": of.demand for stage, of in stages},
        **{f"backlog_{stage}_s": of.backlog_s for stage, of in stages},
    }
