"""Whoever waits for a command in a pipe is told that it goes on, and how far it is."""

import time

import pytest

from triptych.commands import progress


def test_in_a_pipe_a_part_is_told_when_it_begins_and_again_as_long_as_it_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REPORT_S", 0.02)
    with progress.progress("plan") as part:
        with part("candidates", 8) as advance:
            advance()
            advance()
            _until_told(capsys, "plan: candidates, 8\n", "plan: candidates, 2 of 8 after 0 s\n")
        with part("longer runs", 1):
            _until_told(capsys, "plan: longer runs\n", "plan: longer runs after 0 s\n")
    assert not capsys.readouterr().out


def _until_told(capsys: pytest.CaptureFixture[str], *lines: str) -> None:
    told, end_s = "", time.monotonic() + 5
    while not all(line in told for line in lines):
        assert time.monotonic() < end_s, told
        time.sleep(0.02)
        told += capsys.readouterr().err


def test_what_is_over_soon_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("plan") as part, part("picture", 1):
        pass
    assert capsys.readouterr().err == "plan: picture\n"


def test_in_a_terminal_a_bar_is_drawn_and_taken_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.progress("plan") as part, part("candidates", 8) as advance:
        advance()
    told = capsys.readouterr().err
    assert "candidates" in told and "\x1b[2K" in told and "plan: " not in told
