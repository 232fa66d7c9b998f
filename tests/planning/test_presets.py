"""Workloads by name."""

from pathlib import Path

import pytest

from tests.planning.rows import SimpleRows
from triptych.errors import ConfigError
from triptych.planning.workloads.presets import PRESETS, load, paper_synthetic


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_played(name: str) -> None:
    assert len(load(name).demands(SimpleRows())) == load(name).num_requests


@pytest.mark.parametrize(("images", "slo"), [(2, (1.4, 0.04)), (4, (2.6, 0.04)), (6, (3.9, 0.06)), (8, (5.1, 0.06))])
def test_the_synthetic_load_is_the_papers(images: int, slo: tuple[float, float]) -> None:
    """Section 4 and Table 9, MiniCPM-V 2.6."""
    workload = paper_synthetic(images, rate=0.5)
    assert workload.slo is not None and (workload.slo.ttft, workload.slo.tpot) == slo
    demands = workload.demands(SimpleRows())
    assert len(demands) == 100
    (content,) = {(one.media, one.text_tokens, one.output_tokens) for one in demands}
    assert [item.pixels for item in content[0]] == [4032 * 3024] * images
    assert content[1:] == (22, 10)


def test_the_synthetic_load_may_have_no_picture_and_then_no_slo() -> None:
    workload = paper_synthetic(0)
    assert workload.slo is None and not workload.demands(SimpleRows())[0].media


def test_what_is_neither_a_preset_nor_a_file_is_refused_with_the_presets(tmp_path: Path) -> None:
    told = (
        r"pictues: neither a workload file nor a preset; did you mean 'pictures'\? presets are text, pictures, mixed,"
    )
    with pytest.raises(ConfigError, match=told):
        load("pictues")
    with pytest.raises(ConfigError, match="neither a workload file nor a preset"):
        load("a" * 5000)
    with pytest.raises(ConfigError, match=r"missing\.json: cannot be read: No such file"):
        load(tmp_path / "missing.json")
