"""Turns media bytes into rows in the blocks of the embedding region. Knows no request and no language model."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from triptych.config import EMBEDDING_BLOCK_TOKENS, ITEMS_AT_HAND
from triptych.core import EncodeWork, Media
from triptych.errors import RequestError
from triptych.model.caches import EmbeddingRegion

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
_Batch = list[tuple[int, EncodeWork, Tensors]]  # index of the result, the work, its tensors


class MediaSource(Protocol):
    """The part of a processor that the encoder needs."""

    def prepare(self, media: Media) -> Any:
        """The decoded item; RequestError if it cannot be decoded."""
        ...

    def inputs(self, media: Media, prepared: Any, index: int) -> Tensors:
        """What `features` takes for one unit of the item."""
        ...

    def features(self, modality: str, model: PreTrainedModel, inputs: Tensors) -> Tensor:
        """[rows of all units of a batch, row width]."""
        ...


class EncodeRunner:
    """Encodes batches of units. Units whose tensors fit together run as one forward."""

    def __init__(self, model: PreTrainedModel, processor: MediaSource, region: EmbeddingRegion) -> None:
        self._model = model
        self._processor = processor
        self._region = region
        self._device = region.device
        self._dtype = region.layout.dtype
        self._prepared: OrderedDict[bytes, Any] = OrderedDict()  # by hash of the item: its units come one after another

    @torch.inference_mode()
    def run(self, works: list[EncodeWork]) -> list[RequestError | None]:
        """One result per work: None once its rows are in its blocks, or why the item cannot be encoded."""
        errors: list[RequestError | None] = [None] * len(works)
        batches: dict[object, _Batch] = {}
        for index, work in enumerate(works):
            tensors = self._inputs(work)
            if isinstance(tensors, RequestError):
                errors[index] = tensors
            else:
                batches.setdefault((work.unit.modality, _batch_key(tensors)), []).append((index, work, tensors))
        for batch in batches.values():
            if self._try_to_encode(batch) is not None:  # one of them may be to blame, and the others are of strangers
                for one in batch:
                    errors[one[0]] = self._try_to_encode([one])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # from now on another instance may read the blocks
        return errors

    @torch.inference_mode()
    def warm_up(self, media: Media) -> None:
        """Encodes the first unit of an item and throws it away, so that the first request pays for no page fault."""
        inputs = self._processor.inputs(media, self._processor.prepare(media), 0)
        self._features(media.modality, {name: self._to_device(tensor) for name, tensor in inputs.items()})

    def _inputs(self, work: EncodeWork) -> Tensors | RequestError:
        media = work.media
        if media.hash not in self._prepared:  # once for all units of an item that this instance encodes about now
            prepared = self._attempt(media, lambda: self._processor.prepare(media))
            if isinstance(prepared, RequestError) and prepared.status >= 500:  # perhaps only this time
                return prepared
            self._prepared[media.hash] = prepared
            if len(self._prepared) > ITEMS_AT_HAND:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(media.hash)
        prepared = self._prepared[media.hash]
        if isinstance(prepared, RequestError):
            return prepared
        found: Tensors | RequestError = self._attempt(
            media, lambda: self._processor.inputs(media, prepared, work.unit.index)
        )
        return found

    def _attempt(self, media: Media, decode: Callable[[], Any]) -> Any:
        """What it gives, or why it fails."""
        try:
            return decode()
        except RequestError as error:
            return error.with_traceback(None)  # it is kept for the item's other units: not what the media code held
        except Exception:  # a request boundary: what a client sent goes through media code of others here
            logger.exception("the media code failed on %d bytes of %s", len(media.data), media.modality)
            return _encode_failed()

    def _try_to_encode(self, batch: _Batch) -> RequestError | None:
        """What ends all items of the batch. Raises only where the device can compute no more."""
        try:
            self._encode(batch)
        except Exception as error:  # a request boundary: the tensors follow from what clients sent
            if _breaks_device(error):
                raise
            logger.exception("the encoder failed on a batch of %d units", len(batch))
            return _encode_failed()
        return None

    def _encode(self, batch: _Batch) -> None:
        """Features of all units of a batch, written block by block."""
        works = [work for _, work, _ in batch]
        names = batch[0][2]
        inputs = {name: self._to_device(torch.cat([tensors[name] for _, _, tensors in batch])) for name in names}
        rows = self._features(works[0].unit.modality, inputs)
        expected = sum(work.unit.num_tokens for work in works)
        assert rows.shape == (expected, self._region.layout.row_width), (
            f"encoder gave rows {tuple(rows.shape)} for units of {[work.unit.num_tokens for work in works]} tokens"
            f" and row width {self._region.layout.row_width}"
        )
        target = torch.cat([_row_indices(work) for work in works]).to(self._device)
        self._region.rows.index_copy_(0, target, rows)

    def _features(self, modality: str, inputs: Tensors) -> Tensor:
        return self._processor.features(modality, self._model, inputs)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype) if tensor.is_floating_point() else tensor.to(self._device)


def _encode_failed() -> RequestError:
    return RequestError("the media item could not be encoded", status=500, code="encode_failed")


def _breaks_device(error: Exception) -> bool:
    """After an error of the device every later kernel fails too; being short of memory is none."""
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def _batch_key(tensors: Tensors) -> object:
    """Items with equal keys can be joined along their first axis (patches, tiles or pictures)."""
    return tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in tensors.items())


def _row_indices(work: EncodeWork) -> Tensor:
    """Rows of the region that the unit's embeddings fill, in order."""
    needed = -(-work.unit.num_tokens // EMBEDDING_BLOCK_TOKENS)
    assert len(work.blocks) == needed, f"{len(work.blocks)} blocks for {work.unit.num_tokens} rows"
    rows = torch.tensor(work.blocks)[:, None] * EMBEDDING_BLOCK_TOKENS + torch.arange(EMBEDDING_BLOCK_TOKENS)
    return rows.view(-1)[: work.unit.num_tokens]
