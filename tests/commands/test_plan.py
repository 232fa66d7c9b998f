"""`triptych plan`: what it prints and writes, that `triptych serve` takes the file, and what it refuses."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from triptych import cli
from triptych.commands.plan import plan
from triptych.config_file import read
from triptych.core import Placement
from triptych.errors import ConfigError

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(plan)

SMALL = ("--requests", "15", "--trials", "4", "--processes", "1")


def run(*arguments: str | Path, model: str = "qwen2.5-vl-7b") -> Result:
    return CliRunner().invoke(app, [model, *map(str, arguments)])


def refusal(*arguments: str | Path, model: str = "qwen2.5-vl-7b") -> str:
    result = run(*arguments, model=model)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "photos.json"
    kind = {"text_tokens": 30, "output_tokens": 8, "images": {"size": "1024x768", "count": 2}}
    slo = {"ttft": "1 s", "tpot": "50 ms"}
    arrivals = {"process": "poisson", "rate": "4 req/s"}
    workload = {"name": "photos", "arrivals": arrivals, "kinds": {"photos": kind}, "num_requests": 40, "slo": slo}
    path.write_text(json.dumps(workload))
    return path


def test_a_plan_is_told_written_and_drawn(workload: Path, tmp_path: Path):
    output, png = tmp_path / "plan.yaml", tmp_path / "plan.png"
    result = run("--gpus", 2, "--workload", workload, *SMALL, "-o", output, "--png", png, "--export", "vllm")
    assert result.exit_code == 0, result.output
    for word in ("req/s", "met", "TTFT s", "USD/1,000", "idle %", "triptych serve --placement"):
        assert word in result.output
    assert "Disaggregation is not needed." in result.output or "Splitting" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.png", "plan.vllm.sh", "plan.yaml"]
    assert "vllm serve" in (tmp_path / "plan.vllm.sh").read_text()


def test_serve_takes_the_file_as_it_is(workload: Path, tmp_path: Path):
    output = tmp_path / "plan.yaml"
    assert run("--gpus", 2, "--workload", workload, *SMALL, "-o", output).exit_code == 0
    values = read(output, _serve_flags())
    assert len(Placement.parse(values["placement"]).roles) <= 2
    assert values["model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (values["slo_ttft_ms"], values["slo_tpot_ms"]) == (1000.0, 50.0)
    assert values["max_num_seqs"] in (16, 64, 256)


def _serve_flags() -> dict[str, object]:
    """What the config of `triptych serve` may say."""
    from typing import get_type_hints

    return {**get_type_hints(cli.serve, include_extras=True)}


def test_machines_read_the_same(workload: Path):
    arguments = ("--gpus", 2, "--workload", workload, *SMALL, "--json", "--export", "sglang")
    first, second = run(*arguments), run(*arguments)
    found = json.loads(first.stdout)
    assert first.stdout == second.stdout
    assert found["best"][0]["goodput"] > 0
    assert found["best"][0]["figures"]["slo_attainment"] >= 0.9
    assert set(found["files"]) == {"serve", "export"}
    assert any(row["placement"].endswith("epd") for row in found["best"])


def test_a_budget_is_as_many_gpus_as_it_buys(workload: Path):
    result = run("--budget", "4 USD/h", "--workload", workload, *SMALL)
    assert "on at most 2 x A100-80G" in result.output


def test_the_least_cost_is_told_for_a_goodput(workload: Path):
    result = run("--gpus", 2, "--workload", workload, "--objective", "cost", "--goodput", 0.2, *SMALL)
    assert result.exit_code == 0, result.output
    unreachable = run("--gpus", 2, "--workload", workload, "--objective", "cost", "--goodput", 1000, *SMALL)
    assert unreachable.exit_code == 1
    assert "Nothing reaches 1000 req/s within the SLO" in unreachable.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--gpus, --budget: one of them is needed"),
        (("--gpus", "2", "--budget", "4 USD/h"), "--gpus, --budget: one of them is needed"),
        (("--gpus", "0"), "--gpus: 0 is not between 1 and 64"),
        (("--budget", "4"), "--budget: '4' has no unit; use USD/h"),
        (("--budget", "1 USD/h"), "--budget: 1 USD/h buys nothing: one A100-80G costs"),
        (("--gpus", "2", "--objective", "speed"), "--objective: 'speed' is none of goodput, cost"),
        (("--gpus", "2", "--beta", "-1"), "--beta: -1.0 is not a finite number of at least 0"),
        (("--gpus", "2", "--beta", "nan"), "--beta: nan is not a finite number"),
        (("--gpus", "2", "--goodput", "0"), "--goodput: 0.0 is not a finite number above 0"),
        (("--gpus", "2", "--attainment", "1.5"), "--attainment: 1.5 is not above 0 and at most 1"),
        (("--gpus", "2", "--trials", "0"), "--trials: 0 is not between 1 and"),
        (("--gpus", "2", "--slo-ttft", "2"), "--slo-ttft: '2' has no unit; use h, min, s, ms"),
        (("--gpus", "2", "--slo-tpot", "-5 ms"), "--slo-tpot: '-5 ms' is out of range"),
        (("--gpus", "2", "--slo-ttft", "0 s"), "--slo-ttft, --slo-tpot: ttft: 0 s, which nothing can keep"),
        (("--gpus", "2", "--tensor-parallel", "1,x"), "--tensor-parallel: '1,x' is not a list of different numbers"),
        (("--gpus", "2", "--tensor-parallel", "3"), "tensor-parallel: 3 does not divide"),
        (("--gpus", "2", "--export", "tgi"), "--export: 'tgi' is none of vllm, sglang"),
        (("--gpus", "2", "--gpu", "B9000"), "gpu: 'B9000' is neither a hardware file nor one of"),
        (("--gpus", "2", "--workload", "holidays"), "holidays: neither a workload file nor a preset"),
        (("--gpus", "2", "-o", "/nowhere/plan.yaml"), "--output: /nowhere/plan.yaml: there is no folder /nowhere"),
        (("--gpus", "2", "--png", "/tmp"), "--png: /tmp is a folder"),
    ],
)
def test_bad_flags_are_refused_with_their_valid_range(arguments: tuple[str, ...], said: str):
    assert said in refusal(*arguments)


def test_an_slo_that_nothing_can_keep_is_told_with_what_is_needed(workload: Path, tmp_path: Path):
    output = tmp_path / "plan.yaml"
    asked = ("--gpus", 2, "--workload", workload, *SMALL, "-o", output)
    assert "photos.json: slo.ttft: 10 ms cannot be kept within 2 GPUs: on an idle server" in refusal(
        *asked, "--slo-ttft", "10 ms"
    )
    assert "slo.tpot: 1 ms cannot be kept" in refusal(*asked, "--slo-tpot", "1 ms")
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_told_with_the_reason(workload: Path):
    said = refusal("--gpus", 2, "--gpu", "RTX-4090", "--workload", workload, *SMALL, model="internvl2-26b")
    assert "cannot hold what" in said and "internvl2-26b needs" in said


def test_a_workload_without_a_rate_is_refused(tmp_path: Path, workload: Path):
    found = json.loads(workload.read_text())
    found["arrivals"] = {"process": "all_at_once"}
    path = tmp_path / "burst.json"
    path.write_text(json.dumps(found))
    said = refusal("--gpus", 2, "--workload", path, *SMALL)
    assert "burst.json" in said and "arrivals" in said
