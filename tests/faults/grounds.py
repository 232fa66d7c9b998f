"""A server whose instances fail on order, beside one that nothing happens to and that knows the right answers."""

import asyncio
import itertools
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx

from tests.faults.asking import Answer, Ask, ask_all, difference
from tests.faults.batches import batch, body, image
from tests.faults.points import Arming, Fault, Fired, Moment, Points
from tests.faults.ties import possible_texts
from tests.faults.worker import work
from tests.flows.servers import cluster, running, wait_until_idle
from triptych.cluster.local import LocalCluster
from triptych.control import back_off
from triptych.core import InstanceId
from triptych.router.generation import Generation
from triptych.server.frontend import Frontend

RECOVERY_S = 20.0
FOUND_S = 5.0  # on a machine that does other things as well
LONGEST_BACK_OFF_S = 0.1  # an instance fails here more often in a minute than a healthy one in a year
NUM_PROBES = 12
WARM_UP_BATCHES = 3
CHUNK = 48  # tokens of a forward: prompts take several
_NUMBERS = itertools.count(1)


@dataclass
class Ground:
    """`right_url` is the address of the server that nothing happens to."""

    url: str
    right_url: str
    folder: Path
    points: Points
    log: "ErrorLog"
    num_asked: int = 0
    gate: "Gate" = field(default_factory=lambda: Gate())

    def warm_up(self) -> None:
        """Until everybody knows how fast everybody is: before, nobody shares work out."""
        for number in range(-WARM_UP_BATCHES, 0):
            self.ask(batch(number, stream=False))
        self.wait_until_whole()

    def instances(self, role: str | None = None) -> list[dict[str, Any]]:
        return [each for each in cluster(self.url)["instances"] if role in (None, each["role"])]

    def arm(self, moment: Moment, fault: Fault, role: str, num_requests: int) -> int:
        """For the first instance of that role that gets to the moment, as soon as so many further requests are
        admitted: later ones may be told that a stage is missing. Returns the number of the fault."""
        number = next(_NUMBERS)
        ids = [InstanceId(each["id"]) for each in self.instances(role)]
        assert ids, f"no instance is {role}"
        self.gate.expect(num_requests, lambda: self.points.release(number))
        self.points.arm(Arming(number, moment, fault, ids, waits=True))
        return number

    def ask(self, asks: list[Ask]) -> list[Answer]:
        self.num_asked += len(asks)
        return asyncio.run(ask_all(self.url, asks))

    def right(self, asks: list[Ask]) -> list[Answer]:
        return asyncio.run(ask_all(self.right_url, asks))

    def differences(self, asks: list[Ask], right: list[Answer]) -> list[str]:
        """What is wrong with the answers to requests that are sent all at once. The other side of a tie is not."""
        found = []
        for index, (asked, answer, wanted) in enumerate(zip(asks, self.ask(asks), right, strict=True)):
            text = difference(answer, wanted)
            if text is not None and not self._is_tied(asked, answer):
                found.append(f"{index}: {text}")
        return found

    def pids(self) -> dict[str, int]:
        return {each["id"]: each["pid"] for each in self.instances()}

    def wait_until_whole(self) -> None:
        """Every instance is there, nothing is held by anybody."""
        deadline = time.monotonic() + RECOVERY_S
        while not self._is_whole():
            assert time.monotonic() < deadline, f"not whole after {RECOVERY_S:g} s: {cluster(self.url)}"
            time.sleep(0.02)
        wait_until_idle(self.url, timeout_s=5)

    def wait_until_replaced(self, fired: Fired) -> None:
        """A process that hangs is found a while after everybody got an answer."""
        deadline = time.monotonic() + FOUND_S
        while self.pids().get(fired.instance) == fired.pid:
            assert time.monotonic() < deadline, f"{fired.instance} is still there after {FOUND_S:g} s"
            time.sleep(0.02)

    def find_broken(self, fired: Fired) -> None:
        """Requests that meet a broken transport until the instance with it is replaced: they are all answered."""
        for number in range(NUM_PROBES):
            self.wait_until_whole()
            if self.pids().get(fired.instance) != fired.pid:
                return
            asks = probes(f"{fired.epoch} {number}")
            assert not (found := self.differences(asks, self.right(asks))), found
        raise AssertionError(f"{fired.instance} still has a broken transport")

    def _is_tied(self, asked: Ask, answer: Answer) -> bool:
        """Whether it could have been that as well, by plain transformers."""
        if answer.wrong is not None:
            return False
        choices = answer.choices.items()
        return all(choice.text in possible_texts(self.folder, asked.body, index) for index, choice in choices)

    def _is_whole(self) -> bool:
        if httpx.get(f"{self.url}/health").status_code != 200:
            return False
        return all(each["state"] == "active" for each in self.instances())


def probes(name: str) -> list[Ask]:
    """Short requests in which all instances have a part. One that comes when a stage is missing comes again."""
    rng = random.Random(name)
    return [Ask(body(rng, [image(rng)], num_words=3, max_tokens=4), stream=False, comes_again=True) for _ in range(6)]


class Gate:
    """Counts what is admitted by the servers of this process."""

    def __init__(self) -> None:
        self._missing = 0
        self._then: Callable[[], None] = lambda: None
        self._generate = Frontend.generate

    def expect(self, num_requests: int, then: Callable[[], None]) -> None:
        self._missing, self._then = num_requests, then

    def generate(self, frontend: Frontend, *arguments: Any, **named: Any) -> Generation:
        """In place of `Frontend.generate`."""
        generation = self._generate(frontend, *arguments, **named)
        self._missing -= 1
        if self._missing == 0:
            self._then()
        return generation


class ErrorLog(logging.Handler):
    """Tracebacks of the server: recovery would hide what they tell."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.texts.append(self.format(record))


@contextmanager
def ground(folder: Path, placement: str, **changes: Any) -> Iterator[Ground]:
    """Both servers, with all that they start, until the block is left."""
    log = ErrorLog()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(back_off, "LONGEST_S", LONGEST_BACK_OFF_S))
        meeting = stack.enter_context(tempfile.TemporaryDirectory(prefix="points-"))
        options = {"max_num_seqs": 16, "max_num_batched_tokens": CHUNK, **changes}
        right_url = stack.enter_context(running(folder, "1epd"))
        url = stack.enter_context(running(folder, placement, cluster=faulty_cluster(meeting), **options))
        logging.getLogger("triptych").addHandler(log)
        stack.callback(logging.getLogger("triptych").removeHandler, log)
        gate = Gate()
        admitting = mock.patch.object(Frontend, "generate", lambda *args, **named: gate.generate(*args, **named))
        stack.enter_context(admitting)
        there = Ground(url, right_url, folder, Points(meeting), log, gate=gate)
        there.warm_up()
        yield there


def faulty_cluster(meeting: str) -> LocalCluster:
    return LocalCluster(entry=partial(work, meeting))
