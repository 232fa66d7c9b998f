"""What the command line says of itself."""

import pytest
from typer.testing import CliRunner

from triptych import __version__
from triptych.cli import SUMMARIES, app


def test_the_version_is_told_with_the_name() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"triptych {__version__}\n")


def test_every_command_is_told_whole_in_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = CliRunner().invoke(app, ["--help"]).output
    listed = output.partition("Commands:\n")[2].splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[one.__name__, text] for one, text in SUMMARIES.items()]
