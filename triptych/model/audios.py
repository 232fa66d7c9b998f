"""From the bytes of an audio file to its length and to its samples: one channel, at the rate that a model asks for.

Both ends must agree on the number of samples, because the prompt is laid out from it. Where packets say exactly how
many samples they hold they are counted without decoding; lossy codecs drop some at either end, each in its own way, so
those are decoded on both ends. That costs about half a millisecond for a second of audio, and finds damaged files
before an instance has begun.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
import soxr  # type: ignore[import-untyped]
from av import AudioFrame, AudioResampler, Packet
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from triptych.errors import RequestError
from triptych.model.containers import TruncatedError, check_whole, container_of
from triptych.model.headers import AudioHeader

MAX_SECONDS = 2400  # of one file, whatever the model: its samples are decoded at once
MAX_SAMPLES = MAX_SECONDS * 48_000  # of one channel
MIN_RATE, MAX_RATE = 1_000, 192_000  # samples per second
MAX_CHANNELS = 8

# FFmpeg reads hundreds of formats, among them play lists that open other files.
_FORMATS = "wav,mp3,flac,ogg,aac,mov,matroska,aiff"
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": ""}
_LOSSLESS = ("flac", "alac")  # and all of PCM: their packets know their length
_LOSSY = ("aac", "mp3", "opus", "vorbis")

_TELLING = ("flac", "aiff")  # formats whose header has the length of the whole
_TOLERANCE_S = 0.05  # headers of lossy files round

_MP3_FRAME_BYTES = 1441  # at most
# Behind 4 bytes of frame header, and 9, 17 or 32 of what MPEG 2 and 1 have on one or two channels.
_XING = re.compile(rb"\xff[\xe0-\xff].{11}(?:.{8}|.{23})?(?:Xing|Info)", re.DOTALL)
_OGG_HEADER_BYTES = 27  # of a page, in front of the lengths of its segments (RFC 3533)
_MAX_WAV_CHUNKS = 1000


def read_audio_header(data: bytes, sampling_rate: int) -> AudioHeader:
    """How many samples `decode_audio` gives for the same arguments.

    Raises RequestError for bytes that are no audio, or audio of a kind that is not served, or cut off.
    """
    with _open(data) as track:
        num_samples = track.skim() if track.packets_tell else sum(frame.samples for frame in track.frames())
        track.refuse_bad_length(num_samples)
    return AudioHeader(_resampled_len(num_samples, track.rate, sampling_rate), sampling_rate)


def decode_audio(data: bytes, sampling_rate: int) -> NDArray[np.float32]:
    """[samples], the mean of all channels, in [-1, 1] where the file is not louder. Raises RequestError as above."""
    with _open(data) as track:
        to_float = AudioResampler(format="fltp")
        parts = [_mono(part) for frame in track.frames() for part in to_float.resample(frame)]
        samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        track.refuse_bad_length(len(samples))
    if track.packets_tell and len(samples) != track.packet_samples:  # the prompt was laid out for what packets say
        raise _invalid(f"its packets say {track.packet_samples} samples, but it has {len(samples)}")
    if not np.isfinite(samples).all():
        raise _invalid("it has samples that are no finite numbers")
    return _resample(samples, track.rate, sampling_rate)


@contextmanager
def _open(data: bytes) -> Iterator["_Track"]:
    """The first audio track of a file. FFmpeg's errors inside the block become RequestErrors."""
    try:
        with av.open(io.BytesIO(data), "r", options=_OPTIONS) as container:
            if not container.streams.audio:
                raise _invalid("it has no audio track")
            yield _Track(data, container, container.streams.audio[0])
    except av.EOFError as error:
        raise _invalid("it is cut off: the file ends where more was expected") from error
    except (av.FFmpegError, ValueError) as error:  # some of PyAV's own checks raise ValueError
        raise _invalid(getattr(error, "strerror", None) or str(error)) from error


