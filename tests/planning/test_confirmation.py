"""Rates that a few requests seem to allow are lowered until longer runs keep them, which `simulate` can repeat."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.planning.places import make_candidate
from tests.planning.plans import PROFILE, SHAPE, make_question, make_workload
from triptych.latency import Objectives
from triptych.planning.quantities import Seconds
from triptych.planning.search.confirmation import At, different_seeds, enough_requests, kept, kept_rate
from triptych.planning.search.goals import HighestRate
from triptych.planning.search.plan import rows
from triptych.planning.search.scenario import Scenario
from triptych.planning.search.search import Found, processes
from triptych.planning.workloads.traces import Trace
from triptych.planning.workloads.workload import Period, Slo

WHOLE, SPLIT = make_candidate("2epd"), make_candidate("1ep1d")


def below(limit: float, asked: list[float]) -> Callable[[float], bool]:
    def attains(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    return attains


@pytest.mark.parametrize("limit", [0.00123, 0.8, 3.33, 7.5, 9.2, 77.0])
def test_a_kept_rate_is_found_to_four_percent_from_any_guess_in_three_digits(limit: float):
    for guess in (0.5 * limit, 0.97 * limit, 1.1 * limit, 3 * limit):
        asked: list[float] = []
        rate = kept_rate(below(limit, asked), guess, least=limit / 100, most=limit * 100)
        assert limit / 1.05 <= rate <= limit
        assert rate == float(f"{rate:.3g}")
        assert len(asked) <= 14


def test_what_nothing_keeps_is_no_rate_and_what_is_beyond_a_bound_is_not_looked_for():
    assert kept_rate(lambda rate: False, 5.0, least=0.01, most=10.0) == 0.0
    assert kept_rate(lambda rate: True, 5.0, least=0.01, most=10.0) == 10.0
    assert kept_rate(lambda rate: rate <= 0.01, 5.0, least=0.01, most=10.0) == 0.01


def test_a_rate_of_few_requests_is_lowered_until_every_longer_run_keeps_it():
    """Twenty requests are over before a queue is long."""
    question = make_question(num_gpus=2, num_requests=20, num_confirming=400)
    short = question.evaluator.kept_rate(SPLIT)
    found = kept(question.runs, At(SPLIT, short))
    assert 0 < found.rate < 0.8 * short
    assert len(found.figures) == 3 and all((one.slo_attainment or 0.0) >= 0.9 for one in found.figures)
    assert any(question.runs.attained(SPLIT, 1.1 * found.rate, seed) is None for seed in (0, 1, 2))


def test_a_run_that_confirms_is_the_one_that_simulate_plays():
    runs = make_question(num_gpus=2).runs
    for seed in runs.seeds:
        scenario = Scenario(
            where="photos.json",
            workload=msgspec.structs.replace(runs.workload, seed=seed),
            rows_of=SHAPE,
            profile=PROFILE,
            candidate=WHOLE,
            objectives=Objectives(1000.0, 50.0, None),
            max_queue_s=3600.0,
        )
        assert runs.attained(WHOLE, 2.34, seed) == scenario.run(2.34).figures


def test_runs_can_be_sent_to_another_process():
    runs = make_question(num_gpus=2).runs
    assert pickle.loads(pickle.dumps(runs)).figures(WHOLE, 2.0, 1) == runs.figures(WHOLE, 2.0, 1)


def test_what_keeps_no_rate_in_longer_runs_is_no_row():
    question = make_question(num_gpus=2, slo=Slo(ttft=Seconds(0.001)))
    impossible = Found(WHOLE, 2.0, 3.58, 2.0)
    with processes(question.runs, 1) as ask:
        assert rows([impossible], HighestRate(), ask) == []


def test_runs_are_long_enough_for_their_rate():
    assert enough_requests(Objectives(4000.0, 50.0), 1.0) == 2000
    assert enough_requests(Objectives(4000.0, 50.0), 30.0) == 3600
    assert enough_requests(Objectives(None, None, 30_000.0), 100.0) == 5000
    assert make_question(num_confirming=None).runs.workload.num_requests == 2000


def test_runs_have_seeds_of_their_own_and_phases_come_at_the_rate_that_is_asked_for():
    workload = make_workload(seed=7)
    assert different_seeds(workload, 3) == (7, 8, 9)
    phased = make_workload(num_requests=None, phases=[Period(num_requests=5), Period(num_requests=6, rate_factor=2.0)])
    question = make_question(phased)
    assert math.isclose(question.runs.evaluator(2.0, 0).load.rate, 2.0)
    searched, confirmed = question.load.at(3.0), question.runs.demands(3.0, question.runs.seeds[0])
    assert [one.at_s for one in searched] == pytest.approx([one.at_s for one in confirmed])


def test_a_trace_is_confirmed_only_by_more_of_it_than_was_searched_with(tmp_path: Path):
    lines = ["Timestamp,Request tokens,Response tokens", *(f"{second},400,20" for second in range(30))]
    (tmp_path / "trace.csv").write_text("\n".join(lines))
    trace = Trace(format="burstgpt", path=str(tmp_path / "trace.csv"))
    recorded = make_workload(arrivals=None, kinds={}, num_requests=None, trace=trace)
    for searched, confirming, confirmed in ((10, 20, True), (30, 2000, False), (50, None, False), (10, 0, False)):
        question = make_question(recorded, num_requests=searched, num_confirming=confirming)
        assert question.is_confirmed is confirmed, (searched, confirming)
