"""The record of one instance: its configuration, its worker, and the state it is in."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from triptych.config import InstanceConfig
from triptych.messages import Peer


class State(enum.StrEnum):
    STARTING = "starting"  # process started, weights loading
    ACTIVE = "active"  # in the routing table
    DEAD = "dead"  # process ended or given up


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
class Instance:
    config: InstanceConfig
    worker: Worker
    state: State = State.STARTING
    peer: Peer | None = None  # known once it is ready
