"""Turns media bytes into rows in the blocks of the embedding region. Knows no request and no language model."""

import io
import logging
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from triptych.config import EMBEDDING_BLOCK_TOKENS
from triptych.core import EncodeWork
from triptych.errors import RequestError
from triptych.model.caches import EmbeddingRegion

logger = logging.getLogger(__name__)

_WARM_UP_SIDE = 224

_Batch = list[tuple[int, EncodeWork, dict[str, Tensor]]]  # index of the result, the work, its tensors


class PixelSource(Protocol):
    """The part of a processor that the encoder needs."""

    def pixels(self, data: bytes) -> dict[str, Tensor]:
        """Keyword arguments of the model's feature function for one item; RequestError if it cannot be decoded."""
        ...


class EncodeRunner:
    """Encodes batches of units. Items whose tensors fit together run as one forward."""

    def __init__(self, model: PreTrainedModel, processor: PixelSource, region: EmbeddingRegion) -> None:
        self._model = model
        self._processor = processor
        self._region = region
        self._device = region.device
        self._dtype = region.layout.dtype

    @torch.inference_mode()
    def run(self, works: list[EncodeWork]) -> list[RequestError | None]:
        """One result per work: None once its rows are in its blocks, or why the item cannot be encoded."""
        errors: list[RequestError | None] = [None] * len(works)
        batches: dict[object, _Batch] = {}
        for index, work in enumerate(works):
            tensors = self._pixels(work.data)
            if isinstance(tensors, RequestError):
                errors[index] = tensors
            else:
                batches.setdefault((work.unit.modality, _batch_key(tensors)), []).append((index, work, tensors))
        for batch in batches.values():
            error = self._try_to_encode(batch)
            for index, _, _ in batch:
                errors[index] = error
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # from now on another instance may read the blocks
        return errors

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Encodes one grey picture and throws it away, so that the first request pays for no page fault."""
        file = io.BytesIO()
        Image.new("RGB", (_WARM_UP_SIDE, _WARM_UP_SIDE), (128, 128, 128)).save(file, "PNG")
        pixels = self._processor.pixels(file.getvalue())
        self.features("image", {name: self._to_device(tensor) for name, tensor in pixels.items()})

    def _pixels(self, data: bytes) -> dict[str, Tensor] | RequestError:
        try:
            return self._processor.pixels(data)
        except RequestError as error:
            return error
        except Exception:  # a request boundary: what a client sent goes through image code of others here
            logger.exception("the image code failed on an item of %d bytes", len(data))
            return _encode_failed()

    def _try_to_encode(self, batch: _Batch) -> RequestError | None:
        """What ends all items of the batch. Raises only where the device can compute no more."""
        try:
            self._encode(batch)
        except Exception as error:  # a request boundary: the tensors follow from what clients sent
            if _breaks_device(error):
                raise
            logger.exception("the encoder failed on a batch of %d items", len(batch))
            return _encode_failed()
        return None

    def _encode(self, batch: _Batch) -> None:
        """Features of all items of a batch, written block by block."""
        works = [work for _, work, _ in batch]
        names = batch[0][2]
        inputs = {name: self._to_device(torch.cat([tensors[name] for _, _, tensors in batch])) for name in names}
        rows = self.features(works[0].unit.modality, inputs)
        expected = sum(work.unit.num_tokens for work in works)
        assert rows.shape == (expected, self._region.layout.row_width), (
            f"encoder gave rows {tuple(rows.shape)} for units of {[work.unit.num_tokens for work in works]} tokens"
            f" and row width {self._region.layout.row_width}"
        )
        target = torch.cat([_row_indices(work) for work in works]).to(self._device)
        self._region.rows.index_copy_(0, target, rows)

    def features(self, modality: str, inputs: dict[str, Tensor]) -> Tensor:
        """[rows of all items, hidden * (1 + deepstack layers)]: the projected features, then the deepstack ones."""
        output = getattr(self._model.base_model, f"get_{modality}_features")(**inputs, return_dict=True)
        pooled = output.pooler_output if output.pooler_output is not None else output.last_hidden_state
        deepstack = getattr(output, "deepstack_features", None) or ()
        parts = [_flatten(pooled), *(_flatten(layer) for layer in deepstack)]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype) if tensor.is_floating_point() else tensor.to(self._device)


def _encode_failed() -> RequestError:
    return RequestError("the media item could not be encoded", status=500, code="encode_failed")


def _breaks_device(error: Exception) -> bool:
    """After an error of the device every later kernel fails too; being short of memory is none."""
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def _batch_key(tensors: dict[str, Tensor]) -> object:
    """Items with equal keys can be joined along their first axis (patches, tiles or pictures)."""
    return tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in tensors.items())


def _row_indices(work: EncodeWork) -> Tensor:
    """Rows of the region that the unit's embeddings fill, in order."""
    needed = -(-work.unit.num_tokens // EMBEDDING_BLOCK_TOKENS)
    assert len(work.blocks) == needed, f"{len(work.blocks)} blocks for {work.unit.num_tokens} rows"
    rows = torch.tensor(work.blocks)[:, None] * EMBEDDING_BLOCK_TOKENS + torch.arange(EMBEDDING_BLOCK_TOKENS)
    return rows.view(-1)[: work.unit.num_tokens]


def _flatten(features: Any) -> Tensor:
    """Families nest features per item, per tile or not at all; rows are always in item order."""
    if isinstance(features, (list, tuple)):
        return torch.cat([_flatten(part) for part in features])
    return features.reshape(-1, features.shape[-1])  # type: ignore[no-any-return]
