"""The life of a request between a router and whoever hears of it, without a server."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.server.fakes import D, P
from tests.server.scripted import Wire
from triptych.config import AdmissionConfig
from triptych.core import FinishReason, RequestId, Role, SamplingParams
from triptych.errors import RequestError
from triptych.messages import Abort, Failed, Peer, SlabDescription, Table, TokenUpdate
from triptych.router.attempts import Task
from triptych.router.generation import Generation, PreparedPrompt
from triptych.router.output import Output
from triptych.router.router import Router
from triptych.router.waiting import Kind

SLO_S = 0.05


class Timer:
    def __init__(self, at_s: float, action: Callable[[], None]) -> None:
        self.at_s, self.action, self.is_cancelled = at_s, action, False

    def cancel(self) -> None:
        self.is_cancelled = True


class HandClock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[Timer] = []

    def after(self, seconds: float, action: Callable[..., None], /, *arguments: Any) -> Timer:
        self._timers.append(Timer(self.now + seconds, lambda: action(*arguments)))
        return self._timers[-1]

    def move(self, to_s: float) -> None:
        self.now = to_s
        due = [timer for timer in self._timers if timer.at_s <= to_s]
        self._timers = [timer for timer in self._timers if timer.at_s > to_s]
        for timer in due:
            if not timer.is_cancelled:
                timer.action()


class NoText:
    def push(self, token_id: int, /) -> str:
        return ""

    def flush(self) -> str:
        return ""


@dataclass
class Listener:
    """Writes down what it hears, in its order."""

    heard: list[tuple[str, object]] = field(default_factory=list)

    def said(self, task: Task, num_tokens: int, after_s: float) -> None:
        self.heard.append(("said", round(after_s, 3)))

    def answered(self, task: Task) -> None:
        self.heard.append(("answered", task.output.index))

    def failed(self, generation: Generation, tasks: list[Task], error: RequestError) -> None:
        self.heard.append(("failed", [task.output.index for task in tasks]))

    def abort(self, generation: Generation) -> None:
        raise AssertionError("nobody leaves")


class Room:
    """A router with a P and a D, and who listens."""

    def __init__(self) -> None:
        self.clock, self.wire, self.listener = HandClock(), Wire(), Listener()
        self.router = Router(
            AdmissionConfig(slo_tpot_ms=SLO_S * 1e3),
            self.wire,
            self.clock,
            b"model",
            parallel_encode=True,
            prefix_caching=False,
            max_num_seqs=8,
            audience=self.listener,
        )
        slab = SlabDescription({}, "", "cpu", 0, {})
        self.router.take(Table(1, [Peer(P, Role.P, "a", "", slab), Peer(D, Role.D, "a", "", slab)]))

    def ask(self, *, n: int = 1, deadline: float | None = None) -> Generation:
        prompt = PreparedPrompt([1] * 16)
        generation = Generation(self.listener, [prompt], self.clock.now, deadline)
        for index in range(n):
            sampling = SamplingParams(max_tokens=4, seed=0)
            generation.outputs.append(Output(index, RequestId(f"r{index}"), sampling, (), NoText()))
        hashes = self.router.dispatcher.hashes(prompt)
        tasks = [Task(output, generation, prompt, hashes, Kind.TEXT) for output in generation.outputs]
        self.router.requests.begin(generation, [tasks])
        return generation

    def say(self, index: int, *, of: str = "r0.1", last: bool = False) -> None:
        finish = FinishReason.LENGTH if last else None
        self.router.requests.take(TokenUpdate(RequestId(of), 7, index, finish), P if index == 0 else D)


@pytest.fixture
def room() -> Room:
    return Room()


def test_each_token_is_told_with_the_time_since_the_one_before(room: Room) -> None:
    room.ask()
    for index, at_s in enumerate((2.0, 2.5, 2.6)):
        room.clock.move(at_s)
        room.say(index, last=index == 2)
    assert room.listener.heard == [("said", 2.0), ("said", 0.5), ("said", 0.1), ("answered", 0)]
    assert not room.router.requests.open


def test_a_token_that_overtook_another_is_told_behind_it(room: Room) -> None:
    room.ask()
    room.clock.move(1.0)
    room.say(1, last=True)
    assert room.listener.heard == []
    room.say(0)
    assert room.listener.heard == [("said", 1.0), ("said", 0.0), ("answered", 0)]


def test_what_was_answered_does_not_fail_any_more(room: Room) -> None:
    generation = room.ask(n=2, deadline=9.0)
    room.say(0, last=True)
    room.clock.move(10.0)
    assert room.listener.heard[-1] == ("failed", [1])
    room.router.requests.fail([generation], RequestError("once more"))
    assert room.listener.heard.count(("failed", [1])) == 1
    assert not generation.outputs[1].finish


def test_a_deadline_is_nobodys_business_once_all_is_answered(room: Room) -> None:
    generation = room.ask(deadline=9.0)
    room.say(0, last=True)
    room.clock.move(10.0)
    assert not generation.failed
    assert room.listener.heard[-1] == ("answered", 0)


def test_whoever_sends_tokens_of_a_request_that_nobody_knows_is_told_so(room: Room) -> None:
    room.say(1, of="nobody.1")
    assert room.wire.sent == [(D, Abort(RequestId("nobody.1")))]
    room.say(2, of="nobody.1", last=True)
    assert len(room.wire.sent) == 1, "it has ended it by itself"


def test_the_pause_of_a_sequence_that_was_taken_up_again_is_told_and_does_not_count_as_pace(room: Room) -> None:
    room.ask()
    room.clock.move(0.1)
    room.say(0)
    room.clock.move(0.12)
    room.say(1)
    room.router.take(Failed(RequestId("r0.1"), "gone", 503, "moved", retry=True))
    before = room.router.slots.number(1, 4)
    room.clock.move(30.0)
    room.router.requests.take(TokenUpdate(RequestId("r0.2"), 7, 2), P)
    assert room.listener.heard[-1] == ("said", 29.88)
    assert room.router.slots.number(1, 4) == before
