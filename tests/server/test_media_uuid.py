"""Media that have a name: what it means, what it never does, and how long it is known."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.clips import sound, video
from tests.server.fakes import (
    Stack,
    all_media,
    data_url,
    image_part,
    input_audio_part,
    picture,
    reservation,
    video_part,
)
from triptych.config import ServerConfig
from triptych.core import EncodeUnit
from triptych.errors import RequestError
from triptych.messages import Submit
from triptych.server.fetch import Fetcher
from triptych.server.media import MediaLoader
from triptych.server.media_source import MediaSource
from triptych.server.media_store import Content, MediaStore

RED, BLUE = picture(32, 32, "red"), picture(32, 32, "blue")


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack(processor=all_media()) as stack:
        yield stack


def ask(stack: Stack, *parts: Any, **fields: Any) -> Any:
    return stack.chat(messages=[{"role": "user", "content": [*parts]}], **fields)


def units(stack: Stack, *parts: Any, **fields: Any) -> tuple[EncodeUnit, ...]:
    stack.cluster.sent.clear()
    response = ask(stack, *parts, **fields)
    assert response.status_code == 200, response.text
    (order,) = stack.cluster.orders(Submit)
    return order.units


def refused(stack: Stack, *parts: Any) -> dict[str, Any]:
    response = ask(stack, *parts)
    assert response.status_code == 400, response.text
    return dict(response.json()["error"])


def named(part: dict[str, Any], uuid: str) -> dict[str, Any]:
    return part | {"uuid": uuid}


def alone(kind: str, uuid: str) -> dict[str, Any]:
    return {"type": kind, kind: None, "uuid": uuid}


RED_PART, BLUE_PART = image_part(data_url(RED)), image_part(data_url(BLUE))


@pytest.mark.parametrize(
    ("kind", "part"),
    [("image_url", RED_PART), ("video_url", video_part(video())), ("input_audio", input_audio_part(sound()))],
)
def test_a_name_stands_for_bytes_that_were_sent_before(stack: Stack, kind: str, part: dict[str, Any]) -> None:
    first = units(stack, named(part, "a"))
    assert units(stack, alone(kind, "a")) == first
    for left_out in ({"type": kind, "uuid": "a"}, {kind: {}, "type": kind, "uuid": "a"}, {kind: None, "uuid": "a"}):
        assert units(stack, left_out) == first
    assert units(stack, part) == first, "a name is no part of what is hashed"
    assert units(stack, named(part, "b")) == first
    assert units(stack, alone(kind, "b")) == first


def test_a_sound_may_be_named_in_one_form_and_meant_in_the_other(stack: Stack) -> None:
    first = units(stack, named(input_audio_part(sound()), "a"))
    assert units(stack, alone("audio_url", "a")) == first


def test_an_unknown_name_is_refused_in_every_modality(stack: Stack) -> None:
    units(stack, named(RED_PART, "a"))
    for kind in ("video_url", "audio_url", "input_audio"):
        error = refused(stack, alone(kind, "a"))
        assert (error["code"], error["param"]) == ("unknown_uuid", f"messages[0].content[0].{kind}")
        assert "send it again" in error["message"]


def test_the_newer_bytes_win_and_the_older_ones_are_gone(stack: Stack) -> None:
    red = units(stack, named(RED_PART, "a"))
    blue = units(stack, named(BLUE_PART, "a"))
    assert red[0].hash != blue[0].hash
    assert units(stack, alone("image_url", "a")) == blue
    assert units(stack, named(RED_PART, "a")) == red
    assert units(stack, alone("image_url", "a")) == red


def test_within_a_request_a_name_means_what_was_named_last_before_it(stack: Stack) -> None:
    (red,), (blue,) = units(stack, RED_PART), units(stack, BLUE_PART)
    parts = [named(RED_PART, "a"), alone("image_url", "a"), named(BLUE_PART, "a"), alone("image_url", "a")]
    assert units(stack, *parts) == (red, red, blue, blue)
    assert units(stack, alone("image_url", "a"), named(RED_PART, "a")) == (blue, red)
    assert refused(stack, alone("image_url", "b"), named(RED_PART, "b"))["code"] == "unknown_uuid"


def test_what_cannot_be_used_is_not_remembered(stack: Stack) -> None:
    units(stack, named(RED_PART, "a"))
    assert refused(stack, named(image_part(data_url(b"no picture")), "a"))["code"] == "invalid_image"
    assert refused(stack, named(BLUE_PART, "a"), named(image_part(data_url(b"no picture")), "b"))
    assert units(stack, alone("image_url", "a")) == units(stack, RED_PART)
    assert refused(stack, alone("image_url", "b"))["code"] == "unknown_uuid"


def test_options_are_those_of_the_request_that_means_the_bytes(stack: Stack) -> None:
    units(stack, named(video_part(video(8)), "a"))
    few = units(stack, alone("video_url", "a"), media_io_kwargs={"video": {"num_frames": 2}})
    assert few == units(stack, video_part(video(8)), media_io_kwargs={"video": {"num_frames": 2}})
    assert len(few) == 2


def test_remembered_bytes_count_as_bytes_of_the_request() -> None:
    noise = [image_part(data_url(picture() + bytes([i]) * 2000)) for i in range(3)]
    with Stack(processor=all_media(), max_body_bytes=6000) as stack:
        for i, part in enumerate(noise):
            assert ask(stack, named(part, str(i))).status_code == 200
        names = [alone("image_url", str(i)) for i in range(3)]
        assert ask(stack, *names[:2]).status_code == 200
        response = ask(stack, *names)
        assert response.status_code == 413
        assert response.json()["error"]["param"] == "messages[0].content[2].image_url"


def test_names_are_forgotten_for_newer_ones_and_nothing_else_happens() -> None:
    with Stack(processor=all_media(), media_store_bytes=4000) as stack:
        for i in range(6):
            units(stack, named(RED_PART, str(i)))
        assert refused(stack, alone("image_url", "0"))["code"] == "unknown_uuid"
        assert units(stack, alone("image_url", "5")) == units(stack, RED_PART)


def test_a_server_without_a_store_takes_names_and_knows_none() -> None:
    with Stack(processor=all_media(), media_store_bytes=0) as stack:
        first = units(stack, named(RED_PART, "a"), alone("image_url", "a"))
        assert first[0] == first[1]
        assert refused(stack, alone("image_url", "a"))["code"] == "unknown_uuid"


def test_a_slow_request_does_not_overwrite_what_a_later_one_said(monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()

    async def get(self: Fetcher, url: str, count: object, accept: str) -> bytes:
        await release.wait()
        return RED

    monkeypatch.setattr(Fetcher, "get", get)

    async def run() -> None:
        loader = MediaLoader(ServerConfig(), all_media().modalities)
        slow = asyncio.create_task(loader.load([MediaSource("f", "image", url="http://a/", uuid="a")], reservation()))
        await asyncio.sleep(0)
        await loader.load([MediaSource("f", "image", url=data_url(BLUE), uuid="a")], reservation())
        release.set()
        assert (await slow)[0].data == RED
        (later,) = await loader.load([MediaSource("f", "image", uuid="a")], reservation())
        assert later.data == BLUE
        await loader.close()

    asyncio.run(run())


def test_bytes_that_a_request_means_stay_its_own_whatever_happens_to_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()

    async def get(self: Fetcher, url: str, count: object, accept: str) -> bytes:
        await release.wait()
        return RED

    monkeypatch.setattr(Fetcher, "get", get)

    async def run() -> None:
        loader = MediaLoader(ServerConfig(), all_media().modalities)
        await loader.load([MediaSource("f", "image", url=data_url(BLUE), uuid="a")], reservation())
        sources = [MediaSource("f", "image", uuid="a"), MediaSource("g", "image", url="http://a/")]
        early = asyncio.create_task(loader.load(sources, reservation()))
        await asyncio.sleep(0)
        await loader.load([MediaSource("f", "image", url=data_url(RED), uuid="a")], reservation())
        release.set()
        assert [item.data for item in await early] == [BLUE, RED]
        await loader.close()

    asyncio.run(run())


def test_random_names_never_mix_up_what_they_stand_for() -> None:
    """Against a plain dictionary: each answer is for the bytes that were named last, or a refusal."""
    chance = random.Random(7)
    pictures = [picture(16 + 16 * (i % 3), 16, f"#{i:02x}0000", "BMP") for i in range(12)]
    largest = max(map(len, pictures))

    async def run() -> None:
        loader = MediaLoader(ServerConfig(media_store_bytes=6 * (largest + 1024)), all_media().modalities)
        truth: dict[str, bytes] = {}
        num_known = 0
        for _ in range(3000):
            uuid, data = str(chance.randrange(10)), chance.choice(pictures)
            if chance.random() < 0.4:
                await loader.load([MediaSource("f", "image", url=data_url(data), uuid=uuid)], reservation())
                truth[uuid] = data
                continue
            source = MediaSource("f", "image", uuid=uuid)
            if loader._store.get(("image", uuid)) is None:
                with pytest.raises(RequestError, match="send it again"):
                    await loader.load([source], reservation())
                continue
            num_known += 1
            (item,) = await loader.load([source], reservation())
            assert item.data == truth[uuid]
            assert item.hash == Content.of(truth[uuid]).hash
            loader._store.check_integrity()
        assert 500 < num_known < 1700, "both known and forgotten names were met"
        await loader.close()

    asyncio.run(run())


def test_the_store_is_bounded_in_bytes_and_gives_up_what_was_used_longest_ago() -> None:
    store = MediaStore(3 * (1024 + 100))
    contents = [Content.of(bytes([i]) * 100) for i in range(5)]
    for i in range(3):
        store.put(("image", str(i)), contents[i], arrival=i)
    assert store.get(("image", "0")) == contents[0]
    store.put(("image", "3"), contents[3], arrival=3)
    store.check_integrity()
    assert [store.get(("image", str(i))) is not None for i in range(4)] == [True, False, True, True]
    store.put(("image", "0"), Content.of(bytes(4000)), arrival=4)
    store.check_integrity()
    assert store.get(("image", "0")) is None, "too large to keep, and no longer what it was"
    assert store.get(("image", "2")) == contents[2]
