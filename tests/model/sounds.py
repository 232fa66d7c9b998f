"""Sounds, and files of them in every format that is served."""

import io
import struct
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Format:
    container: str
    codec: str
    rates: tuple[int, ...] = (8_000, 16_000, 22_050, 44_100, 48_000)


FORMATS = {
    "wav": Format("wav", "pcm_s16le"),
    "wav24": Format("wav", "pcm_s24le"),
    "wav8": Format("wav", "pcm_u8"),
    "aiff": Format("aiff", "pcm_s16be"),
    "mp3": Format("mp3", "libmp3lame"),
    "flac": Format("flac", "flac"),
    "opus": Format("ogg", "libopus", (8_000, 16_000, 48_000)),
    "ogg flac": Format("ogg", "flac"),
    "m4a": Format("ipod", "aac"),
    "alac": Format("ipod", "alac"),
    "aac": Format("adts", "aac"),
    "webm": Format("webm", "libopus", (48_000,)),
    "mka": Format("matroska", "flac"),
}


def noise(num_samples: int, seed: int = 0) -> Samples:
    """A hum with noise on it, different for every seed."""
    random = np.random.default_rng(seed)
    hum = 0.3 * np.sin(np.arange(num_samples) * random.uniform(0.02, 0.3))
    return (hum + 0.1 * random.standard_normal(num_samples)).clip(-1, 1).astype(np.float32)


def float_wav(samples: Samples, rate: int = 16_000) -> bytes:
    """A WAV file of one channel that keeps every bit of the samples."""
    data = samples.astype("<f4").tobytes()
    return wav_header(len(data), rate, kind=3, bits=32) + data


def wav_header(num_bytes: int, rate: int, *, kind: int = 1, bits: int = 16, channels: int = 1) -> bytes:
    frame = channels * bits // 8
    layout = struct.pack("<HHIIHH", kind, channels, rate, min(rate * frame, 2**32 - 1), frame, bits)
    size = min(num_bytes + 36, 2**32 - 1)
    return b"RIFF" + struct.pack("<I", size) + b"WAVEfmt \x10\0\0\0" + layout + b"data" + struct.pack("<I", num_bytes)


def encoded(name: str, samples: Samples, rate: int, *, layout: str = "mono") -> bytes:
    """A file of one of FORMATS, all channels alike."""
    return encoded_as(FORMATS[name].container, FORMATS[name].codec, samples, rate, layout=layout)


def encoded_as(
    container: str,
    codec: str,
    samples: Samples,
    rate: int,
    *,
    layout: str = "mono",
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=options or {}) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout, options=codec_options or {})
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(np.stack([samples] * stream.layout.nb_channels), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        context = stream.codec_context
        cut = av.AudioResampler(context.format, layout, rate, frame_size=context.frame_size or None)
        for part in [*cut.resample(frame), *cut.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return out.getvalue()
