"""Small videos and sounds, under the names that tests of the server want."""

from functools import cache

import numpy as np

from tests.model.clips import clip, write
from tests.model.sounds import encoded, encoded_as, float_wav, noise

SAMPLING_RATE = 16_000


def video(num_frames: int = 8, width: int = 32, height: int = 24, kind: str = "mp4 mpeg4") -> bytes:
    """At 8 frames per second."""
    return clip(kind, num_frames=num_frames, width=width, height=height, fps=8)


@cache
def noisy_video(encoder: str = "mpeg4", container: str = "mp4") -> bytes:
    """8 frames that fill a file with bytes that matter."""
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (24, 32, 3), dtype=np.uint8) for _ in range(8)]
    return write(frames, container, encoder, fps=8)


@cache
def sound(seconds: float = 1.0, rate: int = SAMPLING_RATE) -> bytes:
    """A WAV file."""
    return float_wav(noise(round(seconds * rate)), rate)


@cache
def encoded_sound(name: str) -> bytes:
    """A second in one of the formats of tests.model.sounds."""
    return encoded(name, noise(48_000), 48_000)


@cache
def unsupported_sound() -> bytes:
    return encoded_as("matroska", "ac3", noise(48_000), 48_000)
