"""Stand-ins for picture tokens, made from facts alone: what a good vision tower would deliver, blurred.

Stage 2 trains the language model on them, so that wordings and "picture k" are learned without drawing anything.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from triptych.demo.facts import NUM_FACTS, fact_directions, fact_vector, random_facts
from triptych.demo.forward import MAX_TOKENS
from triptych.demo.model import WIDTH
from triptych.demo.pool import Grid
from triptych.demo.rows import Scene

_GRIDS: dict[Grid, float] = {  # mostly small ones: they cost least and teach the same
    (4, 4): 4,
    (2, 4): 2,
    (4, 2): 2,
    (4, 6): 3,
    (6, 4): 3,
    (6, 6): 1,
    (6, 8): 1,
    (8, 6): 1,
    (8, 8): 1,
}
_BLUR, _TOKEN_BLUR, _NOISE, _BLANK_SHARE = 0.12, 0.15, 0.08, 0.2


def random_scenes(num_pictures: int, rng: random.Random, pair_weight: float) -> list[Scene]:
    grids = rng.choices(list(_GRIDS), list(_GRIDS.values()), k=num_pictures)
    return [Scene(random_facts(rng, pair_weight), grid) for grid in grids]


class Symbols:
    """Facts -> picture tokens [pictures, MAX_TOKENS, width]."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._directions = torch.from_numpy(fact_directions(WIDTH)).to(device)

    def tokens(self, scenes: Sequence[Scene], rng: random.Random) -> Tensor:
        truth = torch.from_numpy(np.stack([fact_vector(scene.facts) for scene in scenes]))
        noise = torch.Generator().manual_seed(rng.getrandbits(48))
        told = (truth + _BLUR * torch.randn(len(scenes), NUM_FACTS, generator=noise))[:, None]
        told = told + _TOKEN_BLUR * torch.randn(len(scenes), MAX_TOKENS, NUM_FACTS, generator=noise)
        strength = 0.6 + 0.7 * torch.rand(len(scenes), MAX_TOKENS, 1, generator=noise)
        strength[:, 1:] *= torch.rand(len(scenes), MAX_TOKENS - 1, 1, generator=noise) > _BLANK_SHARE
        stray = _NOISE * torch.randn(len(scenes), MAX_TOKENS, WIDTH, generator=noise)
        return (told * strength).to(self._device) @ self._directions + stray.to(self._device)
