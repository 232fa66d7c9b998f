"""Rotary positions of a sequence: the token index, or three axes where pictures have a height and a width."""

import inspect

import numpy as np
import torch
from transformers import PreTrainedModel

from triptych.core import Sequence
from triptych.model.attention_batch import Ints

_MODALITY_TYPES = {"image": 1, "video": 2}  # as transformers numbers them in mm_token_type_ids


class Positions:
    """Positions of prompts for one model. `num_axes` is 3 for families with multi-axis rotary positions, else 1."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._base = model.base_model
        self._parameters = inspect.signature(self._base.get_rope_index).parameters if self._multi_axis else {}
        self.num_axes = 3 if self._multi_axis else 1

    @property
    def _multi_axis(self) -> bool:
        return hasattr(self._base, "get_rope_index")

    def of_prompt(self, sequence: Sequence) -> tuple[Ints, int]:
        """([num_axes, num_prompt_tokens], delta): a token behind the prompt stands at index + delta on every axis."""
        length = sequence.num_prompt_tokens
        if not self._multi_axis or not sequence.spans:
            return np.broadcast_to(np.arange(length), (self.num_axes, length)), 0
        ids = torch.tensor(sequence.token_ids[:length])[None]
        arguments = {
            "mm_token_type_ids": _token_types(sequence),
            "image_grid_thw": _grids(sequence, "image"),
            "video_grid_thw": _grids(sequence, "video"),
            "attention_mask": torch.ones_like(ids),
        }
        known = {name: value for name, value in arguments.items() if name in self._parameters}
        positions, delta = self._base.get_rope_index(ids, **known)
        return positions[:, 0].numpy(), int(delta.reshape(-1)[0])


def _token_types(sequence: Sequence) -> torch.Tensor:
    types = torch.zeros(1, sequence.num_prompt_tokens, dtype=torch.int32)
    for span in sequence.spans:
        types[0, span.start : span.start + span.length] = _MODALITY_TYPES[sequence.units[span.unit].modality]
    return types


def _grids(sequence: Sequence, modality: str) -> torch.Tensor | None:
    """Grids in prompt order, one per occurrence of an item (a unit may occur twice, or in several runs)."""
    first_runs = [span for span in sorted(sequence.spans, key=lambda span: span.start) if span.offset == 0]
    units = [sequence.units[span.unit] for span in first_runs]
    grids = [unit.grid for unit in units if unit.modality == modality]
    return torch.tensor(grids) if grids else None
