"""Small videos whose frames tell their own number."""

import io
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from triptych.model.videos import iter_frames

# container, encoder, pixel format, options of the container
KINDS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "mp4": ("mp4", "libx264", "yuv420p", {}),
    "mp4 header first": ("mp4", "libx264", "yuv420p", {"movflags": "faststart"}),
    "mp4 fragments": ("mp4", "libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
    "mp4 mpeg4": ("mp4", "mpeg4", "yuv420p", {}),
    "mov": ("mov", "libx264", "yuv420p", {}),
    "mkv": ("matroska", "libx264", "yuv420p", {}),
    "webm vp8": ("webm", "libvpx", "yuv420p", {}),
    "webm vp9": ("webm", "libvpx-vp9", "yuv420p", {}),
    "webm live": ("webm", "libvpx-vp9", "yuv420p", {"live": "1"}),
    "avi": ("avi", "mjpeg", "yuvj420p", {}),
    "avi mpeg4": ("avi", "mpeg4", "yuv420p", {}),
    "gif": ("gif", "gif", "rgb8", {}),
}
STREAMED = ("mp4 fragments", "webm live")  # they do not say where they end


def level(index: int) -> int:
    """The grey of frame `index`: of 16 in a row, all differ by far more than an encoder loses."""
    return 8 + index * 7 % 16 * 15


def picture(index: int, width: int, height: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), level(index), np.uint8)


def indices(frames: NDArray[np.uint8]) -> list[int]:
    """What number each frame says it has, modulo 16."""
    levels = np.array([level(index) for index in range(16)])
    return [int(np.abs(levels - frame.mean()).argmin()) for frame in frames]


@cache
def clip(
    kind: str = "mp4",
    *,
    num_frames: int = 12,
    width: int = 64,
    height: int = 48,
    fps: int = 10,
    rotation: int = 0,
    flip: bool = False,
    gop: int | None = None,
) -> bytes:
    container, encoder, pixels, options = KINDS[kind]
    pictures = [picture(index, width, height) for index in range(num_frames)]
    return write(pictures, container, encoder, pixels, options, fps=fps, rotation=rotation, flip=flip, gop=gop)


def write(
    pictures: list[NDArray[np.uint8]],
    container: str = "mp4",
    encoder: str = "libx264",
    pixels: str = "yuv420p",
    options: Any = MappingProxyType({}),
    *,
    fps: int = 10,
    rotation: int = 0,
    flip: bool = False,
    gop: int | None = None,
) -> bytes:
    with tempfile.TemporaryDirectory() as folder:  # some containers are finished by a second look at the file
        path = Path(folder) / "clip"
        with av.open(str(path), "w", format=container, options=dict(options)) as output:
            quiet = {"x264-params": "log-level=none"} if encoder == "libx264" else {}
            stream: Any = output.add_stream(encoder, rate=fps, options=quiet)
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = pixels
            if gop is not None:
                stream.codec_context.gop_size = gop
            if rotation or flip:
                stream.set_display_rotation(rotation, hflip=flip)
            for each in pictures:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24").reformat(format=pixels)))
            output.mux(stream.encode(None))
        return path.read_bytes()


def sound(container: str = "mp4", encoder: str = "aac") -> bytes:
    """A file with nothing to see."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound"
        with av.open(str(path), "w", format=container) as output:
            stream: Any = output.add_stream(encoder, rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return path.read_bytes()


def trimmed(data: bytes, num_hidden: int) -> bytes:
    """The same MP4 with an edit list that starts behind the first `num_hidden` of its frames, which stay in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
        with av.open(io.BytesIO(data)) as source, av.open(str(path), "w", format="mp4", options=options) as output:
            video: Any = source.streams.video[0]
            stream = output.add_stream_from_template(video)
            ticks = round(num_hidden / video.average_rate / video.time_base)
            for packet in source.demux(video):
                if packet.pts is not None and packet.dts is not None:
                    packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, stream
                    output.mux(packet)
        return path.read_bytes()


def decode_frames(data: bytes, frames: Iterable[int]) -> NDArray[np.uint8]:
    """[frames, height, width, 3]."""
    return np.stack(list(iter_frames(data, list(frames))))
