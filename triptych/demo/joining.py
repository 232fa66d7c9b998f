"""Stage 3: the language model of stage 2 learns to read the tower of stage 1, which stays as it is.

Does not know transformers' generate; `evaluate` asks the exported model.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from triptych.demo.answering import Answers, answer, exact_scores
from triptych.demo.batches import Batch
from triptych.demo.facts import MAX_PICTURES
from triptych.demo.hints import Hints
from triptych.demo.loop import Scores
from triptych.demo.optimiser import Optimiser
from triptych.demo.packing import Packer
from triptych.demo.pool import Pool
from triptych.demo.questions import KIND_SHARES
from triptych.demo.rows import Scene
from triptych.demo.seeing import look

_NUM_PICTURES: dict[int, float] = {0: 0.3, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2, 7: 2, 8: 2}
# What stage 2 leaves weakest, pictures with two things, gets the most practice.
_SHARES = {**KIND_SHARES, "colour": 0.3, "shape by colour": 0.45, "describe": 0.2, "shape": 0.05}
_PAIR_SHARE = 0.4  # of the pictures are drawn among those with two things, beside those that come by chance


class JoiningStage:
    name = "joining"

    def __init__(
        self,
        model: Qwen2VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        pool: Pool,
        held_out: Pool,
        device: torch.device,
        batch_pictures: int,
        scored_rows: int,
    ) -> None:
        model.model.visual.requires_grad_(False)
        self.optimiser = Optimiser(model, device)
        self._pool, self._held_out, self._device, self._batch_pictures = pool, held_out, device, batch_pictures
        self._pairs = [i for i, facts in enumerate(pool.facts) if facts.is_pair]
        self._packer, self._scorer = Packer(tokenizer, _SHARES), Packer(tokenizer)
        self._hints, self._scored_rows = Hints(device), scored_rows

    def loss(self, rng: random.Random, progress: float) -> Tensor:
        num_pictures = rng.choices(list(_NUM_PICTURES), list(_NUM_PICTURES.values()))[0]
        rows = self._batch_pictures // max(1, num_pictures)
        scenes = [self._training_scenes(num_pictures, rng) for _ in range(max(1, rows))]
        batch = self._packer.pack(scenes, 3 + num_pictures if num_pictures else 1, rng)
        answers = self._answers(self._pool, batch)
        return answers.loss() + self._hints.loss(answers, batch)

    @torch.no_grad()
    def scores(self) -> Scores:
        rng = random.Random(2)
        told = []
        for held_out in (False, True):
            for num_pictures in range(1, MAX_PICTURES + 1):
                indices = [rng.sample(range(len(self._held_out)), num_pictures) for _ in range(self._scored_rows)]
                scenes = [[_scene(self._held_out, i) for i in row] for row in indices]
                batch = self._scorer.pack(scenes, 8, rng, held_out=held_out, only_branches=True)
                told.append((batch, self._answers(self._held_out, batch)))
        return {**exact_scores(told[:MAX_PICTURES]), "held_out": exact_scores(told[MAX_PICTURES:])["all"]}

    def _training_scenes(self, num_pictures: int, rng: random.Random) -> list[Scene]:
        everything = range(len(self._pool))
        chosen = [rng.choice(self._pairs if rng.random() < _PAIR_SHARE else everything) for _ in range(num_pictures)]
        return [_scene(self._pool, i) for i in chosen]

    def _answers(self, pool: Pool, batch: Batch) -> Answers:
        return answer(self.optimiser.compute, batch, self._see(pool, batch.scenes) if batch.scenes else None)

    @torch.no_grad()
    def _see(self, pool: Pool, scenes: list[Scene]) -> Tensor:
        tokens, _, _ = look(self.optimiser.compute.model.visual, pool, [scene.index for scene in scenes], self._device)
        return tokens


def _scene(pool: Pool, index: int) -> Scene:
    return Scene(pool.facts[index], (int(pool.grids[index, 0]), int(pool.grids[index, 1])), index)
