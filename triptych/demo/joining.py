"""Stage 3: the tower of stage 1 and the language model of stage 2 become one model, trained on drawn pictures.

A share of the batches stays symbolic, which keeps "picture k" sharp at little cost; facts keep being read off the
tower's tokens, which teaches it more per picture than a few questions do.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from triptych.demo.answering import answer, exact_scores
from triptych.demo.batches import Packer, Scene, Shares
from triptych.demo.facts import MAX_PICTURES
from triptych.demo.loop import Scores
from triptych.demo.optimiser import Optimiser
from triptych.demo.pool import Pool
from triptych.demo.questions import KIND_SHARES
from triptych.demo.seeing import FactReader, fact_scores, look
from triptych.demo.symbols import Symbols
from triptych.demo.telling import pick, symbolic_batch

CURRICULUM: tuple[tuple[float, Shares], ...] = (
    (0.03, {1: 1, 2: 1}),
    (1.0, {0: 0.3, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2, 7: 2, 8: 2}),
)
_SHARES = {**KIND_SHARES, "describe": 0.14, "shape by colour": 0.12, "which": 0.22}  # what stage 2 leaves weakest
_SYMBOLIC_SHARE = 0.2
_FACT_WEIGHT = 0.2
_VISION_RATE = 0.6  # the tower's learning rate, as a share of the language model's


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
        self.optimiser = Optimiser(model, device, slow="model.visual", slow_by=_VISION_RATE)
        self._pool, self._held_out, self._device, self._batch_pictures = pool, held_out, device, batch_pictures
        self._packer, self._scorer = Packer(tokenizer, _SHARES), Packer(tokenizer)
        self._symbols, self._reader, self._scored_rows = Symbols(device), FactReader(device), scored_rows

    def loss(self, rng: random.Random, progress: float) -> Tensor:
        num_pictures = pick(CURRICULUM, progress, rng)
        if num_pictures == 0 or rng.random() < _SYMBOLIC_SHARE:
            return self._symbolic_loss(num_pictures, rng)
        rows = max(1, self._batch_pictures // num_pictures)
        scenes = [_random_scenes(self._pool, num_pictures, rng) for _ in range(rows)]
        batch = self._packer.pack(scenes, 3 + num_pictures, rng)
        tokens, mask, truth = self._look(self._pool, batch.scenes)
        answers = answer(self.optimiser.compute, batch, tokens)
        return answers.loss() + _FACT_WEIGHT * self._reader.loss(tokens, mask, truth)

    @torch.no_grad()
    def scores(self) -> Scores:
        rng = random.Random(2)
        told, read, truth = [], [], []
        for held_out in (False, True):
            for num_pictures in range(1, MAX_PICTURES + 1):
                scenes = [_random_scenes(self._held_out, num_pictures, rng) for _ in range(self._scored_rows)]
                batch = self._scorer.pack(scenes, 8, rng, held_out=held_out, only_branches=True)
                tokens, mask, facts = self._look(self._held_out, batch.scenes)
                told.append((batch, answer(self.optimiser.compute, batch, tokens)))
                read.append(self._reader.read(tokens, mask))
                truth.append(facts)
        held_out_share = exact_scores(told[MAX_PICTURES:])["all"]
        facts_read = fact_scores(torch.cat(read), torch.cat(truth))
        seen = exact_scores(told[:MAX_PICTURES])
        return {**seen, "held_out": held_out_share, **{f"read {name}": share for name, share in facts_read.items()}}

    def _symbolic_loss(self, num_pictures: int, rng: random.Random) -> Tensor:
        batch = symbolic_batch(self._packer, num_pictures, 2500, rng)
        features = self._symbols.tokens(batch.scenes, rng) if batch.scenes else None
        return answer(self.optimiser.compute, batch, features).loss()

    def _look(self, pool: Pool, scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
        visual = self.optimiser.compute.model.visual
        return look(visual, pool, [scene.index for scene in scenes], self._device)


def _random_scenes(pool: Pool, num_pictures: int, rng: random.Random) -> list[Scene]:
    indices = [rng.randrange(len(pool)) for _ in range(num_pictures)]
    return [Scene(pool.facts[i], (int(pool.grids[i, 0]), int(pool.grids[i, 1])), i) for i in indices]
