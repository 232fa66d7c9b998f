"""Stage 2: the language model alone learns wordings, answers and which picture is meant, on symbols for pictures."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from triptych.demo.answering import Answers, answer, exact_scores
from triptych.demo.batches import Batch, Packer, Shares
from triptych.demo.facts import MAX_PICTURES, number_directions
from triptych.demo.loop import Scores
from triptych.demo.model import WIDTH
from triptych.demo.optimiser import Optimiser
from triptych.demo.symbols import Symbols, random_scenes

# Up to this progress, these shares of conversations have so many pictures. "Picture k" is learned on few pictures first.
CURRICULUM: tuple[tuple[float, Shares], ...] = (
    (0.05, {0: 1, 1: 10, 2: 10}),
    (0.3, {0: 1, 1: 2, 2: 6, 3: 6, 4: 6}),
    (1.0, {0: 1, 1: 2, 2: 3, 3: 3, 4: 3, 5: 3, 6: 3, 7: 3, 8: 4}),
)


_POINTING_SHARPNESS, _POINTING_WEIGHT = 2.0, 0.3


class TellingStage:
    name = "telling"

    def __init__(
        self,
        model: Qwen2VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
        batch_tokens: int,
    ) -> None:
        model.model.visual.requires_grad_(False)
        self.optimiser = Optimiser(model, device)
        self._packer, self._symbols, self._batch_tokens = Packer(tokenizer), Symbols(device), batch_tokens
        self._numbers = torch.from_numpy(number_directions(WIDTH)).to(device)

    def loss(self, rng: random.Random, progress: float) -> Tensor:
        num_pictures = pick(CURRICULUM, progress, rng)
        batch = symbolic_batch(self._packer, num_pictures, self._batch_tokens, rng)
        answers = self._answers(batch, rng)
        return answers.loss() + pointing_loss(answers, batch, self._numbers)

    @torch.no_grad()
    def scores(self) -> Scores:
        rng = random.Random(1)
        told = []
        for held_out in (False, True):
            for num_pictures in range(1, MAX_PICTURES + 1):
                scenes = [random_scenes(num_pictures, rng) for _ in range(12)]
                batch = self._packer.pack(scenes, 8, rng, held_out=held_out, only_branches=True)
                told.append((batch, self._answers(batch, rng)))
        return exact_scores(told[:MAX_PICTURES]) | {"held_out": exact_scores(told[MAX_PICTURES:])["all"]}

    def _answers(self, batch: Batch, rng: random.Random) -> Answers:
        features = self._symbols.tokens(batch.scenes, rng) if batch.scenes else None
        return answer(self.optimiser.compute, batch, features)


def pointing_loss(answers: Answers, batch: Batch, numbers: Tensor) -> Tensor:
    """Early layers should know, in the same directions, a picture token's number and the number that is asked for.

    Left to itself the model finds this out late, and only then starts to learn on more than one picture.
    """
    about = batch.about.to(numbers.device)
    known, owned = about >= 0, answers.is_picture
    total = torch.zeros((), device=numbers.device)
    for layer, chosen in ((0, known & owned), (1, known & ~owned)):
        if chosen.any():
            logits = _POINTING_SHARPNESS * answers.states[layer][chosen].float() @ numbers.t()
            total = total + F.cross_entropy(logits, about[chosen])
    return _POINTING_WEIGHT * total


def symbolic_batch(packer: Packer, num_pictures: int, batch_tokens: int, rng: random.Random) -> Batch:
    """About `batch_tokens` tokens of conversations with so many pictures each."""
    num_questions = 4 + num_pictures if num_pictures else 1
    rows = max(2, batch_tokens // (20 + 14 * num_pictures + 24 * num_questions))
    return packer.pack([random_scenes(num_pictures, rng) for _ in range(rows)], num_questions, rng)


def pick(curriculum: tuple[tuple[float, Shares], ...], progress: float, rng: random.Random) -> int:
    shares = next(shares for until, shares in curriculum if progress <= until)
    return rng.choices(list(shares), list(shares.values()))[0]
