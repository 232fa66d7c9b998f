"""`triptych plan`: what it prints and writes, that `triptych serve` takes the file and `triptych simulate` repeats the
figures, and what it refuses."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

from triptych import cli
from triptych.commands.arguments import find_model
from triptych.commands.plan import plan
from triptych.commands.simulate import simulate
from triptych.config_file import read
from triptych.core import Placement, Role
from triptych.demo import checkpoint_path
from triptych.errors import ConfigError
from triptych.planning.costs.analytic import analytic_profile
from triptych.planning.costs.hardware import find_device
from triptych.planning.search import charts, export
from triptych.planning.search.plan import Curve

app, simulator = typer.Typer(pretty_exceptions_enable=False), typer.Typer(pretty_exceptions_enable=False)
app.command()(plan)
simulator.command()(simulate)

SMALL = ("--requests", "10", "--confirm", "12", "--trials", "3", "--processes", "1")
TINY = ("--requests", "10", "--confirm", "0", "--trials", "1", "--processes", "1")


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


Planned = tuple[Result, Path, list[Curve]]


@pytest.fixture(scope="module")
def asked(workload: Path) -> tuple[str | Path, ...]:
    """By the plan that most tests look at."""
    slo = ("--slo-ttft", "900 ms", "--attainment", "0.8")
    return ("--gpus", "2", "--workload", workload, *slo, *SMALL)


@pytest.fixture(scope="module")
def planned(asked: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """With every file that can be asked for, their folder, and what the picture is of."""
    folder, drawn, draw = tmp_path_factory.mktemp("planned"), list[Curve](), charts.plan_chart

    def plan_chart(path: Path, curves: list[Curve], target: float, title: str) -> None:
        assert target == 0.8
        drawn.extend(curves)
        draw(path, curves, target, title)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "plan_chart", plan_chart)
        files = ("-o", folder / "plan.yaml", "--png", folder / "plan.png", "--export", "vllm")
        return run(*asked, *files), folder, drawn


@pytest.fixture(scope="module")
def answer(asked: tuple[str | Path, ...]) -> dict[str, Any]:
    """The same plan for machines, with a script for another engine."""
    found: dict[str, Any] = json.loads(run(*asked, "--json", "--export", "sglang").stdout)
    return found


def test_a_plan_is_told_written_and_drawn(planned: Planned):
    result, folder, _ = planned
    assert result.exit_code == 0, result.output
    command = "triptych serve Qwen/Qwen2.5-VL-7B-Instruct --placement"
    for word in ("req/s", "met", "TTFT s", "USD/1,000", "idle %", command):
        assert word in result.output
    assert "placements looked at" in result.output
    assert sorted(path.name for path in folder.iterdir()) == ["plan.png", "plan.vllm.sh", "plan.yaml"]
    for path in folder.iterdir():
        assert f"{path} is written" in result.output
    assert "vllm serve" in (folder / "plan.vllm.sh").read_text()


def test_how_sure_the_answer_is_stands_under_the_rows(planned: Planned, answer: dict[str, Any]):
    first, other = answer["best"][0], _other_kind(answer["best"])
    for row in (first, other):
        shares = ", ".join(f"{share:.1%}" for share in row["attained"].values())
        assert f"\nHow sure: {row['placement']} at {row['kept_rate']:.3g} req/s: {shares} of the" in planned[0].stdout
    assert "\nFew requests: runs of 12 confirm this, 2,000 are usual here" in planned[0].stdout


def _other_kind(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best one that is aggregated where the first is not, or the other way round."""
    aggregated = [re.fullmatch(r"\d+epd", row["placement"]) is not None for row in rows]
    return rows[aggregated.index(not aggregated[0])]


def test_a_row_tells_the_least_that_met_the_slo_with_any_seed(planned: Planned, answer: dict[str, Any]):
    lines = planned[0].stdout.splitlines()
    for row in answer["best"]:
        (told,) = [line.split() for line in lines if line.startswith(f"{row['placement']} ")]
        assert told[4] == f"{min(row['attained'].values()):.1%}"


