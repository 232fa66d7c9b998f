"""From the bytes of a video to what is known before it is decoded, and to the frames that a model looks at.

Both ends agree on what frame number n is: the n-th that a player shows, upright, as the container's display matrix
turns it. Frames that a player skips (before an edit list's start, hidden reference frames) do not count.
"""

import io
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream
from numpy.typing import NDArray

from triptych.errors import RequestError
from triptych.model.containers import TruncatedError, check_whole, container_of
from triptych.model.headers import VideoHeader

Frame = NDArray[np.uint8]  # [height, width, 3], RGB

DEFAULT_NUM_FRAMES = 32  # that of vLLM's media_io_kwargs

# Pixels of all frames together that a model looks at: 32 frames of 3840 x 2160, which are 760 MiB as RGB.
MAX_PIXELS = 32 * 3840 * 2160

# And of all frames that have to be decoded on the way to those. A core decodes this much in one or two minutes: with a
# key frame every 250 frames, 32 frames of a 4K video of any length are just within it.
MAX_DECODED_PIXELS = 32 * 130 * 3840 * 2160

MAX_PACKETS = 1 << 18  # two hours at 30 frames per second; each is remembered while the file is looked at

# FFmpeg decodes hundreds more, many of which nobody looks after.
CODECS = ("h264", "hevc", "av1", "vp9", "vp8", "mpeg4", "mpeg2video", "mpeg1video", "h263", "mjpeg", "prores", "gif")
_CONTAINER_OPTIONS = {"protocol_whitelist": "none"}  # no file may make FFmpeg open another one

_USUAL_FPS = 24.0  # for a file that names no rate, as transformers assumes it
_MATRIX = "DISPLAYMATRIX"
_MIN_COST = 1 << 16  # pixels that a frame counts for, however small: each takes its time
_MIN_BUFFER = 1 << 20  # pixels that a decoder may take for one frame, however small: some add wide edges


def read_video_header(data: bytes, *, num_frames: int | None = None, fps: float | None = None) -> VideoHeader:
    """Size, rate and exact number of frames, and which of them the model looks at. Only a key frame is decoded.

    The options are vLLM's, of its backend of uniform sampling: at most `num_frames` frames (by default 32, -1: all),
    and at most `fps` for each second (by default no such bound), evenly spread from the first frame to the last.
    Raises RequestError, code invalid_video, saying what is wrong with the file.
    """
    with _opened(data) as (container, stream):
        index = _read_index(container, stream)
        rate = float(stream.average_rate or stream.guessed_rate or _USUAL_FPS)
        frames = sample(index.num_frames, rate, num_frames=num_frames, fps=fps)
        _check_cost(index, frames, stream.codec_context.width, stream.codec_context.height)
        width, height = _shown_size(stream, index.probe)
        return VideoHeader(width, height, frames, index.num_frames, rate)


def sample(count: int, rate: float, *, num_frames: int | None, fps: float | None) -> tuple[int, ...]:
    """Indices of `count` frames at `rate` in a second, ascending, each at most once."""
    wanted = DEFAULT_NUM_FRAMES if num_frames is None else num_frames
    chosen = min(wanted, count) if wanted > 0 else count
    if fps is not None and fps > 0:
        chosen = min(chosen, math.floor(count / rate * fps))
    return tuple(np.linspace(0, count - 1, max(1, chosen), dtype=int).tolist())


def iter_frames(data: bytes, frames: Sequence[int]) -> Iterator[Frame]:
    """These frames, ascending by index, one at a time, so that a caller can make them smaller before it keeps them.

    Raises RequestError if one of them is missing or broken, or differs from the first in size.
    """
    assert list(frames) == sorted(set(frames)), f"frames {frames} are not ascending"
    shape: tuple[int, ...] | None = None
    for index, frame in zip(frames, _chosen(data, frames), strict=True):
        pixels = _upright(frame.to_ndarray(format="rgb24"), _matrix(frame))
        shape = shape or pixels.shape
        if frame.is_corrupt or pixels.shape != shape:
            raise _invalid(f"frame {index} is broken, or has another size than the first")
        yield pixels


