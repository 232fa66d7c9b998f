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


class Hints:
    """A picture token should know its picture's number; a prompt's last token what is sought, where, and what is found.

    All in the directions in which picture tokens tell it. Left to itself the model finds this out late, and only then
    learns from conversations with many pictures.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers = torch.from_numpy(number_directions(WIDTH)).to(device)
        self._facts = torch.from_numpy(fact_directions(WIDTH)).to(device)

    def loss(self, answers: Answers, batch: Batch) -> Tensor:
        points_to, from_layer = batch.points_to.to(self._device), batch.from_layer.to(self._device)
        knowers, known = batch.knowers.to(self._device), batch.known.to(self._device)
        total = torch.zeros((), device=self._device)
        for layer, states in enumerate(answers.states[:-1]):
            pointers = (points_to >= 0) & (from_layer == layer)
            if pointers.any():
                total = total + functional.cross_entropy(_told(states[pointers], self._numbers), points_to[pointers])
            here = (knowers[:, 2] == layer).nonzero()[:, 0]
            if len(here):
                rows, columns, _ = knowers[here].unbind(1)
                total = total + functional.cross_entropy(_told(states[rows, columns], self._facts), known[here])
        return _WEIGHT * total


def _told(states: Tensor, directions: Tensor) -> Tensor:
    return _SHARPNESS * states.float() @ directions.t()
