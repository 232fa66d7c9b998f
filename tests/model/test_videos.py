"""Videos: what their header says, which frames are looked at, and that those are exactly the ones that come out."""

import io
import tracemalloc
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.model.clips import KINDS, STREAMED, clip, decode_frames, indices, sound, trimmed, write
from triptych.errors import RequestError
from triptych.model import videos
from triptych.model.headers import VideoHeader
from triptych.model.videos import read_video_header, sample


def refusal(data: bytes) -> str:
    with pytest.raises(RequestError) as error:
        read_video_header(data)
    assert error.value.status == 400 and error.value.code == "invalid_video"
    return str(error.value)


def decoded(data: bytes) -> NDArray[np.uint8] | None:
    """All frames of a video, in the shape that its header says; None if it is refused."""
    try:
        header = read_video_header(data)
        frames = decode_frames(data, header.frames)
    except RequestError as error:
        if error.code != "invalid_video":
            raise
        return None
    assert frames.shape == (len(header.frames), header.height, header.width, 3)
    return frames


# ---- what is known before decoding


@pytest.mark.parametrize("kind", KINDS)
def test_header_tells_size_rate_and_exact_number_of_frames(kind: str) -> None:
    assert read_video_header(clip(kind)) == VideoHeader(64, 48, tuple(range(12)), 12, 10.0)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_frames_are_those_of_their_number_in_the_order_in_which_they_are_shown(kind: str) -> None:
    chosen = (0, 3, 4, 9, 11)
    frames = decode_frames(clip(kind), chosen)
    assert frames.shape == (5, 48, 64, 3) and frames.dtype == np.uint8
    assert indices(frames) == list(chosen)


def test_every_single_frame_can_be_had_by_itself() -> None:
    assert [indices(decode_frames(clip(), [index])) for index in range(12)] == [[index] for index in range(12)]


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize(("rotation", "flip"), [(0, True), (90, False), (180, False), (-90, False), (90, True)])
def test_video_is_upright_in_header_and_frames(kind: str, rotation: int, flip: bool) -> None:
    corners = np.zeros((48, 64, 3), np.uint8)  # red, green, blue, white
    corners[:24, :32, 0] = corners[:24, 32:, 1] = corners[24:, :32, 2] = corners[24:, 32:] = 255
    container, encoder, pixels, options = KINDS[kind]
    data = write([corners] * 3, container, encoder, pixels, options, rotation=rotation, flip=flip)
    shown = np.rot90(corners, rotation // 90)
    expected = shown[:, ::-1] if flip else shown
    header, frames = read_video_header(data), decode_frames(data, [1])
    assert (header.height, header.width) == expected.shape[:2] == frames.shape[1:3]
    middles = np.ix_([10, -10], [10, -10])
    assert np.abs(frames[0][middles].astype(int) - expected[middles].astype(int)).max() < 40


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gop", [1, 2, 5])
def test_frames_found_by_way_of_key_frames_are_those_found_by_counting(kind: str, gop: int) -> None:
    data = clip(kind, num_frames=16, gop=gop)
    every = decode_frames(data, range(16))

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.sets(st.integers(0, 15), min_size=1))
    def check(chosen: set[int]) -> None:
        assert np.array_equal(decode_frames(data, sorted(chosen)), every[sorted(chosen)])

    assert indices(every) == list(range(16))
    check()


def test_frames_of_a_gif_that_redraw_a_part_only_keep_the_rest() -> None:
    pictures = [np.zeros((48, 64, 3), np.uint8) for _ in range(6)]
    for number, each in enumerate(pictures):
        each[:, : 10 * (number + 1)] = 255
    every = decode_frames(write(pictures, "gif", "gif", "rgb8"), range(6))
    assert np.array_equal(decode_frames(write(pictures, "gif", "gif", "rgb8"), [4])[0], every[4])
    assert np.abs(every.astype(int) - np.stack(pictures)).max() < 90  # the edge is dithered


def test_few_frames_of_a_long_video_do_not_cost_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0

    def counting(*arguments: Any) -> Iterator[Any]:
        nonlocal decoded
        for frame in original(*arguments):
            decoded += 1
            yield frame

    original = videos._decoded
    monkeypatch.setattr(videos, "_decoded", counting)
    assert indices(decode_frames(clip(num_frames=100, gop=10), [3, 55, 99])) == [3, 55 % 16, 99 % 16]
    assert decoded <= 4 + 6 + 10


@pytest.mark.parametrize("num_hidden", [3, 5, 9])
@pytest.mark.parametrize("gop", [4, 100])
def test_frames_that_an_edit_list_hides_do_not_count(num_hidden: int, gop: int) -> None:
    data = trimmed(clip(num_frames=16, gop=gop), num_hidden)
    header = read_video_header(data)
    assert (header.width, header.height, header.num_frames) == (64, 48, 16 - num_hidden)
    assert indices(decode_frames(data, header.frames)) == list(range(num_hidden, 16))
    assert indices(decode_frames(data, [2])) == [num_hidden + 2]


def test_hidden_reference_frames_do_not_count() -> None:
    data = clip("webm vp8")
    with av.open(io.BytesIO(data)) as container:
        fifth = bytes([packet for packet in container.demux(video=0) if packet.size > 0][5])
    hidden = data.replace(fifth, bytes([fifth[0] & ~0x10]) + fifth[1:])
    header = read_video_header(hidden)
    assert header.num_frames == 11
    assert indices(decode_frames(hidden, header.frames)) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert indices(decode_frames(hidden, [5])) == [6]


