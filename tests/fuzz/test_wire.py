"""Clients that break the rules of HTTP, or have no time for it: every connection ends, and the server goes on."""

import random
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest

from tests.fuzz.size import numbers, randomness
from tests.fuzz.victim import Victim
from tests.fuzz.wire import QUICK, SLOW, line

TOGETHER = 16  # clients at the same time
BATCH = 100
DOCUMENTED = {503, 504}  # a client may ask for an answer within a millisecond
SLOW_SHARE = 0.1  # of the clients


@pytest.mark.timeout(3600)
def test_every_connection_ends_and_no_other_suffers(target: Victim) -> None:
    cases = numbers(short=120, share=0.15)
    with ThreadPoolExecutor(TOGETHER) as pool:
        for first in range(cases.start, cases.stop, BATCH):
            batch = range(first, min(first + BATCH, cases.stop))
            faults = [fault for fault in pool.map(lambda number: tried(target, number), batch) if fault]
            assert not faults, "\n".join(faults)
            target.check_answers()
    target.check_unharmed()


def tried(target: Victim, number: int) -> str | None:
    """What was wrong with how one client was treated."""
    rng = randomness("wire", number)
    behave = rng.choice(SLOW if rng.random() < SLOW_SHARE else QUICK)
    began = monotonic()
    with line(target.url) as one:
        try:
            heard = behave(one, rng)
        except OSError as error:
            return f"TRIPTYCH_FUZZ_FIRST={number}: {behave.__name__} after {monotonic() - began:.1f} s: {error!r}"
    for status in heard.statuses or [0]:  # 0: the connection ended without a word
        target.note(status, monotonic() - began, f"wire {number} {behave.__name__}")
    fine = all(status == 200 or 400 <= status < 500 or status in DOCUMENTED for status in heard.statuses)
    answered = heard.left or heard.statuses or behave not in MUST_ANSWER
    if fine and answered and b"internal_error" not in heard.data:
        return None
    return f"TRIPTYCH_FUZZ_FIRST={number}: {behave.__name__}: heard {heard.statuses}, {heard.data[-500:]!r}"


MUST_ANSWER = tuple(
    behave for behave in QUICK if behave.__name__ in ("good", "good_chunks", "pipelined", "odd_headers")
)


def test_a_stuck_crowd_keeps_nobody_waiting(target: Victim) -> None:
    """Hundreds of clients that stop in the middle of their head: good ones are answered meanwhile, at once."""
    rng = random.Random(0)
    lines = [line(target.url) for _ in range(300)]
    opened = [one.__enter__() for one in lines]
    try:
        for one in opened:
            one.say(b"POST /v1/chat/completions HTTP/1.1\r\nx: " + rng.randbytes(5).hex().encode())
        target.check_answers()
        assert all(status in (408, 400) for one in opened for status in one.hear().statuses)
    finally:
        for each in lines:
            each.__exit__(None, None, None)
    target.check_unharmed()
