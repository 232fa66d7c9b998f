"""The waiting room by itself: windows, orders, what is predicted, and that nobody waits for ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from triptych.config import AdmissionConfig, Schedule
from triptych.core import Stage
from triptych.router.waiting import AGEING, MIN_SEQUENCES, NO_WORK, Kind, Waiter, WaitingRoom, Work

ONE_OF_EACH = {Stage.ENCODE: 1, Stage.PREFILL: 1, Stage.DECODE: 1}


def make_room(
    schedule: Schedule = "fcfs", instances: dict[Stage, int] = ONE_OF_EACH, **config: float
) -> WaitingRoom[str]:
    room: WaitingRoom[str] = WaitingRoom(AdmissionConfig(schedule=schedule, **config))  # type: ignore[arg-type]
    room.set_instances(instances, 0.0)
    return room


def add(
    room: WaitingRoom[str],
    name: str,
    kind: Kind = Kind.TEXT,
    *,
    at: float = 0.0,
    encode_s: float = 0.0,
    prefill_s: float = 1.0,
    num: int = 1,
    deadline: float | None = None,
) -> Waiter[str]:
    waiter = Waiter(name, kind, num, Work(encode_s, prefill_s), at, at, deadline)
    room.add(waiter, at)
    return waiter


def take_all(room: WaitingRoom[str], now: float = 0.0) -> list[str]:
    """All that may go now."""
    taken = []
    while (waiter := room.take(now)) is not None:
        taken.append(waiter.what)
    return taken


def drain(room: WaitingRoom[str], now: float = 0.0) -> list[str]:
    """All, one after the other."""
    taken = []
    while (waiter := room.take(now)) is not None:
        taken.append(waiter.what)
        for i in range(waiter.num_sequences):
            room.release(waiter.kind, waiter.work if i == 0 else NO_WORK, now, done=True)
    return taken


def test_the_heaviest_kind_of_media_says_where_a_request_waits() -> None:
    assert Kind.of([]) is Kind.TEXT
    assert Kind.of(["image", "video", "image"]) is Kind.VIDEO
    assert Kind.of(["image", "audio"]) is Kind.AUDIO
    assert Kind.of(["image"]) is Kind.IMAGE


def test_a_few_sequences_may_always_go_and_more_while_they_are_short() -> None:
    room = make_room(dispatch_s=1.0)
    for i in range(10):
        add(room, f"long{i}", prefill_s=5.0)
    assert len(take_all(room)) == MIN_SEQUENCES
    room = make_room(dispatch_s=1.0)
    for i in range(100):
        add(room, f"short{i}", prefill_s=0.125)
    assert len(take_all(room)) == 8


def test_a_window_grows_with_the_instances_of_the_stage_that_has_most_to_do() -> None:
    room = make_room(instances={Stage.ENCODE: 3, Stage.PREFILL: 1, Stage.DECODE: 1}, dispatch_s=1.0)
    for i in range(100):
        add(room, f"picture{i}", Kind.IMAGE, encode_s=0.125, prefill_s=0.01)
    assert len(take_all(room)) == 24
    room.set_instances({Stage.ENCODE: 4, Stage.PREFILL: 1, Stage.DECODE: 1}, 0.0)
    assert len(take_all(room)) == 8


def test_what_is_past_prefill_makes_place() -> None:
    room = make_room()
    waiters = [add(room, str(i), prefill_s=5.0) for i in range(6)]
    assert take_all(room) == ["0", "1", "2", "3"]
    room.release(Kind.TEXT, waiters[0].work, 0.0, done=True)
    assert take_all(room) == ["4"]
    assert room.num_waiting() == 1


def test_choices_of_a_prompt_go_together_and_each_counts() -> None:
    room = make_room()
    add(room, "many", num=MIN_SEQUENCES, prefill_s=5.0)
    add(room, "next", prefill_s=5.0)
    assert take_all(room) == ["many"]
    room.release(Kind.TEXT, Work(prefill_s=5.0), 0.0, done=True)
    assert take_all(room) == ["next"]


def test_a_burst_of_one_kind_does_not_stop_another() -> None:
    room = make_room()
    for i in range(100):
        add(room, f"video{i}", Kind.VIDEO, encode_s=10.0)
    assert len(take_all(room)) == MIN_SEQUENCES
    add(room, "text")
    assert take_all(room) == ["text"]


def test_one_that_left_is_not_sent() -> None:
    room = make_room()
    first, _, third = add(room, "a"), add(room, "b"), add(room, "c")
    room.remove(first, 0.0)
    room.remove(first, 0.0)
    room.remove(third, 0.0)
    assert room.num_waiting() == 1
    assert take_all(room) == ["b"]
    assert room.queued() == NO_WORK


def test_those_that_left_are_not_kept() -> None:
    room = make_room()
    for i in range(2000):
        room.remove(add(room, f"impatient{i}"), 0.0)
        if i % 200 == 0:
            add(room, f"patient{i}")
    line = room._lines[Kind.TEXT]
    assert len(line.heap) <= 2 * room.num_waiting() == 20
    assert drain(room) == [f"patient{i}" for i in range(0, 2000, 200)]


def test_text_needs_no_encoder_and_nothing_goes_without_the_stages_that_it_needs() -> None:
    room = make_room(instances={Stage.PREFILL: 1, Stage.DECODE: 1})
    add(room, "picture", Kind.IMAGE, at=1.0)
    add(room, "text", at=1.0)
    assert take_all(room, 2.0) == ["text"]
    [(waiter, stage, since)] = room.stalled()
    assert (waiter.what, stage, since) == ("picture", Stage.ENCODE, 1.0)
    room.set_instances(ONE_OF_EACH, 3.0)
    assert list(room.stalled()) == []
    room.set_instances({Stage.ENCODE: 1, Stage.PREFILL: 1}, 4.0)
    assert take_all(room, 4.0) == []
    assert [(stage, since) for _, stage, since in room.stalled()] == [(Stage.DECODE, 4.0)]
    room.set_instances(ONE_OF_EACH, 5.0)
    assert take_all(room, 5.0) == ["picture"]


# ---- orders


def test_first_come_first_served_also_if_queued_again() -> None:
    room = make_room("fcfs")
    add(room, "young", at=2.0)
    add(room, "old", at=1.0)
    assert drain(room, 3.0) == ["old", "young"]


def test_the_shortest_goes_first_but_not_before_one_that_waited_long() -> None:
    room = make_room("sjf")
    add(room, "long", at=0.0, prefill_s=2.0)
    add(room, "short", at=1.0, prefill_s=0.1)
    add(room, "late", at=2.0 * AGEING, prefill_s=0.1)
    assert drain(room, 30.0) == ["short", "long", "late"]


def test_the_least_slack_goes_first() -> None:
    room = make_room("slo", slo_ttft_ms=1000.0)
    add(room, "usual", at=0.0, prefill_s=0.1)
    add(room, "work", at=0.1, prefill_s=0.8)
    add(room, "urgent", at=0.2, prefill_s=0.1, deadline=0.3)
    add(room, "patient", at=0.05, prefill_s=0.1, deadline=50.0)
    assert drain(room, 1.0) == ["urgent", "work", "usual", "patient"]


@pytest.mark.parametrize("schedule", ["fcfs", "sjf", "slo"])
@given(st.lists(st.tuples(st.floats(0.001, 10.0), st.floats(0.0, 2.0)), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_nobody_starves(schedule: Schedule, others: list[tuple[float, float]]) -> None:
    """However many short ones keep coming, a long one is passed only by those of a bounded time."""
    room = make_room(schedule, slo_ttft_ms=500.0)
    add(room, "long", prefill_s=10.0)
    bound_s, now = AGEING * 10.0 + 0.5, 0.0
    for work_s, gap_s in others:
        now += gap_s + bound_s / 10
        add(room, "other", at=now, prefill_s=work_s)
        waiter = room.take(now)
        assert waiter is not None
        room.release(waiter.kind, waiter.work, now, done=True)
        if waiter.what == "long":
            return
        assert waiter.arrived_at <= bound_s
    assert now <= bound_s or room.num_waiting() == 0 or "long" in drain(room, now)[:1]


# ---- how long it takes


def test_an_empty_line_makes_nobody_wait() -> None:
    room = make_room()
    for i in range(MIN_SEQUENCES):
        add(room, str(i), prefill_s=50.0)
    take_all(room)
    assert room.predicted_wait_s(Kind.TEXT, 1.0) == 0.0


def test_before_anything_is_measured_every_instance_does_a_second_of_work_a_second() -> None:
    room = make_room(instances={Stage.ENCODE: 1, Stage.PREFILL: 2, Stage.DECODE: 1})
    for i in range(2 * MIN_SEQUENCES + 10):
        add(room, str(i), prefill_s=3.0)
    take_all(room)
    assert room.predicted_wait_s(Kind.TEXT, 0.0) == pytest.approx(10 * 3.0 / 2)


@pytest.mark.parametrize("speed", [0.2, 1.0, 5.0])
def test_a_wait_is_predicted_from_how_fast_work_left_lately(speed: float) -> None:
    room, now = make_room(), 0.0
    waiters = [add(room, str(i), prefill_s=0.5) for i in range(2000)]
    take_all(room)
    for waiter in waiters[:400]:
        now += 0.5 / speed
        room.release(Kind.TEXT, waiter.work, now, done=True)
        take_all(room, now)
    left = room.num_waiting()
    assert left == 2000 - 400 - MIN_SEQUENCES
    assert room.predicted_wait_s(Kind.TEXT, now) == pytest.approx(left * 0.5 / speed, rel=0.1)


def test_a_time_without_an_instance_does_not_count_as_slow() -> None:
    room = make_room()
    for i in range(MIN_SEQUENCES + 10):
        add(room, str(i), prefill_s=1.0)
    take_all(room)
    before = room.predicted_wait_s(Kind.TEXT, 0.0)
    room.set_instances({}, 0.0)
    room.set_instances(ONE_OF_EACH, 1000.0)
    assert room.predicted_wait_s(Kind.TEXT, 1000.0) == pytest.approx(before)


def test_long_work_that_is_not_done_yet_is_not_taken_for_a_standstill() -> None:
    room = make_room()
    for i in range(MIN_SEQUENCES + 2):
        add(room, str(i), Kind.VIDEO, encode_s=20.0, prefill_s=0.0)
    take_all(room)
    assert room.predicted_wait_s(Kind.VIDEO, 30.0) < 100.0


class Machine(RuleBasedStateMachine):
    """Anything in any order: the books agree with what was done."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.room: WaitingRoom[int] = WaitingRoom(AdmissionConfig(schedule="sjf", dispatch_s=2.0))
        self.waiting: list[Waiter[int]] = []
        self.ahead: list[tuple[Kind, Work]] = []
        self.num = 0
        self.instances = dict.fromkeys(Stage, 0)

    @rule(counts=st.lists(st.integers(0, 2), min_size=3, max_size=3))
    def resize(self, counts: list[int]) -> None:
        self.instances = dict(zip(Stage, counts, strict=True))
        self.room.set_instances(self.instances, self.now)

    @rule(seconds=st.floats(0.0, 5.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(kind=st.sampled_from(Kind), work=st.floats(0.0, 3.0), num=st.integers(1, 3))
    def add(self, kind: Kind, work: float, num: int) -> None:
        self.num += 1
        waiter = Waiter(self.num, kind, num, Work(0.0 if kind is Kind.TEXT else work, work), self.now, self.now)
        self.waiting.append(waiter)
        self.room.add(waiter, self.now)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiter = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.room.remove(waiter, self.now)

    @rule()
    def take(self) -> None:
        waiter = self.room.take(self.now)
        if waiter is None:
            for kind in Kind:
                waits = any(each.kind is kind for each in self.waiting)
                num_ahead = sum(ahead is kind for ahead, _ in self.ahead)
                missing = any(not self.instances[stage] for stage in kind.stages)
                assert not waits or missing or num_ahead >= MIN_SEQUENCES * self.instances[Stage.PREFILL]
            return
        self.waiting.remove(waiter)
        assert not any(not self.instances[stage] for stage in waiter.kind.stages)
        self.ahead += [(waiter.kind, waiter.work if i == 0 else NO_WORK) for i in range(waiter.num_sequences)]

    @precondition(lambda self: self.ahead)
    @rule(data=st.data(), done=st.booleans())
    def release(self, data: st.DataObject, done: bool) -> None:
        kind, work = self.ahead.pop(data.draw(st.integers(0, len(self.ahead) - 1)))
        self.room.release(kind, work, self.now, done=done)

    @invariant()
    def counts_agree(self) -> None:
        for kind in Kind:
            mine = [waiter for waiter in self.waiting if waiter.kind is kind]
            assert self.room.num_waiting(kind) == sum(waiter.num_sequences for waiter in mine)
            wait_s = self.room.predicted_wait_s(kind, self.now)
            assert wait_s >= 0.0 and (mine or wait_s == 0.0)
        queued = sum((waiter.work for waiter in self.waiting), NO_WORK)
        assert self.room.queued().prefill_s == pytest.approx(queued.prefill_s, abs=1e-6)
        stalled = {waiter.what for waiter, _, _ in self.room.stalled()}
        assert stalled == {
            waiter.what for waiter in self.waiting if any(not self.instances[stage] for stage in waiter.kind.stages)
        }


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_the_books_agree_with_whatever_is_done = Machine.TestCase
