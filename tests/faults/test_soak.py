"""A long run loses nothing, says nothing wrong, and does not grow; here the short form of it."""

from pathlib import Path

from tests.faults.soak import Plan, run
from tests.flows.test_lifecycle import left_behind
from tests.model.builders import checkpoint

FAMILY = "qwen2_5_omni"  # pictures, videos and sounds
SHORT = Plan(requests=60, block=20, kill_every=30, switch_every=60, seed=1)


def test_a_short_run_with_kills_and_a_switch_loses_nothing_and_says_nothing_wrong(tmp_path: Path) -> None:
    before = left_behind()
    progress = run(SHORT, checkpoint(FAMILY), tmp_path / "state")
    assert (progress.lost, progress.wrong) == ([], [])
    assert progress.done == 60
    assert progress.left > 0
    assert len(progress.kills) == 2
    assert [said.split(": ")[-1][:3] for said in progress.switches] == ["200"], progress.switches
    assert left_behind() <= before
