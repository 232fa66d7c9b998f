"""Candidates, machines and loads with defaults that stay out of the way."""

from triptych.core import Placement
from triptych.latency import Objectives
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.sizes import Sizes
from triptych.planning.search.evaluation import Evaluator
from triptych.planning.search.load import Load
from triptych.planning.search.machines import FixedMachines
from triptych.planning.search.space import Candidate
from triptych.planning.workloads.demand import Item, Phase, poisson

COSTS = Costs(
    encode_row=0.001, prefill_step=0.01, prefill_token=0.0004, decode_step=0.01, decode_sequence=0.001, message=0.0
)
PICTURES = (Item((200, 200)), Item((200,)))  # 0.6 s to encode, 0.25 s to prefill


def make_candidate(placement: str, **options: object) -> Candidate:
    return Candidate(placement=Placement.parse(placement), **options)


def make_load(number: int = 100, *, media: tuple[Item, ...] = PICTURES, answer: int = 20, rate: float = 1.0) -> Load:
    return Load(poisson([Phase(number, answer, media)], rate=rate, seed=1), rate)


def make_evaluator(
    load: Load | None = None,
    *,
    costs: Costs = COSTS,
    ttft_ms: float | None = 2000.0,
    tpot_ms: float | None = 40.0,
    target: float = 0.9,
    price: float | None = 2.0,
) -> Evaluator:
    machines = FixedMachines(costs, Sizes(), price)
    return Evaluator(load or make_load(), machines, Objectives(ttft_ms, tpot_ms), target)
