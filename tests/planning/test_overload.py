"""Five times as many requests as can be answered, on simulated time, through the server's own router."""

import random
from statistics import fmean

import pytest

from triptych.config import AdmissionConfig
from triptych.core import Placement
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation.frontend import Record
from triptych.planning.simulation.simulator import Options, Simulation
from triptych.planning.workloads.demand import Demand, Item

SHARED = Costs(  # two cores for everything
    encode_step=0.002, encode_unit=0.06, prefill_step=0.004, prefill_token=0.0002, decode_step=0.006,
    decode_sequence=0.0005, message=0.0003, transfer=0.0005, bytes_per_second=3e9, kv_token_bytes=8192,
    embedding_row_bytes=2048, cores=2.0, server_request=0.003, server_token=40e-6, client_request=0.001,
    client_token=50e-6,
)  # fmt: skip
SLO_TTFT_S, SLO_TPOT_S = 2.0, 0.4


def load(rate: float, seconds: float) -> list[Demand]:
    rng, now, demands = random.Random(1), 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        media = (Item((144,)),) if rng.random() < 0.5 else ()
        demands.append(Demand(now, media, text_tokens=32 if media else 64, output_tokens=16))
    return demands


def play(rate: float, seconds: float) -> list[Record]:
    admission = AdmissionConfig(max_queue_s=0.6, slo_ttft_ms=SLO_TTFT_S * 1e3, slo_tpot_ms=SLO_TPOT_S * 1e3)
    sizes = Sizes(max_num_seqs=64, decode_interval_ms=30)
    return Simulation(Placement.parse("1e1pd"), SHARED, sizes, Options(admission=admission)).run(load(rate, seconds))


def goodput(records: list[Record], seconds: float) -> float:
    met = [r for r in records if not r.error and r.ttft_s <= SLO_TTFT_S and (r.tpot_s or 0) <= SLO_TPOT_S]
    return len(met) / seconds


@pytest.mark.parametrize("times", [2.0, 5.0])
def test_more_requests_than_can_be_answered_do_not_make_fewer_answers_good(times):
    peak = max(goodput(play(rate, 10.0), 10.0) for rate in (24.0, 28.0, 32.0))
    assert goodput(play(28.0 * times, 20.0), 20.0) >= 0.9 * peak


def test_under_overload_both_kinds_are_answered():
    records = [record for record in play(100.0, 20.0) if not record.error]
    assert fmean(bool(record.demand.media) for record in records) > 0.1