def test_one_frame_is_a_video() -> None:
    data = clip(num_frames=1)
    assert read_video_header(data).frames == (0,)
    assert indices(decode_frames(data, [0])) == [0]


# ---- sampling


def test_without_options_at_most_32_frames_evenly_spread() -> None:
    header = read_video_header(clip(num_frames=100))
    assert len(header.frames) == 32 and header.num_frames == 100
    assert header.frames[:4] == (0, 3, 6, 9) and header.frames[-1] == 99


@pytest.mark.parametrize(
    ("num_frames", "fps", "expected"),
    [
        (None, None, 32),
        (8, None, 8),
        (-1, None, 100),
        (1000, None, 100),
        (-1, 2.0, 20),
        (8, 2.0, 8),
        (None, 2.0, 20),
        (None, 0.01, 1),
        (None, 60.0, 32),
        (None, -1, 32),
    ],
)
def test_options_of_sampling(num_frames: int | None, fps: float | None, expected: int) -> None:
    assert len(sample(100, 10.0, num_frames=num_frames, fps=fps)) == expected


@given(
    st.integers(1, 5000),
    st.floats(1, 120),
    st.none() | st.integers(-1, 400),
    st.none() | st.floats(-1, 200),
)
@settings(max_examples=200, deadline=None)
def test_sampled_frames_are_ascending_and_inside(
    count: int, rate: float, num_frames: int | None, fps: float | None
) -> None:
    frames = sample(count, rate, num_frames=num_frames, fps=fps)
    assert 1 <= len(frames) <= count and frames[0] == 0 and frames[-1] < count
    assert list(frames) == sorted(set(frames))
    assert len(frames) == 1 or frames[-1] == count - 1


# ---- what is no video


@pytest.mark.parametrize("data", [b"", b"a text file, renamed to .mp4\n" * 40, b"\x00" * 4000, bytes(range(256)) * 9])
def test_what_is_no_video_is_refused(data: bytes) -> None:
    assert "not a video" in refusal(data)


def test_playlist_that_names_other_files_is_refused() -> None:
    assert "not a video" in refusal(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n")


def test_file_with_sound_only_is_refused() -> None:
    assert "no video stream" in refusal(sound())
    assert "no video stream" in refusal(sound("matroska"))


def test_codec_that_is_not_supported_is_named() -> None:
    data = write([np.zeros((48, 64, 3), np.uint8)] * 3, "matroska", "ffv1")
    assert "ffv1 is not supported" in refusal(data)


def test_video_without_frames_is_refused() -> None:
    data = clip("mp4 fragments")
    assert "no frames" in refusal(data[: data.index(b"moof") - 4])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STREAMED])
def test_truncated_file_is_refused_wherever_it_ends(kind: str) -> None:
    data = clip(kind)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.integers(0, len(data) - 1))
    @example(len(data) - 1)
    def check(length: int) -> None:
        refusal(data[:length])

    check()


@pytest.mark.parametrize("kind", STREAMED)
def test_truncated_stream_is_refused_or_a_whole_shorter_video(kind: str) -> None:
    data = clip(kind)
    num_refused = 0
    for length in range(0, len(data), 7):
        frames = decoded(data[:length])
        num_refused += frames is None
        assert frames is None or indices(frames) == list(range(len(frames)))
    assert num_refused > len(data) // 7 // 2


@pytest.mark.parametrize("kind", KINDS)
def test_broken_bytes_give_frames_of_the_right_shape_or_a_refusal(kind: str) -> None:
    data = clip(kind)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), min_size=1, max_size=20))
    def check(changes: list[tuple[int, int]]) -> None:
        broken = bytearray(data)
        for place, value in changes:
            broken[place] = value
        frames = decoded(bytes(broken))
        assert frames is None or frames.ndim == 4

    check()


def test_frame_that_is_not_there_is_named() -> None:
    with pytest.raises(RequestError, match="frame 12 is missing"):
        decode_frames(clip(), [0, 12])


def test_huge_picture_in_the_header_is_refused_before_memory_is_taken() -> None:
    data = bytearray(clip("gif"))
    data[6:10] = (16000).to_bytes(2, "little") * 2
    tracemalloc.start()
    assert "16000 x 16000" in refusal(bytes(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_frames_that_have_to_be_decoded_on_the_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    still = [np.zeros((48, 64, 3), np.uint8)] * 16
    in_one_piece, in_pieces = write(still, gop=100), write(still, gop=5)
    monkeypatch.setattr(videos, "_MIN_COST", 1)
    monkeypatch.setattr(videos, "MAX_DECODED_PIXELS", 8 * 64 * 48)
    assert "16 frames of 64 x 48 pixels have to be decoded" in refusal(in_one_piece)
    assert "have to be decoded" in refusal(in_pieces)
    assert read_video_header(in_pieces, num_frames=2).frames == (0, 15)
    with pytest.raises(RequestError, match="16 frames"):
        read_video_header(in_one_piece, num_frames=2)


def test_all_frames_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_MIN_COST", 1)
    monkeypatch.setattr(videos, "MAX_PIXELS", 10 * 64 * 48)
    assert "12 frames of 64 x 48" in refusal(clip())
    with pytest.raises(RequestError, match="limit"):
        decode_frames(clip(), range(12))
    assert len(read_video_header(clip(), num_frames=10).frames) == 10
