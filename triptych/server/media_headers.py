"""What is known about a media item before anything of it is laid out, read under the limits and options of a server."""

from collections.abc import Mapping

import msgspec

from triptych.config import ServerConfig
from triptych.errors import ConfigError, RequestError
from triptych.model.audios import read_audio_header
from triptych.model.families import Modality
from triptych.model.families.audio import AudioModality
from triptych.model.headers import AudioHeader, Header, ImageHeader, VideoHeader
from triptych.model.images import read_header
from triptych.model.videos import read_video_header
from triptych.server.schema import MediaIoKwargs, VideoIo

MAX_FRAMES = 8192  # of a video that the model looks at
_NO_BOUND = -1  # how clients write that there is none


class HeaderReader:
    def __init__(self, config: ServerConfig, modalities: Mapping[str, Modality]) -> None:
        """`modalities` are those that the model takes. Raises ConfigError for options that mean nothing."""
        self._max_pixels = config.max_image_pixels
        audio = modalities.get("audio")
        self._sampling_rate = audio.sampling_rate if isinstance(audio, AudioModality) else 0
        self._video_options = _checked(config.media_io_kwargs).video or VideoIo()

    def video_options(self, asked: MediaIoKwargs | None) -> VideoIo:
        """Those of a request, or the server's own. One that is asked for alone is meant alone: the server's other one
        is not mixed in. Raises RequestError for those that mean nothing."""
        options = asked.video if asked is not None else None
        if options is None or (options.num_frames is None and options.fps is None):
            return self._video_options
        _check_bounds(options)
        return options

    def read(self, modality: str, data: bytes, options: VideoIo) -> Header:
        """Raises RequestError for what is no file of this kind, and for one that is too large. A video costs
        milliseconds, and so does audio that has to be decoded."""
        header: Header
        match modality:
            case "image":
                header = ImageHeader(*read_header(data)[1:])
            case "video":
                header = read_video_header(data, num_frames=options.num_frames, fps=options.fps)
            case _:
                assert self._sampling_rate > 0, f"a model whose audio modality is none of {AudioModality}"
                header = read_audio_header(data, self._sampling_rate)
        if not isinstance(header, AudioHeader):
            self._check_size(modality, header)
        return header

    def _check_size(self, modality: str, header: ImageHeader | VideoHeader) -> None:
        if header.width * header.height > self._max_pixels:
            text = f"{header.width} x {header.height} pixels are more than the limit of {self._max_pixels}"
            raise RequestError(text, code=f"{modality}_too_large")
        if isinstance(header, VideoHeader) and len(header.frames) > MAX_FRAMES:
            text = f"{len(header.frames)} frames are more than the limit of {MAX_FRAMES}; media_io_kwargs bounds them"
            raise RequestError(text, code="video_too_large")


def _checked(options: Mapping[str, object]) -> MediaIoKwargs:
    """The server's own options. Raises ConfigError naming the field."""
    try:
        checked = msgspec.convert(options, MediaIoKwargs)
        _check_bounds(checked.video or VideoIo())
    except (msgspec.ValidationError, RequestError) as error:
        raise ConfigError(f"media_io_kwargs: {error}") from error
    return checked


def _check_bounds(options: VideoIo) -> None:
    """Raises RequestError for a bound of nothing."""
    for name, value in (("num_frames", options.num_frames), ("fps", options.fps)):
        if value is not None and value <= 0 and value != _NO_BOUND:
            field = f"media_io_kwargs.video.{name}"
            text = f"{field}: expected more than 0, or {_NO_BOUND} for no bound"
            raise RequestError(text, param=field, code="invalid_value")
