"""Units of media items, encoded one by one or in any batch, are what the unsplit model puts into its prompt."""

import hashlib
import io
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from tests.checkpoints import IMAGE_FAMILIES, make_checkpoint
from tests.model.builders import checkpoint, model_config
from tests.reference import reference_inputs, reference_model
from triptych.core import EncodeUnit, Media
from triptych.model.headers import ImageHeader
from triptych.model.loading import Half, load_half
from triptych.model.processor import Processor, Prompt

torch.set_num_threads(1)

TILED_FAMILIES = ["internvl", "idefics3", "smolvlm", "llava_next", "llava_onevision", "aya_vision"]

Size = tuple[int, int]  # (width, height)
PROMPTS: list[list[Size]] = [
    [(64, 64)],
    [(150, 40)],
    [(33, 97)],
    [(21, 20)],
    [(90, 80), (160, 23)],
    [(40, 120), (20, 20), (131, 101)],
]


@cache
def processor_of(folder: Path) -> Processor:
    return Processor.load(folder)


@cache
def encoder_of(folder: Path) -> PreTrainedModel:
    return load_half(model_config(folder), Half.ENCODE)


def make_picture(size: Size, seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_file(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def conversation(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]


def expanded(folder: Path, pictures: list[Image.Image]) -> tuple[Prompt, list[tuple[EncodeUnit, Media]]]:
    processor = processor_of(folder)
    messages = conversation([{"type": "image_url", "image_url": {"url": "data:"}} for _ in pictures])
    items = [("image", ImageHeader(*picture.size)) for picture in pictures]
    prompt = processor.expand(processor.render(messages), items)
    files = [as_file(picture) for picture in pictures]
    hashed = [(data, hashlib.blake2b(data, digest_size=16).digest()) for data in files]
    return prompt, processor.encode_units(prompt, processor.media(items, hashed))


@torch.inference_mode()
def encode(folder: Path, units: list[tuple[EncodeUnit, Media]], *, seed: int | None) -> list[Tensor]:
    """Rows of each unit. Units are encoded alone, or with a seed in random batches of those whose tensors fit."""
    processor = processor_of(folder)
    prepared = {media.hash: processor.prepare(media) for _, media in units}
    tensors = [processor.inputs(media, prepared[media.hash], unit.index) for unit, media in units]
    rows: dict[int, Tensor] = {}
    for batch in _batches(tensors, seed):
        joined = {name: torch.cat([tensors[index][name] for index in batch]) for name in tensors[batch[0]]}
        features = processor.features("image", encoder_of(folder), joined)
        parts = features.split([units[index][0].num_tokens for index in batch])
        rows.update(zip(batch, parts, strict=True))
    return [rows[index] for index in range(len(units))]


def _batches(tensors: list[dict[str, Tensor]], seed: int | None) -> Iterator[list[int]]:
    if seed is None:
        yield from ([index] for index in range(len(tensors)))
        return
    rng = random.Random(seed)
    fitting: dict[object, list[int]] = {}
    for index in rng.sample(range(len(tensors)), len(tensors)):
        shapes = tuple((name, tensor.shape[1:]) for name, tensor in tensors[index].items())
        fitting.setdefault(shapes, []).append(index)
    for group in fitting.values():
        while group:
            size = rng.randint(1, 5)
            yield group[:size]
            del group[:size]


def assembled(prompt: Prompt, rows: list[Tensor]) -> tuple[list[int], Tensor]:
    """Places in the prompt, and the rows that stand there."""
    places = [place for span in prompt.spans for place in range(span.start, span.start + span.length)]
    parts = [rows[span.unit][span.offset : span.offset + span.length] for span in prompt.spans]
    return places, torch.cat(parts)


@torch.inference_mode()
def unsplit(folder: Path, pictures: list[Image.Image]) -> tuple[list[int], Tensor, list[Tensor]]:
    """Of the reference: token ids, what its language model gets for each of them, and what its first layers get on top
    for each placeholder."""
    model = reference_model(folder)
    inputs = reference_inputs(folder, conversation([{"type": "image", "image": picture} for picture in pictures]))
    seen: dict[str, Any] = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    try:
        model(**inputs)
    finally:
        hook.remove()
    return inputs["input_ids"][0].tolist(), seen["inputs_embeds"][0], seen.get("deepstack_visual_embeds") or []


def assert_units_are_the_unsplit_model(folder: Path, prompts: list[list[Size]]) -> None:
    for number, sizes in enumerate(prompts):
        pictures = [make_picture(size, seed) for seed, size in enumerate(sizes)]
        prompt, units = expanded(folder, pictures)
        token_ids, embeddings, deepstack = unsplit(folder, pictures)
        assert prompt.token_ids == token_ids
        for seed in (None, number):
            places, rows = assembled(prompt, encode(folder, units, seed=seed))
            expected = torch.cat([embeddings[places], *deepstack], -1)
            torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_units_encoded_alone_or_in_any_batch_are_the_embeddings_of_the_unsplit_model(family: str) -> None:
    assert_units_are_the_unsplit_model(checkpoint(family), PROMPTS)


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("internvl", {"max_patches": 1}),
        ("internvl", {"min_patches": 3, "max_patches": 5}),
        ("aya_vision", {"max_patches": 12}),
        ("idefics3", {"do_image_splitting": False}),
        ("smolvlm", {"size": {"longest_edge": 190}}),
        ("pixtral", {"size": {"height": 70, "width": 30}}),
    ],
    ids=str,
)
def test_so_are_those_of_other_processor_arguments(family: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path / family)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | arguments))
    assert_units_are_the_unsplit_model(folder, [[(90, 80), (160, 23)]])


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_pixels_are_bit_for_bit_those_of_the_families_own_processor(family: str) -> None:
    folder = checkpoint(family)
    pictures = [make_picture((90, 80), 0), make_picture((160, 23), 1)]
    theirs = reference_inputs(folder, conversation([{"type": "image", "image": each} for each in pictures]))
    _, units = expanded(folder, pictures)
    processor = processor_of(folder)
    ours = [processor.inputs(media, processor.prepare(media), unit.index) for unit, media in units]
    values = {value for tensors in ours for value in tensors["pixel_values"].flatten().tolist()}
    assert values <= set(theirs["pixel_values"].flatten().tolist())  # which may have padding, and tiles of nothing else


