"""One suspect at a time."""

from typing import Any, cast

from triptych.router.attempts import Task
from triptych.router.quarantine import Quarantine

A, B, C = (cast(Task, object()) for _ in range(3))


def quarantined(*tasks: Any) -> Quarantine:
    suspects = Quarantine()
    for task in tasks:
        suspects.add(task)
    return suspects


def test_the_next_suspect_goes_when_the_one_before_is_none_any_more() -> None:
    suspects = quarantined(A, B)
    assert suspects.next() is A
    assert suspects.is_out(A) and not suspects.is_out(B)
    assert suspects.next() is None
    suspects.discard(A)
    assert suspects.next() is B
    suspects.discard(B)
    assert suspects.next() is None


def test_one_that_ends_before_its_turn_never_has_it() -> None:
    suspects = quarantined(A, B, C)
    suspects.next()
    suspects.discard(B)
    suspects.discard(B)
    suspects.discard(A)
    assert suspects.next() is C
