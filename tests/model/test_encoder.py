"""The encode half gives the rows that the whole model computes, block by block, whatever shares the batch."""

from typing import Any

import pytest
import torch

from tests.checkpoints import IMAGE_FAMILIES
from tests.model.builders import (
    Blocks,
    checkpoint,
    encode_request,
    make_encoder,
    make_request,
    processor_of,
)
from tests.reference import reference_model
from triptych.core import EncodeUnit, EncodeWork, Media
from triptych.errors import RequestError
from triptych.model.caches import EmbeddingRegion
from triptych.model.encoder import EncodeRunner

torch.set_num_threads(1)


class Tensors:
    """A processor whose media bytes are keys of tensors, or of failures, made beforehand."""

    def __init__(self, encoder: EncodeRunner, **items: dict[str, torch.Tensor] | Exception) -> None:
        self.items = items
        self._features = encoder._processor.features
        encoder._processor = self

    def prepare(self, media: Media) -> dict[str, torch.Tensor]:
        item = self.items[media.data.decode()]
        if isinstance(item, Exception):
            raise item
        return item

    def inputs(self, media: Media, prepared: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        return prepared

    def features(self, *args: Any) -> torch.Tensor:
        return self._features(*args)


def work(unit: EncodeUnit, name: str, *blocks: int) -> EncodeWork:
    return EncodeWork(unit, Media(name.encode(), "image", name.encode()), list(blocks))


def llava() -> tuple[EncodeRunner, EmbeddingRegion, EncodeUnit, dict[str, torch.Tensor]]:
    """An encoder, its region, and one picture of one block: its unit and its tensors."""
    request = make_request("llava", 0, 1)
    encoder, region = make_encoder(checkpoint("llava"))
    processor = processor_of(checkpoint("llava"))
    tensors = processor.inputs(request.media[0], processor.prepare(request.media[0]), 0)
    return encoder, region, request.units[0], tensors


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@torch.inference_mode()
def test_rows_of_all_units_are_those_that_each_unit_has_alone(family: str) -> None:
    """That these are the whole model's rows is shown by test_units."""
    folder, requests = checkpoint(family), [make_request(family, index, 1) for index in (0, 2, 3)]
    encoder, region = make_encoder(folder)
    blocks, processor = Blocks(256), processor_of(folder)
    works = [
        EncodeWork(unit, media, blocks.take(unit.num_tokens))
        for request in requests
        for unit, media in zip(request.units, request.media, strict=True)
    ]
    assert encoder.run(works) == [None] * len(works)
    for each in works:
        rows = region.blocks[each.blocks].flatten(0, 1)[: each.unit.num_tokens]
        inputs = processor.inputs(each.media, processor.prepare(each.media), each.unit.index)
        alone = processor.features("image", reference_model(folder), inputs)
        torch.testing.assert_close(rows, alone, atol=1e-4, rtol=1e-4)


def test_blocks_of_others_stay_as_they_are() -> None:
    request = make_request("qwen2_5_vl", 0, 1)
    encoder, region = make_encoder(checkpoint("qwen2_5_vl"))
    region.blocks.fill_(7.0)
    used = [block for taken in encode_request(encoder, Blocks(64), request).values() for block in taken]
    others = [block for block in range(64) if block not in used]
    assert region.blocks[others].eq(7.0).all()


def test_an_undecodable_picture_ends_its_own_unit_only() -> None:
    encoder, region, unit, tensors = llava()
    Tensors(encoder, broken=RequestError("not a picture"), fine=tensors)
    first, second = encoder.run([work(unit, "broken", 0), work(unit, "fine", 1)])
    assert isinstance(first, RequestError)
    assert second is None
    assert region.blocks[0].eq(0).all()
    assert region.blocks[1].ne(0).any()


@pytest.mark.parametrize("failure", [ValueError("bad strides"), MemoryError(), OSError("truncated")])
def test_an_unexpected_failure_of_media_code_ends_its_own_unit_only(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, region, unit, tensors = llava()
    Tensors(encoder, faulty=failure, fine=tensors)
    first, second = encoder.run([work(unit, "faulty", 0), work(unit, "fine", 1)])
    assert first is not None
    assert (first.status, first.code) == (500, "encode_failed")
    assert second is None
    assert region.blocks[1].ne(0).any()
    assert any(record.exc_info for record in caplog.records)


def test_a_batch_that_fails_ends_its_own_units_only(caplog: pytest.LogCaptureFixture) -> None:
    """Here because of a row count that differs from the promised one: the log has the numbers."""
    encoder, region, unit, tensors = llava()
    two = {"pixel_values": tensors["pixel_values"].repeat(2, 1, 1, 1)}
    Tensors(encoder, two=two, misshapen={"pixel_values": torch.zeros(1, 3, 5, 7)}, fine=tensors)
    for error in encoder.run([work(unit, "two", 0), work(unit, "misshapen", 1)]):
        assert error is not None
        assert (error.status, error.code) == (500, "encode_failed")
    assert "(32, 64)" in caplog.text
    assert encoder.run([work(unit, "fine", 1)]) == [None]
    assert region.blocks[1].ne(0).any()


def test_an_item_is_decoded_once_for_all_its_units() -> None:
    request = make_request("internvl", 0, 1)
    encoder, _ = make_encoder(checkpoint("internvl"))
    processor, prepared = processor_of(checkpoint("internvl")), []

    class Counting:
        inputs, features = processor.inputs, processor.features

        def prepare(self, media: Media) -> Any:
            prepared.append(media.hash)
            return processor.prepare(media)

    encoder._processor = Counting()
    blocks = Blocks(256)
    for unit, media in zip(request.units, request.media, strict=True):
        assert encoder.run([EncodeWork(unit, media, blocks.take(unit.num_tokens))]) == [None]
    assert len(request.units) > len(prepared) == len({media.hash for media in request.media})


@pytest.mark.parametrize(
    ("failure", "ends_the_instance"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_a_device_that_can_compute_no_more_ends_the_instance(failure: Exception, ends_the_instance: bool) -> None:
    encoder, _, unit, tensors = llava()
    fake = Tensors(encoder, x=tensors)

    def fail(*args: Any) -> torch.Tensor:
        raise failure

    fake.features = fail  # type: ignore[method-assign]
    if ends_the_instance:
        with pytest.raises(type(failure)):
            encoder.run([work(unit, "x", 1)])
    else:
        assert isinstance(encoder.run([work(unit, "x", 1)])[0], RequestError)
