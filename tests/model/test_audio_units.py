"""Families that take audio: prompts, units and answers against the families' own processors and unsplit models."""

import json
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.model.builders import (
    Request,
    checkpoint,
    expand,
    make_picture,
    model_config,
    processor_of,
)
from tests.model.clips import clip as make_clip
from tests.model.halves import Halves
from tests.model.sounds import Samples, encoded, float_wav, noise
from tests.reference import Messages, reference_inputs, reference_model
from triptych.core import EncodeUnit, Media
from triptych.errors import ConfigError, RequestError
from triptych.model.audios import read_audio_header
from triptych.model.families.base import ItemLayout
from triptych.model.headers import AudioHeader, Header, ImageHeader
from triptych.model.loading import Half, load_half
from triptych.model.positions import Positions
from triptych.model.processor import Item, Processor
from triptych.model.videos import read_video_header

torch.set_num_threads(1)

FAMILIES = ["qwen2_audio", "voxtral", "audioflamingo3", "qwen2_5_omni"]
RATE = 16_000
CLIPS = [[8_000], [16_000, 31_003], [33_000, 4_000, 700], [64_321], [16_000 * 2 + 1]]  # samples
LONGEST = {"qwen2_audio": 2, "voxtral": None, "audioflamingo3": 3, "qwen2_5_omni": 2}  # seconds that are looked at


@cache
def encoder_of(family: str) -> PreTrainedModel:
    return load_half(model_config(checkpoint(family)), Half.ENCODE)


def lay_out(family: str, num_samples: int) -> ItemLayout:
    audio = processor_of(checkpoint(family)).modalities["audio"]
    return audio.lay_out(AudioHeader(num_samples, RATE), 1)


def conversation(clips: list[Samples], pictures: list[bytes] = [], text: str = "What is this?") -> Messages:  # noqa: B006
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    parts += [{"type": "audio", "audio": clip} for clip in clips]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def make_audio_request(family: str, index: int, new_tokens: int = 10) -> Request:
    """Clips of different lengths; where the family takes pictures too, one or two of them before the clips."""
    clips = [noise(length, seed=index) for length in CLIPS[index % len(CLIPS)]]
    sizes = [(64, 48), (40, 88)][: 1 + index % 2] if family == "qwen2_5_omni" else []
    pictures = [make_picture(*size, seed=index) for size in sizes]
    items: list[Item] = [("image", ImageHeader(*size)) for size in sizes]
    items += [("audio", AudioHeader(len(clip), RATE)) for clip in clips]
    messages = conversation(clips, pictures, "What do you hear?" + " Please." * index)
    return expand(checkpoint(family), messages, items, pictures + [float_wav(clip) for clip in clips], new_tokens)


@torch.inference_mode()
def encode(family: str, units: list[tuple[EncodeUnit, Media]], rng: random.Random | None = None) -> list[Tensor]:
    """Rows of each unit, encoded alone or, with `rng`, in random batches."""
    processor, rows = processor_of(checkpoint(family)), {}
    prepared = {media.hash: processor.prepare(media) for _, media in units}
    order = rng.sample(range(len(units)), len(units)) if rng else range(len(units))
    size = rng.randint(2, 6) if rng else 1
    for batch in (order[start : start + size] for start in range(0, len(order), size)):
        tensors = [
            processor.inputs(media, prepared[media.hash], unit.index) for unit, media in (units[i] for i in batch)
        ]
        joined = {name: torch.cat([each[name] for each in tensors]) for name in tensors[0]}
        features = processor.features("audio", encoder_of(family), joined)
        rows.update(zip(batch, features.split([units[index][0].num_tokens for index in batch]), strict=True))
    return [rows[index] for index in range(len(units))]