def test_serve_takes_the_file_as_it_is(planned: Planned):
    values = read(planned[1] / "plan.yaml", _serve_flags())
    assert len(Placement.parse(values["placement"]).roles) <= 2
    assert values["model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (values["slo_ttft_ms"], values["slo_tpot_ms"]) == (900.0, 50.0)
    assert values["max_num_seqs"] in (16, 64, 256)


def _serve_flags() -> dict[str, object]:
    """What the config of `triptych serve` may say."""
    from typing import get_type_hints

    return {**get_type_hints(cli.serve, include_extras=True)}


def test_in_a_pipe_progress_is_a_few_lines_on_stderr(planned: Planned):
    lines = planned[0].stderr.splitlines()
    assert lines[0] == "plan: looking for the fastest"
    assert "plan: candidates, 3" in lines and any(line.startswith("plan: longer runs of the best") for line in lines)
    assert len(lines) < 10
    assert "plan: " not in planned[0].stdout


def test_machines_read_the_same(planned: Planned, answer: dict[str, Any]):
    assert answer["verdict"] in planned[0].stdout
    assert answer["best"][0]["kept_rate"] > 0
    assert all(share >= 0.8 for row in answer["best"] for share in row["attained"].values())
    assert set(answer["files"]) == {"serve", "export"}
    assert any(row["placement"].endswith("epd") for row in answer["best"])


def test_a_budget_is_as_many_gpus_as_it_buys(workload: Path):
    result = run("--budget", "3 USD/h", "--workload", workload, *TINY)
    assert "on at most 1 x A100-80G" in result.output


def test_the_least_cost_is_told_for_a_rate(workload: Path):
    asked = ("--gpus", 1, "--workload", workload, "--attainment", 0.8, "--objective", "cost", *TINY)
    assert run(*asked, "--rate", 0.2).exit_code == 0
    unreachable = run(*asked, "--rate", 1000)
    assert unreachable.exit_code == 1
    assert "Nothing keeps the SLO at 1000 req/s, of the " in unreachable.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--gpus, --budget: one of them is needed"),
        (("--gpus", "2", "--budget", "4 USD/h"), "--gpus, --budget: one of them is needed"),
        (("--gpus", "0"), "--gpus: 0 is not between 1 and 64"),
        (("--budget", "4"), "--budget: '4' has no unit; use USD/h"),
        (("--budget", "1 USD/h"), "--budget: 1 USD/h buys nothing: one A100-80G costs"),
        (("--budget", "1e30 USD/h"), "--budget: 1e+30 USD/h buys more than 64 GPUs"),
        (("--gpus", "2", "--objective", "speed"), "--objective: 'speed' is none of rate, goodput, cost"),
        (("--gpus", "2", "--beta", "-1"), "--beta: -1.0 is not a finite number of at least 0"),
        (("--gpus", "2", "--beta", "nan"), "--beta: nan is not a finite number"),
        (("--gpus", "2", "--rate", "0"), "--rate: 0.0 is not a finite number above 0"),
        (("--gpus", "2", "--rate", "5"), "--rate, --objective: the highest rate is looked for"),
        (("--gpus", "2", "--objective", "cost", "--beta", "3"), "--beta, --objective: the least cost is not weighed"),
        (("--gpus", "2", "--confirm", "-1"), "--confirm: -1 is not between 0 and"),
        (("--gpus", "2", "-o", "plan.json"), "--output: plan.json does not end in .yaml or .yml"),
        (("--gpus", "2", "--png", "plan.gif"), "--png: plan.gif does not end in .png"),
        (("--gpus", "2", "--attainment", "1.5"), "--attainment: 1.5 is not above 0 and at most 1"),
        (("--gpus", "2", "--trials", "0"), "--trials: 0 is not between 1 and"),
        (("--gpus", "2", "--requests", "1"), "--requests: 1 is not between 2 and"),
        (("--gpus", "2", "--slo-ttft", "2"), "--slo-ttft: '2' has no unit; use h, min, s, ms"),
        (("--gpus", "2", "--slo-tpot", "-5 ms"), "--slo-tpot: '-5 ms' is out of range"),
        (("--gpus", "2", "--slo-ttft", "0 s"), "--slo-ttft: '0 s' is out of range"),
        (("--gpus", "2", "--tensor-parallel", "1,x"), "--tensor-parallel: '1,x' is not a list of different numbers"),
        (("--gpus", "2", "--tensor-parallel", "3"), "tensor-parallel: 3 does not divide"),
        (("--gpus", "2", "--export", "tgi"), "--export: 'tgi' is none of vllm, sglang"),
        (("--gpus", "2", "--gpu", "H100", "--profile", "p.json"), "--gpu, --profile: --profile says what --gpu would"),
        (("--gpus", "2", "--tensor-parallel", "2", "--profile", "p.json"), "--tensor-parallel, --profile: --profile"),
        (("--gpus", "2", "--gpu", "B9000"), "gpu: 'B9000' is neither a hardware file nor one of"),
        (("--gpus", "2", "--workload", "holidays"), "holidays: neither a workload file nor a preset"),
        (("--gpus", "2", "-o", "/nowhere/plan.yaml"), "--output: /nowhere/plan.yaml: there is no folder /nowhere"),
        (("--gpus", "2", "--png", "/tmp"), "--png: /tmp is a folder"),
    ],
)
def test_bad_flags_are_refused_with_their_valid_range(arguments: tuple[str, ...], said: str):
    assert said in refusal(*arguments)


