"""What a simulated run did is on its timeline: every step, every request, every switch and loss."""

import io
import json
from typing import Any

import pytest

from triptych.core import InstanceId, Placement, Role
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation import history
from triptych.planning.simulation.failures import Failure
from triptych.planning.simulation.simulator import Options, Simulation
from triptych.planning.workloads.demand import Demand, Item
from triptych.timeline import Timeline

PLAIN = Costs(encode_row=0.1, prefill_token=0.01, decode_step=0.001, decode_sequence=0.0001, message=0.0, transfer=1e-5)
PICTURE = Demand(0.0, media=(Item((8,)),), text_tokens=4, output_tokens=3)


def played(simulation: Simulation, *demands: Demand) -> list[dict[str, Any]]:
    simulation.stints = []
    simulation.run(demands)
    stream = io.BytesIO()
    timeline = Timeline(stream)
    history.tell(timeline, simulation)
    timeline.close()
    return json.loads(stream.getvalue())


def named(events: list[dict[str, Any]], **fields: Any) -> list[str]:
    return [event["name"] for event in events if fields.items() <= event.items()]


def test_steps_are_where_and_when_they_were_made():
    simulation = Simulation(Placement.parse("1e1p1d"), PLAIN, Sizes(streamed_prefill=False))
    events = played(simulation, PICTURE)
    steps = [event for event in events if event["ph"] == "X"]
    assert [(step["tid"], step["name"], step["args"]["batch"]) for step in steps] == [
        (1, "encode", 1), (2, "prefill", 1), (3, "decode", 1),
    ]  # fmt: skip
    assert steps[0]["dur"] == pytest.approx(0.8e6)
    (end,) = [event for event in events if event["ph"] == "e" and event["name"] == "r0"]
    assert end["ts"] == pytest.approx(simulation.records[0].finished_s * 1e6, abs=0.001)
    assert end["args"] == {"outcome": "finished", "tokens": 3}


def test_a_switch_is_a_slice_and_a_mark():
    simulation = Simulation(Placement.parse("2e1p1d"), PLAIN)
    simulation.clock.at(1.0, simulation.switch_role, InstanceId("i1"), Role.D, lambda steps_s: None)
    events = played(simulation, Demand(0.0, output_tokens=5000))
    assert named(events, ph="i", tid=2) == ["e", "e to d"]
    (switch,) = [event for event in events if event["name"] == "becomes d"]
    assert (switch["ts"], switch["dur"]) == (pytest.approx(1e6), pytest.approx(0.7e6))


def test_a_loss_and_a_return_are_marks_and_a_refused_request_ends_where_it_was_refused():
    options = Options(failures=(Failure(0.5, 0, restart_s=1.0),))
    late = Demand(0.1, text_tokens=4, output_tokens=3000, timeout_s=1.0)
    events = played(Simulation(Placement.parse("1epd"), PLAIN, options=options), late)
    assert named(events, ph="i") == ["epd", "lost", "lost to epd"]
    (end,) = [event for event in events if event["ph"] == "e" and event["name"] == "r0"]
    assert (end["ts"], end["args"]["outcome"]) == (pytest.approx(1.1e6), "deadline_exceeded")
