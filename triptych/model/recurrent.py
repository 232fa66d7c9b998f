"""Linear-attention layers over a KV region: the rows of every sequence run with the states of that sequence.

What a layer computes stays with transformers: its own forward runs on sequences with equally many rows, such as the
decodes, with a cache that holds just their states. Knows no model and no request.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from triptych.model.caches import KVRegion, LayerState

_BYTES_TOGETHER = 64 << 20  # of states; a layer takes several times as much while it runs

Forward = Callable[..., Tensor]  # of a layer: hidden states [sequences, tokens, width], `cache_params`


class States(Protocol):
    """What the keyword `states` of a decoder's forward is."""

    def run(self, layer: int, forward: Forward, hidden: Tensor) -> Tensor:
        """The output of a linear-attention layer for the rows of a flattened forward [1, rows, width]."""
        ...


def hand_states_to_linear_layers(model: nn.Module) -> int:
    """Makes linear-attention layers (known by their argument `cache_params`) run as the keyword `states` of the
    decoder's forward says. Returns how many there are."""
    layers = [module for module in model.modules() if "cache_params" in signature(module.forward).parameters]
    for layer in layers:
        layer.forward = partial(_forward, int(layer.layer_idx), layer.forward)  # type: ignore[arg-type]
    return len(layers)


def _forward(layer: int, forward: Forward, hidden_states: Tensor, *, states: States, **_: object) -> Tensor:
    return states.run(layer, forward, hidden_states)


@dataclass(slots=True)
class StateRows:
    """Tokens [start, end) of one sequence, as rows of a flattened forward, and the blocks of its states."""

    start: int
    end: int
    blocks: Sequence[int]


class StateBatch:
    """The states of the sequences of one flattened forward. Valid for one forward.

    A sequence that starts at 0 starts without states, whatever is in its blocks; any other one goes on with the states
    of [0, start), so no token may run twice. When the forward returns, the states are those of [0, end).
    """

    def __init__(self, region: KVRegion, sequences: Sequence[StateRows]) -> None:
        self._region = region
        self._words = region.pages.view(torch.int64)  # moved as they are, whatever type a page is a part of
        self._states: dict[int, list[tuple[LayerState, range]]] = {}
        for state, pages in region.layout.state_pages.items():
            self._states.setdefault(state.layer, []).append((state, pages))
        self._parts: list[_Part] = []
        table, first, row = _pages(region, sequences), 0, 0
        for (length, fresh), group in groupby(sequences, lambda rows: (rows.end - rows.start, rows.start == 0)):
            num_alike = len(list(group))
            for group_pages in torch.split(table[first : first + num_alike], self._num_together()):
                self._parts.append(_Part(row, length, group_pages, fresh))
                row += length * len(group_pages)
            first += num_alike

    def run(self, layer: int, forward: Forward, hidden: Tensor) -> Tensor:
        outputs = []
        for part in self._parts:
            kept = self._load(layer, part)
            rows = hidden[0, part.row : part.row + part.num_rows].reshape(-1, part.length, hidden.shape[2])
            outputs.append(forward(rows, cache_params=Cache([kept] * (layer + 1))).flatten(0, 1))
            self._store(layer, part, kept)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def _num_together(self) -> int:
        """How many sequences a layer takes at once."""
        pages = max(states[-1][1].stop - states[0][1].start for states in self._states.values())
        return max(1, _BYTES_TOGETHER // (pages * self._region.layout.page_bytes))

    def _load(self, layer: int, part: "_Part") -> "_Kept":
        """Valid until the next gather of the region."""
        of_layer, num_sequences = self._states[layer], len(part.pages)
        if part.fresh:
            zeros = self._words.new_zeros
            states = {state.name: zeros((num_sequences, *state.shape), dtype=state.dtype) for state, _ in of_layer}
            return _Kept(states, has_previous=False)
        first, stop = of_layer[0][1].start, of_layer[-1][1].stop
        gathered = self._region.gather(part.index(range(first, stop))).view(num_sequences, stop - first, -1)
        states = {}
        for state, pages in of_layer:
            own = gathered[:, pages.start - first : pages.stop - first].flatten(1).view(state.dtype)
            states[state.name] = torch.unflatten(own[:, : state.num_elements], 1, state.shape)
        return _Kept(states, has_previous=True)

    def _store(self, layer: int, part: "_Part", kept: "_Kept") -> None:
        words_per_page = self._words.shape[1]
        for state, pages in self._states[layer]:
            rows = kept.state(state.name).to(state.dtype).flatten(1)
            room = len(pages) * self._region.layout.page_bytes // state.dtype.itemsize
            if room > state.num_elements:
                rows = F.pad(rows, (0, room - state.num_elements))
            self._words.index_copy_(0, part.index(pages), rows.view(torch.int64).reshape(-1, words_per_page))


@dataclass(slots=True)
class _Part:
    """Neighbouring sequences that run together, because each has `length` rows: decodes, or a chunk."""

    row: int  # the first one
    length: int
    pages: Tensor  # [sequences, pages of the state blocks]
    fresh: bool  # they start at 0

    @property
    def num_rows(self) -> int:
        return self.length * len(self.pages)

    def index(self, pages: range) -> Tensor:
        """Where these pages of the states of all its sequences are in the region."""
        return self.pages[:, pages.start : pages.stop].reshape(-1)


class _Kept(LinearAttentionLayer):  # type: ignore[misc]
    """The states of a part in one layer, as that layer of transformers' cache."""

    def __init__(self, states: dict[str, Tensor], *, has_previous: bool) -> None:
        super().__init__()
        self.has_previous_state[0] = has_previous
        if "conv" in states:
            self.conv_states[0] = states["conv"]
            self.conv_kernel_size[0] = states["conv"].shape[-1]
            self.is_conv_states_initialized[0] = True
        if "recurrent" in states:
            self.recurrent_states[0] = states["recurrent"]
            self.is_recurrent_states_initialized[0] = True

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states  # not copied: the region is where it stays
        return recurrent_states

    def state(self, name: str) -> Tensor:
        kept: Tensor = self.conv_states[0] if name == "conv" else self.recurrent_states[0]
        return kept


def _pages(region: KVRegion, sequences: Sequence[StateRows]) -> Tensor:
    """[sequences, pages of the state blocks]."""
    blocks = torch.from_numpy(np.array([rows.blocks for rows in sequences], np.int64)).to(region.device)
    per_block = region.layout.pages_per_block
    return (blocks[:, :, None] * per_block + torch.arange(per_block, device=region.device)).flatten(1)
