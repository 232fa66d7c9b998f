"""Stage 2: the language model alone learns wordings, answers and which picture is meant, on symbols for pictures."""

from __future__ import annotations

import random
from collections.abc import Mapping

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
from triptych.demo.questions import KIND_SHARES
from triptych.demo.symbols import Symbols, random_scenes

Curriculum = tuple[tuple[float, Mapping[int, float]], ...]

# Up to this progress, these shares of conversations have so many pictures: "picture k" is learned on few ones first.
CURRICULUM: Curriculum = (
    (0.08, {0: 1, 1: 10, 2: 10}),
    (0.2, {0: 1, 1: 2, 2: 6, 3: 6, 4: 6}),
    (1.0, {0: 1, 1: 2, 2: 3, 3: 3, 4: 3, 5: 3, 6: 3, 7: 3, 8: 4}),
)
# The hardest get the most practice: "which", and what pictures with two things allow to ask.
_SHARES = {**KIND_SHARES, "which": 0.45, "colour": 0.3, "shape by colour": 0.25}
_PAIR_WEIGHT, _SCORED_PAIR_WEIGHT = 0.5, 0.2


class TellingStage:
    name = "telling"

    def __init__(
        self,
        model: Qwen2VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
        batch_tokens: int,
        scored_rows: int,
    ) -> None:
        model.model.visual.requires_grad_(False)
        self.optimiser = Optimiser(model, device)
        self._packer, self._symbols, self._batch_tokens = Packer(tokenizer, _SHARES), Symbols(device), batch_tokens
        self._scorer, self._hints, self._scored_rows = Packer(tokenizer), Hints(device), scored_rows

    def loss(self, rng: random.Random, progress: float) -> Tensor:
        num_pictures = _pick(CURRICULUM, progress, rng)
        batch = symbolic_batch(self._packer, num_pictures, self._batch_tokens, rng)
        answers = self._answers(batch, rng)
        return answers.loss() + self._hints.loss(answers, batch)

    @torch.no_grad()
    def scores(self) -> Scores:
        rng = random.Random(1)
        told = []
        for held_out in (False, True):
            for num_pictures in range(1, MAX_PICTURES + 1):
                scenes = [random_scenes(num_pictures, rng, _SCORED_PAIR_WEIGHT) for _ in range(self._scored_rows)]
                batch = self._scorer.pack(scenes, 8, rng, held_out=held_out, only_branches=True)
                told.append((batch, self._answers(batch, rng)))
        return {**exact_scores(told[:MAX_PICTURES]), "held_out": exact_scores(told[MAX_PICTURES:])["all"]}

    def _answers(self, batch: Batch, rng: random.Random) -> Answers:
        features = self._symbols.tokens(batch.scenes, rng) if batch.scenes else None
        return answer(self.optimiser.compute, batch, features)


def symbolic_batch(packer: Packer, num_pictures: int, batch_tokens: int, rng: random.Random) -> Batch:
    """About `batch_tokens` tokens of conversations with so many pictures each."""
    num_questions = 4 + num_pictures if num_pictures else 1
    rows = max(2, batch_tokens // (20 + 14 * num_pictures + 24 * num_questions))
    return packer.pack([random_scenes(num_pictures, rng, _PAIR_WEIGHT) for _ in range(rows)], num_questions, rng)


def _pick(curriculum: Curriculum, progress: float, rng: random.Random) -> int:
    shares = next(shares for until, shares in curriculum if progress <= until)
    return rng.choices(list(shares), list(shares.values()))[0]
