"""The encode half gives the rows that the whole model computes, block by block, whatever shares the batch."""

import pytest
import torch
from transformers import PreTrainedModel

from tests.checkpoints import FAMILIES
from tests.model.builders import (
    Blocks,
    Request,
    checkpoint,
    encode_request,
    make_encoder,
    make_request,
)
from tests.reference import reference_model
from triptych.core import EncodeWork
from triptych.errors import RequestError

torch.set_num_threads(1)


def expected_rows(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model.model.get_image_features(**tensors, return_dict=True)
    parts = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    return torch.cat([_rows(part) for part in parts], -1)


def _rows(part: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]) -> torch.Tensor:
    tensors = part if isinstance(part, list | tuple) else [part]
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_rows_of_all_units_equal_those_of_the_whole_model(family: str) -> None:
    folder, requests = checkpoint(family), [make_request(family, index, 1) for index in (0, 2, 3)]
    encoder, region, pixels = make_encoder(folder)
    blocks = Blocks(64)
    works, tensors = [], []
    for request in requests:
        for unit, inputs in zip(request.units, request.pixels, strict=True):
            pixels.tensors[unit.hash] = inputs
            tensors.append(inputs)
            works.append(EncodeWork(unit, unit.hash, blocks.take(unit.num_tokens)))
    assert encoder.run(works) == [None] * 6
    for work, inputs in zip(works, tensors, strict=True):
        rows = region.blocks[work.blocks].flatten(0, 1)[: work.unit.num_tokens]
        torch.testing.assert_close(rows, expected_rows(reference_model(folder), inputs), atol=1e-4, rtol=1e-4)


def test_blocks_of_others_stay_as_they_are() -> None:
    request = make_request("qwen2_5_vl", 0, 1)
    encoder, region, pixels = make_encoder(checkpoint("qwen2_5_vl"))
    region.blocks.fill_(7.0)
    used = [block for taken in encode_request(encoder, pixels, Blocks(64), request).values() for block in taken]
    others = [block for block in range(64) if block not in used]
    assert region.blocks[others].eq(7.0).all()


def test_an_undecodable_picture_ends_its_own_unit_only() -> None:
    request: Request = make_request("llava", 0, 1)
    encoder, region, pixels = make_encoder(checkpoint("llava"))

    class Broken:
        def pixels(self, data: bytes) -> dict[str, torch.Tensor]:
            if data == b"broken":
                raise RequestError("not a picture")
            return pixels.pixels(data)

    encoder._processor = Broken()
    unit = request.units[0]
    pixels.tensors[b"fine"] = request.pixels[0]
    works = [EncodeWork(unit, b"broken", [0]), EncodeWork(unit, b"fine", [1])]
    first, second = encoder.run(works)
    assert isinstance(first, RequestError)
    assert second is None
    assert region.blocks[0].eq(0).all()
    assert region.blocks[1].ne(0).any()


@pytest.mark.parametrize("failure", [ValueError("bad strides"), MemoryError(), OSError("truncated")])
def test_an_unexpected_failure_of_image_code_ends_its_own_unit_only(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    request = make_request("llava", 0, 1)
    encoder, region, pixels = make_encoder(checkpoint("llava"))

    class Faulty:
        def pixels(self, data: bytes) -> dict[str, torch.Tensor]:
            if data == b"faulty":
                raise failure
            return pixels.pixels(data)

    encoder._processor = Faulty()
    pixels.tensors[b"fine"] = request.pixels[0]
    first, second = encoder.run(
        [EncodeWork(request.units[0], data, [i]) for i, data in enumerate([b"faulty", b"fine"])]
    )
    assert first is not None
    assert (first.status, first.code) == (500, "encode_failed")
    assert second is None
    assert region.blocks[1].ne(0).any()
    assert any(record.exc_info for record in caplog.records)


def test_a_batch_that_fails_ends_its_own_units_only(caplog: pytest.LogCaptureFixture) -> None:
    """Here because of a row count that differs from the promised one: the log has the numbers."""
    request = make_request("llava", 0, 1)
    encoder, region, pixels = make_encoder(checkpoint("llava"))
    pixels.tensors[b"two"] = {"pixel_values": request.pixels[0]["pixel_values"].repeat(2, 1, 1, 1)}
    pixels.tensors[b"misshapen"] = {"pixel_values": torch.zeros(1, 3, 5, 7)}
    first, second = encoder.run(
        [EncodeWork(request.units[0], data, [i]) for i, data in enumerate([b"two", b"misshapen"])]
    )
    for error in (first, second):
        assert error is not None
        assert (error.status, error.code) == (500, "encode_failed")
    assert "(32, 64)" in caplog.text
    pixels.tensors[b"fine"] = request.pixels[0]
    assert encoder.run([EncodeWork(request.units[0], b"fine", [1])]) == [None]
    assert region.blocks[1].ne(0).any()


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
    request = make_request("llava", 0, 1)
    encoder, _, pixels = make_encoder(checkpoint("llava"))
    pixels.tensors[b"x"] = request.pixels[0]

    def fail(modality: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        raise failure

    encoder.features = fail  # type: ignore[method-assign]
    work = EncodeWork(request.units[0], b"x", [1])
    if ends_the_instance:
        with pytest.raises(type(failure)):
            encoder.run([work])
    else:
        assert isinstance(encoder.run([work])[0], RequestError)
