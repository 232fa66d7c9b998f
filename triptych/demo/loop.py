"""One training stage: step, log, evaluate, save, resume. Knows no model and no data.

Each step draws its own random numbers from (seed, step), so a resumed stage continues exactly as if it had not stopped.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from triptych.demo.optimiser import Optimiser

logger = logging.getLogger(__name__)

Scores = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a stage lasts and how fast it learns: warm-up, then constant, then falling to a tenth."""

    num_steps: int
    learning_rate: float
    warmup_steps: int = 150
    cooldown: float = 0.25  # share of the steps, at the end
    score_every: int = 250
    save_every_s: float = 120.0

    def rate_at(self, step: int) -> float:
        left = (self.num_steps - step) / max(1.0, self.cooldown * self.num_steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * min(1.0, 0.1 + 0.9 * left)


class Stage(Protocol):
    name: str
    optimiser: Optimiser

    def loss(self, rng: random.Random, progress: float) -> Tensor: ...

    def scores(self) -> Scores: ...


def run_stage(stage: Stage, plan: Plan, folder: Path, seed: int) -> None:
    """Runs from where the folder's state file stands until the plan's last step; leaves the final state there."""
    path = folder / f"{stage.name}.pt"
    step, spent = _restore(stage, path)
    started = saved = time.monotonic()
    recent: list[float] = []
    while step < plan.num_steps:
        rng = random.Random(f"{seed}-{stage.name}-{step}")
        loss = stage.loss(rng, step / plan.num_steps)
        stage.optimiser.step(loss, plan.rate_at(step))
        recent = [*recent[-49:], loss.item()]
        step += 1
        now = time.monotonic()
        if step % plan.score_every == 0 or step == plan.num_steps:
            minutes = (spent + now - started) / 60
            _log(stage, folder, {"step": step, "minutes": minutes, "loss": sum(recent) / len(recent), **stage.scores()})
        if now - saved > plan.save_every_s:
            _save(stage, path, step, spent + now - started)
            saved = now
    _save(stage, path, step, spent + time.monotonic() - started)


def load_weights(folder: Path, stage_name: str) -> dict[str, Tensor]:
    """The exact weights that a stage left (or last saved)."""
    weights: dict[str, Tensor] = torch.load(folder / f"{stage_name}.pt", map_location="cpu")["module"]
    return weights


def _restore(stage: Stage, path: Path) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu")
    stage.optimiser.restore(state)
    logger.info("%s resumes at step %d", stage.name, state["step"])
    return state["step"], state["seconds"]


def _save(stage: Stage, path: Path, step: int, seconds: float) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "seconds": seconds, **stage.optimiser.state()}, partial)
    os.replace(partial, path)


def _log(stage: Stage, folder: Path, record: Mapping[str, float]) -> None:
    line = json.dumps({"stage": stage.name, **{key: round(value, 4) for key, value in record.items()}})
    logger.info(line)
    with (folder / "log.jsonl").open("a") as log:
        log.write(line + "\n")
