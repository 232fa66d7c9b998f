"""Who is found to hang, on a clock of ticks that the test makes."""

import pytest

from triptych.control.liveness import LOADING_SILENT_TICKS, SILENT_TICKS, STRIKE_TICKS, STUCK_S, Liveness
from triptych.core import InstanceId

A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")


def watching(*instances: InstanceId) -> Liveness:
    liveness = Liveness()
    for instance in instances:
        liveness.watch(instance)
    return liveness


def tick(liveness: Liveness, number: int, alive: tuple[InstanceId, ...] = ()) -> dict[InstanceId, str]:
    """What the last of that many ticks found, with signs of life before each."""
    accused: dict[InstanceId, str] = {}
    for _ in range(number):
        for instance in alive:
            liveness.alive(instance, turning_s=0.0)
        accused = liveness.tick()
    return accused


def test_an_instance_is_accused_after_so_many_silent_ticks_and_the_others_are_not() -> None:
    liveness = watching(A, B)
    assert tick(liveness, SILENT_TICKS - 1, alive=(B,)) == {}
    assert tick(liveness, 1, alive=(B,)) == {A: "no sign of life for 1.5 s"}


def test_one_sign_of_life_is_enough_to_start_the_count_again() -> None:
    liveness = watching(A)
    for _ in range(3):
        assert tick(liveness, SILENT_TICKS - 1) == {}
        liveness.alive(A, turning_s=0.0)


def test_a_late_tick_counts_as_one() -> None:
    """On a starved machine the owner is late too: all that time is a single tick for it."""
    liveness = watching(A)
    tick(liveness, SILENT_TICKS - 2)
    assert tick(liveness, 1) == {}


def test_an_engine_that_stays_in_one_step_is_accused_unless_it_may_take_long() -> None:
    liveness = watching(A)
    liveness.alive(A, turning_s=STUCK_S + 1)
    assert liveness.tick(may_take_long={A}) == {}
    assert liveness.tick() == {A: "its engine has been in one step for 121 s"}
    liveness.alive(A, turning_s=STUCK_S)
    assert liveness.tick() == {}


def test_who_is_not_watched_is_never_accused() -> None:
    liveness = watching(A)
    liveness.forget(A)
    liveness.alive(A, turning_s=1e6)
    assert tick(liveness, 100) == {}
    assert liveness.unreachable(reader=A, holder=B) is None


def test_a_new_incarnation_starts_with_a_clean_slate() -> None:
    liveness = watching(A, B)
    tick(liveness, SILENT_TICKS - 1)
    liveness.unreachable(reader=B, holder=A)
    liveness.watch(A)
    assert A not in tick(liveness, 1)
    assert liveness.unreachable(reader=B, holder=A) == B, "it was named twice, the new A once"


def test_a_holder_that_two_cannot_read_from_is_to_blame() -> None:
    liveness = watching(A, B, C)
    assert liveness.unreachable(reader=A, holder=C) is None
    assert liveness.unreachable(reader=B, holder=C) == C


def test_a_reader_that_can_read_from_nobody_is_to_blame() -> None:
    liveness = watching(A, B, C)
    assert liveness.unreachable(reader=A, holder=B) is None
    assert liveness.unreachable(reader=A, holder=C) == A


def test_of_two_that_are_named_equally_often_the_holder_is_to_blame() -> None:
    liveness = watching(A, B)
    assert liveness.unreachable(reader=A, holder=B) is None
    assert liveness.unreachable(reader=A, holder=B) == B


@pytest.mark.parametrize(("ticks", "blamed"), [(STRIKE_TICKS - 1, B), (STRIKE_TICKS, None)])
def test_complaints_count_for_half_a_minute(ticks: int, blamed: InstanceId | None) -> None:
    liveness = watching(A, B)
    liveness.unreachable(reader=A, holder=B)
    tick(liveness, ticks, alive=(A, B))
    assert liveness.unreachable(reader=A, holder=B) == blamed


def test_who_was_right_about_somebody_is_not_to_blame_for_one_more_failure_elsewhere() -> None:
    liveness = watching(A, B, C)
    assert liveness.unreachable(reader=A, holder=C) is None
    assert liveness.unreachable(reader=A, holder=C) == C
    liveness.forget(C)
    assert liveness.unreachable(reader=A, holder=B) is None
    assert liveness.unreachable(reader=A, holder=B) == B


def test_who_could_not_read_from_one_that_died_by_itself_is_not_to_blame_either() -> None:
    liveness = watching(A, B, C)
    liveness.unreachable(reader=A, holder=C)
    liveness.forget(C)
    assert liveness.unreachable(reader=A, holder=B) is None


def test_who_cannot_read_from_the_next_incarnation_either_is_to_blame() -> None:
    """Otherwise a broken reader would have its only holder killed again and again."""
    liveness = watching(A, B)
    liveness.unreachable(reader=A, holder=B)
    assert liveness.unreachable(reader=A, holder=B) == B
    liveness.forget(B)
    liveness.watch(B)
    assert liveness.unreachable(reader=A, holder=B) == A


def test_one_that_loads_may_be_silent_for_longer() -> None:
    liveness = watching(B)
    liveness.watch(A, loads=True)
    assert tick(liveness, LOADING_SILENT_TICKS - 1, alive=(B,)) == {}
    assert tick(liveness, 1, alive=(B,)) == {A: "no sign of life for 15 s"}
    liveness.watch(A)
    assert A in tick(liveness, SILENT_TICKS, alive=(B,))
