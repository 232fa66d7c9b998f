"""Audio clips as the encoder gets them: a log-mel spectrogram of the clip, in windows that it treats independently."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperFeatureExtractor

from triptych.core import Media
from triptych.errors import ConfigError, RequestError
from triptych.model.audios import decode_audio
from triptych.model.families.base import ItemLayout, Modality, Parts, Piece, Tensors, require_equal
from triptych.model.headers import AudioHeader, Header

Samples = NDArray[np.float32]  # [samples], one channel
Count = TypeVar("Count", int, Tensor)


class AudioModality(Modality):
    """Clips, at the rate of the feature extractor. Each window of a clip is one unit."""

    name = "audio"

    def __init__(self, extractor: WhisperFeatureExtractor, token: str, **texts: str | None) -> None:
        super().__init__(token, **texts)
        self.extractor = extractor
        self.sampling_rate: int = extractor.sampling_rate

    @property
    def arguments(self) -> str:
        text: str = self.extractor.to_json_string()
        return text

    def lay_out(self, header: Header, num_items: int) -> ItemLayout:
        assert isinstance(header, AudioHeader) and header.sampling_rate == self.sampling_rate, f"{header}"
        return super().lay_out(header, num_items)

    def _lay_out(self, header: AudioHeader, num_items: int) -> ItemLayout:
        units = [rows for rows in self.rows_of_windows(header.num_samples) if rows]
        if not units:
            seconds = header.num_samples / self.sampling_rate
            raise RequestError(f"a clip of {seconds:.3f} s is too short for the model", code="invalid_audio")
        return self.item(self.pieces(sum(units)), units, positions=self.positions(header.num_samples))

    @abstractmethod
    def rows_of_windows(self, num_samples: int) -> Iterable[int]:
        """Embedding rows of each window of a clip. Only the last ones may have none: they are no units then."""

    def pieces(self, num_rows: int) -> Sequence[Piece]:
        return [num_rows]

    def positions(self, num_samples: int) -> Mapping[str, Any]:
        return {}

    def prepare(self, media: Media) -> Tensors:
        return self.extract(decode_audio(media.data, self.sampling_rate))

    @abstractmethod
    def extract(self, samples: Samples) -> Tensors:
        """What the family's feature extractor makes of a clip: tensors whose first axis are its windows."""

    def inputs(self, prepared: Tensors, index: int) -> Tensors:
        return {name: tensor.narrow(0, index, 1) for name, tensor in prepared.items()}

    def num_frames(self, num_samples: int) -> int:
        """Of the spectrogram of a clip. The extractor cuts what is longer than it takes."""
        hop, most = int(self.extractor.hop_length), int(self.extractor.nb_max_frames)
        return min(-(-num_samples // hop), most)


def convolved(num_frames: Count) -> Count:
    """Positions of a Whisper encoder for so many frames of a spectrogram."""
    return (num_frames - 1) // 2 + 1


def pooled(num_frames: Count) -> Count:
    """Embedding rows of such an encoder with an average over pairs of positions behind it."""
    return (convolved(num_frames) - 2) // 2 + 1


def whisper_extractor(parts: Parts, num_mel_bins: int) -> WhisperFeatureExtractor:
    """Raises ConfigError for another kind of feature extractor, and for one that does not fit the model."""
    extractor = parts.feature_extractor
    if not isinstance(extractor, WhisperFeatureExtractor):
        raise ConfigError(f"a feature extractor of type {type(extractor).__name__} is not supported")
    require_equal("mel bins", extractor.feature_size, num_mel_bins)
    if extractor.dither:
        raise ConfigError(f"dither {extractor.dither}: with added noise a clip never has the same features twice")
    return extractor
