"""A loss on what the language model's early layers know, beside the loss on its answers."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from triptych.demo.answering import Answers
from triptych.demo.batches import Batch
from triptych.demo.facts import fact_directions, number_directions
from triptych.demo.model import WIDTH

_SHARPNESS, _WEIGHT = 2.0, 0.3
_SEEKING_LAYER = 1


class Hints:
    """A picture token should know its picture's number, the last token of a prompt what is sought and in which picture.

    All in the directions in which picture tokens tell it. Left to itself the model finds this out late, and only then
    learns from conversations with many pictures.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers = torch.from_numpy(number_directions(WIDTH)).to(device)
        self._facts = torch.from_numpy(fact_directions(WIDTH)).to(device)

    def loss(self, answers: Answers, batch: Batch) -> Tensor:
        points_to, from_layer = batch.points_to.to(self._device), batch.from_layer.to(self._device)
        total = torch.zeros((), device=self._device)
        for layer, states in enumerate(answers.states[:-1]):
            chosen = (points_to >= 0) & (from_layer == layer)
            if chosen.any():
                total = total + functional.cross_entropy(_told(states[chosen], self._numbers), points_to[chosen])
        if len(batch.seekers):
            rows, columns = batch.seekers.to(self._device).unbind(1)
            told = _told(answers.states[_SEEKING_LAYER][rows, columns], self._facts)
            total = total + functional.cross_entropy(told, batch.sought.to(self._device))
        return _WEIGHT * total


def _told(states: Tensor, directions: Tensor) -> Tensor:
    return _SHARPNESS * states.float() @ directions.t()
