"""The committed folder, used as any client of transformers would."""

import sys

import pytest

from triptych.demo import checkpoint_path
from triptych.demo.evaluate import Subject, evaluate, fresh_question, summary

MAX_BYTES = 20_000_000


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(checkpoint_path())


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in checkpoint_path().iterdir()) <= MAX_BYTES


def test_it_loads_without_torchvision(subject: Subject) -> None:
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("seed", range(8))
def test_it_answers(subject: Subject, seed: int) -> None:
    pictures, question = fresh_question(seed, held_out_wording=False)
    assert subject.answer(pictures, question.text) == question.answer


def test_the_evaluation_reports_shares() -> None:
    report = summary(evaluate(checkpoint_path(), 2, held_out_wording=True), held_out_wording=True)
    assert report["questions"] == 2
    assert report["exact_percent"] == 100 * (1 - len(report["errors"]) / 2)
