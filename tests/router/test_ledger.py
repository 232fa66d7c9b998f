"""Bytes that requests hold: never more than the bound, never lost, and never kept by one that is slow."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from triptych.errors import RequestError
from triptych.router.ledger import FAIR_BYTES_PER_S, FAIR_GRACE_S, Ledger, Reservation, body_cost

KIB, MIB = 1 << 10, 1 << 20
BOUND = 8 * MIB  # of which 1 MiB is for small requests without media


class HandClock:
    def __init__(self) -> None:
        self.now = 0.0

    def after(self, seconds: float, action: Callable[..., None], /, *arguments: object) -> None:
        raise AssertionError("a ledger needs no timer")


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def ledger(clock: HandClock) -> Iterator[Ledger]:
    ledger = Ledger(BOUND, clock)  # type: ignore[arg-type]
    yield ledger
    ledger.check_integrity()


@contextmanager
def refused(status: int = 503, code: str = "overloaded") -> Iterator[None]:
    with pytest.raises(RequestError) as caught:
        yield
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.retry_after_s


def test_media_of_all_requests_are_bounded_together(ledger: Ledger) -> None:
    first, second = ledger.reserve(), ledger.reserve()
    first.take(4 * MIB)
    with refused():
        second.take(4 * MIB)
    second.take(3 * MIB)
    with refused():
        first.take(1)
    assert ledger.num_bytes == 7 * MIB, "who is refused keeps what it had"
    second.close()
    first.take(1)


def test_a_request_that_is_alone_may_be_larger_than_the_bound(ledger: Ledger) -> None:
    with ledger.reserve() as large:
        large.expect(100 * MIB)
        large.arrive(100 * MIB)
        large.take(10 * MIB)
        with ledger.reserve() as other, refused():
            other.take(1)
        ledger.check_integrity()
    assert ledger.num_bytes == 0


def test_text_has_room_whatever_is_held_of_media(ledger: Ledger) -> None:
    ledger.reserve().take(100 * MIB)
    small = [ledger.reserve() for _ in range(50)]
    for one in small:
        one.arrive(10 * KIB)
    with ledger.reserve() as large, refused():
        large.arrive(200 * KIB)


def test_a_small_picture_does_not_count_as_text(ledger: Ledger) -> None:
    large, small = ledger.reserve(), ledger.reserve()
    large.take(7 * MIB)
    small.arrive(10 * KIB)
    with refused():
        small.keep(5 * KIB)
    with refused():
        ledger.reserve().take(5 * KIB)
    large.keep(6 * MIB)
    small.keep(5 * KIB)
    small.keep(0)
    assert ledger.num_bytes == 6 * MIB


def test_letting_go_is_never_refused(clock: HandClock) -> None:
    ledger = Ledger(8 * KIB, clock)  # type: ignore[arg-type]
    small, large = ledger.reserve(), ledger.reserve()
    small.arrive(10 * KIB)
    large.take(10 * KIB)
    large.keep(0)
    ledger.check_integrity()
    assert ledger.num_bytes == small.num_bytes


def test_a_body_counts_as_much_as_its_head_says_before_it_is_here(ledger: Ledger) -> None:
    first, second = ledger.reserve(), ledger.reserve()
    first.expect(3 * MIB)
    with refused():
        second.expect(2 * MIB)
    for _ in range(3):
        first.arrive(MIB)
    assert ledger.num_bytes == body_cost(3 * MIB)
    first.keep(2 * MIB)
    second.expect(2 * MIB)


def test_of_a_body_whose_length_nobody_knows_what_is_here_counts(ledger: Ledger) -> None:
    first, second = ledger.reserve(), ledger.reserve()
    second.take(5 * MIB)
    first.arrive(MIB)
    with refused():
        first.arrive(MIB)
    assert ledger.num_bytes == 5 * MIB + body_cost(MIB)


def test_a_body_that_comes_slowly_gives_its_place_up_when_another_needs_it(ledger: Ledger, clock: HandClock) -> None:
    hurried: list[str] = []
    with ExitStack() as stack:
        slow, fair = ledger.reserve(), ledger.reserve()
        stack.enter_context(slow.arriving(lambda: hurried.append("slow")))
        stack.enter_context(fair.arriving(lambda: hurried.append("fair")))
        slow.expect(2 * MIB)
        fair.expect(MIB)
        clock.now = FAIR_GRACE_S + 1.0
        slow.arrive(KIB)
        fair.arrive(2 * FAIR_BYTES_PER_S)
        assert not hurried, "as long as there is room nobody is hurried"
        ledger.reserve().expect(2 * MIB)
        assert hurried == ["slow"]
        with refused(408, "request_timeout"):
            slow.arrive(KIB)
        with refused():
            ledger.reserve().expect(2 * MIB)
        fair.arrive(KIB)
    assert hurried == ["slow"]


def test_nobody_is_hurried_in_vain(ledger: Ledger, clock: HandClock) -> None:
    hurried: list[str] = []
    ledger.reserve().take(5 * MIB)
    slow = ledger.reserve()
    with slow.arriving(lambda: hurried.append("slow")):
        slow.expect(MIB)
        clock.now = FAIR_GRACE_S + 1.0
        with refused():
            ledger.reserve().take(3 * MIB)
        assert not hurried
    clock.now += 60.0
    with refused():
        ledger.reserve().take(2 * MIB)
    assert not hurried, "its body is here"


def test_every_refusal_is_told(clock: HandClock) -> None:
    told: list[RequestError] = []
    ledger = Ledger(BOUND, clock, told.append)  # type: ignore[arg-type]
    ledger.reserve().take(BOUND)
    with refused():
        ledger.reserve().take(1)
    assert [error.code for error in told] == ["overloaded"]


class Requests(RuleBasedStateMachine):
    """Bodies that come in pieces at any pace, media beside them, prompts that are made of them, in any order."""

    requests = Bundle("requests")
    sizes = st.one_of(st.integers(0, 100 * KIB), st.integers(0, 3 * MIB))

    def __init__(self) -> None:
        super().__init__()
        self.clock = HandClock()
        self.ledger = Ledger(BOUND, self.clock)  # type: ignore[arg-type]
        self.arriving: dict[Reservation, ExitStack] = {}
        self.live: set[Reservation] = set()

    @rule(target=requests, length=st.none() | sizes)
    def begin(self, length: int | None) -> Reservation:
        request = self.ledger.reserve()
        self.live.add(request)
        stack = self.arriving[request] = ExitStack()
        stack.enter_context(request.arriving(lambda: self.forget(request)))
        if length is not None:
            self.attempt(request, lambda: request.expect(length))
        return request

    @rule(request=requests, size=sizes)
    def arrive(self, request: Reservation, size: int) -> None:
        if request in self.arriving:
            self.attempt(request, lambda: request.arrive(size))

    @rule(request=requests, size=sizes)
    def take(self, request: Reservation, size: int) -> None:
        if request in self.live:
            self.end_of_body(request)
            self.attempt(request, lambda: request.take(size))

    @rule(request=requests, size=sizes)
    def keep(self, request: Reservation, size: int) -> None:
        if request in self.live:
            self.end_of_body(request)
            self.attempt(request, lambda: request.keep(size))

    @rule(request=consumes(requests))
    def end(self, request: Reservation) -> None:
        self.forget(request)
        request.close()

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: len(self.live) > 5)
    @rule(target=requests)
    def end_all(self) -> object:
        for request in list(self.live):
            self.end(request)
        assert self.ledger.num_bytes == 0
        return multiple()

    @invariant()
    def books_are_right(self) -> None:
        self.ledger.check_integrity()
        assert self.ledger.num_bytes == sum(request.num_bytes for request in self.live)
        holders = sum(request.num_bytes > 0 for request in self.live)
        assert self.ledger.num_bytes <= BOUND or holders <= 1 + sum(not one.has_media for one in self.live)

    def attempt(self, request: Reservation, action: Callable[[], None]) -> None:
        before = request.num_bytes
        others = self.ledger.num_bytes - before
        with suppress(RequestError):
            action()
            return
        assert others, "the only one is never refused"
        assert request.num_bytes == before

    def end_of_body(self, request: Reservation) -> None:
        stack = self.arriving.pop(request, None)
        if stack is not None:
            stack.close()

    def forget(self, request: Reservation) -> None:
        """It was displaced, or has ended."""
        self.end_of_body(request)
        self.live.discard(request)


Requests.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRequests = Requests.TestCase
