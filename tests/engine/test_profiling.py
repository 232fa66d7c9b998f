"""Measuring the engine: every stage gets samples, and they say what was in its steps."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.checkpoints import make_checkpoint
from triptych.config import InstanceConfig, ModelConfig
from triptych.core import EncodeUnit, EncodeWork, Media, UnitHash
from triptych.engine import neighbour, profiling
from triptych.engine.profiling import ENCODE, FITTED, Effort, Measured, Profiler, encode_samples
from triptych.engine.rig import Turn
from triptych.errors import InstanceError
from triptych.planning.costs.cost_model import STAGES
from triptych.planning.costs.fit import fit

LEAST = Effort(
    repeats=1,
    passes=1,
    sides=(56, 112),
    picture_batches=(2,),
    batches=(1, 4),
    output_tokens=4,
    most_context=200,
    switches=1,
    pings=8,
    comparisons=1,
)


@pytest.fixture(scope="module")
def done() -> Counter[str]:
    return Counter()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, done: Counter[str]) -> Measured:
    folder = make_checkpoint("qwen2_vl", tmp_path_factory.mktemp("checkpoint"))
    model = ModelConfig(path=str(folder), name="tiny", max_model_len=256)
    told = partial(done.update, ["steps"])
    return Profiler(model, threads=1, transfer="shm", effort=LEAST, sides=(224, 448), done=told).run()


def test_pictures_are_told_by_their_rows(measured: Measured) -> None:
    assert set(measured.rows) == {224, 448}
    assert all(rows and min(rows) > 0 for rows in measured.rows.values())
    assert measured.lead_tokens > 0


def test_every_stage_has_samples_that_took_time(measured: Measured) -> None:
    for stage in FITTED:
        samples = measured.stages[stage]
        assert samples
        assert all(sample.seconds > 0 for sample in samples)


def test_costs_can_be_fitted_to_every_stage(measured: Measured) -> None:
    for stage, names in FITTED.items():
        found = fit(measured.stages[stage], names)
        assert sum(found.costs.values()) > 0
        assert found.residual.samples == len(measured.stages[stage])


def test_steps_say_what_was_in_them(measured: Measured) -> None:
    encoded = [sample.amounts for sample in measured.stages["encode"]]
    pictures = {amounts["encode_item"] for amounts in encoded}
    pixels = {amounts["encode_pixel"] / amounts["encode_item"] for amounts in encoded if amounts["encode_item"]}
    assert 1.0 in pictures
    assert pixels == {56.0 * 56, 112.0 * 112}
    assert {sample.amounts["decode_sequence"] for sample in measured.stages["decode"]} >= {1.0, 4.0}
    assert {8.0, 16.0, 32.0, 64.0, 128.0} <= {sample.amounts["prefill_token"] for sample in measured.stages["prefill"]}


def test_a_picture_is_read_by_the_first_step_with_a_unit_of_it() -> None:
    def work(picture: bytes, index: int) -> EncodeWork:
        unit = EncodeUnit(UnitHash(picture + bytes([index])), "image", 9, index)
        return EncodeWork(unit, Media(picture, "image", b""), [])

    steps = [[work(b"a", 0), work(b"a", 1)], [], [work(b"a", 2), work(b"b", 0)], [work(b"b", 1)]]
    samples = encode_samples([Turn(0.1, works=works) for works in steps], pixels=100)
    assert [[sample.amounts[name] for name in ENCODE] for sample in samples] == [
        [1.0, 1.0, 100.0, 2.0, 18.0, 162.0],
        [1.0, 1.0, 100.0, 2.0, 18.0, 162.0],
        [1.0, 0.0, 0.0, 1.0, 9.0, 81.0],
    ]


def test_messages_and_switches_are_timed(measured: Measured) -> None:
    assert measured.seconds.keys() == {"turn", "message", "switch_weights", "switch_books"}
    assert all(seconds > 0 for seconds in measured.seconds.values())


def test_steps_are_compared_with_those_beside_another_engine_where_there_is_a_core_for_it(measured: Measured) -> None:
    is_room = len(os.sched_getaffinity(0)) > 1
    assert measured.crowding.keys() == ({f"{stage}_crowding" for stage in STAGES} if is_room else set())
    assert all(0 <= share < 10 for share in measured.crowding.values())
    assert not measured.notes


def test_memory_is_that_of_the_checkpoint(measured: Measured) -> None:
    memory = measured.memory
    assert memory is not None
    assert memory.encoder_weights > 0
    assert memory.language_weights > 0
    assert memory.context_len == 256
    assert memory.device > memory.language_weights


def test_progress_is_told_step_by_step(measured: Measured, done: Counter[str]) -> None:
    assert done["steps"] == Profiler.steps


def ends_at_once(connection: Connection, config: InstanceConfig) -> None:
    pass


def has_no_room(connection: Connection, config: InstanceConfig) -> None:
    connection.send("no memory for it")


def ends_while_it_works(connection: Connection, config: InstanceConfig) -> None:
    connection.send(None)
    connection.recv()
    connection.send(None)


@pytest.mark.parametrize(
    ("beside", "told"),
    [(ends_at_once, "ended"), (has_no_room, "no memory for it"), (ends_while_it_works, "ended")],
)
def test_a_machine_without_room_for_a_second_engine_is_told_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    beside: Callable[[Connection, InstanceConfig], None],
    told: str,
) -> None:
    monkeypatch.setattr(neighbour, "work_beside", beside)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    model = ModelConfig(path=str(make_checkpoint("qwen2_vl", tmp_path)), name="tiny", max_model_len=256)
    profiler = Profiler(model, threads=1, transfer="shm", effort=LEAST, sides=(224,), done=lambda: None)
    found = profiler.run()
    assert not found.crowding
    assert [note for note in found.notes if "beside" in note and told in note]
    assert found.stages["decode"]
    assert not multiprocessing.active_children()


class Working:
    """A neighbour that says whether it works."""

    is_working = False

    def __init__(self, config: object) -> None:
        pass

    @contextmanager
    def working(self) -> Iterator[None]:
        Working.is_working = True
        yield
        Working.is_working = False

    def close(self) -> None:
        assert not Working.is_working


@pytest.mark.parametrize(("threads", "comparisons"), [(1, 1), (1, 6), (2, 7)])
def test_what_steps_take_longer_beside_another_engine_counts_for_each_of_its_cores(
    monkeypatch: pytest.MonkeyPatch, threads: int, comparisons: int
) -> None:
    monkeypatch.setattr(neighbour, "Neighbour", Working)
    monkeypatch.setattr(
        neighbour,
        "usual_steps",
        lambda rig, config: {"encode": 0.02, "decode": 0.012 if Working.is_working else 0.01},
    )
    beside = SimpleNamespace(threads=threads)
    found = neighbour.crowding(None, beside, comparisons)  # type: ignore[arg-type]
    assert found == {"encode_crowding": 0.0, "decode_crowding": pytest.approx(0.2 / threads)}


def never_answers(there: str, back: str) -> None:
    pass


def test_a_process_that_dies_while_it_is_measured_ends_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "echo", never_answers)
    monkeypatch.setattr(profiling, "ECHO_LIMIT_MS", 100)
    model = ModelConfig(path=str(make_checkpoint("qwen2_vl", tmp_path)), name="tiny", max_model_len=256)
    profiler = Profiler(model, threads=1, transfer="shm", effort=LEAST, sides=(224,), done=lambda: None)
    with pytest.raises(InstanceError, match="silent"):
        profiler.run()
