"""`triptych profile`: what is wrong with the flags is said before anything is measured."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from triptych.commands.profile import profile
from triptych.errors import ConfigError

app = typer.Typer()
app.command()(profile)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threads", "0"], "--threads: 0 is not between 1 and"),
        (["--threads", "100000"], "--threads: 100000 is not between 1 and"),
        (["--output", "/nowhere/profile.json"], "--output: there is no folder /nowhere"),
        (["--output", "/tmp"], "--output: /tmp is a folder"),
        (["--device", "tpu"], "--device: 'tpu' is none of cpu, cuda"),
        (["--transfer", "pigeon"], "--transfer: 'pigeon' is none of auto, shm, nixl"),
        (["--price", "1.29"], "--price: '1.29' has no unit; use USD/h"),
        (["--price", "-1 USD/h"], "--price: '-1 USD/h' is out of range"),
        (["--dtype", "float8"], "dtype: 'float8' is none of"),
        (["--max-model-len", "0"], "max_model_len:"),
        (["/nowhere"], "/nowhere"),
    ],
)
def test_wrong_flags_are_refused_by_name(tmp_path: Path, arguments: list[str], said: str) -> None:
    found = CliRunner().invoke(app, ["--output", str(tmp_path / "profile.json"), *arguments])
    assert isinstance(found.exception, ConfigError), found.exception
    assert said in str(found.exception)
    assert not list(tmp_path.iterdir())