def test_where_the_script_cannot_be_written_nothing_is_planned(tmp_path: Path):
    (tmp_path / "plan.vllm.sh").mkdir()
    said = f"--export: {tmp_path}/plan.vllm.sh is a folder"
    assert said in refusal("--gpus", "2", "--export", "vllm", "-o", tmp_path / "plan.yaml")


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


# ---- figures that can be had again


def test_every_row_is_repeated_by_the_command_that_is_told_for_it(planned: Planned, answer: dict[str, Any]):
    rows = answer["best"]
    assert len(rows) > 1
    for row in rows:
        words = shlex.split(row["simulate"])
        assert words[:2] == ["triptych", "simulate"]
        again = json.loads(CliRunner().invoke(simulator, [*words[2:], "--json"]).stdout)
        assert again["runs"][0]["figures"] == row["figures"]
        assert again["placement"] == row["placement"]
    assert rows[0]["simulate"] in planned[0].stdout


def test_the_picture_shows_the_run_that_limits_each_row(planned: Planned, answer: dict[str, Any]):
    rows = {row["placement"]: row for row in answer["best"]}
    assert planned[2]
    for curve in planned[2]:
        row = rows[str(curve.candidate)]
        assert curve.kept == row["kept_rate"]
        figures = curve.figures[curve.rates.index(row["kept_rate"])]
        assert figures.slo_attainment == min(row["attained"].values())
        assert {one.num_requests for one in curve.figures} == {row["figures"]["num_requests"]}


def test_rates_that_were_not_confirmed_are_told_as_such(workload: Path):
    result = run("--gpus", 1, "--workload", workload, *TINY)
    assert "Not confirmed: rates are those that one run of 10 requests kept" in result.output
    assert "With one GPU there is only the aggregated placement." in result.output


def test_an_slo_that_hardly_enough_requests_keep_alone_is_told(workload: Path, tmp_path: Path):
    found = json.loads(workload.read_text())
    sizes = {"distribution": "values", "values": ["1024x768", "4032x3024"], "weights": [7, 3]}
    found["kinds"]["photos"]["images"] = {"size": sizes, "count": 1}
    path = tmp_path / "large.json"
    path.write_text(json.dumps(found))
    result = run("--gpus", 1, "--workload", path, *SMALL, "--attainment", 0.7)
    assert "Even alone on an idle 1epd only" in result.output, result.output
    assert "Disaggregation" not in result.output


def test_phases_say_how_many_requests_come(workload: Path, tmp_path: Path):
    found = json.loads(workload.read_text())
    del found["num_requests"]
    found["phases"] = [{"num_requests": 10}, {"num_requests": 10, "rate_factor": 2}]
    path = tmp_path / "phases.json"
    path.write_text(json.dumps(found))
    assert "--requests: photos has phases" in refusal("--gpus", 2, "--workload", path, "--requests", 5)
    result = run("--gpus", 1, "--workload", path, "--trials", 1, "--processes", 1, "--json")
    words = shlex.split(json.loads(result.stdout)["best"][0]["simulate"])
    assert "--requests" not in words
    again = json.loads(CliRunner().invoke(simulator, [*words[2:], "--json"]).stdout)
    assert again["runs"][0]["figures"] == json.loads(result.stdout)["best"][0]["figures"]


# ---- files for others


def test_without_an_output_file_the_script_is_all_that_stdout_gets(workload: Path):
    result = run("--gpus", 1, "--workload", workload, *TINY, "--export", "vllm")
    assert result.stdout.startswith("#!/usr/bin/env bash") and result.stdout.endswith('wait "${pids[@]}"\n')
    assert "req/s" in result.stderr


def test_where_the_best_has_no_equivalent_the_exported_one_is_named(workload: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "SHAPES", ({Role.EPD},))
    arguments = ("--gpus", 2, "--workload", workload, *TINY, "--trials", 4, "--objective", "goodput")
    result = run(*arguments, "--json", "--export", "vllm")
    found = json.loads(result.stdout)
    best = found["best"][0]["placement"]
    assert best != "2epd"
    assert f"vllm has no equivalent of {best}: written is 2epd, which keeps the SLO at" in result.stderr
    assert "less than" in result.stderr
    assert f"# vllm has no equivalent of {best}" in found["files"]["export"]


