"""Pictures are whole PNG files, or there are none."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.planning.places import make_candidate, make_evaluator, make_load
from triptych.errors import ConfigError
from triptych.planning.search import charts
from triptych.planning.search.charts import attainment_chart, plan_chart
from triptych.planning.search.plan import Curve, spread

PNG = b"\x89PNG\r\n\x1a\n"


def curve(placement: str, price: float | None = 2.0, kept: float | None = None) -> Curve:
    evaluator, candidate = make_evaluator(make_load(10, answer=2), price=price), make_candidate(placement)
    rates = [0.5, 2.0, 8.0]
    figures = [evaluator.figures(candidate, rate) for rate in rates]
    return Curve(candidate=candidate, rates=rates, figures=figures, kept=kept)


@pytest.mark.parametrize("price", [2.0, None])
def test_pictures_are_drawn_and_nothing_else_is_left(tmp_path: Path, price: float | None):
    curves = [curve("2e1pd", price), curve("3epd", price)]
    plan_chart(tmp_path / "plan.png", curves, 0.9, "a plan")
    attainment_chart(tmp_path / "attainment.png", curves, 0.9, "a simulation")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attainment.png", "plan.png"]
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(PNG)


def test_the_same_curves_are_the_same_picture(tmp_path: Path):
    curves = [curve("1epd")]
    for name in ("a.png", "b.png"):
        plan_chart(tmp_path / name, curves, 0.9, "a plan")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_that_cannot_be_written_is_told_with_its_path(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none/plan\.png: cannot be written"):
        plan_chart(tmp_path / "none" / "plan.png", [curve("1epd")], 0.9, "a plan")


def test_a_plan_shows_what_is_wanted_and_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(charts, "_save", lambda figure, path: drawn.append(figure))
    curves = [curve("2e1pd", kept=2.0), curve("3epd", kept=0.5), curve("1e2pd")]
    plan_chart(tmp_path / "plan.png", curves, 0.85, "a plan")
    lines = [list(zip(*line.get_data(), strict=True)) for line in drawn[0].axes[0].lines]
    met = [
        [rate * (figures.slo_attainment or 0.0) for rate, figures in zip(one.rates, one.figures, strict=True)]
        for one in curves
    ]
    assert [list(zip(one.rates, of_one, strict=True)) for one, of_one in zip(curves, met, strict=True)] == lines[:3]
    assert [(0, 0), (8.0, 0.85 * 8.0)] in lines
    assert [(2.0, met[0][1])] in lines and [(0.5, met[1][0])] in lines
    assert sum(len(line) == 1 for line in lines) == 2


def test_curves_begin_below_a_rate_and_end_above_it():
    rates = spread(10.0)
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(4.0) and rates[-1] == pytest.approx(14.0)