@pytest.mark.parametrize("family", TILED_FAMILIES)
def test_tiles_of_a_picture_are_units_and_each_of_them_stands_in_the_prompt(family: str) -> None:
    prompt, units = expanded(checkpoint(family), [make_picture((160, 45))])
    assert len(units) > 1
    assert {span.unit for span in prompt.spans} == set(range(len(units)))
    assert len({unit.hash for unit, _ in units}) == len(units)
    assert len({unit.num_tokens for unit, _ in units}) == 1


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_lines_run_over_all_tiles_and_end_with_a_newline_row(family: str) -> None:
    # Resized to 72 x 24: 3 tiles of 3 x 3 features.
    prompt, units = expanded(checkpoint(family), [make_picture((144, 48))])
    assert [unit.num_tokens for unit, _ in units] == [10] * 4
    line = [[(1, first, 3), (2, first, 3), (3, first, 3), (3, 9, 1)] for first in (0, 3, 6)]
    assert [(span.unit, span.offset, span.length) for span in prompt.spans] == [(0, 0, 9), *line[0], *line[1], *line[2]]


def test_lines_and_columns_of_padding_are_left_out() -> None:
    flat, _ = expanded(checkpoint("llava_next"), [make_picture((144, 16))])  # fills 1 of the 3 lines of 3 tiles
    assert [(span.unit, span.offset, span.length) for span in flat.spans] == [
        (0, 0, 9),
        *[(1, 3, 3), (2, 3, 3), (3, 3, 3), (3, 9, 1)],
    ]
    tall, _ = expanded(checkpoint("llava_next"), [make_picture((16, 144))])
    assert [(span.unit, span.offset, span.length) for span in tall.spans][1:] == [
        part for tile in (1, 2, 3) for line in range(3) for part in [(tile, 3 * line + 1, 1), (tile, 9, 1)]
    ]


def test_only_the_lone_picture_of_a_prompt_is_cut_into_tiles() -> None:
    picture = make_picture((160, 45))
    _, units = expanded(checkpoint("llava_onevision"), [picture])
    _, both_units = expanded(checkpoint("llava_onevision"), [picture, picture])
    assert (len(units), len(both_units)) == (4, 2)
    assert both_units[0][0].hash != units[0][0].hash
    assert [unit.num_tokens for unit, _ in both_units] == [10, 10]


def test_picture_whose_grid_is_shrunk_over_all_tiles_is_one_unit() -> None:
    # 3 x 3 tiles, where the features of 3 are allowed.
    prompt, units = expanded(checkpoint("llava_onevision"), [make_picture((160, 150))])
    assert [unit.num_tokens for unit, _ in units] == [prompt.spans[0].length]
    assert len(prompt.spans) == 1


def test_picture_of_one_token_is_encoded_alone_as_it_is_with_others() -> None:
    pictures = [make_picture((9, 12), 1), make_picture((90, 80), 2)]
    _, alone = expanded(checkpoint("mistral3"), pictures[:1])
    assert [unit.num_tokens for unit, _ in alone] == [1]
    prompt, _ = expanded(checkpoint("mistral3"), pictures)
    _, embeddings, _ = unsplit(checkpoint("mistral3"), pictures)
    rows = encode(checkpoint("mistral3"), alone, seed=None)[0]
    torch.testing.assert_close(rows, embeddings[[prompt.spans[0].start]], rtol=1e-5, atol=1e-5)


def test_tile_that_is_all_zeros_is_encoded_like_any_other() -> None:
    processor = processor_of(checkpoint("smolvlm"))
    _, units = expanded(checkpoint("smolvlm"), [make_picture((60, 30))])
    media = units[0][1]
    prepared = processor.prepare(media)
    prepared["pixel_values"][:, 1] = 0
    inputs = [processor.inputs(media, prepared, index) for index in range(len(units))]
    joined = {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}
    with torch.inference_mode():
        rows = processor.features("image", encoder_of(checkpoint("smolvlm")), joined)
    assert len(rows) == sum(unit.num_tokens for unit, _ in units)