@torch.inference_mode()
def embeddings_of_the_unsplit_model(family: str, clips: list[Samples]) -> Tensor:
    """[tokens, hidden]: what its language model gets, media and all."""
    model, seen = reference_model(checkpoint(family)), {}
    take = model.get_decoder().register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    try:
        model(**reference_inputs(checkpoint(family), conversation(clips)))
    finally:
        take.remove()
    return seen["inputs_embeds"][0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", CLIPS)
def test_units_encoded_alone_or_in_any_batch_are_the_embeddings_of_the_unsplit_model(
    family: str, lengths: list[int]
) -> None:
    processor = processor_of(checkpoint(family))
    clips = [noise(length, seed) for seed, length in enumerate(lengths)]
    items: list[Item] = [("audio", AudioHeader(length, RATE)) for length in lengths]
    prompt = processor.expand(processor.render(_without_samples(conversation(clips))), items)
    units = processor.encode_units(
        prompt, processor.media(items, [(float_wav(clip), bytes([i])) for i, clip in enumerate(clips)])
    )
    expected = embeddings_of_the_unsplit_model(family, clips)
    assert len(expected) == len(prompt.token_ids)
    for rng in (None, random.Random(0), random.Random(1)):
        rows = encode(family, units, rng)
        for span in prompt.spans:
            ours = rows[span.unit][span.offset : span.offset + span.length]
            torch.testing.assert_close(ours, expected[span.start : span.start + span.length], rtol=1e-5, atol=1e-5)


def _without_samples(messages: Messages) -> Messages:
    content = messages[0]["content"]
    return [messages[0] | {"content": [part if part["type"] == "text" else {"type": part["type"]} for part in content]}]


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(500, 70_000), min_size=1, max_size=3))
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_tokens_that_the_families_own_processor_gives(family: str, lengths: list[int]) -> None:
    processor = processor_of(checkpoint(family))
    messages = conversation([noise(length) for length in lengths])
    items: list[Item] = [("audio", AudioHeader(length, RATE)) for length in lengths]
    prompt = processor.expand(processor.render(_without_samples(messages)), items)
    assert prompt.token_ids == reference_inputs(checkpoint(family), messages)["input_ids"][0].tolist()


@settings(max_examples=60, deadline=None)
@given(num_samples=st.integers(481, 70_000))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_unit_has_the_rows_that_its_layout_says_and_none_has_no_rows(family: str, num_samples: int) -> None:
    layout = lay_out(family, num_samples)
    assert min(layout.units) > 0
    assert [(row.unit, row.offset, row.length) for row in layout.rows] == [
        (unit, 0, length) for unit, length in enumerate(layout.units)
    ]
    assert sum(run.length for run in layout.runs) == sum(layout.units)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beyond", [1, 160, 320, 321])
def test_a_window_that_is_too_short_for_a_row_is_no_unit(family: str, beyond: int) -> None:
    """A few samples behind a whole number of windows: the tensors have a window more than there are units."""
    processor = processor_of(checkpoint(family))
    clip, items = noise(16_000 + beyond), [("audio", AudioHeader(16_000 + beyond, RATE))]
    prompt = processor.expand(processor.render(_without_samples(conversation([clip]))), items)
    units = processor.encode_units(prompt, processor.media(items, [(float_wav(clip), b"x")]))
    expected = embeddings_of_the_unsplit_model(family, [clip])
    rows = torch.cat(encode(family, units))
    places = [place for span in prompt.spans for place in range(span.start, span.start + span.length)]
    torch.testing.assert_close(rows, expected[places], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_audio", "audioflamingo3", "qwen2_5_omni"])
def test_a_clip_that_is_too_short_for_a_row_is_refused(family: str) -> None:
    for num_samples in (1, 160, 320):
        with pytest.raises(RequestError, match="too short") as caught:
            lay_out(family, num_samples)
        assert caught.value.status == 400
        assert caught.value.code == "invalid_audio"
    assert sum(lay_out(family, 321).units) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_only_as_much_of_a_clip_counts_as_the_family_looks_at(family: str) -> None:
    seconds = LONGEST[family]
    if seconds is None:
        assert sum(lay_out(family, 100 * RATE).units) == 100 * lay_out(family, RATE).units[0]
    else:
        assert lay_out(family, 100 * RATE).units == lay_out(family, seconds * RATE).units


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_of_a_model_with_mixed_chunked_batches_give_the_tokens_of_generate(family: str) -> None:
    requests = [make_audio_request(family, index) for index in range(4)]
    halves = Halves(checkpoint(family))
    answers = halves.answer(requests, output_tokens=10)
    assert halves.num_mixed_steps > 0
    for answer, request in zip(answers, requests, strict=True):
        assert answer[: len(request.expected)] == request.expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_hangs_on_what_is_heard(family: str) -> None:
    """Otherwise none of the above would show a clip in the wrong place."""
    folder = checkpoint(family)
    answers = set()
    for seed in range(3):
        clip = noise(16_000, seed)
        request = expand(folder, conversation([clip]), [("audio", AudioHeader(16_000, RATE))], [float_wav(clip)])
        answers.add(tuple(request.expected))
    assert len(answers) > 1


@torch.inference_mode()
def test_a_picture_a_video_and_a_clip_in_one_prompt_give_the_tokens_of_generate() -> None:
    folder = checkpoint("qwen2_5_omni")
    processor = processor_of(folder)
    files = [
        make_picture(64, 48, seed=5),
        make_clip(num_frames=6, width=48, height=32),
        encoded("mp3", noise(30_000), 22_050),
    ]
    video, audio = read_video_header(files[1], num_frames=4, fps=None), read_audio_header(files[2], RATE)
    headers: list[Header] = [ImageHeader(64, 48), video, audio]
    items: list[Item] = list(zip(("image", "video", "audio"), headers, strict=True))
    parts = [{"type": name} for name, _ in items] + [{"type": "text", "text": "What is all this?"}]
    prompt = processor.expand(processor.render([{"role": "user", "content": parts}]), items)
    media = processor.media(items, [(data, bytes([index])) for index, data in enumerate(files)])
    units = processor.encode_units(prompt, media)
    expected = _generate(processor, prompt.token_ids, prompt.position_arguments, media)
    request = Request(
        prompt.token_ids,
        tuple(unit for unit, _ in units),
        prompt.spans,
        prompt.position_arguments,
        [item for _, item in units],
        expected,
    )
    (answer,) = Halves(folder).answer([request], output_tokens=10, chunk_tokens=101)
    assert answer == expected


@pytest.mark.parametrize("mark", ["<|audio_bos|>", "<|vision_bos|>"])
def test_a_token_that_marks_media_and_stands_alone_in_a_text_counts_as_any_other(mark: str) -> None:
    """transformers' position rule of this family loses its way at it."""
    folder, clip = checkpoint("qwen2_5_omni"), noise(9_000)
    processor = processor_of(folder)
    rule = Positions(load_half(model_config(folder), Half.LANGUAGE))
    items: list[Item] = [("image", ImageHeader(64, 48)), ("audio", AudioHeader(len(clip), RATE))]
    found = []
    for text in (f"a{mark}b{mark}", "a<|im_start|>b<|im_start|>"):
        parts = [{"type": "text", "text": text}, {"type": "image"}, {"type": "audio"}, {"type": "text", "text": text}]
        prompt = processor.expand(processor.render([{"role": "user", "content": parts}]), items)
        units = processor.encode_units(prompt, processor.media(items, [(b"", b"a"), (b"", b"b")]))
        request = Request(
            prompt.token_ids, tuple(unit for unit, _ in units), prompt.spans, prompt.position_arguments, [], []
        )
        found.append(rule.of_prompt(request.sequence()))
    assert found[0][1] == found[1][1]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][0].shape[1] > found[0][0].max() + 1  # a picture stands at fewer positions than it has tokens


