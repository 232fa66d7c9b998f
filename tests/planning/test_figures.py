"""What a run comes to, by hand; the highest rate; and the same run under the server's metrics."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.config import AdmissionConfig
from triptych.core import InstanceId, Placement, Role
from triptych.latency import Objectives, Percentiles
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation.figures import Figures, highest_rate, idle_shares
from triptych.planning.simulation.metrics import tell
from triptych.planning.simulation.simulator import Options, Simulation
from triptych.planning.workloads.demand import Demand
from triptych.telemetry import Telemetry

PLAIN = Costs(prefill_token=0.01, decode_step=0.1, message=0.0, transfer=0.0)


def played(*demands: Demand, placement: str = "1epd", options: Options | None = None) -> Simulation:
    simulation = Simulation(Placement.parse(placement), PLAIN, Sizes(), options)
    simulation.run(demands)
    return simulation


def text(at_s: float, tokens: int = 100, answer: int = 11, **more: float) -> Demand:
    return Demand(at_s, text_tokens=tokens, output_tokens=answer, **more)


def numbers(values: Percentiles | None) -> list[float]:
    assert values is not None
    return list(msgspec.structs.astuple(values))


def test_two_requests_that_never_meet_have_the_figures_of_one():
    figures = Figures.of_run(played(text(0.0), text(10.0)), Objectives(1000, 100), 3.6)
    assert numbers(figures.ttft_ms) == pytest.approx([1000] * 4)
    assert numbers(figures.tpot_ms) == pytest.approx([100] * 4)
    assert numbers(figures.itl_ms) == pytest.approx([100] * 4)
    assert numbers(figures.e2e_ms) == pytest.approx([2000] * 4)
    assert figures.duration_s == pytest.approx(12.0)
    assert figures.requests_per_s == pytest.approx(2 / 12)
    assert figures.prompt_tokens_per_s == pytest.approx(200 / 12)
    assert figures.output_tokens_per_s == pytest.approx(22 / 12)
    assert figures.sent_per_s == pytest.approx(0.1)


def test_the_cost_is_that_of_the_time_in_which_requests_come():
    figures = Figures.of_run(played(text(0.0), text(10.0, tokens=200)), Objectives(1500, 150), 3.6)
    assert figures.slo_attainment == 0.5
    assert figures.goodput_requests_per_s == pytest.approx(1 / 13)
    assert figures.dollars_per_1000_met == pytest.approx(3.6 / 3600 * 20 * 1000)  # 20 s of two requests, one met


def test_nothing_is_known_of_objectives_that_nobody_gave():
    figures = Figures.of_run(played(text(0.0)))
    assert (figures.slo_attainment, figures.goodput_requests_per_s, figures.dollars_per_1000_met) == (None, None, None)
    assert Figures.of_run(played(text(0.0)), Objectives(1.0), 3.6).dollars_per_1000_met is None


def test_what_is_refused_misses_its_objectives_and_has_no_latency():
    asked = [text(0.0, tokens=1000, answer=1), text(0.0), text(0.1), text(5.0, timeout_s=0.5)]
    figures = Figures.of_run(played(*asked, options=Options(admission=AdmissionConfig())), Objectives(60_000))
    assert (figures.num_requests, figures.num_failed, figures.slo_attainment) == (4, 1, 0.75)


def test_who_waits_for_others_is_idle():
    simulation = played(text(0.0, answer=91), placement="1e1p1d")
    assert simulation.records[0].latency_s == pytest.approx(10.0)
    assert idle_shares(simulation) == pytest.approx({"e": 1.0, "p": 0.9, "d": 0.1})


def test_an_instance_that_changed_its_role_counts_for_both():
    simulation = Simulation(Placement.parse("2e1p1d"), Costs(prefill_token=0.01, decode_step=0.1, switch_weights=1.0))
    simulation.clock.at(4.0, simulation.switch_role, InstanceId("i1"), Role.D, lambda steps_s: None)
    simulation.run([text(0.0, answer=91)])
    shares = idle_shares(simulation)
    assert shares["e"] == 1.0
    assert shares["d"] == pytest.approx(1 - 9 / 15, abs=0.01)  # 10 s of one, 5 s of the other, 9 s of work


@given(st.floats(0.01, 1000), st.floats(0.01, 1000), st.floats(0.001, 2000))
def test_the_highest_rate_is_found_wherever_the_search_begins(limit: float, guess: float, least: float):
    found = highest_rate(lambda rate: rate <= limit, guess, least=least)
    if least > limit:
        assert found == 0.0
    else:
        assert found <= limit <= found * 1.01


@given(st.floats(0.01, 1000), st.floats(0.01, 1000))
def test_the_highest_rate_is_not_looked_for_where_it_cannot_be(limit: float, most: float):
    asked: list[float] = []

    def attains(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    found = highest_rate(attains, most, least=0.001, most=most)
    assert max(asked) <= most
    assert found == most if limit >= most else found <= limit <= found * 1.01


def test_a_run_has_the_metrics_of_a_server():
    telemetry = Telemetry("model")
    tell(telemetry, played(text(0.0), text(1.0), text(3.0, timeout_s=0.1), placement="1e1pd"))
    lines = telemetry.exposition().decode().splitlines()
    assert 'vllm:time_to_first_token_seconds_count{model_name="model"} 2.0' in lines
    assert 'vllm:generation_tokens_total{model_name="model"} 22.0' in lines
    assert 'vllm:prompt_tokens_total{model_name="model"} 200.0' in lines
    assert 'vllm:request_success_total{finished_reason="length",model_name="model"} 2.0' in lines
    assert 'triptych:requests_refused_total{model_name="model",reason="deadline"} 1.0' in lines
    assert any(line.startswith('triptych:decode_tokens_total{instance="i1"') for line in lines)
