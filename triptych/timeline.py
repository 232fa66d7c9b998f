"""When what was done, as a file of Chrome trace events: https://ui.perfetto.dev and chrome://tracing show it.

One track per instance with its steps, one per request. Knows no messages: it takes plain names, and seconds of a clock.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from triptych.errors import ConfigError

INSTANCES, REQUESTS = 1, 2  # the two groups of tracks
_UNTIL_FIRST, _ANSWER = "to first token", "answer"


class Timeline:
    """Writes every event at once, so that a file that breaks off can be read; `close` makes it valid JSON.

    What is said late or twice of a request is left out: after a failure much is.
    """

    def __init__(self, stream: IO[bytes], began_s: float = 0.0) -> None:
        """`began_s`: the moment that is shown as 0. The stream stays open."""
        self._stream = stream
        self._began_s = began_s
        self._last_s = began_s
        self._roles: dict[str, str] = {}
        self._numbers: dict[str, int] = {}  # of the tracks of instances
        self._open: dict[str, str] = {}  # requests, and the part that they are in
        self._separator = b"[\n"
        self._name(INSTANCES, "instances")
        self._name(REQUESTS, "requests")

    # ---- instances

    def instance(self, instance: str, role: str, at_s: float) -> None:
        """It has this role from now on. Nothing is written where it had it before."""
        before = self._roles.get(instance)
        self._roles[instance] = role
        if before != role:
            self._mark(instance, role if before is None else f"{before} to {role}", at_s)

    def step(self, instance: str, what: str, began_s: float, ended_s: float, size: int = 0) -> None:
        """It computed. `what` is encode, prefill, decode or mixed; `size` counts units, or sequences; 0: unknown."""
        event = {"ph": "X", "cat": "step", "name": what, "pid": INSTANCES, "tid": self._track(instance)}
        event |= {"ts": self._us(began_s), "dur": round(self._us(ended_s) - self._us(began_s), 3)}
        self._write(event | ({"args": {"batch": size}} if size else {}))

    def lost(self, instance: str, at_s: float) -> None:
        """It failed. If it comes back, that is told as if it were new."""
        self._gone(instance, "lost", at_s)

    def stopped(self, instance: str, at_s: float) -> None:
        """It ended as it was told to."""
        self._gone(instance, "stopped", at_s)

    # ---- requests

    def queued(self, request: str, at_s: float, **about: Any) -> None:
        """It came. `about`: whatever is worth seeing."""
        if request in self._open:
            return
        self._async("b", request, request, at_s, about)
        self._open[request] = _UNTIL_FIRST
        self._async("b", request, _UNTIL_FIRST, at_s)

    def first_token(self, request: str, at_s: float) -> None:
        if self._open.get(request) == _UNTIL_FIRST:
            self._async("e", request, _UNTIL_FIRST, at_s)
            self._open[request] = _ANSWER
            self._async("b", request, _ANSWER, at_s)

    def ended(self, request: str, at_s: float, outcome: str, num_tokens: int = 0) -> None:
        """`outcome`: finished, aborted, or what it failed with."""
        part = self._open.pop(request, None)
        if part is not None:
            self._async("e", request, part, at_s)
            self._async("e", request, request, at_s, {"outcome": outcome, "tokens": num_tokens})

    # ---- the file

    def flush(self) -> None:
        """What was said until now can be read."""
        self._stream.flush()

    def close(self) -> None:
        """What is open ends with what was told last."""
        for request in list(self._open):
            self.ended(request, self._last_s, "unfinished")
        self._stream.write(b"\n]\n")
        self._stream.flush()

    def _gone(self, instance: str, how: str, at_s: float) -> None:
        self._roles[instance] = how
        self._mark(instance, how, at_s)

    def _track(self, instance: str) -> int:
        if instance not in self._numbers:
            self._numbers[instance] = len(self._numbers) + 1
            self._name(INSTANCES, instance, self._numbers[instance])
        return self._numbers[instance]

    def _us(self, at_s: float) -> float:
        self._last_s = max(self._last_s, at_s)
        return round(1e6 * (at_s - self._began_s), 3)

    def _name(self, group: int, name: str, track: int = 0) -> None:
        what = "thread_name" if track else "process_name"
        self._write({"ph": "M", "name": what, "pid": group, "tid": track, "args": {"name": name}})

    def _mark(self, instance: str, text: str, at_s: float) -> None:
        track, at_us = self._track(instance), self._us(at_s)
        self._write({"ph": "i", "s": "t", "name": text, "pid": INSTANCES, "tid": track, "ts": at_us})

    def _async(self, phase: str, request: str, name: str, at_s: float, about: dict[str, Any] | None = None) -> None:
        event = {"ph": phase, "cat": "request", "id": request, "name": name, "pid": REQUESTS, "ts": self._us(at_s)}
        self._write(event | ({"args": about} if about else {}))

    def _write(self, event: dict[str, Any]) -> None:
        self._stream.write(self._separator + msgspec.json.encode(event))
        self._separator = b",\n"


@contextlib.contextmanager
def timeline_file(path: Path, flag: str, began_s: float = 0.0) -> Iterator[Timeline]:
    """A file that grows while it is open, and is closed whatever happens. Raises ConfigError naming the `flag` if it
    cannot be written."""
    try:
        stream = path.open("wb")
    except OSError as error:
        raise ConfigError(f"{flag}: {path} cannot be written: {error.strerror}") from None
    with stream:
        timeline = Timeline(stream, began_s)
        try:
            yield timeline
        finally:
            timeline.close()
