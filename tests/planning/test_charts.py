"""Pictures are whole PNG files, or there are none."""

from pathlib import Path

import pytest

from tests.planning.places import make_candidate, make_evaluator, make_load
from triptych.errors import ConfigError
from triptych.planning.search.charts import attainment_chart, plan_chart
from triptych.planning.search.plan import Curve, spread

PNG = b"\x89PNG\r\n\x1a\n"


def curve(placement: str, price: float | None = 2.0) -> Curve:
    evaluator, candidate = make_evaluator(make_load(10, answer=2), price=price), make_candidate(placement)
    rates = [0.5, 2.0, 8.0]
    return Curve(candidate=candidate, rates=rates, figures=[evaluator.figures(candidate, rate) for rate in rates])


@pytest.mark.parametrize("price", [2.0, None])
def test_pictures_are_drawn_and_nothing_else_is_left(tmp_path: Path, price: float | None):
    curves = [curve("2e1pd", price), curve("3epd", price)]
    plan_chart(tmp_path / "plan.png", curves, "a plan")
    attainment_chart(tmp_path / "attainment.png", curves, 0.9, "a simulation")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attainment.png", "plan.png"]
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(PNG)


def test_the_same_curves_are_the_same_picture(tmp_path: Path):
    curves = [curve("1epd")]
    for name in ("a.png", "b.png"):
        plan_chart(tmp_path / name, curves, "a plan")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_that_cannot_be_written_is_told_with_its_path(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none/plan\.png: cannot be written"):
        plan_chart(tmp_path / "none" / "plan.png", [curve("1epd")], "a plan")


def test_curves_begin_below_a_rate_and_end_above_it():
    rates = spread(10.0)
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(4.0) and rates[-1] == pytest.approx(14.0)
