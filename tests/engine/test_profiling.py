"""Measuring the engine: every stage gets samples, and they say what was in its steps."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from triptych.config import ModelConfig
from triptych.engine import profiling
from triptych.engine.profiling import FITTED, Effort, Measured, Profiler
from triptych.errors import InstanceError
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
    pictures = {sample.amounts["encode_item"] for sample in measured.stages["encode"]}
    pixels = {sample.amounts["encode_pixel"] / sample.amounts["encode_item"] for sample in measured.stages["encode"]}
    assert 1.0 in pictures
    assert pixels == {56.0 * 56, 112.0 * 112}
    assert {sample.amounts["decode_sequence"] for sample in measured.stages["decode"]} >= {1.0, 4.0}
    assert {8.0, 16.0, 32.0, 64.0, 128.0} <= {sample.amounts["prefill_token"] for sample in measured.stages["prefill"]}


def test_messages_and_switches_are_timed(measured: Measured) -> None:
    assert measured.seconds.keys() == {"turn", "message", "switch_weights", "switch_books"}
    assert all(seconds > 0 for seconds in measured.seconds.values())


def test_memory_is_that_of_the_checkpoint(measured: Measured) -> None:
    memory = measured.memory
    assert memory is not None
    assert memory.encoder_weights > 0
    assert memory.language_weights > 0
    assert memory.context_len == 256
    assert memory.device > memory.language_weights


def test_progress_is_told_step_by_step(measured: Measured, done: Counter[str]) -> None:
    assert done["steps"] == Profiler.steps


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
