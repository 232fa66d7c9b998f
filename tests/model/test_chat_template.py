"""Media in conversations: templates of every kind, and what stands for an item in those that know none."""

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from triptych.errors import RequestError
from triptych.model.chat import ChatTemplate

MARKUP = {"image": "<image>", "video": "<v><video></v>", "audio": "<audio>"}
HEAD = "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
EACH = "{% for p in m.content %}"
PART = "{% if p.type == 'text' %}{{ p.text }}{% elif p.type in known %}({{ p.type }}){% else %}UNKNOWN{% endif %}"
TAIL = "{% endfor %}{% endif %};{% endfor %}"
ALL = "{% set known = ['image', 'video', 'audio'] %}" + HEAD + EACH + PART.replace("UNKNOWN", "") + TAIL
ONLY_IMAGES = "{% set known = ['image'] %}" + HEAD + EACH + PART.replace("UNKNOWN", "") + TAIL
STRICT = "{% set known = ['image'] %}" + HEAD + EACH + PART.replace("UNKNOWN", "{{ raise_exception('what?') }}") + TAIL
TEXT_ONLY = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"

TEXT = {"type": "text", "text": "hi"}
IMAGE, VIDEO, AUDIO = ({"type": kind} for kind in ("image", "video", "audio"))


def render(template: str, content: object, markup: dict[str, str] = MARKUP, reserved: Sequence[str] = ()) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    chat = ChatTemplate(tokenizer, template, markup=markup, reserved=reserved)
    return chat.render(
        [{"role": "user", "content": content}],
        add_generation_prompt=False,
        continue_final_message=False,
        chat_template=None,
        tools=None,
        variables={},
    )


def test_parts_reach_the_template_in_their_order() -> None:
    assert render(ALL, [VIDEO, TEXT, AUDIO, IMAGE, VIDEO]) == "user: (video)hi(audio)(image)(video);"


@pytest.mark.parametrize(
    ("kind", "written"),
    [("image_url", "(image)"), ("video_url", "(video)"), ("audio_url", "(audio)"), ("input_audio", "(audio)")],
)
def test_types_of_requests_are_taken_for_their_modality(kind: str, written: str) -> None:
    assert render(ALL, [{"type": kind, kind: {"url": "x"}}]) == f"user: {written};"


@pytest.mark.parametrize("template", [ONLY_IMAGES, STRICT])
def test_a_template_that_does_not_know_a_modality_gets_its_markup_as_text(template: str) -> None:
    assert render(template, [AUDIO, TEXT, IMAGE, VIDEO]) == "user: <audio>hi(image)<v><video></v>;"


def test_a_template_that_takes_text_only_gets_all_markup_before_the_text() -> None:
    assert render(TEXT_ONLY, [TEXT, VIDEO, IMAGE, TEXT]) == "user: <v><video></v>\n<image>\nhi\nhi;"


@pytest.mark.parametrize("template", [ALL, ONLY_IMAGES, TEXT_ONLY])
def test_a_modality_that_the_model_does_not_have_is_refused_whatever_the_template_writes(template: str) -> None:
    with pytest.raises(RequestError, match="'video' are not supported") as caught:
        render(template, [TEXT, VIDEO], {"image": "<image>"})
    assert caught.value.param == "messages[0].content[1].type"


@pytest.mark.parametrize("part", [{"type": "smell"}, {"type": 3}, {"type": ["image"]}, {}, 5, None, "text"])
def test_what_is_no_part_is_refused(part: Any) -> None:
    with pytest.raises(RequestError, match="not supported"):
        render(ALL, [part])


@pytest.mark.parametrize("template", [ALL, TEXT_ONLY])
def test_text_that_stands_for_media_is_refused(template: str) -> None:
    for content, field in (
        ("a <video>", "messages[0].content"),
        ([TEXT, {"type": "text", "text": "<audio>"}], "messages[0].content[1].text"),
    ):
        with pytest.raises(RequestError, match="stands for media") as caught:
            render(template, content, reserved=["<audio>", "<video>"])
        assert caught.value.param == field
