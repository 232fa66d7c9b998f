"""Figures of simulated runs as tables for people."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from triptych.latency import Percentiles
from triptych.planning.search.plan import Row
from triptych.planning.simulation.figures import Figures

if TYPE_CHECKING:
    from rich.table import Table

CAPTION = (
    "req/s: the highest rate at which enough requests meet the SLO in every run, less 4% for what so many requests "
    "leave open. Met: how many did there in the run with the fewest; the other figures are of the first run. TTFT and "
    "TPOT: p50/p90/p99. USD/1,000: for a thousand requests that met it. Idle: of the time, by role in the order of the "
    "placement."
)


def plan_table(rows: Iterable[Row], unit: str) -> "Table":
    """The candidates of a plan, each at the rate that it keeps. `unit` is what placements are made of."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0, caption=CAPTION, caption_justify="left")
    for title in _columns(unit):
        table.add_column(title, justify="left" if title == "placement" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def plan_lines(rows: Iterable[Row], unit: str) -> list[str]:
    """The same where the table is too wide."""
    pairs = [zip(_columns(unit), _cells(row), strict=True) for row in rows]
    return [*(", ".join(f"{title} {cell}" for title, cell in row) for row in pairs), CAPTION]


def _columns(unit: str) -> list[str]:
    number = {"GPU": "GPUs", "instance": "inst."}[unit]
    return ["placement", number, "USD/h", "req/s", "met", "TTFT s", "TPOT ms", "USD/1,000", "idle %"]


def _cells(row: Row) -> list[str]:
    return [
        str(row.candidate),
        str(row.candidate.num_gpus),
        _money(row.figures.dollars_per_hour),
        f"{row.rate:.3g}",
        f"{min(row.attained):.1%}",
        _percentiles(row.figures.ttft_ms, 1e-3, 2),
        _percentiles(row.figures.tpot_ms, 1.0, 0),
        _money(row.figures.dollars_per_1000_met),
        "/".join(f"{100 * row.figures.idle[role]:.0f}" for role in row.candidate.family),
    ]


def figures_table(figures: Figures) -> "Table":
    """Of one run, as `triptych bench` shows it."""
    from rich.table import Table

    title = f"{figures.num_requests} requests in {figures.duration_s:.2f} s, {figures.num_failed} refused or failed"
    table = Table(title=title)
    for column in ("", "mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("ttft", "tpot", "itl", "e2e"):
        values: Percentiles | None = getattr(figures, f"{name}_ms")
        cells = ["-"] * 4
        if values is not None:
            cells = [f"{value:.1f}" for value in (values.mean, values.p50, values.p90, values.p99)]
        table.add_row(f"{name.upper()} (ms)", *cells)
    return table


def figures_lines(figures: Figures) -> list[str]:
    """What stands under the table of a run."""
    lines = [
        f"Throughput: {figures.requests_per_s:.2f} requests/s, {figures.output_tokens_per_s:.1f} output tokens/s, "
        f"{figures.prompt_tokens_per_s:.1f} prompt tokens/s"
    ]
    if figures.slo_attainment is not None:
        lines.append(
            f"SLO attainment: {figures.slo_attainment:.1%}, goodput: {figures.goodput_requests_per_s:.2f} requests/s"
        )
    if figures.dollars_per_hour is not None:
        lines.append(
            f"Cost: {_money(figures.dollars_per_hour)} USD/h, {_money(figures.dollars_per_1000_met)} USD for 1,000 "
            "requests that met the SLO"
        )
    return [*lines, f"Idle: {idle(figures)}"]


def idle(figures: Figures) -> str:
    return ", ".join(f"{role} {share:.0%}" for role, share in figures.idle.items())


def _percentiles(values: Percentiles | None, unit: float, digits: int) -> str:
    if values is None:
        return "-"
    return "/".join(f"{value * unit:.{digits}f}" for value in (values.p50, values.p90, values.p99))


def _money(dollars: float | None) -> str:
    return "-" if dollars is None else f"{dollars:.2f}"
