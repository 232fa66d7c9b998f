"""A timeline is valid JSON however it ends, and what is told appears once, on its track."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.errors import ConfigError
from triptych.timeline import Timeline, timeline_file


def written(*calls: tuple[Any, ...], began_s: float = 0.0) -> list[dict[str, Any]]:
    """The events of calls, each the name of a method and its arguments."""
    stream = io.BytesIO()
    timeline = Timeline(stream, began_s)
    for name, *arguments in calls:
        getattr(timeline, name)(*arguments)
    timeline.close()
    return json.loads(stream.getvalue())


def of(events: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    return [event for event in events if fields.items() <= event.items()]


def test_a_step_is_a_slice_on_the_track_of_its_instance():
    events = written(
        ("instance", "i0", "e", 10.0),
        ("instance", "i1", "d", 10.0),
        ("step", "i1", "decode", 10.5, 10.75, 3),
        began_s=10.0,
    )
    (step,) = of(events, ph="X")
    assert (step["name"], step["ts"], step["dur"], step["args"]) == ("decode", 5e5, 2.5e5, {"batch": 3})
    (track,) = of(events, ph="M", name="thread_name", tid=step["tid"])
    assert track["args"] == {"name": "i1"}


def test_an_instance_that_was_told_to_end_is_not_lost():
    events = written(
        ("instance", "i0", "e", 0.0), ("stopped", "i0", 1.0), ("instance", "i1", "d", 0.0), ("lost", "i1", 1.0)
    )
    assert [(event["tid"], event["name"]) for event in of(events, ph="i")] == [
        (1, "e"), (1, "stopped"), (2, "d"), (2, "lost")
    ]  # fmt: skip


def test_a_step_of_an_unknown_size_says_nothing_of_it():
    (step,) = of(written(("step", "i0", "encode", 0.0, 1.0)), ph="X")
    assert "args" not in step


def test_a_request_is_an_outer_slice_with_two_parts():
    events = written(("queued", "r1", 1.0), ("first_token", "r1", 2.0), ("ended", "r1", 4.0, "finished", 9))
    phases = [(event["ph"], event["name"], event["ts"]) for event in of(events, cat="request", id="r1")]
    assert phases == [
        ("b", "r1", 1e6),
        ("b", "to first token", 1e6),
        ("e", "to first token", 2e6),
        ("b", "answer", 2e6),
        ("e", "answer", 4e6),
        ("e", "r1", 4e6),
    ]
    assert events[-1]["args"] == {"outcome": "finished", "tokens": 9}


def test_what_comes_late_or_twice_is_left_out():
    events = written(
        ("first_token", "r1", 1.0),
        ("queued", "r1", 1.0),
        ("queued", "r1", 1.5),
        ("ended", "r1", 2.0, "deadline_exceeded"),
        ("first_token", "r1", 3.0),
        ("ended", "r1", 3.0, "finished"),
    )
    assert [event["ts"] for event in of(events, cat="request")] == [1e6, 1e6, 2e6, 2e6]


def test_a_request_that_is_open_at_the_end_is_closed():
    events = written(("queued", "r1", 1.0), ("step", "i0", "encode", 1.0, 5.0))
    assert events[-1] == {**events[-1], "ph": "e", "ts": 5e6, "args": {"outcome": "unfinished", "tokens": 0}}


def test_roles_losses_and_returns_are_instants_and_a_role_that_stays_is_told_once():
    events = written(
        ("instance", "i0", "e", 0.0), ("instance", "i0", "e", 1.0), ("instance", "i0", "d", 2.0), ("lost", "i0", 3.0),
        ("instance", "i0", "d", 4.0),
    )  # fmt: skip
    marks = [(event["name"], event["ts"]) for event in of(events, ph="i")]
    assert marks == [("e", 0.0), ("e to d", 2e6), ("lost", 3e6), ("lost to d", 4e6)]
    assert len(of(events, name="thread_name")) == 1


CALLS = st.one_of(
    st.tuples(st.just("queued"), st.sampled_from("abc"), st.floats(0, 9)),
    st.tuples(st.just("first_token"), st.sampled_from("abc"), st.floats(0, 9)),
    st.tuples(st.just("ended"), st.sampled_from("abc"), st.floats(0, 9), st.text(max_size=9)),
    st.tuples(st.just("instance"), st.text(max_size=3), st.sampled_from("epd"), st.floats(0, 9)),
    st.tuples(st.just("lost"), st.text(max_size=3), st.floats(0, 9)),
)


@given(st.lists(CALLS, max_size=30))
def test_whatever_is_told_every_slice_that_begins_ends_inside_the_one_around_it(calls):
    open_slices: dict[str, list[str]] = {}
    for event in of(written(*calls), cat="request"):
        stack = open_slices.setdefault(event["id"], [])
        if event["ph"] == "b":
            stack.append(event["name"])
        else:
            assert stack.pop() == event["name"]
    assert not any(open_slices.values())


def test_a_file_that_breaks_off_lacks_nothing_but_its_bracket(tmp_path: Path):
    path = tmp_path / "trace.json"
    with timeline_file(path, "--timeline") as timeline:
        timeline.step("i0", "encode", 0.0, 1.0)
        timeline.flush()
        assert len(json.loads(path.read_text() + "]")) == 4
    assert len(json.loads(path.read_text())) == 4


def test_a_file_is_valid_after_an_error(tmp_path: Path):
    path = tmp_path / "trace.json"
    with contextlib.suppress(KeyboardInterrupt), timeline_file(path, "--timeline") as timeline:
        timeline.queued("r1", 1.0)
        raise KeyboardInterrupt
    assert len(json.loads(path.read_text())) == 6


def test_a_file_that_cannot_be_written_is_named_with_its_flag(tmp_path: Path):
    with (
        pytest.raises(ConfigError, match=r"--timeline: .*missing.* cannot be written: No such file"),
        timeline_file(tmp_path / "missing" / "trace.json", "--timeline"),
    ):
        pass
