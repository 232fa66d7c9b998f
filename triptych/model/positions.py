"""Rotary positions of a sequence: the token index, or three axes where pictures have a height and a width."""

import inspect

import numpy as np
import torch
from transformers import PreTrainedModel

from triptych.core import Sequence
from triptych.model.attention_batch import Ints

_MODALITY_TYPES = {"image": 1, "video": 2, "audio": 3}  # as transformers numbers them in mm_token_type_ids
_MARKS = ("vision_start_token_id", "audio_start_token_id")  # in front of media, by their names in configs


class Positions:
    """Positions of prompts for one model. `num_axes` is 3 for families with multi-axis rotary positions, else 1."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._base = model.base_model
        self._parameters = inspect.signature(self._base.get_rope_index).parameters if self._multi_axis else {}
        self._marks = torch.tensor([getattr(model.config, name) for name in _MARKS if hasattr(model.config, name)])
        self.num_axes = 3 if self._multi_axis else 1

    @property
    def _multi_axis(self) -> bool:
        return hasattr(self._base, "get_rope_index")

    def of_prompt(self, sequence: Sequence) -> tuple[Ints, int]:
        """([num_axes, num_prompt_tokens], delta): a token behind the prompt stands at index + delta on every axis."""
        length = sequence.num_prompt_tokens
        if not self._multi_axis or not sequence.spans:
            return np.broadcast_to(np.arange(length), (self.num_axes, length)), 0
        ids = self._token_ids(sequence)
        arguments = {
            "mm_token_type_ids": _token_types(sequence),
            "attention_mask": torch.ones_like(ids),
            **{name: torch.tensor(values) for name, values in sequence.position_arguments.items()},
        }
        known = {name: value for name, value in arguments.items() if name in self._parameters}
        positions, delta = self._base.get_rope_index(ids, **known)
        return positions[:, 0].numpy(), int(delta.reshape(-1)[0])

    def _token_ids(self, sequence: Sequence) -> torch.Tensor:
        """[1, num_prompt_tokens]. Rules that are not told where media stand look for the tokens in front of them: those
        that a client wrote elsewhere become another token, which stands at the same position."""
        ids = torch.tensor(sequence.token_ids[: sequence.num_prompt_tokens])[None]
        if "mm_token_type_ids" not in self._parameters:
            stray = torch.isin(ids, self._marks)
            stray[0, [span.start - 1 for span in sequence.spans if span.start]] = False
            ids[stray] = 0
        return ids


def _token_types(sequence: Sequence) -> torch.Tensor:
    types = torch.zeros(1, sequence.num_prompt_tokens, dtype=torch.int32)
    for span in sequence.spans:
        types[0, span.start : span.start + span.length] = _MODALITY_TYPES[sequence.units[span.unit].modality]
    return types
