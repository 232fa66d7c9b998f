import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from triptych.demo.loop import Plan, load_weights, run_stage
from triptych.demo.training import Settings, new_stage, train


def make_settings(folder: Path) -> Settings:
    return Settings(
        work=folder / "work",
        out=folder / "out",
        threads=1,
        num_shards=1,
        shard_pictures=40,
        scale=0.0002,
        seeing_pictures=4,
        telling_tokens=400,
        joining_pictures=4,
        scored_rows=1,
        tokenizer_questions=500,
    )


def test_training_runs_to_an_exported_model(tmp_path: Path) -> None:
    train(make_settings(tmp_path))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    weights = load_weights(tmp_path / "work", "joining")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    stages = [json.loads(line)["stage"] for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert set(stages) == {"seeing", "telling", "joining"}


def test_a_stopped_stage_continues_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    settings.work.mkdir()
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    plan = Plan(num_steps=4, learning_rate=1e-3, score_every=100, warmup_steps=1, cooldown=1e-9)
    for folder, stops in ((whole, (4,)), (halves, (2, 4))):
        folder.mkdir()
        for stop in stops:
            stage = new_stage("telling", settings)
            run_stage(stage, Plan(stop, plan.learning_rate, 1, 1e-9, 100), folder, seed=0)
    for name, weight in load_weights(whole, "telling").items():
        assert torch.equal(weight, load_weights(halves, "telling")[name]), name
