"""Stage 1: the vision tower alone learns to write each picture's facts into its tokens.

The facts go in fixed directions (`facts.fact_directions`), the same that stage 2 teaches the language model to read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from triptych.demo.facts import fact_directions, group_slices
from triptych.demo.forward import see, token_mask
from triptych.demo.loop import Scores
from triptych.demo.model import WIDTH
from triptych.demo.optimiser import Optimiser
from triptych.demo.pool import Grid, Pool

_SHARPNESS = 12.0  # a fact is present where its direction holds more than 0.5; 12: nearly certain at 0 and 1
_STRAY = 0.02  # weight of whatever lies in no fact's direction
_EXCESS = 0.1  # weight of going below 0 or above 1, where the symbols of stage 2 never are
_PER_TOKEN = 0.15  # weight of what each token tells alone, beside what their mean tells
_WEIGHTS = {"shapes": 1.0, "colours": 0.5, "pairs": 1.0, "digit": 4.0, "count": 3.0}  # the slow ones count more
_SCORED, _AT_ONCE = 2000, 100  # pictures


class FactReader:
    """Reads facts off picture tokens, and says how wrong they are."""

    def __init__(self, device: torch.device) -> None:
        self._directions = torch.from_numpy(fact_directions(WIDTH)).to(device)
        self._weights = torch.cat([torch.full((at.stop - at.start,), _WEIGHTS[g]) for g, at in group_slices().items()])
        self._weights = self._weights.to(device)

    def loss(self, tokens: Tensor, mask: Tensor, truth: Tensor) -> Tensor:
        """tokens [pictures, MAX_TOKENS, width], truth [pictures, facts]: their mean and each should tell all."""
        tokens = tokens.float()
        told = tokens @ self._directions.t()
        each = self._wrongness(told, truth[:, None].expand_as(told))
        stray = (tokens - told @ self._directions).square().sum(-1)
        excess = (told - told.clamp(0, 1)).square().sum(-1)
        per_token = ((_PER_TOKEN * each + _STRAY * stray + _EXCESS * excess) * mask).sum() / mask.sum()
        return self._wrongness(_mean(told, mask), truth).mean() + per_token

    def read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return _mean(tokens.float() @ self._directions.t(), mask)

    def _wrongness(self, told: Tensor, truth: Tensor) -> Tensor:
        logits = _SHARPNESS * (told - 0.5)
        return functional.binary_cross_entropy_with_logits(logits, truth, reduction="none") @ self._weights


class SeeingStage:
    name = "seeing"

    def __init__(self, visual: nn.Module, pool: Pool, held_out: Pool, device: torch.device, batch: int) -> None:
        self.optimiser = Optimiser(visual, device)
        self._pool, self._held_out, self._device, self._batch = pool, held_out, device, batch
        self._reader = FactReader(device)

    def loss(self, rng: random.Random, progress: float) -> Tensor:
        indices = [rng.randrange(len(self._pool)) for _ in range(self._batch)]
        tokens, mask, truth = self._look(self._pool, indices)
        return self._reader.loss(tokens, mask, truth)

    @torch.no_grad()
    def scores(self) -> Scores:
        told, truth = [], []
        for start in range(0, min(_SCORED, len(self._held_out)), _AT_ONCE):
            tokens, mask, facts = self._look(self._held_out, range(start, min(start + _AT_ONCE, len(self._held_out))))
            told.append(self._reader.read(tokens, mask))
            truth.append(facts)
        return fact_scores(torch.cat(told), torch.cat(truth))

    def _look(self, pool: Pool, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        return look(self.optimiser.compute, pool, indices, self._device)


def look(visual: nn.Module, pool: Pool, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """-> tokens, which of them are real, and the true facts of these pictures."""
    grids: list[Grid] = [(int(pool.grids[i, 0]), int(pool.grids[i, 1])) for i in indices]
    patches = torch.from_numpy(pool.gather(indices)).to(device)
    truth = torch.from_numpy(pool.vectors[list(indices)]).to(device)
    return see(visual, patches, grids), token_mask(grids).to(device), truth


def fact_scores(told: Tensor, truth: Tensor) -> Scores:
    """Share of pictures whose facts are read right, per group; digit and count by the largest."""
    right = (told > 0.5) == (truth > 0.5)
    scores = {}
    for name, at in group_slices().items():
        if name in ("digit", "count"):
            shown = truth[:, at].sum(-1) > 0
            hits = told[shown, at].argmax(-1) == truth[shown, at].argmax(-1)
        else:
            hits = right[:, at].all(-1)
        scores[name] = hits.float().mean().item()
    scores["all"] = right.all(-1).float().mean().item()
    return scores


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
