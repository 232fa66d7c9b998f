"""`triptych simulate`, as it is called."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from triptych.commands.arguments import find_model
from triptych.commands.simulate import simulate
from triptych.demo import checkpoint_path
from triptych.errors import ConfigError
from triptych.planning.costs.analytic import analytic_profile
from triptych.planning.costs.hardware import find_device

MODEL = "minicpm-v-2.6"
PAPER = ("--workload", "paper-synthetic-2")

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(simulate)


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, [MODEL, *arguments], env={"COLUMNS": "100"})
    if result.exception is not None:
        raise result.exception
    return result.output


def answer(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call(*arguments, "--json"))
    return found


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


# ---- one rate


def test_one_run_is_a_table_and_what_it_comes_to() -> None:
    output = call("--placement", "5e2p1d", *PAPER, "--rate", "0.1")
    assert output.splitlines()[:3] == [
        "5e2p1d of minicpm-v-2.6 on A100-80G, paper-synthetic-2",
        "Sent: 0.1 req/s; these 100 requests came at 0.0843 req/s",
        "SLO: TTFT at most 1.4 s, TPOT at most 40 ms, for 90% of the requests",
    ]
    for line in ("100 requests in", "TTFT (ms)", "ITL (ms)", "Throughput: 0.", "SLO attainment:", "USD/h", "Idle: e "):
        assert line in output


def test_the_same_call_gives_the_same_figures_and_another_seed_others() -> None:
    first, again, other = (answer("--requests", "40", "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first["runs"][0]["figures"]["num_requests"] == 40
    assert first["runs"][0]["figures"]["ttft_ms"] != other["runs"][0]["figures"]["ttft_ms"]


def test_more_encoders_answer_pictures_sooner_and_without_irp_later() -> None:
    load = ("--workload", "paper-synthetic-8", "--requests", "30", "--rate", "0.1")
    ttft = [
        answer("--placement", placement, *load, *more)["runs"][0]["figures"]["ttft_ms"]["p50"]
        for placement, more in (("4e1p1d", ()), ("4e1p1d", ("--no-irp",)), ("1e1p1d", ()))
    ]
    assert ttft[0] < 0.7 * ttft[1]
    assert ttft[1] <= ttft[2]


def test_objectives_are_the_workloads_but_for_what_flags_say() -> None:
    assert answer(*PAPER)["slo"] == {"ttft_ms": 1400.0, "tpot_ms": 40.0, "e2e_ms": None, "attainment": 0.9}
    changed = answer(*PAPER, "--slo-ttft", "100 s", "--attainment", "0.5")
    assert changed["slo"] == {"ttft_ms": 1e5, "tpot_ms": 40.0, "e2e_ms": None, "attainment": 0.5}
    assert changed["runs"][0]["figures"]["slo_attainment"] == 1.0


def test_instances_that_fail_are_told_and_cost_time() -> None:
    load = ("--placement", "1epd", "--requests", "30", "--rate", "0.5")
    well, ill = answer(*load), answer(*load, "--fail", "i0@10s", "--fail", "i0@0.5 min")
    assert [loss["at_s"] for loss in ill["runs"][0]["losses"]] == [10.0, 30.0]
    assert ill["runs"][0]["figures"]["ttft_ms"]["p99"] > well["runs"][0]["figures"]["ttft_ms"]["p99"]
    told = call(*load, "--fail", "i0@10s", "--fail", "i0@10h")
    assert "i0 was lost at 10.0 s" in told
    assert "i0 was not lost: all was answered before 36000 s" in told


def test_roles_follow_the_load() -> None:
    load = ("--placement", "2e4p2d", "--workload", "paper-synthetic-8", "--requests", "60", "--rate", "1")
    fixed, adaptive = answer(*load), answer(*load, "--adaptive")
    assert not fixed["runs"][0]["switches"]
    assert {switch["after"] for switch in adaptive["runs"][0]["switches"]} == {"e"}
    assert adaptive["runs"][0]["figures"]["duration_s"] < fixed["runs"][0]["figures"]["duration_s"]
    assert "became e instead of" in call(*load, "--adaptive")


def test_the_head_says_how_fast_requests_come_and_what_they_are_held_against(tmp_path: Path) -> None:
    path = tmp_path / "load.json"

    def head(arrivals: dict[str, Any], *flags: str, **more: Any) -> list[str]:
        kinds = {"short": {"text_tokens": 10, "output_tokens": 10}}
        path.write_text(json.dumps({"name": "load", "arrivals": arrivals, "kinds": kinds, **more}))
        return call("--workload", str(path), *flags).splitlines()[1:3]

    steady, even = ({"process": process, "rate": "3 req/s"} for process in ("poisson", "uniform"))
    assert head({"process": "all_at_once"}, num_requests=4) == ["Sent: all at once", "SLO: none"]
    phases = head(steady, phases=[{"num_requests": 4, "rate_factor": 2}])[0]
    assert phases.startswith("Sent: 3 req/s, times the factor of each phase; these 4 requests came at ")
    slo = head(even, "--slo-tpot", "25 ms", "--attainment", "0.995", num_requests=4)
    assert slo == ["Sent: 3 req/s", "SLO: TPOT at most 25 ms, for 99.5% of the requests"]


def test_the_rate_of_a_recorded_trace_is_told(tmp_path: Path) -> None:
    lines = ["Timestamp,Request tokens,Response tokens", *(f"{second / 2},400,20" for second in range(11))]
    (tmp_path / "trace.csv").write_text("\n".join(lines))
    path = tmp_path / "load.json"
    path.write_text(json.dumps({"name": "load", "trace": {"format": "burstgpt", "path": "trace.csv"}}))
    sent = call("--workload", str(path)).splitlines()[1]
    assert sent == "Sent: as recorded; these 11 requests came at 2 req/s"


# ---- the model and its profile


def test_the_built_in_model_is_the_one_if_none_is_named_and_its_profile_is_taken(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    analytic_profile(find_model(None), find_device("A100-80G")).save(profile)
    few = ["--requests", "5", "--profile", str(profile)]
    output = CliRunner().invoke(app, few).output
    assert output.startswith("1e1p1d of triptych-demo on A100-80G, pictures\n")
    for model in (checkpoint_path(), checkpoint_path() / "config.json"):
        assert CliRunner().invoke(app, [str(model), *few]).output == output


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    analytic_profile(find_model(None), find_device("A100-80G")).save(profile)
    assert refusal("--profile", str(profile)) == (
        f"--profile: {profile} is of the model triptych-demo, and not of {MODEL}"
    )


# ---- several rates


def test_several_rates_are_columns_and_the_highest_that_keeps_the_slo_is_told() -> None:
    load = ("--placement", "5e2p1d", *PAPER, "--slo-ttft", "2 s", "--requests", "40")
    found = answer(*load, "--rates", "2,0.05,0.1,40,1,20")
    assert [run["rate"] for run in found["runs"]] == [0.05, 0.1, 1.0, 2.0, 20.0, 40.0]
    kept = [run["rate"] for run in found["runs"] if run["figures"]["slo_attainment"] >= 0.9]
    assert 0 < len(kept) < 5
    assert found["kept_rate"] == kept[-1]
    output = call(*load, "--rates", "0.05,0.1,1,2,20,40")
    assert output.count("rate (requests/s)") == output.count("sent (requests/s)") == 2
    assert "Sent: " not in output and "SLO: TTFT at most 2 s, TPOT at most 40 ms, for 90%" in output
    assert f"Kept rate: {kept[-1]:g} req/s, the highest of these at which 90% of the requests meet" in output


def test_an_slo_that_is_missed_at_every_rate_is_said() -> None:
    assert "Kept rate: none; at 2 req/s already fewer than 90%" in call(*PAPER, "--rates", "2,4", "--requests", "40")


# ---- files


def test_files_are_a_timeline_metrics_and_a_picture(tmp_path: Path) -> None:
    timeline, metrics, png = tmp_path / "trace.json", tmp_path / "metrics.txt", tmp_path / "slo.png"
    call("--requests", "20", "--timeline", str(timeline), "--metrics", str(metrics), "--png", str(png))
    events = json.loads(timeline.read_text())
    assert sum(event["ph"] == "e" and event["name"] == "r7" for event in events) == 1
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"encode", "prefill", "decode"}
    lines = metrics.read_text().splitlines()
    assert f'vllm:request_success_total{{finished_reason="length",model_name="{MODEL}"}} 20.0' in lines
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flag", ["--timeline", "--metrics"])
def test_files_of_one_run_are_refused_for_several(tmp_path: Path, flag: str) -> None:
    assert refusal("--rates", "1,2", flag, str(tmp_path / "file")).startswith(f"{flag}: ")
    assert not list(tmp_path.iterdir())


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--fail", "i9@10s"), "--fail: 'i9@10s': 1e1p1d has the instances i0 to i2"),
        (("--fail", "i0@10"), "--fail: '10' has no unit; use h, min, s, ms, us or ns"),
        (("--fail", "first"), "--fail: 'first' is not an instance and a time, such as i0@10s"),
        (("--rate", "0"), "--rate: 0.0 is not a finite number above 0"),
        (("--rate", "nan"), "--rate: nan is not a finite number above 0"),
        (("--rates", "1,a"), "--rates: '1,a' is not a list of 1 to 100 different numbers above 0: 0.5,1,2"),
        (("--rates", "1,1"), "--rates: '1,1' is not a list of 1 to 100 different numbers above 0: 0.5,1,2"),
        (("--rate", "1", "--rates", "2"), "--rate, --rates: only one of them can be given"),
        (("--requests", "0"), "--requests: 0 is not between 1 and 10000000"),
        (("--seed", "-1"), "--seed: -1 is not between 0 and 4294967295"),
        (("--attainment", "1.5"), "--attainment: 1.5 is not above 0 and at most 1"),
        (("--slo-ttft", "2"), "--slo-ttft: '2' has no unit"),
        (
            ("--slo-ttft", "1e306 s"),
            "--slo-ttft: '1e306 s' is out of range; a finite number above 0 is needed, at most",
        ),
        (("--slo-tpot", "0 ms"), "--slo-tpot: '0 ms' is out of range; a finite number above 0 is needed"),
        (("--schedule", "lifo"), "--schedule: 'lifo' is none of fcfs, sjf, slo"),
        (("--max-queue-s", "inf"), "--max-queue-s: inf is not a finite number above 0"),
        (("--max-num-seqs", "2048"), "--max-num-batched-tokens: 2048 is not above --max-num-seqs, which is 2048"),
        (("--placement", "1e"), "no instance serves prefill or decode"),
        (("--workload", "picturs"), "did you mean 'pictures'?"),
        (("--gpu", "H100", "--profile", "p.json"), "--gpu, --profile: --profile says what --gpu would; leave one"),
        (("--gpu", "B1"), "neither a hardware file nor one of"),
        (("--profile", "missing.json"), "missing.json: cannot be read: No such file or directory"),
        (("--timeline", "missing/trace.json"), "--timeline: missing/trace.json: there is no folder missing"),
        (("--png", "."), "--png: . is a folder"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: tuple[str, ...], said: str) -> None:
    assert said in refusal(*arguments)


def test_a_request_that_the_model_cannot_take_is_refused_with_its_workload(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    kind = {"text_tokens": 100_000, "output_tokens": 10}
    arrivals = {"process": "poisson", "rate": "1 req/s"}
    path.write_text(json.dumps({"name": "long", "arrivals": arrivals, "kinds": {"long": kind}, "num_requests": 2}))
    assert f"{path}: a request has 100010 tokens, the context of {MODEL} is" in refusal("--workload", str(path))


def test_a_first_token_may_not_be_later_than_the_last(tmp_path: Path) -> None:
    path = tmp_path / "late.json"
    arrivals = {"process": "poisson", "rate": "1 req/s"}
    kinds = {"short": {"text_tokens": 10, "output_tokens": 10}}
    asked = {"arrivals": arrivals, "kinds": kinds, "num_requests": 2, "slo": {"e2e": "1 s"}}
    path.write_text(json.dumps({"name": "late"} | asked))
    said = "--slo-ttft, --slo-tpot: e2e: 1 s is less than ttft, 5 s; at least that is needed"
    assert said in refusal("--workload", str(path), "--slo-ttft", "5 s")


def test_a_share_of_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "free.json"
    kinds = {"short": {"text_tokens": 10, "output_tokens": 10}}
    arrivals = {"process": "poisson", "rate": "1 req/s"}
    path.write_text(json.dumps({"name": "free", "arrivals": arrivals, "kinds": kinds, "num_requests": 2}))
    said = "--attainment: is the share that keeps an SLO, and there is none; give --slo-ttft or --slo-tpot"
    assert said in refusal("--workload", str(path), "--attainment", "0.5")


def test_a_number_of_requests_is_refused_where_phases_say_it(tmp_path: Path) -> None:
    path = tmp_path / "phases.json"
    kinds = {"short": {"text_tokens": 10, "output_tokens": 10}}
    phases = [{"num_requests": 5}, {"num_requests": 5, "rate_factor": 2}]
    arrivals = {"process": "poisson", "rate": "1 req/s"}
    path.write_text(json.dumps({"name": "two", "arrivals": arrivals, "kinds": kinds, "phases": phases}))
    assert answer("--workload", str(path))["runs"][0]["figures"]["num_requests"] == 10
    assert "--requests: two has phases" in refusal("--workload", str(path), "--requests", "5")
