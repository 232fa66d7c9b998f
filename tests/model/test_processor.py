"""Prompts and tensors are those of the family's own processor; what a client may send is refused with a reason."""

import hashlib
import io
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
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers

from tests.checkpoints import FAMILIES, IMAGE_FAMILIES, make_checkpoint
from tests.reference import reference_inputs
from triptych.core import EncodeUnit, Media
from triptych.errors import ConfigError, RequestError
from triptych.model.headers import ImageHeader
from triptych.model.images import read_header
from triptych.model.processor import Item, Processor, Prompt
from triptych.model.token_stream import TokenStream

torch.set_num_threads(1)

WORDS = ["What colour?", "Look:\n", "\n\n and 你好 ", " 😀", "a\tb  c ", "{'type': 'image'}", "<b>1 < 2</b>"]
PADDED_FAMILIES = {"llava_next", "llava_onevision", "pixtral", "mistral3"}  # all pictures of a prompt to one shape
OLD_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def processors(checkpoints: dict[str, Path]) -> dict[str, Processor]:
    return {family: Processor.load(folder) for family, folder in checkpoints.items()}


def make_picture(width: int, height: int, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(values), "PNG")


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_conversation(rng: random.Random, num_pictures: int) -> tuple[list[dict[str, Any]], list[bytes]]:
    """System message or none, several turns, text before, between and after the pictures."""
    pictures = [make_picture(rng.randint(4, 150), rng.randint(4, 150), seed) for seed in range(num_pictures)]
    left = list(pictures)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief.\n"}] if rng.random() < 0.5 else []
    while True:
        parts: list[dict[str, Any]] = [text_part(rng.choice(WORDS))] if rng.random() < 0.5 else []
        for _ in range(rng.randint(0, 3)):
            parts += [{"type": "image", "image": left.pop(0)}] if left else []
            parts += [text_part(rng.choice(WORDS))] if rng.random() < 0.5 else []
        messages.append({"role": "user", "content": [*parts, text_part(rng.choice(WORDS))]})
        if not left and rng.random() < 0.6:
            return messages, pictures
        messages.append({"role": "assistant", "content": rng.choice(WORDS)})


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def items_of(pictures: list[bytes]) -> list[Item]:
    return [sized(*read_header(data)[1:]) for data in pictures]


def sized(width: int, height: int) -> Item:
    return "image", ImageHeader(width, height)