# ---- containers


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file that is whole, and its video. Whatever FFmpeg raises inside becomes a RequestError."""
    name = container_of(data)
    if name is None:
        raise _invalid("not a video of one of the containers MP4, MOV, Matroska, WebM, AVI and GIF")
    try:
        check_whole(name, data)
        file = io.BytesIO(data)
        with av.open(file, "r", format=name, options=_CONTAINER_OPTIONS, metadata_errors="ignore") as container:
            yield container, _video_stream(container)
    except TruncatedError as error:
        raise _invalid(f"the file is truncated: {error}") from None
    except av.FFmpegError as error:
        raise _invalid(f"the file is broken: {error.strerror}") from error


def _video_stream(container: InputContainer) -> VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:  # but for the cover of a song
        raise _invalid("the file has no video stream")
    codec: Any = streams[0].codec_context  # None where the wheel has no decoder at all
    name = codec.codec.canonical_name if codec is not None else "unknown"
    if name not in CODECS:
        raise _invalid(f"the codec {name} is not supported; supported are {', '.join(CODECS)}")
    if codec.width < 1 or codec.height < 1:
        raise _invalid(f"its header says {codec.width} x {codec.height} pixels")
    codec.options = {"max_pixels": str(max(_MIN_BUFFER, 4 * codec.width * codec.height))}
    return streams[0]


@dataclass(frozen=True, slots=True)
class _Index:
    """What the packets tell of the frames that a player shows."""

    num_frames: int
    times: list[int]  # when each is shown, ascending, in units of the stream; empty where packets do not tell
    key_times: list[int]  # when key frames are shown, ascending
    probe: "list[Packet[VideoStream]]"  # from which a frame comes: one of a key frame, if there is one that is shown


def _read_index(container: InputContainer, stream: VideoStream) -> _Index:
    packets = [packet for packet in islice(container.demux(stream), MAX_PACKETS + 1) if packet.size > 0]
    if len(packets) > MAX_PACKETS:
        raise _invalid(f"it has more than {MAX_PACKETS} frames")
    broken = [place for place, packet in enumerate(packets) if packet.is_corrupt]
    if broken:
        raise _invalid(f"the file is broken: packet {broken[0]} is not whole")
    listed = len(stream.index_entries) if container.format.name.startswith("mov") else 0  # others list key frames only
    if len(packets) < listed:
        raise _invalid(f"the file is truncated: {len(packets)} of {listed} packets")
    shown = [packet for packet in packets if _is_shown(packet, stream)]
    keys = [packet for packet in packets if packet.is_keyframe]
    if not shown or not keys:
        raise _invalid("the video has no frames")
    if stream.codec_context.name == "gif":
        keys = keys[:1]  # all call themselves key frames, yet draw on top of the one before
    times = sorted({packet.pts for packet in shown if packet.pts is not None})
    key_times = sorted(packet.pts for packet in keys if packet.pts is not None)
    probe = [packet for packet in keys if not packet.is_discard][:1] or packets
    return _Index(len(shown), times if len(times) == len(shown) else [], key_times, probe)


def _is_shown(packet: "Packet[VideoStream]", stream: VideoStream) -> bool:
    """Whether a frame comes of it. VP8 packs its hidden frames by themselves (RFC 6386, 9.1: bit 4 of the tag)."""
    if packet.is_discard:
        return False
    return stream.codec_context.name not in ("vp8", "libvpx") or bool(bytes(packet)[0] & 0x10)


# ---- frames


def _shown_size(stream: VideoStream, probe: "list[Packet[VideoStream]]") -> tuple[int, int]:
    """(width, height) of the upright picture: neither the container nor the codec's header has to say so."""
    frame = next((frame for packet in [*probe, None] for frame in stream.codec_context.decode(packet)), None)
    if frame is None:
        raise _invalid("its first frame cannot be decoded")
    _, is_turned, _, _ = _matrix(frame)
    return (frame.height, frame.width) if is_turned else (frame.width, frame.height)


