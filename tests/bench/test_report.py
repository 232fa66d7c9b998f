import pytest
from rich.console import Console

from triptych.bench.client import Answer
from triptych.bench.options import BenchOptions
from triptych.bench.report import CpuSeconds, Record, Summary, show


def answer(sent_at: float, *token_times: float, tokens: int | None = None) -> Answer:
    return Answer(
        sent_at, 200, list(token_times), ended_at=token_times[-1] + 0.5, completion_tokens=tokens, prompt_tokens=10
    )


def test_a_record_has_the_times_of_its_tokens() -> None:
    record = Record.of(4, 0.9, 10.0, answer(11.0, 11.5, 11.7, 12.0, tokens=6))
    assert (record.index, record.scheduled_s, record.sent_s) == (4, 0.9, 1.0)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.tpot_s == pytest.approx(0.5 / 5)
    assert record.itl_s == pytest.approx([0.2, 0.3])
    assert record.e2e_s == pytest.approx(1.5)


def test_a_single_token_has_no_tpot() -> None:
    assert Record.of(0, 0, 0, answer(0, 1, tokens=1)).tpot_s is None


def test_failures_count_as_misses_and_as_nothing_else() -> None:
    options = BenchOptions(slo_ttft_ms=600, slo_tpot_ms=250)
    answers = [answer(0, 0.5, 0.7), answer(0, 0.5, 0.8), answer(0, 0.7, 0.8), Answer(0.0, error="x")]
    records = [Record.of(i, 0, 0, a) for i, a in enumerate(answers)]
    summary = Summary.of_run(options, records, 2.0, CpuSeconds(0.1))
    assert (summary.num_requests, summary.num_failed, summary.errors) == (4, 1, {"x": 1})
    assert summary.slo_attainment == 0.25
    assert summary.goodput_requests_per_s == 0.5
    assert summary.requests_per_s == 1.5
    assert summary.output_tokens_per_s == 3
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.p50 == pytest.approx(500)


def test_answers_that_arrive_in_one_piece_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*answers: Answer) -> str:
        records = [Record.of(i, 0, 0, one) for i, one in enumerate(answers)]
        show(Console(width=200), Summary.of_run(BenchOptions(), records, 2.0, CpuSeconds(0.1)))
        return capsys.readouterr().out

    whole, streamed = answer(0, 0.5, tokens=64), answer(0, 0.5, 0.502, 0.504, tokens=3)
    assert "2 of 3 answers arrived in one piece" in told(whole, streamed, whole)
    assert "in one piece" not in told(streamed, answer(0, 0.5, tokens=1), Answer(0.0, error="x"))


def test_nothing_but_failures_is_still_a_summary() -> None:
    summary = Summary.of_run(BenchOptions(), [Record.of(0, 0, 0, Answer(0.0, error="x"))], 1.0, CpuSeconds(0.0))
    assert summary.ttft_ms is None
    assert summary.slo_attainment is None