def test_a_local_model_is_served_from_anywhere_under_its_name(
    workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "mine" / name).write_bytes((checkpoint_path() / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert run("--gpus", 1, "--workload", workload, *TINY, "-o", "plan.yaml", model="mine").exit_code == 0
    values = read(tmp_path / "plan.yaml", _serve_flags())
    assert values["model"] == str(tmp_path / "mine")
    assert values["served_model_name"] == ["mine"]


def test_the_built_in_model_is_the_one_that_serve_takes_by_itself(workload: Path, tmp_path: Path):
    output = tmp_path / "plan.yaml"
    arguments = ("--gpus", 1, "--workload", workload, *TINY, "-o", output)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("triptych-demo on at most 1 x")
    assert "model" not in read(output, _serve_flags())


def test_a_plan_for_a_cpu_is_served_with_the_threads_that_were_measured(workload: Path, tmp_path: Path):
    profile, output = tmp_path / "profile.json", tmp_path / "plan.yaml"
    computed = analytic_profile(find_model(None), find_device("A100-80G"))
    costs = msgspec.structs.replace(computed.costs_of_steps, cores=2)
    made = msgspec.structs.replace(computed.made, device="cpu", threads=2)
    msgspec.structs.replace(computed, costs_of_steps=costs, made=made).save(profile)
    arguments = ("--gpus", 3, "--profile", profile, "--workload", workload, *SMALL, "-o", output)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    (command,) = re.findall("^triptych serve (.*)$", result.stdout, re.M)
    assert "--threads 2 " in command
    assert read(output, _serve_flags())["threads"] == 2
    (again,) = re.findall("^The first row again: triptych simulate (.*)$", result.stdout, re.M)
    figures = json.loads(CliRunner().invoke(simulator, [*shlex.split(again), "--json"]).stdout)["runs"][0]["figures"]
    assert f" req/s: {figures['slo_attainment']:.1%}, " in result.stdout.partition("How sure: ")[2]


def test_the_line_that_serves_the_best_says_the_same_as_the_file(workload: Path, tmp_path: Path):
    output = tmp_path / "plan.yaml"
    result = run("--gpus", 1, "--workload", workload, *TINY, "-o", output)
    (command,) = re.findall("^triptych serve (.*)$", result.stdout, re.M)
    model, *words = shlex.split(command)
    assert model == "Qwen/Qwen2.5-VL-7B-Instruct"
    flags = {name: value for name, value in read(output, _serve_flags()).items() if name != "model"}
    for name, value in flags.items():
        flag = name.replace("_", "-")
        assert (
            (f"--{'' if value else 'no-'}{flag}" in words)
            if isinstance(value, bool)
            else (words[words.index(f"--{flag}") + 1] == str(value))
        )
    assert sum(word.startswith("--") for word in words) == len(flags)


def test_a_model_may_be_given_by_its_name_on_the_hub(workload: Path):
    asked = ("--gpus", 1, "--workload", workload, *TINY)
    assert (
        run(*asked, model="Qwen/Qwen2.5-VL-7B-Instruct").stdout.splitlines()[1:]
        == run(*asked).stdout.replace("simulate qwen2.5-vl-7b", "simulate Qwen/Qwen2.5-VL-7B-Instruct").splitlines()[1:]
    )


@pytest.mark.parametrize("flags", [("-o", "plan.yaml"), ("--export", "vllm")])
def test_a_config_without_a_checkpoint_can_be_planned_and_not_served(
    workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_bytes((checkpoint_path() / "config.json").read_bytes())
    asked = ("--gpus", 1, "--workload", workload, *TINY)
    assert run(*asked, model="mine.json").exit_code == 0
    assert "mine.json is a config without a checkpoint" in refusal(*asked, *flags, model="mine.json")


def test_an_slo_that_no_request_lives_to_keep_is_refused(workload: Path, tmp_path: Path):
    found = json.loads(workload.read_text())
    found["kinds"]["photos"] |= {"timeout": "1 ms"}
    path = tmp_path / "hurried.json"
    path.write_text(json.dumps(found))
    said = refusal("--gpus", 2, "--workload", path, *SMALL, "--attainment", 0.995)
    assert "hurried.json: slo: no idle server keeps all of it for 99.5% of these requests" in said


# ---- how it is told


def test_a_narrow_terminal_shows_every_figure(workload: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ("--gpus", 1, "--workload", workload, *TINY)
    (row,) = json.loads(run(*arguments, "--json").stdout)["best"]
    monkeypatch.setenv("COLUMNS", "50")
    told = " ".join(run(*arguments).stdout.split())
    assert "\N{HORIZONTAL ELLIPSIS}" not in told
    assert f"placement 1epd, GPUs 1, USD/h 1.79, req/s {row['kept_rate']:.3g}, met {row['attained']['0']:.1%}," in told