def _generate(processor: Processor, token_ids: list[int], positions: Any, media: list[Media]) -> list[int]:
    """transformers' own answer to tokens and tensors; its processor would need torchvision for the video."""
    picture, video, clip = (processor.prepare(item) for item in media)
    (grid,) = positions["video_grid_thw"]
    slices = [processor.inputs(media[1], video, index) for index in range(grid[0])]
    is_sound = clip["feature_attention_mask"].reshape(1, -1)
    output = reference_model(checkpoint("qwen2_5_omni")).generate(
        input_ids=torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
        **picture,
        pixel_values_videos=torch.cat([each["pixel_values_videos"] for each in slices]),
        video_grid_thw=torch.tensor([grid]),
        video_second_per_grid=torch.tensor(positions["second_per_grids"]),
        input_features=clip["input_features"].transpose(0, 1).reshape(1, -1, is_sound.shape[1]),
        feature_attention_mask=is_sound,
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
    )
    return output[0, len(token_ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("argument", "value"), [("dither", 0.1), ("feature_size", 80), ("feature_extractor_type", "x")]
)
def test_a_feature_extractor_that_does_not_fit_is_refused(
    family: str, argument: str, value: object, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint(family), tmp_path / family)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {argument: value}))
    with pytest.raises(ConfigError):
        Processor.load(folder)


def test_a_checkpoint_that_can_speak_as_well_is_served_by_its_thinker(tmp_path: Path) -> None:
    """In the layout of the hub: an older one, every name behind `thinker.`, and the talker beside it."""
    folder = shutil.copytree(checkpoint("qwen2_5_omni"), tmp_path / "omni")
    thinker = json.loads((folder / "config.json").read_text()) | {"architectures": ["AnyName"]}
    whole = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": thinker}
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = load_file(folder / "model.safetensors")
    renamed = {"thinker." + _old_name(name): tensor for name, tensor in tensors.items()}
    save_file(renamed | {"talker.x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    clip = noise(16_000)
    messages, items = conversation([clip]), [("audio", AudioHeader(len(clip), RATE))]
    processor = Processor.load(folder)
    prompt = processor.expand(processor.render(_without_samples(messages)), items)
    assert prompt == processor_of(checkpoint("qwen2_5_omni")).expand(
        processor.render(_without_samples(messages)), items
    )
    for half in Half:
        state = load_half(model_config(folder), half).state_dict()
        expected = load_half(model_config(checkpoint("qwen2_5_omni")), half).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def _old_name(name: str) -> str:
    for part in ("audio_tower", "visual"):
        name = name.replace(f"model.{part}", part)
    return name.replace("model.language_model", "model")
