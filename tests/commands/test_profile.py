"""`triptych profile`: what is wrong with the flags is said before anything is measured; what was measured, in words."""

from pathlib import Path

import pytest
import typer
from msgspec.structs import replace
from typer.testing import CliRunner

from tests.planning.test_profile import make_profile
from triptych.commands.profile import described, next_command, profile, tell
from triptych.errors import ConfigError
from triptych.planning.costs.profile import Residual

app = typer.Typer()
app.command()(profile)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threads", "0"], "--threads: 0 is not between 1 and"),
        (["--threads", "100000"], "--threads: 100000 is not between 1 and"),
        (["--output", "/nowhere/profile.json"], "--output: /nowhere/profile.json: there is no folder /nowhere"),
        (["--output", "/tmp"], "--output: /tmp is a folder"),
        (["--device", "tpu"], "--device: 'tpu' is none of cpu, cuda"),
        (["--device", "cuda:99"], "--device: cuda:99: this host has "),
        (["--transfer", "pigeon"], "--transfer: 'pigeon' is none of auto, shm, nixl"),
        (["--price", "1.29"], "--price: '1.29' has no unit; use USD/h"),
        (["--price", "-1 USD/h"], "--price: '-1 USD/h' is out of range"),
        (["--dtype", "float8"], "--dtype: 'float8' is none of"),
        (["--max-model-len", "0"], "--max-model-len: 0 is not valid; a whole number of at least 1 is needed"),
        (["/nowhere"], "/nowhere"),
        (["qwen3-vl-8b"], "model 'qwen3-vl-8b': is what capacity, simulate and plan call Qwen/Qwen3-VL-8B-Instruct"),
    ],
)
def test_wrong_flags_are_refused_by_name(tmp_path: Path, arguments: list[str], said: str) -> None:
    found = CliRunner().invoke(app, ["--output", str(tmp_path / "profile.json"), *arguments])
    assert isinstance(found.exception, ConfigError), found.exception
    assert said in str(found.exception)
    assert not list(tmp_path.iterdir())


def test_costs_are_told_in_words_and_what_is_unknown_by_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    tell(make_profile(encode_step=0.0123456), quick=False)
    output = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in output.splitlines() if "│" in line]
    said = {row[0]: row[1] for row in rows}
    assert said["encode: a step, beside what is in it"] == "12.3 ms"
    assert said["encode: a pixel of it"] == said["bytes to host memory and back"] == "-"
    assert said["KV of a token"] == "57.3 kB"
    assert "_" not in "".join(said) and "None" not in output


def test_what_is_simulated_next_is_a_folder_of_this_machine(tmp_path: Path) -> None:
    assert next_command(Path("p.json"), None) == "triptych simulate --profile p.json"
    assert next_command(Path("p.json"), "./my model") == "triptych simulate './my model' --profile p.json"
    assert described(None, "/hub/snapshot") is None
    assert described(str(tmp_path), "/elsewhere") == str(tmp_path)
    assert described("Qwen/Qwen2.5-VL-3B-Instruct", "/hub/snapshot") == "/hub/snapshot"


def test_a_fit_that_is_far_off_is_said_with_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    poor = replace(make_profile(), residuals={"decode": Residual(samples=9, median=0.1, worst=0.24)})
    tell(poor, quick=True)
    output = capsys.readouterr().out
    assert "Far off at worst: decode. To do better, measure without --quick, and keep the machine free" in output
    tell(make_profile(), quick=True)
    assert "Far off" not in capsys.readouterr().out
