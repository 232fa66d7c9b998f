"""What simulated runs came to, for people, for machines and for files."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from triptych.latency import Percentiles
from triptych.planning import files
from triptych.planning.quantities import percent
from triptych.planning.search.charts import attainment_chart
from triptych.planning.search.plan import Curve
from triptych.planning.search.scenario import Run, Scenario
from triptych.planning.search.tables import figures_lines, figures_table
from triptych.planning.simulation import history
from triptych.planning.simulation.figures import Figures
from triptych.planning.simulation.metrics import tell
from triptych.planning.simulation.simulator import Simulation
from triptych.telemetry import Telemetry
from triptych.timeline import Timeline

if TYPE_CHECKING:
    from rich.table import Table

RATES_OF_A_TABLE = 5  # fit into 80 columns


def kept_rate(runs: Sequence[Run], target: float) -> float | None:
    """The highest of the rates at which enough requests met the SLO, counted from the lowest without a gap. None
    without an SLO, or where it is missed already at the lowest."""
    met = None
    for run in runs:
        attained = run.figures.slo_attainment
        if attained is None or attained < target:
            break
        met = _sent(run)
    return met


# ---- for people


def run_lines(run: Run) -> list[str]:
    """What stands under the table of one run."""
    simulation = run.simulation
    lines = figures_lines(run.figures)
    lines += [f"{s.instance} became {s.after} instead of {s.before} at {s.at_s:.1f} s" for s in simulation.switches]
    lines += [f"{loss.instance} was lost at {loss.at_s:.1f} s" for loss in simulation.losses]
    return lines + [f"{one.id} was not lost: all was answered before {one.at_s:g} s" for one in simulation.unseen]


def rates_table(runs: Sequence[Run]) -> "Table":
    """A column for each rate."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("rate (requests/s)", no_wrap=True)
    for run in runs:
        table.add_column(_rate(_sent(run)), justify="right", no_wrap=True)
    for name, cell in _rows(runs[0].figures).items():
        table.add_row(name, *(cell(run.figures) for run in runs))
    return table


def _rows(figures: Figures) -> dict[str, Callable[[Figures], str]]:
    """What is said of each rate."""
    rows: dict[str, Callable[[Figures], str]] = {"sent (requests/s)": lambda found: _rate(found.sent_per_s)}
    for name in ("ttft", "tpot", "itl"):
        for rank in ("mean", "p50", "p90", "p99"):
            rows[f"{name.upper()} {rank} (ms)"] = partial(_milliseconds, name, rank)
    rows |= {
        "answered (requests/s)": lambda found: f"{found.requests_per_s:.2f}",
        "answered (tokens/s)": lambda found: f"{found.output_tokens_per_s:.0f}",
        "refused or failed": lambda found: str(found.num_failed),
    }
    if figures.slo_attainment is not None:
        rows["met the SLO"] = lambda found: f"{found.slo_attainment or 0.0:.1%}"
    if figures.dollars_per_hour is not None:
        rows["USD for 1,000 that met it"] = lambda found: _dollars(found.dollars_per_1000_met)
    return rows | {f"idle {role}": partial(_idle, role) for role in figures.idle}


def _milliseconds(name: str, rank: str, figures: Figures) -> str:
    values: Percentiles | None = getattr(figures, f"{name}_ms")
    return "-" if values is None else f"{getattr(values, rank):.1f}"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.3g}"


def _dollars(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:.2f}"


def _idle(role: str, figures: Figures) -> str:
    return f"{figures.idle[role]:.0%}" if role in figures.idle else "-"


def kept_rate_line(runs: Sequence[Run], target: float) -> str | None:
    """None without an SLO."""
    if runs[0].figures.slo_attainment is None:
        return None
    met = kept_rate(runs, target)
    if met is None:
        lowest = _rate(_sent(runs[0]))
        return f"Kept rate: none; at {lowest} req/s already fewer than {percent(target)} of the requests meet the SLO"
    return f"Kept rate: {met:.3g} req/s, the highest of these at which {percent(target)} of the requests meet the SLO"


def tables(runs: Sequence[Run], target: float) -> "tuple[list[Table], list[str]]":
    """Tables, and the lines under them."""
    if len(runs) == 1:
        return [figures_table(runs[0].figures)], run_lines(runs[0])
    parts = [runs[i : i + RATES_OF_A_TABLE] for i in range(0, len(runs), RATES_OF_A_TABLE)]
    line = kept_rate_line(runs, target)
    return [rates_table(part) for part in parts], [] if line is None else [line]


# ---- for machines


def as_json(scenario: Scenario, runs: Sequence[Run], target: float) -> str:
    slo = msgspec.to_builtins(scenario.objectives) | {"attainment": target}
    answer = {
        "model": scenario.profile.model,
        "hardware": scenario.profile.hardware,
        "profile": scenario.profile.kind,
        "placement": str(scenario.candidate.placement),
        "workload": scenario.workload.name,
        "slo": slo if scenario.objectives else None,
        "kept_rate": kept_rate(runs, target),
        "runs": [_as_builtins(run) for run in runs],
    }
    return msgspec.json.format(msgspec.json.encode(answer)).decode()


def _as_builtins(run: Run) -> dict[str, Any]:
    return {
        "rate": run.rate,
        "figures": msgspec.to_builtins(run.figures),
        "switches": msgspec.to_builtins(run.simulation.switches),
        "losses": msgspec.to_builtins(run.simulation.losses),
    }


# ---- files, each whole or not at all


def write_timeline(path: Path, simulation: Simulation) -> None:
    stream = io.BytesIO()
    timeline = Timeline(stream)
    history.tell(timeline, simulation)
    timeline.close()
    files.write_bytes(path, stream.getvalue())


def write_metrics(path: Path, simulation: Simulation, model: str) -> None:
    telemetry = Telemetry(model)
    tell(telemetry, simulation)
    files.write_bytes(path, telemetry.exposition())


def write_chart(path: Path, scenario: Scenario, runs: Sequence[Run], target: float, title: str) -> None:
    rates = [_sent(run) or 0.0 for run in runs]
    curve = Curve(candidate=scenario.candidate, rates=rates, figures=[run.figures for run in runs])
    attainment_chart(path, [curve], target, title)


def _sent(run: Run) -> float | None:
    """Requests a second that came."""
    return run.figures.sent_per_s if run.rate is None else run.rate