def units_of(processor: Processor, prompt: Prompt, pictures: list[bytes]) -> list[tuple[EncodeUnit, Media]]:
    files = [(data, hashlib.blake2b(data, digest_size=16).digest()) for data in pictures]
    return processor.encode_units(prompt, processor.media(items_of(pictures), files))


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def as_sent(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation as a client writes it."""
    return [
        message
        if isinstance(message["content"], str)
        else message
        | {
            "content": [
                {"type": "image_url", "image_url": {"url": "data:"}} if part["type"] == "image" else part
                for part in message["content"]
            ]
        }
        for message in messages
    ]


# ---- the same inputs as transformers'


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_prompts_and_tensors_are_those_of_the_families_own_processor(
    checkpoints: dict[str, Path], processors: dict[str, Processor], family: str
) -> None:
    processor, rng = processors[family], random.Random(family)
    for num_pictures in [*range(7), *range(7), 0, 1, 2]:
        messages, pictures = make_conversation(rng, num_pictures)
        theirs = reference_inputs(checkpoints[family], messages)
        prompt = processor.expand(processor.render(as_sent(messages)), items_of(pictures))
        assert prompt.token_ids == theirs["input_ids"][0].tolist()
        units = units_of(processor, prompt, pictures) if family not in PADDED_FAMILIES else []
        tensors = [processor.inputs(media, processor.prepare(media), unit.index) for unit, media in units]
        for name in tensors[0] if tensors else ():
            assert torch.equal(torch.cat([each[name].flatten() for each in tensors]), theirs[name].flatten())


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_spans_cover_every_placeholder_token_once_with_rows_that_the_units_have(
    processors: dict[str, Processor], family: str
) -> None:
    processor = processors[family]
    messages, pictures = make_conversation(random.Random(3), 5)
    prompt = processor.expand(processor.render(as_sent(messages)), items_of(pictures))
    covered = [at for span in prompt.spans for at in range(span.start, span.start + span.length)]
    stand_ins = {run.token for layout in prompt.layouts for run in layout.runs}
    ids = set(processor.tokenizer.convert_tokens_to_ids(list(stand_ins)))
    assert covered == [at for at, token_id in enumerate(prompt.token_ids) if token_id in ids]
    units = [unit for unit, _ in units_of(processor, prompt, pictures)]
    assert all(span.offset >= 0 and span.offset + span.length <= units[span.unit].num_tokens for span in prompt.spans)
    assert {span.unit for span in prompt.spans} == set(range(len(units)))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_text_content_says_the_same_as_one_text_part(processors: dict[str, Processor], family: str) -> None:
    plain = [{"role": "user", "content": "Hello there"}]
    parts = [{"role": "user", "content": [text_part("Hello there")]}]
    rendered = processors[family].render(plain)
    assert "Hello there" in rendered
    assert rendered == processors[family].render(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_completion_prompt_is_what_the_tokenizer_makes_of_it(processors: dict[str, Processor], family: str) -> None:
    processor = processors[family]
    for text in ["", "Once upon a time", "\n 😀"]:
        for special in (True, False):
            theirs = processor.tokenizer(text, add_special_tokens=special)["input_ids"]
            assert processor.expand(text, add_special_tokens=special).token_ids == theirs
            assert processor.encode(text, add_special_tokens=special) == theirs


def test_special_tokens_are_not_added_twice(processors: dict[str, Processor]) -> None:
    gemma, llava, qwen = processors["gemma3"], processors["llava"], processors["qwen2_vl"]
    messages = [{"role": "user", "content": "Hi"}]
    assert gemma.expand(gemma.render(messages)).token_ids.count(gemma.tokenizer.bos_token_id) == 1
    assert llava.expand(llava.render(messages)).token_ids.count(llava.tokenizer.bos_token_id) == 1
    assert qwen.tokenizer.bos_token_id is None


def test_token_ids_from_a_client_make_a_prompt(processors: dict[str, Processor]) -> None:
    processor = processors["qwen2_vl"]
    assert processor.from_token_ids([5, 6, 7]).token_ids == [5, 6, 7]
    for wrong in ([-1], [len(processor.tokenizer)], [processor.encode("<|image_pad|>")[0]]):
        with pytest.raises(RequestError):
            processor.from_token_ids(wrong)


# ---- chat templates of other kinds


def test_template_that_takes_only_text_gets_the_placeholders_before_the_text(processors: dict[str, Processor]) -> None:
    content = [text_part("What is"), {"type": "image_url", "image_url": {"url": "x"}}, text_part("this?")]
    messages = [{"role": "user", "content": content}]
    rendered = processors["llava"].render(messages, chat_template=OLD_TEMPLATE)
    assert rendered == "user: <image>\nWhat is\nthis?\n"
    rendered = processors["qwen2_vl"].render(messages, chat_template=OLD_TEMPLATE)
    assert rendered.startswith("user: <|vision_start|><|image_pad|><|vision_end|>\nWhat is")
    assert len(processors["qwen2_vl"].expand(rendered, [sized(50, 50)]).spans) == 1


def test_template_gets_tools_and_further_arguments(processors: dict[str, Processor]) -> None:
    template = "{{ tools[0]['name'] }} {{ thinking }} {{ messages[0]['content'] }}"
    messages = [{"role": "user", "content": "hi"}]
    rendered = processors["llava"].render(
        messages, chat_template=template, tools=[{"name": "search"}], variables={"thinking": True}
    )
    assert rendered == "search True hi"


@pytest.mark.parametrize("name", ["thinking", "template", "takes", "variables", "name with a blank", "kwargs", "_"])
def test_variables_of_any_name_reach_the_template(processors: dict[str, Processor], name: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    template = "{{ messages[0]['content'] }}{% if thinking is defined %}{{ thinking }}{% endif %}"
    rendered = processors["llava"].render(messages, chat_template=template, variables={name: 5})
    assert rendered == ("hi5" if name == "thinking" else "hi")


@pytest.mark.parametrize(
    "name",
    [
        "self",
        "messages",
        "conversation",
        "conversations",
        "chat_template",
        "tokenize",
        "tools",
        "add_generation_prompt",
    ],
)
def test_variables_cannot_replace_what_a_prompt_is_made_of(processors: dict[str, Processor], name: str) -> None:
    with pytest.raises(RequestError) as caught:
        processors["llava"].render([{"role": "user", "content": "hi"}], variables={name: 1})
    assert (caught.value.status, caught.value.param) == (400, f"chat_template_kwargs.{name}")


def test_the_last_message_can_be_continued(processors: dict[str, Processor]) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once upon"}]
    for processor in (processors["qwen2_vl"], processors["llava"]):
        rendered = processor.render(messages, add_generation_prompt=False, continue_final_message=True)
        assert rendered.endswith("Once upon")


def test_tool_call_arguments_reach_the_template_as_objects(processors: dict[str, Processor]) -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert processors["qwen2_vl"].render(messages, chat_template=template) == "Bern"


def test_template_is_taken_from_a_chat_template_json_too(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["llava"], tmp_path / "llava"))
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": OLD_TEMPLATE}))
    assert Processor.load(folder).render([{"role": "user", "content": "hi"}]) == "user: hi\n"
    (folder / "chat_template.json").unlink()
    with pytest.raises(RequestError, match="no chat template"):
        Processor.load(folder).render([{"role": "user", "content": "hi"}])


# ---- what is refused


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen2_vl", "<|image_pad|>"),
        ("qwen2_5_vl", "a <|video_pad|> b"),
        ("gemma3", "<start_of_image>"),
        ("gemma3", "<image_soft_token>"),
        ("internvl", "x<IMG_CONTEXT>"),
        ("idefics3", "<image>"),
    ],
)
def test_text_that_stands_for_media_is_refused_naming_the_field(
    processors: dict[str, Processor], family: str, text: str
) -> None:
    for content, field in [
        (text, "messages[1].content"),
        ([text_part("a"), text_part(text)], "messages[1].content[1].text"),
    ]:
        messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": content}]
        with pytest.raises(RequestError) as caught:
            processors[family].render(messages)
        assert (caught.value.status, caught.value.param) == (400, field)
    with pytest.raises(RequestError):
        processors[family].expand(text)


def test_prompt_with_more_or_fewer_placeholders_than_pictures_is_refused(processors: dict[str, Processor]) -> None:
    for text, items in [("<image>", []), ("hi", [sized(9, 9)]), ("<image> <image>", [sized(9, 9)])]:
        with pytest.raises(RequestError, match="placeholders") as caught:
            processors["llava"].expand(text, items)
        assert caught.value.status == 400


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ([{"type": "video_url", "video_url": {"url": "x"}}], "messages[0].content[0].type"),
        (["text"], "messages[0].content[0].type"),
        ([{"type": "text"}], "messages[0].content[0].text"),
        ([{"type": "text", "text": 3}], "messages[0].content[0].text"),
        (17, "messages[0].content"),
    ],
)
def test_content_that_is_not_understood_is_refused_naming_the_field(
    processors: dict[str, Processor], content: Any, field: str
) -> None:
    with pytest.raises(RequestError) as caught:
        processors["llava"].render([{"role": "user", "content": content}])
    assert (caught.value.status, caught.value.param) == (400, field)


def test_what_the_template_refuses_is_a_bad_request(processors: dict[str, Processor]) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        processors["gemma3"].render(messages)
    assert (caught.value.status, caught.value.param) == (400, "messages")
    with pytest.raises(RequestError, match="chat template"):
        processors["qwen2_vl"].render([{"role": "user", "content": "a"}], chat_template="{{ nothing.at.all }}")


def test_checkpoint_with_a_missing_or_broken_part_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ["config.json", "tokenizer.json", "preprocessor_config.json"]:
        folder = Path(shutil.copytree(checkpoints["llava"], tmp_path / name))
        (folder / name).unlink()
        with pytest.raises(ConfigError):
            Processor.load(folder)
    folder = Path(shutil.copytree(checkpoints["llava"], tmp_path / "broken"))
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"processor_config\.json"):
        Processor.load(folder)
    with pytest.raises(ConfigError):
        Processor.load(tmp_path / "nowhere")


def test_checkpoint_with_an_image_only_processor_class_and_no_processor_config_is_read(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints["qwen2_vl"], tmp_path / "qwen2_vl"))
    (folder / "processor_config.json").unlink()
    for name, change in [
        ("tokenizer_config.json", {"processor_class": "PaddleOCRVLProcessor"}),
        ("preprocessor_config.json", {"processor_class": "PaddleOCRVLProcessor"}),
        ("config.json", {"video_token_id": 151656}),  # not in this vocabulary
    ]:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    processor = Processor.load(folder)
    messages, pictures = make_conversation(random.Random(4), 2)
    expected = reference_inputs(checkpoints["qwen2_vl"], messages)["input_ids"][0].tolist()
    assert processor.expand(processor.render(as_sent(messages)), items_of(pictures)).token_ids == expected


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl_moe", "qwen3_5", "qwen2_5_omni", "glm4v", "llava_onevision"])
def test_checkpoint_whose_tokenizer_lacks_the_token_of_videos_is_served_without_them(
    family: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path / family)
    served = set(Processor.load(folder).modalities)
    change_json(folder / "config.json", video_token_id=151656)
    assert "video" in served
    assert set(Processor.load(folder).modalities) == served - {"video"}


def test_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints["llava"], tmp_path / "llava"))
    num_tokens = len(Processor.load(folder).tokenizer)
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    change_json(folder / "config.json", text_config=text_config | {"vocab_size": num_tokens})
    Processor.load(folder)
    change_json(folder / "config.json", text_config=text_config | {"vocab_size": num_tokens - 1})
    with pytest.raises(ConfigError, match=f"{num_tokens} tokens.* {num_tokens - 1} embeddings"):
        Processor.load(folder)


def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints["llava"], tmp_path / "llava"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(Processor.load(folder).encode("one two three four five six")) > 4


# ---- end of sequence, unit hashes


def test_end_of_sequence_tokens_are_those_of_generation_config_and_tokenizer(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints["gemma3"], tmp_path / "gemma3"))
    eos = Processor.load(folder).tokenizer.eos_token_id
    assert Processor.load(folder).eos_token_ids == {eos}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert Processor.load(folder).eos_token_ids == {3, 5, eos}
    (folder / "generation_config.json").unlink()
    assert Processor.load(folder).eos_token_ids == {eos}


def test_unit_hash_is_the_same_in_every_process_and_changes_with_everything_it_is_over(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder, picture = checkpoints["internvl"], make_picture(64, 32)
    other_mean = Path(shutil.copytree(folder, tmp_path / folder.name))
    change_json(other_mean / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])

    def hashes(processor: Processor, picture: bytes) -> list[bytes]:
        prompt = processor.expand("<IMG_CONTEXT>", items_of([picture]))
        return [unit.hash for unit, _ in units_of(processor, prompt, [picture])]

    processor = Processor.load(folder, revision="a")
    different = [
        *hashes(processor, picture),
        *hashes(processor, make_picture(64, 32, seed=1)),
        *hashes(Processor.load(folder, revision="b"), picture),
        *hashes(Processor.load(Path(shutil.copytree(folder, tmp_path / "elsewhere")), revision="a"), picture),
        *hashes(Processor.load(other_mean, revision="a"), picture),
    ]
    assert len(different) == len(set(different)) == 15
    assert {len(each) for each in different} == {16}
    assert hashes(Processor.load(folder, revision="a"), picture) == different[:3]


def test_units_carry_index_rows_and_item_and_the_prompt_what_places_them(processors: dict[str, Processor]) -> None:
    processor = processors["qwen2_vl"]
    prompt = processor.expand("<|image_pad|> <|image_pad|>", [sized(64, 64), sized(32, 64)])
    pictures = [make_picture(64, 64), make_picture(32, 64)]
    units = units_of(processor, prompt, pictures)
    assert [(unit.modality, unit.num_tokens, unit.index) for unit, _ in units] == [("image", 16, 0), ("image", 8, 0)]
    assert [media.data for _, media in units] == pictures
    assert prompt.position_arguments == {"image_grid_thw": [(1, 8, 8), (1, 8, 4)]}


# ---- text out


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_streamed_text_is_the_decoded_text_and_never_half_a_character(
    processors: dict[str, Processor], data: st.DataObject
) -> None:
    processor = processors["qwen2_vl"]
    text = data.draw(st.text(max_size=30))
    stream, pieces = processor.token_stream(), []
    for token_id in processor.encode(text):
        pieces.append(stream.push(token_id))
        assert not pieces[-1].endswith("\N{REPLACEMENT CHARACTER}")
    assert "".join([*pieces, stream.flush()]) == processor.decode(processor.encode(text)) == text
    assert stream.flush() == ""


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_stream_of_any_tokens_is_the_decoded_text(processors: dict[str, Processor], data: st.DataObject) -> None:
    processor = processors["qwen2_vl"]
    token_ids = data.draw(st.lists(st.integers(0, len(processor.tokenizer) - 1), max_size=40))
    stream = processor.token_stream()
    text = "".join(map(stream.push, token_ids)) + stream.flush()
    assert text == processor.decode(token_ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=30))
def test_stream_of_a_tokenizer_with_byte_tokens_is_the_text_too(text: str) -> None:
    tokenizer = make_byte_fallback_tokenizer()
    token_ids = tokenizer.encode(text).ids
    stream = TokenStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(token_ids)
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 269), max_size=30))
def test_bytes_that_are_no_text_do_not_stop_what_follows(token_ids: list[int]) -> None:
    tokenizer = make_byte_fallback_tokenizer()
    stream = TokenStream(tokenizer)
    word = [tokenizer.token_to_id(token) for token in ("b", "a")]
    text = "".join(map(stream.push, [*token_ids, *word]))
    assert text.endswith("ba")
    assert stream.flush() == ""


@cache
def make_byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 and Gemma have them: words with their leading space, and bytes for what is no word."""
    words = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *["▁", "a", "b", "é", "▁a", "▁b", "▁éa", "你", "!", "\n", ".", ",", "c"],
    ]
    tokenizer = Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
