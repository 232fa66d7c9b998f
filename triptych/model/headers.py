"""What is known of a media item before anything of it is decoded: enough to lay it out in a prompt."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Pixels of the upright picture."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Pixels of a frame, and which frames the model sees: their indices (ascending), of how many, at which rate."""

    width: int
    height: int
    frames: tuple[int, ...]
    num_frames: int  # of the whole file
    fps: float  # of the whole file


@dataclass(frozen=True, slots=True)
class AudioHeader:
    """Samples of one channel once the file has the rate that the model asks for, and that rate: samples per second."""

    num_samples: int
    sampling_rate: int


Header = ImageHeader | VideoHeader | AudioHeader