class _Track:
    """The audio of an open file, read once from its beginning, with or without decoding."""

    def __init__(self, data: bytes, container: InputContainer, stream: AudioStream) -> None:
        codec: str = stream.codec_context.codec.canonical_name if stream.codec_context else "of this file"
        lossless = codec in _LOSSLESS or codec.startswith("pcm_")
        if not lossless and codec not in _LOSSY:
            raise _invalid(f"the codec {codec} is not supported; supported are PCM, {', '.join((*_LOSSLESS, *_LOSSY))}")
        if not 1 <= stream.channels <= MAX_CHANNELS:
            raise _invalid(f"{stream.channels} channels; supported are 1 to {MAX_CHANNELS}")
        self._data, self._container, self._stream = data, container, stream
        self._formats = container.format.name.split(",")
        self._first_packet: int | None = None  # its place in the file
        self.packets_tell = lossless and stream.time_base is not None and stream.time_base * stream.rate == 1
        self.packet_samples = 0  # valid where packets tell, after all of them were read
        self.rate = stream.rate  # what the decoder gives may be another one than what the header says
        self._refuse_bad_rate()

    def skim(self) -> int:
        """The number of samples, without decoding one."""
        for _ in self._packets():
            _refuse_too_long(self.packet_samples, self.rate)
        return self.packet_samples

    def frames(self) -> Iterator[AudioFrame]:
        num_samples, first_kind = 0, None
        for packet in self._packets():
            for frame in packet.decode():
                assert isinstance(frame, AudioFrame)
                kind = (frame.sample_rate, frame.layout.name, frame.format.name)
                if num_samples and kind != first_kind:
                    raise _invalid("its sample rate or its channels change on the way")
                first_kind = kind
                num_samples += frame.samples
                self.rate = frame.sample_rate
                self._refuse_bad_rate()
                _refuse_too_long(num_samples, self.rate)
                yield frame

    def refuse_bad_length(self, num_samples: int) -> None:
        """Raises RequestError where there is nothing, or less than the file announces."""
        missing = (self._announced_s() or 0.0) - num_samples / self.rate
        if missing > (0.5 / self.rate if self.packets_tell else _TOLERANCE_S):
            raise _invalid(f"it is cut off: {missing:.3f} s of what its header says are missing")
        if not _is_whole(self._formats, self._data):
            raise _invalid("it is cut off: the file ends earlier than its parts say")
        if num_samples == 0:
            raise _invalid("it has no samples")

    def _packets(self) -> "Iterator[Packet[AudioStream]]":
        """The last one is empty: it asks the decoder for what it still has."""
        for packet in self._container.demux(self._stream):
            if self._first_packet is None:
                self._first_packet = packet.pos
            if packet.size:
                self.packet_samples += packet.duration or 0
            yield packet

    def _announced_s(self) -> float | None:
        """The length that the header says. None where it has none, and FFmpeg guesses from the size of the file."""
        tells = ("mp3" in self._formats and self._has_frame_count) or not set(_TELLING).isdisjoint(self._formats)
        if not tells or self._stream.duration is None or self._stream.time_base is None:
            return None
        return float(self._stream.duration * self._stream.time_base)

    @property
    def _has_frame_count(self) -> bool:
        """Whether an MP3 file has a Xing header: a frame without sound in front of the first packet."""
        end = self._first_packet or 0
        return _XING.search(self._data, max(0, end - _MP3_FRAME_BYTES), end) is not None

    def _refuse_bad_rate(self) -> None:
        if not MIN_RATE <= self.rate <= MAX_RATE:
            raise _invalid(f"{self.rate} samples per second; supported are {MIN_RATE} to {MAX_RATE}")


def _mono(frame: AudioFrame) -> NDArray[np.float32]:
    channels: NDArray[Any] = frame.to_ndarray()  # [channels, samples]
    mono: NDArray[np.float32] = channels[0] if len(channels) == 1 else channels.mean(axis=0)
    return mono


def _resample(samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """As librosa does it, and with it the processors of most of these models."""
    if rate == wanted:
        return samples
    length = _resampled_len(len(samples), rate, wanted)
    resampled: NDArray[np.float32] = soxr.resample(samples, rate, wanted, quality="HQ")[:length]
    padding = np.zeros(length - len(resampled), np.float32)
    return np.concatenate([resampled, padding])


def _resampled_len(num_samples: int, rate: int, wanted: int) -> int:
    return -(-num_samples * wanted // rate)


def _refuse_too_long(num_samples: int, rate: int) -> None:
    longest_s = min(MAX_SECONDS, MAX_SAMPLES / rate)
    if num_samples > longest_s * rate:
        raise _invalid(f"it is longer than {longest_s:g} s")


def _is_whole(formats: Sequence[str], data: bytes) -> bool:
    """Whether a file of one of the formats that consist of parts ends where the last one ends."""
    if "ogg" in formats:
        return _ends_with_a_page(data)
    if "wav" in formats:
        return not _wav_is_cut_off(data)
    container = container_of(data)
    if container is not None:
        try:
            check_whole(container, data)
        except TruncatedError:
            return False
    return True


def _ends_with_a_page(data: bytes) -> bool:
    """Whether the last page of an Ogg file is whole."""
    page = data[data.rfind(b"OggS") :]
    if len(page) < _OGG_HEADER_BYTES:
        return False
    num_segments = page[_OGG_HEADER_BYTES - 1]
    lengths = page[_OGG_HEADER_BYTES : _OGG_HEADER_BYTES + num_segments]
    return len(lengths) == num_segments and len(page) >= _OGG_HEADER_BYTES + num_segments + sum(lengths)


def _wav_is_cut_off(data: bytes) -> bool:
    """Whether the samples of a RIFF file end before they should. Programs that write to a pipe leave their length 0 or
    as large as can be, which announces nothing."""
    position = 12
    for _ in range(_MAX_WAV_CHUNKS):
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8
        if name == b"data":
            return 0 < size < 0x7FFFFFFF and position + size > len(data)
        position += size + size % 2
    return False


def _invalid(reason: str) -> RequestError:
    return RequestError(f"the audio cannot be decoded: {reason}", code="invalid_audio")
