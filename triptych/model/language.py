"""Runs prefill chunks and decodes of many sequences in one flattened forward, and samples. Knows no queue."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from triptych.config import EMBEDDING_BLOCK_TOKENS, KV_BLOCK_TOKENS
from triptych.core import Chunk, RequestId, SampledToken, SamplingParams, Sequence
from triptych.model.attention_batch import AttentionBatch, Ints, SequenceRows
from triptych.model.caches import EmbeddingRegion, KVRegion
from triptych.model.positions import Positions
from triptych.model.probe import num_deepstack_layers
from triptych.model.recurrent import StateBatch, StateRows
from triptych.model.sampling import sample


class LanguageFamily(Protocol):
    """What the runner has to know about a family of models."""

    @property
    def image_groups(self) -> bool:
        """Whether the tokens of a picture attend to each other in both directions."""
        ...


@dataclass(slots=True)
class _PromptState:
    """`Sequence.scratch`: what is computed once per sequence here."""

    positions: Ints  # [num_axes, num_prompt_tokens]
    last_visible: Ints | None  # [num_prompt_tokens], for families with image groups


class LanguageRunner:
    """The language model over a KV region. `embedding_region` is where the rows of pictures are read from."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: LanguageFamily,
        kv_region: KVRegion,
        embedding_region: EmbeddingRegion | None,
        eos_token_ids: Seq[int],
    ) -> None:
        self._decoder = model.get_decoder()
        self._head = model.get_output_embeddings()
        self._embed = model.get_input_embeddings()
        self._positions = Positions(model)
        self._image_groups = family.image_groups
        self._kv = kv_region
        self._state_blocks = kv_region.layout.state_blocks  # at the start of every block table
        self._embeddings = embedding_region
        self._eos_token_ids = tuple(eos_token_ids)
        self._hidden = self._embed.weight.shape[1]
        self._device = self._embed.weight.device
        self._deepstack = num_deepstack_layers(model.config)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[SampledToken]:
        """One forward over all chunks. One token per chunk that samples, in the order of `chunks`.

        A chunk's KV is in its sequence's blocks when this returns; `rope_delta` is set with a sequence's first chunk.
        """
        # Decodes first, the longest first: neighbours are gathered together and padded to the longest of them.
        ordered = sorted(chunks, key=lambda chunk: (chunk.length > 1, -chunk.start))
        num_decodes = sum(chunk.length == 1 for chunk in ordered)
        for chunk in ordered:
            self._check(chunk)
        rows = [self._rows(chunk) for chunk in ordered]
        batch = AttentionBatch(self._kv, rows, num_decodes)
        inputs, extra = self._inputs(ordered)
        if self._state_blocks:
            extra["states"] = StateBatch(self._kv, [self._state_rows(chunk) for chunk in ordered])
        hidden = self._decoder(
            inputs_embeds=inputs[None],
            position_ids=self._position_ids(ordered),
            attention_mask=None,
            past_key_values=None,
            use_cache=False,
            batch=batch,
            **extra,
        ).last_hidden_state[0]
        return self._sample(chunks, ordered, hidden)

    def offload(self, blocks: list[int]) -> Tensor:
        """A copy of KV blocks in host memory."""
        return self._kv.blocks.index_select(0, self._index(blocks)).cpu()

    def restore(self, saved: Tensor, blocks: list[int]) -> None:
        """Writes what `offload` gave into other blocks."""
        self._kv.blocks.index_copy_(0, self._index(blocks), saved.to(self._device))

    def warm_up(self) -> None:
        """Runs both kinds of step once, so that the first request pays for no page fault and no compilation.

        Overwrites the first KV blocks: call it before anything is stored.
        """
        length = min(32, KV_BLOCK_TOKENS * (self._kv.num_blocks - self._state_blocks) - 1)
        sampling = SamplingParams(max_tokens=2, seed=0, temperature=0.0)
        blocks = list(range(self._state_blocks - (-(length + 1) // KV_BLOCK_TOKENS)))
        sequence = Sequence(RequestId("warm-up"), [0] * length, length, sampling, block_table=blocks)
        self.run([Chunk(sequence, 0, length)])
        sequence.num_computed = length
        sequence.token_ids.append(0)
        self.run([Chunk(sequence, length, 1)])

    def _check(self, chunk: Chunk) -> None:
        end = chunk.start + chunk.length
        room = (len(chunk.sequence.block_table) - self._state_blocks) * KV_BLOCK_TOKENS
        assert chunk.length > 0, f"chunk of {chunk.length} tokens"
        assert end <= min(room, len(chunk.sequence.token_ids)), (
            f"chunk ends at {end}, sequence has {len(chunk.sequence.token_ids)} tokens and room for {room}"
        )

    def _state(self, sequence: Sequence) -> _PromptState:
        state = sequence.scratch
        if not isinstance(state, _PromptState):
            positions, sequence.rope_delta = self._positions.of_prompt(sequence)
            visible = _last_visible(sequence) if self._image_groups and sequence.spans else None
            state = sequence.scratch = _PromptState(positions, visible)
        return state

    def _rows(self, chunk: Chunk) -> SequenceRows:
        sequence, end = chunk.sequence, chunk.start + chunk.length
        rows = SequenceRows(chunk.start, end, np.array(sequence.block_table[self._state_blocks :], np.int64))
        if self._image_groups and chunk.start < sequence.num_prompt_tokens:
            visible = self._state(sequence).last_visible
            if visible is not None:
                rows.last_visible = np.arange(chunk.start, end)
                known = visible[chunk.start : end]
                rows.last_visible[: len(known)] = known
                assert int(rows.last_visible[-1]) < end, f"chunk [{chunk.start}, {end}) cuts a picture in two"
        return rows

    def _state_rows(self, chunk: Chunk) -> StateRows:
        sequence = chunk.sequence
        assert chunk.start in (0, sequence.num_computed), (
            f"chunk starts at {chunk.start}, the states are those of {sequence.num_computed} tokens"
        )
        return StateRows(chunk.start, chunk.start + chunk.length, sequence.block_table[: self._state_blocks])

    def _position_ids(self, chunks: list[Chunk]) -> Tensor:
        """[1, rows], or [3, 1, rows] for multi-axis positions."""
        axes = self._positions.num_axes
        parts: list[Ints] = []
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.length
            prompt = sequence.num_prompt_tokens
            if chunk.start < prompt:
                parts.append(self._state(sequence).positions[:, chunk.start : end])
            if end > prompt:
                behind = np.arange(max(chunk.start, prompt), end) + sequence.rope_delta
                parts.append(np.broadcast_to(behind, (axes, len(behind))))
        positions = torch.from_numpy(np.concatenate(parts, axis=1)).to(self._device, non_blocking=True)
        return positions[:, None] if axes > 1 else positions

    def _inputs(self, chunks: list[Chunk]) -> tuple[Tensor, dict[str, Any]]:
        """Token embeddings [rows, hidden] with the pictures' rows in place, and the decoder's deepstack arguments."""
        ids: list[int] = []
        places: list[Ints] = []  # rows of this forward that belong to pictures
        sources: list[Ints] = []  # and the rows of the embedding region that stand there
        for chunk in chunks:
            if chunk.embedding_blocks:
                _place_spans(chunk, len(ids), places, sources)
            ids += chunk.sequence.token_ids[chunk.start : chunk.start + chunk.length]
        token_ids = torch.tensor(ids)
        if not places:
            return self._embed(token_ids.to(self._device)), {}
        assert self._embeddings is not None, "pictures in the prompt of an instance without an embedding region"
        place = torch.from_numpy(np.concatenate(places))
        token_ids[place] = 0  # a placeholder's id may lie outside the vocabulary
        place = place.to(self._device)
        rows = self._embeddings.rows.index_select(0, torch.from_numpy(np.concatenate(sources)).to(self._device))
        inputs = self._embed(token_ids.to(self._device)).index_copy_(0, place, rows[:, : self._hidden].contiguous())
        if not self._deepstack:
            return inputs, {}
        mask = torch.zeros(1, len(ids), dtype=torch.bool, device=self._device)
        mask[0, place] = True
        deep = list(torch.unflatten(rows[:, self._hidden :], 1, (self._deepstack, -1)).unbind(1))
        return inputs, {"visual_pos_masks": mask, "deepstack_visual_embeds": deep}

    def _sample(self, chunks: list[Chunk], ordered: list[Chunk], hidden: Tensor) -> list[SampledToken]:
        last_rows: dict[int, int] = {}  # by identity of the chunk
        row = 0
        for chunk in ordered:
            row += chunk.length
            last_rows[id(chunk)] = row - 1
        sampling = [chunk for chunk in chunks if chunk.samples]
        if not sampling:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # the caller may hand blocks on when this returns
            return []
        wanted = [last_rows[id(chunk)] for chunk in sampling]
        if wanted != list(range(len(hidden))):
            hidden = hidden.index_select(0, torch.tensor(wanted, device=self._device))
        return sample(self._head(hidden), [chunk.sequence for chunk in sampling], self._eos_token_ids)

    def _index(self, blocks: list[int]) -> Tensor:
        return torch.tensor(blocks, device=self._device)


def _place_spans(chunk: Chunk, first_row: int, places: list[Ints], sources: list[Ints]) -> None:
    """Adds the rows that a chunk's spans fill, and the rows of the embedding region to fill them with."""
    start, end = chunk.start, chunk.start + chunk.length
    for span in sorted(chunk.sequence.spans, key=lambda span: span.start):
        low, high = max(span.start, start), min(span.start + span.length, end)
        if low >= high:
            continue
        blocks = np.array(chunk.embedding_blocks[span.unit], np.int64)
        unit_rows = np.arange(low, high) - span.start + span.offset
        places.append(np.arange(low, high) - start + first_row)
        sources.append(
            blocks[unit_rows // EMBEDDING_BLOCK_TOKENS] * EMBEDDING_BLOCK_TOKENS + unit_rows % EMBEDDING_BLOCK_TOKENS
        )


def _last_visible(sequence: Sequence) -> Ints:
    """Per prompt token the last position that it sees: the end of its picture, or itself."""
    visible = np.arange(sequence.num_prompt_tokens)
    for span in sequence.spans:
        visible[span.start : span.start + span.length] = span.start + span.length - 1
    return visible
