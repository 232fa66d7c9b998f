"""The whole training: draw a pool, stages 1 and 2 side by side, stage 3, export. Each picks up where it stopped."""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from triptych.demo.export import export
from triptych.demo.joining import JoiningStage
from triptych.demo.loop import Plan, Stage, load_weights, run_stage
from triptych.demo.model import new_model
from triptych.demo.pool import SHARD_PICTURES, Pool, ensure_pool
from triptych.demo.seeing import SeeingStage
from triptych.demo.telling import TellingStage
from triptych.demo.tokenizer import new_tokenizer

PLANS = {
    "seeing": Plan(num_steps=10_500, learning_rate=1.5e-3),
    "telling": Plan(num_steps=5_000, learning_rate=1.5e-3),
    "joining": Plan(num_steps=4_800, learning_rate=1e-3, cooldown=0.4),
}
STAGES = tuple(PLANS)
_HELD_OUT_SEED = 900_000


@dataclass(frozen=True, slots=True)
class Settings:
    work: Path  # pools, states and logs
    out: Path  # the Hugging Face folder
    device: str = "cpu"
    threads: int = 2
    seed: int = 0
    num_shards: int = 18
    shard_pictures: int = SHARD_PICTURES
    scale: float = 1.0  # of every stage's number of steps
    seeing_pictures: int = 64  # per step
    telling_tokens: int = 4000
    joining_pictures: int = 48
    scored_rows: int = 12  # per number of pictures, at each scoring
    tokenizer_questions: int = 20_000

    def plan(self, stage: str) -> Plan:
        plan = PLANS[stage]
        return replace(plan, num_steps=max(1, round(plan.num_steps * self.scale)))


def train(settings: Settings) -> None:
    settings.work.mkdir(parents=True, exist_ok=True)
    _open_pools(settings)
    if settings.device == "cpu" and settings.threads > 1:
        _side_by_side(replace(settings, threads=settings.threads // 2), ("seeing", "telling"))
    else:
        train_stage("seeing", settings)
        train_stage("telling", settings)
    train_stage("joining", settings)
    export_model(settings)


def train_stage(name: str, settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    run_stage(new_stage(name, settings), settings.plan(name), settings.work, settings.seed)


def export_model(settings: Settings) -> None:
    """Writes the last stage's latest saved weights as a Hugging Face folder."""
    tokenizer, model = _new_model(settings)
    model.load_state_dict(load_weights(settings.work, "joining"))
    export(model, tokenizer, settings.out)


def new_stage(name: str, settings: Settings) -> Stage:
    tokenizer, model = _new_model(settings)
    device = torch.device(settings.device)
    if name == "telling":
        return TellingStage(model, tokenizer, device, settings.telling_tokens, settings.scored_rows)
    pool, held_out = _open_pools(settings)
    if name == "seeing":
        return SeeingStage(model.model.visual, pool, held_out, device, settings.seeing_pictures)
    if not (settings.work / "joining.pt").exists():
        model.load_state_dict(load_weights(settings.work, "telling"))
        model.model.visual.load_state_dict(load_weights(settings.work, "seeing"))
    return JoiningStage(model, tokenizer, pool, held_out, device, settings.joining_pictures, settings.scored_rows)


def _new_model(settings: Settings) -> tuple[PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration]:
    tokenizer = new_tokenizer(num_questions=settings.tokenizer_questions)
    return tokenizer, new_model(tokenizer, settings.seed)


def _open_pools(settings: Settings) -> tuple[Pool, Pool]:
    """-> pictures to train on, and pictures to score on."""
    folder = settings.work / "pool"
    pool = ensure_pool(folder, settings.num_shards, 1, settings.threads, settings.shard_pictures)
    return pool, ensure_pool(folder, 1, _HELD_OUT_SEED, 1, settings.shard_pictures)


def _side_by_side(settings: Settings, names: tuple[str, ...]) -> None:
    """One process per stage; if one fails, its error is raised when the other has ended."""
    with multiprocessing.get_context("spawn").Pool(len(names), initializer=start_logging) as workers:
        workers.starmap(train_stage, [(name, settings) for name in names], chunksize=1)


def start_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
