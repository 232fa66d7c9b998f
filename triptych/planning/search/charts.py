"""Pictures of what was simulated, as PNG. Colours are those of Okabe and Ito, which colour-blind people tell apart, and
every line has a marker and a dash of its own."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from triptych.planning import files
from triptych.planning.quantities import percent
from triptych.planning.search.plan import Curve
from triptych.planning.simulation.figures import Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
SIZE_INCHES = (11.0, 4.4)
DOTS_PER_INCH = 140

Value = Callable[[Figures], float | None]
ValueAt = Callable[[float, Figures], float | None]  # of a rate, too


def plan_chart(path: str | Path, curves: Sequence[Curve], target: float, title: str) -> None:
    """What is within the SLO, and what that costs, over the request rate; stars where a curve is told to keep the SLO.
    Whole or not at all; raises ConfigError where it cannot be written."""
    figure = _figure(title)
    served, cost = figure.subplots(1, 2)
    end = max(rate for curve in curves for rate in curve.rates)
    _lines_at(served, curves, lambda rate, figures: rate * (figures.slo_attainment or 0.0))
    _stars(served, curves)
    _label(served, "goodput: of these within the SLO (req/s)")
    served.plot([0, end], [0, end], color="#999999", linewidth=0.8, zorder=0, label="all of them")
    wanted = f"{percent(target)} of them"
    served.plot([0, end], [0, target * end], color="#777777", linewidth=1.0, linestyle="--", zorder=0, label=wanted)
    served.set_ylim(0, None)
    served.legend(frameon=False, fontsize=9)
    _lines(cost, curves, lambda figures: figures.dollars_per_1000_met)
    _label(cost, "USD per 1,000 requests within the SLO")
    for axes in (served, cost):
        axes.set_xlim(0, end * 1.03)
    _limit_cost(cost, curves)
    _save(figure, path)


def attainment_chart(path: str | Path, curves: Sequence[Curve], target: float, title: str) -> None:
    """SLO attainment, and TTFT, over the request rate. As `plan_chart`."""
    figure = _figure(title)
    attained, ttft = figure.subplots(1, 2)
    _lines(attained, curves, lambda figures: None if figures.slo_attainment is None else 100 * figures.slo_attainment)
    _label(attained, "requests within the SLO (%)")
    attained.set_ylim(0, 103)
    attained.axhline(100 * target, color="#777777", linewidth=1.0, linestyle="--")
    attained.annotate(
        f"target {percent(target)}", (0.02, 100 * target - 4.5), xycoords=("axes fraction", "data"), fontsize=8
    )
    attained.legend(frameon=False, fontsize=9)
    _lines(ttft, curves, lambda figures: None if figures.ttft_ms is None else figures.ttft_ms.p50 / 1e3)
    _lines(ttft, curves, lambda figures: None if figures.ttft_ms is None else figures.ttft_ms.p99 / 1e3, thin=True)
    _label(ttft, "TTFT (s): p50, thin p99")
    ttft.set_yscale("log")
    ttft.yaxis.set_major_formatter("{x:g}")
    ttft.yaxis.set_minor_formatter("{x:g}")
    for axes in (attained, ttft):
        axes.set_xlim(0, None)
    _save(figure, path)


def _figure(title: str) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def _stars(axes: "Axes", curves: Sequence[Curve]) -> None:
    for number, curve in enumerate(curves):
        if curve.kept is not None:
            met = curve.kept * (curve.figures[curve.rates.index(curve.kept)].slo_attainment or 0.0)
            named = None if number else "its kept rate"
            axes.plot(curve.kept, met, "*", color=_colour(number), mec="#000000", ms=14, zorder=3, label=named)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _lines(axes: "Axes", curves: Sequence[Curve], value: Value, *, thin: bool = False) -> None:
    _lines_at(axes, curves, lambda _, figures: value(figures), thin=thin)


def _lines_at(axes: "Axes", curves: Sequence[Curve], value: ValueAt, *, thin: bool = False) -> None:
    """One for each curve; where there is no value, there is a gap."""
    for number, curve in enumerate(curves):
        found = [value(rate, figures) for rate, figures in zip(curve.rates, curve.figures, strict=True)]
        axes.plot(
            curve.rates,
            [float("nan") if one is None else one for one in found],
            color=_colour(number),
            linestyle=DASHES[number % len(DASHES)],
            marker=None if thin else MARKERS[number % len(MARKERS)],
            markersize=4.5,
            linewidth=0.9 if thin else 1.7,
            label=None if thin else str(curve.candidate),
        )


def _label(axes: "Axes", what: str) -> None:
    axes.set_xlabel("requests sent (req/s)")
    axes.set_ylabel(what)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _values(curves: Sequence[Curve], value: Value) -> list[float]:
    found = [value(figures) for curve in curves for figures in curve.figures]
    return [one for one in found if one is not None] or [0.0]


def _limit_cost(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Where almost nobody is served in time a request costs almost anything: that is cut off."""
    known = [one for one in _values(curves, lambda figures: figures.dollars_per_1000_met) if one > 0]
    if not known:
        axes.text(0.5, 0.5, "no price given", transform=axes.transAxes, ha="center", color="#777777")
        return
    axes.set_ylim(0, min(max(known), 6 * min(known)) * 1.08)


def _save(figure: "Figure", path: str | Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": "triptych"})
    files.write_bytes(path, drawn.getvalue())
