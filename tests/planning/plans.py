"""Questions and rows of plans with defaults that stay out of the way."""

from typing import Any

from tests.planning.places import make_candidate
from triptych.planning.costs.analytic import analytic_profile
from triptych.planning.costs.hardware import find_device
from triptych.planning.model.shapes import find_shape
from triptych.planning.quantities import PerSecond, Seconds
from triptych.planning.search.goals import Goal, HighestRate
from triptych.planning.search.plan import Question, Row
from triptych.planning.simulation.figures import Figures
from triptych.planning.workloads.arrivals import Poisson
from triptych.planning.workloads.kinds import Images, Kind
from triptych.planning.workloads.workload import Slo, Workload

SHAPE = find_shape("qwen2.5-vl-7b")
PROFILE = analytic_profile(SHAPE, find_device("A100-80G"))
PHOTOS = Kind(text_tokens=30, output_tokens=8, images=Images(size="1024x768", count=2))
SLO = Slo(ttft=Seconds(1), tpot=Seconds(0.05))


def make_workload(**changes: Any) -> Workload:
    usual = {"arrivals": Poisson(rate=PerSecond(4)), "kinds": {"photos": PHOTOS}, "num_requests": 40, "slo": SLO}
    return Workload(**{"name": "photos", **usual, **changes})


def make_question(
    workload: Workload | None = None,
    *,
    num_gpus: int = 3,
    num_requests: int = 20,
    num_confirming: int | None = 40,
    slo: Slo = SLO,
) -> Question:
    return Question.of(
        where="photos.json",
        workload=workload or make_workload(),
        rows_of=SHAPE,
        slo=slo,
        profiles={1: PROFILE},
        num_gpus=num_gpus,
        choices={},
        num_requests=num_requests,
        num_confirming=num_confirming,
    )


def make_row(
    placement: str,
    rate: float,
    cost: float = 6.0,
    *,
    goal: Goal | None = None,
    price: float | None = 6.0,
    **options: Any,
) -> Row:
    goal = goal or HighestRate()
    return Row(
        candidate=make_candidate(placement, **options),
        rate=rate,
        cost=cost,
        score=goal.score(min(rate, goal.most), cost),
        runs=[make_figures(price, share) for share in (0.92, 0.9, 0.95)],
    )


def make_figures(price: float | None, share: float) -> Figures:
    return Figures(
        num_requests=40,
        num_failed=0,
        ttft_ms=None,
        tpot_ms=None,
        itl_ms=None,
        e2e_ms=None,
        duration_s=10.0,
        sent_per_s=4.0,
        requests_per_s=4.0,
        prompt_tokens_per_s=0.0,
        output_tokens_per_s=0.0,
        slo_attainment=share,
        goodput_requests_per_s=4 * share,
        dollars_per_hour=price,
        dollars_per_1000_met=None,
        idle={"epd": 0.5},
    )
