"""Trains the built-in model: `python -m triptych.demo.train --work DIR`. Run it again to resume."""

from __future__ import annotations

import argparse
from pathlib import Path

from triptych.demo import checkpoint_path
from triptych.demo.training import STAGES, Settings, export_model, start_logging, train, train_stage


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m triptych.demo.train", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="pictures, states and log; about 7 GB")
    parser.add_argument("--out", type=Path, default=checkpoint_path(), help="the Hugging Face folder to write")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=18, help="of 5,000 pictures each")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's number of steps")
    parser.add_argument("--only", choices=[*STAGES, "export"], help="one stage instead of all")
    options = parser.parse_args(arguments)
    settings = Settings(
        work=options.work,
        out=options.out,
        device=options.device,
        threads=options.threads,
        seed=options.seed,
        num_shards=options.shards,
        scale=options.scale,
    )
    start_logging()
    if options.only == "export":
        export_model(settings)
    elif options.only:
        settings.work.mkdir(parents=True, exist_ok=True)
        train_stage(options.only, settings)
    else:
        train(settings)


if __name__ == "__main__":
    main()
