"""Videos and sounds over real HTTP, in every form, with every way of getting them wrong."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tests.model.clips import sound as video_without_frames
from tests.server.clips import encoded_sound, noisy_video, sound, unsupported_sound, video
from tests.server.fakes import (
    ANSWER,
    Stack,
    all_media,
    audio_part,
    data_url,
    image_part,
    input_audio_part,
    picture,
    video_part,
)
from tests.server.senses import AUDIO, IMAGE, SLICE_ROWS, VIDEO
from triptych.config import ServerConfig
from triptych.errors import ConfigError
from triptych.messages import Encode, Submit
from triptych.model.processor import Processor
from triptych.server import media_headers
from triptych.server.media import MediaLoader

TEXT = {"type": "text", "text": "What?"}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack(
        processor=all_media(), limit_mm_per_prompt={"image": 2, "video": 2, "audio": 2}, max_image_pixels=40_000
    ) as stack:
        yield stack


@pytest.fixture
def fresh() -> Iterator[Stack]:
    """Whose instances hold nothing yet."""
    with Stack(processor=all_media()) as stack:
        yield stack


def ask(stack: Stack, *parts: Any, **fields: Any) -> Any:
    return stack.chat(messages=[{"role": "user", "content": [*parts]}], **fields)


def submitted(stack: Stack, *parts: Any, **fields: Any) -> Submit:
    stack.cluster.sent.clear()
    response = ask(stack, *parts, **fields)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == ANSWER
    (order,) = stack.cluster.orders(Submit)
    return order


def num_tokens(order: Submit, token: str) -> int:
    return order.token_ids.count(all_media().tokenizer.convert_tokens_to_ids(token))


# ---- what is taken


def test_pictures_videos_and_sounds_in_one_prompt(fresh: Stack) -> None:
    parts = [audio_part(sound(1.5)), TEXT, video_part(video(6)), image_part(data_url(picture(32, 32)))]
    order = submitted(fresh, *parts)
    assert [num_tokens(order, token) for token in (IMAGE, VIDEO, AUDIO)] == [4, 6 * SLICE_ROWS, 15]
    assert [unit.modality for unit in order.units] == ["image", *["video"] * 6, *["audio"] * 2], (
        "as the template has it"
    )
    encodes = {message.media.modality: message for message in fresh.cluster.orders(Encode)}
    assert encodes["video"].media.data == video(6)
    assert encodes["video"].media.frames == (0, 1, 2, 3, 4, 5)
    assert encodes["audio"].media.data == sound(1.5)
    assert [unit.num_tokens for unit in encodes["audio"].units] == [10, 5]


def test_a_family_that_takes_everything(tmp_path: Path) -> None:
    processor = Processor.load(make_checkpoint("qwen2_5_omni", tmp_path))
    with Stack(processor=processor, max_model_len=2048) as stack:
        parts = [audio_part(sound(1.5)), TEXT, video_part(video(6)), image_part(data_url(picture(32, 32)))]
        order = submitted(stack, *parts)
        assert [media.media.modality for media in stack.cluster.orders(Encode)] == ["audio", "video", "image"]
        assert {"image_grid_thw", "video_grid_thw", "audio_seqlens"} <= order.position_arguments.keys()


@pytest.mark.parametrize(
    "part",
    [
        video_part(video()),
        {"type": "video_url", "video_url": data_url(video(), "video/mp4")},
        {"video_url": {"url": data_url(video(), "video/mp4")}},
        {"video_url": data_url(video(), "video/mp4")},
        {"video_url": data_url(video(kind="webm vp9"), "video/webm"), "type": "video_url", "uuid": "a"},
        audio_part(sound()),
        input_audio_part(sound()),
        {"audio_url": data_url(sound(), "audio/wav")},
        {"input_audio": {"data": base64.b64encode(sound()).decode()}},
        input_audio_part(encoded_sound("mp3"), "mp3"),
        input_audio_part(encoded_sound("flac"), "flac"),
        {"audio_url": data_url(encoded_sound("opus"), "audio/ogg; codecs=opus")},
        {"image_url": data_url(picture())},
        "text alone",
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_every_form_of_a_part(stack: Stack, part: Any) -> None:
    order = submitted(stack, TEXT, part)
    assert bool(order.units) == (part != "text alone")


def test_files_and_the_web_bring_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video())
    (tmp_path / "a.wav").write_bytes(sound())
    with Stack(processor=all_media(), allowed_local_media_path=str(tmp_path)) as stack:
        order = submitted(
            stack, {"video_url": f"file://{tmp_path}/a.mp4"}, {"audio_url": {"url": f"file://{tmp_path}/a.wav"}}
        )
        assert {unit.modality for unit in order.units} == {"video", "audio"}
        response = ask(stack, {"audio_url": f"file://{tmp_path}/../a.wav"})
        assert response.json()["error"]["param"] == "messages[0].content[0].audio_url"


def test_tokenize_counts_media_too(stack: Stack) -> None:
    messages = [{"role": "user", "content": [video_part(video(4)), TEXT]}]
    body = {"messages": messages, "media_io_kwargs": {"video": {"num_frames": 2}}}
    tokens = stack.http.post("/tokenize", json=body).json()["tokens"]
    assert tokens.count(all_media().tokenizer.convert_tokens_to_ids(VIDEO)) == 2 * SLICE_ROWS


# ---- which frames


@pytest.mark.parametrize(
    ("options", "num_frames"),
    [
        ({}, 32),
        ({"video": {}}, 32),
        ({"video": None, "image": {}, "audio": None}, 32),
        ({"video": {"num_frames": 4}}, 4),
        ({"video": {"num_frames": -1}}, 40),
        ({"video": {"num_frames": 4, "fps": 2}}, 4),
        ({"video": {"num_frames": -1, "fps": 2}}, 10),
        ({"video": {"fps": 2.0}}, 10),
        ({"video": {"fps": 0.01}}, 1),
        ({"video": {"fps": -1}}, 32),
    ],
)
def test_the_request_says_which_frames_are_looked_at(stack: Stack, options: dict[str, Any], num_frames: int) -> None:
    order = submitted(stack, video_part(video(40)), media_io_kwargs=options)
    assert len(order.units) == num_frames


def test_the_server_says_which_frames_are_looked_at_where_the_request_does_not() -> None:
    with Stack(processor=all_media(), media_io_kwargs={"video": {"num_frames": 3}}) as stack:
        for options, num_frames in ((None, 3), ({"video": {"num_frames": 5}}, 5), ({"video": {"fps": 4}}, 20)):
            order = submitted(stack, video_part(video(40)), media_io_kwargs=options)
            assert len(order.units) == num_frames


def test_other_frames_of_one_file_are_other_units(stack: Stack) -> None:
    orders = [submitted(stack, video_part(video(4)), media_io_kwargs={"video": {"num_frames": n}}) for n in (4, 3, 4)]
    first, second, third = ({unit.hash for unit in order.units} for order in orders)
    assert first == third
    assert first.isdisjoint(second)


@pytest.mark.parametrize(
    "options",
    [
        {"video": {"num_frames": 0}},
        {"video": {"frames": 3}},
        {"image": {"mode": "RGB"}},
        {"sound": {}},
        {"video": {"fps": "2"}},
    ],
)
def test_a_server_with_bad_options_does_not_start(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="media_io_kwargs"):
        MediaLoader(ServerConfig(media_io_kwargs=options), all_media().modalities)


# ---- what is refused

VIDEO_FIELD, AUDIO_FIELD = "messages[0].content[0].video_url", "messages[0].content[0].audio_url"
INPUT_FIELD = "messages[0].content[0].input_audio"

BAD_MEDIA: list[tuple[Any, str, str]] = [
    (video_part(video()[:-100]), VIDEO_FIELD, "truncated"),
    (video_part(video(kind="webm vp9")[:-100]), VIDEO_FIELD, "truncated"),
    (video_part(video()[:20]), VIDEO_FIELD, "truncated"),
    (video_part(b""), VIDEO_FIELD, "cannot be decoded"),
    (video_part(b"this is no video"), VIDEO_FIELD, "not a video"),
    (video_part(picture()), VIDEO_FIELD, "not a video"),
    (video_part(sound()), VIDEO_FIELD, "not a video"),
    (video_part(video_without_frames()), VIDEO_FIELD, "no video stream"),
    (video_part(noisy_video("ffv1", "matroska")), VIDEO_FIELD, "codec ffv1 is not supported"),
    (video_part(video(2, 3000, 16)), VIDEO_FIELD, "3000 x 16 pixels"),
    ({"video_url": "data:video/jpeg;base64,AAAA,AAAA"}, VIDEO_FIELD, "base64"),
    ({"video_url": "data:video/mp4;base64,@@@@"}, VIDEO_FIELD, "base64"),
    ({"video_url": {"url": "a.mp4"}}, VIDEO_FIELD, "http"),
    ({"video_url": {}}, VIDEO_FIELD, "required"),
    ({"type": "video_url"}, VIDEO_FIELD, "required"),
    ({"type": "video_url", "video_url": {"url": 3}}, f"{VIDEO_FIELD}.url", "str"),
    (audio_part(sound(0)), AUDIO_FIELD, "no samples"),
    (audio_part(sound(0.01)), AUDIO_FIELD, "too short"),
    (audio_part(sound()[:-1000]), AUDIO_FIELD, "cut off"),
    (audio_part(sound()[:30]), AUDIO_FIELD, "cannot be decoded"),
    (audio_part(b""), AUDIO_FIELD, "cannot be decoded"),
    (audio_part(b"this is no sound"), AUDIO_FIELD, "cannot be decoded"),
    (audio_part(picture()), AUDIO_FIELD, "cannot be decoded"),
    (audio_part(video()), AUDIO_FIELD, "no audio track"),
    (audio_part(sound(1.0, rate=400)), AUDIO_FIELD, "400 samples per second"),
    (audio_part(unsupported_sound()), AUDIO_FIELD, "codec ac3 is not supported"),
    (audio_part(encoded_sound("opus")[:-20]), AUDIO_FIELD, "cut off"),
    ({"audio_url": "data:audio/wav;base64,@@@@"}, AUDIO_FIELD, "base64"),
    ({"type": "audio_url", "audio_url": None}, AUDIO_FIELD, "required"),
    (input_audio_part(sound(), "x" * 100_000), f"{INPUT_FIELD}.format", "'xxx"),
    (input_audio_part(sound(), "exe"), f"{INPUT_FIELD}.format", "'exe' is no format"),
    (input_audio_part(sound(0)), INPUT_FIELD, "no samples"),
    ({"input_audio": {"data": "@@@@", "format": "wav"}}, INPUT_FIELD, "base64"),
    ({"input_audio": {"data": "abc", "format": "wav"}}, INPUT_FIELD, "base64"),
    ({"input_audio": {"data": 3, "format": "wav"}}, f"{INPUT_FIELD}.data", "str"),
    ({"input_audio": {"data": "", "format": "wav"}}, INPUT_FIELD, "required"),
    ({"input_audio": None}, INPUT_FIELD, "required"),
    ({"video_url": "x", "uuid": ""}, "messages[0].content[0].uuid", "length >= 1"),
    ({"video_url": "x", "uuid": "x" * 10_000_000}, "messages[0].content[0].uuid", "length <= 1024"),
    ({"video_url": "x", "uuid": 5}, "messages[0].content[0].uuid", "str"),
    ({"video_url": None, "uuid": "never seen"}, VIDEO_FIELD, "send it again"),
    ({"type": "input_audio", "uuid": "never seen"}, INPUT_FIELD, "send it again"),
    ({"type": "image_url", "uuid": "never seen"}, "messages[0].content[0].image_url", "send it again"),
]


@pytest.mark.parametrize(("part", "param", "hint"), BAD_MEDIA, ids=[f"{p}-{h}" for _, p, h in BAD_MEDIA])
def test_bad_media_are_named(stack: Stack, part: Any, param: str, hint: str) -> None:
    response = ask(stack, part, TEXT)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert hint in error["message"]
    assert len(error["message"]) < 1000
    stack.wait_until_idle()
    assert stack.chat().status_code == 200


BAD_OPTIONS: list[tuple[Any, str, str]] = [
    (3, "", "object"),
    ({"video": 3}, ".video", "object"),
    ({"video": {"num_frames": 0}}, ".video.num_frames", "-1 for no bound"),
    ({"video": {"num_frames": -2}}, ".video.num_frames", "at least -1 and at most 1048576"),
    ({"video": {"num_frames": 1 << 40}}, ".video.num_frames", "at least -1 and at most 1048576"),
    ({"video": {"num_frames": 2.5}}, ".video.num_frames", "a whole number"),
    ({"video": {"num_frames": "8"}}, ".video.num_frames", "a whole number"),
    ({"video": {"fps": 0}}, ".video.fps", "-1 for no bound"),
    ({"video": {"fps": -0.5}}, ".video.fps", "-1 for no bound"),
    ({"video": {"fps": -2}}, ".video.fps", "at least -1 and at most 1000"),
    ({"video": {"fps": 1e300}}, ".video.fps", "at least -1 and at most 1000"),
    ({"video": {"fps": "2"}}, ".video.fps", "a number"),
    ({"video": {"max_duration": 300}}, ".video.max_duration", "not supported"),
    ({"image": {"rgba_background_color": [0, 0, 0]}}, ".image.rgba_background_color", "not supported"),
    ({"audio": {"mono": True}}, ".audio.mono", "not supported"),
    ({"smell": {}}, ".smell", "not supported"),
]


@pytest.mark.parametrize("with_video", [False, True])
@pytest.mark.parametrize(("options", "path", "hint"), BAD_OPTIONS, ids=[f"{p}-{h}" for _, p, h in BAD_OPTIONS])
def test_bad_options_are_named(stack: Stack, options: Any, path: str, hint: str, with_video: bool) -> None:
    response = ask(stack, *([video_part(video())] if with_video else []), TEXT, media_io_kwargs=options)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == f"media_io_kwargs{path}"
    assert hint in response.json()["error"]["message"]


def test_numbers_that_are_none_are_refused_in_options_too(stack: Stack) -> None:
    body = '{"messages": [{"role": "user", "content": "Hi"}], "media_io_kwargs": {"video": {"fps": NaN}}}'
    response = stack.http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "media_io_kwargs.video.fps"


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_each_modality_has_a_limit_of_its_own(stack: Stack, kind: str) -> None:
    media = {"image": image_part(data_url(picture())), "video": video_part(video()), "audio": audio_part(sound())}
    others = [part for name, part in media.items() if name != kind]
    assert ask(stack, *others, *others, media[kind], media[kind]).status_code == 200
    response = ask(stack, *others, media[kind], media[kind], media[kind])
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (f"messages[0].content[4].{kind}_url", "too_many_media")
    assert f"at most 2 {kind}(s)" in error["message"]


def test_media_that_the_model_does_not_take_are_refused(only_pictures: Stack) -> None:
    for part, field in (
        (video_part(video()), "video_url"),
        (audio_part(sound()), "audio_url"),
        (input_audio_part(sound()), "input_audio"),
    ):
        response = ask(only_pictures, TEXT, part)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (f"messages[0].content[1].{field}", "unsupported_content")
        assert "not supported by this model, which takes: text, image" in error["message"]


def test_a_frame_that_turns_out_to_be_broken_is_blamed_on_its_part(stack: Stack) -> None:
    whole = noisy_video()
    middle = len(whole) // 2
    broken = whole[:middle] + bytes(200) + whole[middle + 200 :]
    for _ in range(2):
        response = ask(stack, TEXT, video_part(whole), video_part(broken))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages[0].content[2].video_url"
    assert ask(stack, video_part(whole)).status_code == 200


def test_a_video_with_more_tokens_than_the_context_is_refused_before_it_is_expanded() -> None:
    with Stack(processor=all_media(), max_model_len=64) as stack:
        response = ask(stack, video_part(video(40)), media_io_kwargs={"video": {"num_frames": -1}})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
        assert "80 tokens of media" in error["message"]


def test_a_video_of_too_many_frames_is_refused(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_headers, "MAX_FRAMES", 10)
    every = {"video": {"num_frames": -1}}
    response = ask(stack, video_part(video(11)), media_io_kwargs=every)
    assert response.status_code == 400
    assert "11 frames are more than the limit of 10" in response.json()["error"]["message"]
    assert ask(stack, video_part(video(10)), media_io_kwargs=every).status_code == 200


def test_media_of_all_kinds_share_the_bytes_of_a_request(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video())
    (tmp_path / "a.wav").write_bytes(sound())
    parts = [{"video_url": f"file://{tmp_path}/a.mp4"}, {"audio_url": f"file://{tmp_path}/a.wav"}]
    room = len(video()) + len(sound())
    for limit, status in ((room, 200), (room - 1, 413)):
        with Stack(processor=all_media(), allowed_local_media_path=str(tmp_path), max_body_bytes=limit) as stack:
            response = ask(stack, *parts)
            assert response.status_code == status, response.text
    assert response.json()["error"]["param"].startswith("messages[0].content[")


@pytest.fixture(scope="module")
def only_pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(processor=Processor.load(make_checkpoint("llava", tmp_path_factory.mktemp("llava")))) as stack:
        yield stack