def _chosen(data: bytes, places: Sequence[int]) -> Iterator[av.VideoFrame]:
    """The frames at these places, by way of the key frames before them where the packets tell enough for that."""
    num_found = 0
    with _opened(data) as (container, stream):
        index = _read_index(container, stream)
        _check_cost(index, places, stream.codec_context.width, stream.codec_context.height)
        if places[-1] < len(index.times):
            for frame in _sought(container, stream, index, [index.times[place] for place in places]):
                num_found += 1
                yield frame
    if num_found < len(places):
        with _opened(data) as (container, stream):
            index = replace(index, times=[])
            _check_cost(index, places, stream.codec_context.width, stream.codec_context.height)
            yield from _counted(container, stream, places[num_found:])


def _sought(container: InputContainer, stream: VideoStream, index: _Index, times: list[int]) -> Iterator[av.VideoFrame]:
    """The frames that are shown at these times, ascending. Ends before the first that does not come as announced."""
    now: int | None = None
    frames: Iterator[av.VideoFrame] = iter(())
    for time in times:
        key = bisect_right(index.key_times, time) - 1
        if key < 0:
            return
        if now is None or index.key_times[key] > now:
            container.seek(index.key_times[key], stream=stream)
            frames = _decoded(container, stream)
        found = next((frame for frame in frames if frame.pts is None or frame.pts >= time), None)
        if found is None or found.pts != time:
            return
        now = time
        yield found


def _counted(container: InputContainer, stream: VideoStream, places: Sequence[int]) -> Iterator[av.VideoFrame]:
    """The frames at these places, counted from the first. Raises RequestError for one that is not there."""
    frames = enumerate(_decoded(container, stream))
    for place in places:
        found = next((frame for number, frame in frames if number == place), None)
        if found is None:
            raise _invalid(f"frame {place} is missing")
        yield found


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """All frames from here on, in the order in which they are shown."""
    for packet in container.demux(stream):
        yield from packet.decode()


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d): a pixel at (x, y) is shown at (a x + c y, b x + d y), each 1, 0 or -1. Upright where it says more
    than quarter turns and reflections."""
    data: Any = frame.side_data.get(_MATRIX)
    values = np.frombuffer(bytes(data), "<i4") if data is not None else np.zeros(0, np.int32)
    if len(values) < 5:
        return 1, 0, 0, 1
    a, b, c, d = (int(np.sign(values[place])) for place in (0, 1, 3, 4))
    is_turn = (a == d == 0 and b * c != 0) or (b == c == 0 and a * d != 0)
    return (a, b, c, d) if is_turn else (1, 0, 0, 1)


def _upright(pixels: NDArray[Any], matrix: tuple[int, int, int, int]) -> NDArray[Any]:
    a, b, c, d = matrix
    if b:
        pixels = pixels.swapaxes(0, 1)
    x_sign, y_sign = a + c, b + d
    return pixels[::y_sign, ::x_sign]


def _check_cost(index: _Index, places: Sequence[int], width: int, height: int) -> None:
    """Before a frame is decoded: a file of a few bytes can have millions of frames of any size."""
    for verb, num_frames, limit in (
        ("are looked at", len(places), MAX_PIXELS),
        ("have to be decoded", _num_decoded(index, places), MAX_DECODED_PIXELS),
    ):
        if num_frames * max(width * height, _MIN_COST) > limit:
            text = f"{num_frames} frames of {width} x {height} pixels {verb}: more than the limit of {limit} pixels"
            raise RequestError(text, code="invalid_video")


def _num_decoded(index: _Index, places: Sequence[int]) -> int:
    """How many frames have to be decoded on the way to these."""
    if not index.times:
        return places[-1] + 1
    key_places = [bisect_left(index.times, time) for time in index.key_times]
    num_frames, done = 0, 0
    for place in places:
        key = bisect_right(key_places, place) - 1
        num_frames += place + 1 - max(done, key_places[key] if key >= 0 else 0)
        done = place + 1
    return num_frames


def _invalid(reason: str) -> RequestError:
    return RequestError(f"the video cannot be decoded: {reason}", code="invalid_video")
