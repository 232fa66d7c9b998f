"""The long run: python benchmarks/soak.py --json FILE. Goes on where it was cut off; delete the state to start anew."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.checkpoints import make_checkpoint
from tests.faults.soak import Plan, Progress, run
from triptych.bench.environment import environment

FAMILY = "qwen2_5_omni"  # pictures, videos and sounds
FLAT = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=Plan.requests)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--placement", default=Plan.placement)
    parser.add_argument("--state", type=Path, help="a new one if left out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        plan = Plan(requests=options.requests, seed=options.seed, placement=options.placement)
        state = options.state or Path(folder) / "state"
        progress = run(plan, make_checkpoint(FAMILY, Path(folder) / "checkpoint"), state, tell)
    result = {"command": " ".join(["python", *sys.argv]), "environment": environment(), "growth": progress.growth}
    if options.json is not None:
        text = json.dumps(result | msgspec.to_builtins(progress), indent=1, default=str)
        options.json.write_text(text + "\n")
    print(f"memory over the second half: {progress.growth}")
    return int(bool(progress.lost or progress.wrong or max(progress.growth.values()) > FLAT))


def tell(progress: Progress) -> None:
    sample = progress.memory[-1]
    print(
        f"{progress.done:5d} requests  {progress.seconds:6.1f} s  lost {len(progress.lost)}  "
        f"wrong {len(progress.wrong)}  killed {len(progress.kills)}  switched {len(progress.switches)}  "
        f"server {sample.server >> 20} MiB  all {sample.together >> 20} MiB",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
