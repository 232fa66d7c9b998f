"""Time as the router sees it: the event loop's in a server, simulated in a simulation."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """Seconds since some moment; they only go forward. Actions run on the thread that owns it."""

    @property
    def now(self) -> float: ...
    def after(self, seconds: float, action: Callable[..., None], /, *arguments: Any) -> Timer: ...


class LoopClock:
    """`time.monotonic`, and timers of the event loop that runs."""

    @property
    def now(self) -> float:
        return time.monotonic()

    def after(self, seconds: float, action: Callable[..., None], /, *arguments: Any) -> Timer:
        return asyncio.get_running_loop().call_later(seconds, action, *arguments)
