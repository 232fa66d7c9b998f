"""The black box: what a dead process was working on can be read by the living."""

import multiprocessing
import os
import signal
from pathlib import Path

from triptych.core import RequestId
from triptych.engine.black_box import NBYTES, BlackBox, read


def requests(*names: str) -> list[RequestId]:
    return [RequestId(name) for name in names]


def die_in_a_step(path: Path) -> None:
    box = BlackBox(path)
    box.record(requests("a.0", "b.3"))
    box.record(())
    box.record(requests("c.1", "d.0"))
    os.kill(os.getpid(), signal.SIGKILL)


def test_it_names_the_requests_of_the_step_in_which_a_process_was_killed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=die_in_a_step, args=(tmp_path / "box",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert read(tmp_path / "box") == ["c.1", "d.0"]


def test_nobody_is_named_between_steps(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box")
    assert read(tmp_path / "box") == []
    box.record(requests("a.0"))
    box.record(())
    assert read(tmp_path / "box") == []


def test_a_process_that_died_before_it_had_a_box_was_working_on_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "box") == []


def test_more_requests_than_fit_are_cut_off_and_the_box_stays_readable(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box")
    box.record(requests(*(f"request-{i}.0" for i in range(NBYTES))))
    found = read(tmp_path / "box")
    assert found[:2] == ["request-0.0", "request-1.0"]
    assert 1000 < len(found) < NBYTES
