"""docs/workloads.md: its examples can be played, and its tables know every key, choice and preset."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from tests.planning.rows import SimpleRows
from triptych.planning import files, quantities
from triptych.planning.model.shapes import PRESETS as MODELS
from triptych.planning.model.shapes import preset
from triptych.planning.workloads import arrivals, distributions, kinds
from triptych.planning.workloads.distributions import Distribution, Sizes
from triptych.planning.workloads.presets import PRESETS, load
from triptych.planning.workloads.traces import Trace
from triptych.planning.workloads.workload import Period, Slo, Workload

PAGE = Path("docs/workloads.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
INLINE = re.findall(r'`({"distribution".*?})`', PAGE)
AZURE_LINES = [
    "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens",
    "2024-10-15T12:00:00Z,0,90,7",
    "2024-10-15T13:00:00Z,2,3000,8",
    "2024-10-15T13:00:30Z,1,900,9",
]


def example(name: str, folder: Path) -> Workload:
    (text,) = [text for text in EXAMPLES if json.loads(text)["name"] == name]
    path = folder / "workload.json"
    path.write_text(text)
    return load(path)


def structs(*modules: Any) -> list[type[msgspec.Struct]]:
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return [kind for kind in found if issubclass(kind, msgspec.Struct) and not kind.__name__.startswith("_")]


def test_the_first_example_has_all_its_kinds_and_is_for_any_model_that_has_a_name(tmp_path: Path) -> None:
    workload = example("support desk", tmp_path)
    demands = workload.demands(SimpleRows())
    assert len(demands) == pytest.approx(12 * 300, rel=0.2)
    assert {item.modality for demand in demands for item in demand.media} == {"image", "video"}
    for name in MODELS:
        assert len(workload.demands(preset(name))) == len(demands)
    assert any(demand.prefix for demand in demands) and any(demand.timeout_s == 30 for demand in demands)
    assert files.convert(json.loads(files.dumped(workload)), Workload) == workload


def test_the_example_of_phases_is_the_papers_shifting_load(tmp_path: Path) -> None:
    demands = example("shifting load", tmp_path).demands(SimpleRows())
    assert [demand.output_tokens for demand in demands] == [50] * 10 + [500] * 90


def test_the_example_of_a_trace_is_played_from_its_start_at_its_rate(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("\n".join(AZURE_LINES))
    workload = example("an hour of Azure at 20 req/s", tmp_path)
    assert workload.trace is not None and Path(workload.trace.path).parent == tmp_path
    trace = msgspec.structs.replace(workload.trace, path=str(tmp_path / "trace.csv"))
    demands = msgspec.structs.replace(workload, trace=trace).demands(SimpleRows())
    assert [len(demand.media) for demand in demands] == [2, 1]
    assert [demand.at_s for demand in demands] == pytest.approx([0, 2 / 20])


@pytest.mark.parametrize("text", INLINE)
def test_distributions_in_the_tables_can_be_read(text: str) -> None:
    value = json.loads(text)
    files.convert(value, Sizes if value["distribution"] == "megapixels" else Distribution)  # type: ignore[arg-type]


def test_every_example_was_found() -> None:
    assert len(EXAMPLES) == PAGE.count("```json") == 3
    assert len(INLINE) == 5


@pytest.mark.parametrize("kind", [*structs(arrivals, distributions, kinds), Period, Slo, Trace, Workload])
def test_every_key_is_explained(kind: type[msgspec.Struct]) -> None:
    for name in kind.__struct_fields__:
        assert re.search(rf'[`"]{name}[`"]', PAGE), f"{kind.__name__}.{name}"
    tag = kind.__struct_config__.tag
    assert tag is None or re.search(rf'[`"]{tag}[`"]', PAGE), tag


def test_every_preset_format_and_unit_is_named() -> None:
    (formats,) = [get_args(field.type) for field in msgspec.structs.fields(Trace) if field.name == "format"]
    assert all(f"| `{name}`" in PAGE for name in formats)
    names = {name.replace("paper-synthetic-", "-") for name in PRESETS}
    assert all(f"`{name}`" in PAGE or f"`paper-synthetic{name}`" in PAGE for name in names)
    for quantity in (quantities.Seconds, quantities.PerSecond):
        assert f"`{' '.join(quantity.units)}`" in PAGE
