"""The record of one instance: its role, its process, and the state that it is in. Knows no socket and no policy."""

import asyncio
import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from triptych.config import InstanceConfig
from triptych.control.back_off import BackOff
from triptych.core import InstanceId, Role
from triptych.messages import Peer, Switched


class State(enum.StrEnum):
    STARTING = "starting"  # process started, weights loading
    ACTIVE = "active"  # in the routing table
    LEAVING = "leaving"  # in the table without new work: it finishes what it has, to change its role or to end
    RESTARTING = "restarting"  # its process is gone, the next one is started after a back-off
    DEAD = "dead"  # gone for good: stopped on purpose, or never active


_NEXT = {
    State.STARTING: {State.ACTIVE, State.RESTARTING, State.DEAD},
    State.ACTIVE: {State.LEAVING, State.RESTARTING, State.DEAD},
    State.LEAVING: {State.ACTIVE, State.RESTARTING, State.DEAD},
    State.RESTARTING: {State.STARTING, State.DEAD},
    State.DEAD: set(),
}


class Worker(Protocol):
    """A process of a cluster back-end; `LocalWorker` is one."""

    pid: int
    failure: str | None

    @property
    def exit_code(self) -> int | None: ...
    def watch(self, on_exit: Callable[[], None]) -> None: ...
    def kill(self) -> None: ...
    async def wait(self, seconds: float) -> bool: ...


class Cluster(Protocol):
    def start(self, config: InstanceConfig) -> Worker: ...


@dataclass(slots=True)
class SwitchRecord:
    """One change of an instance's role; `after` is None where it is to end."""

    before: Role
    after: Role | None
    at: float = field(default_factory=time.time)  # seconds since 1970
    steps_s: dict[str, float] = field(default_factory=dict)
    is_over: bool = False
    error: str | None = None


@dataclass(slots=True, eq=False)
class Instance:
    """An instance lives on through the processes that serve for it one after the other, its incarnations."""

    id: InstanceId
    slot: int  # the lowest number that was free when it was added: devices are shared out by it
    role: Role  # that it serves, or will when it is ready
    config: InstanceConfig | None = None  # of the present incarnation
    worker: Worker | None = None  # the newest process
    peer: Peer | None = None  # known while it serves
    num_restarts: int = 0
    last_failure: str | None = None
    started_at: float | None = None  # of the newest process, seconds since 1970
    active_since: float | None = None  # monotonic; through changes of its role
    lost_at: float | None = None  # monotonic; while it is away
    accusation: str | None = None  # why it is being killed
    is_out_of_reach: bool = False  # that is why: what it is working on has nothing to do with it
    disposable: bool = False  # is not restarted: it was told to end, or it was added and has never been active
    switch: SwitchRecord | None = None  # under way, or the last one
    order: int = 0  # the newest `SwitchRole`
    answer: "asyncio.Future[Switched] | None" = None  # to that order
    back_off: BackOff = field(default_factory=BackOff)
    state: State = State.STARTING
    since: float = field(default_factory=time.monotonic)  # when it got into its state

    def move_to(self, state: State) -> None:
        assert state in _NEXT[self.state], f"instance {self.id} is {self.state}, it cannot become {state}"
        self.state, self.since = state, time.monotonic()

    @property
    def serves(self) -> bool:
        """Whether it is in the routing table."""
        return self.state in (State.ACTIVE, State.LEAVING)
