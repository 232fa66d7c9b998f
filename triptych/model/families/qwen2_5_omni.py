"""Qwen2.5-Omni, its thinker: pictures, videos and audio in one prompt. The sound of a video is not looked at."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers import WhisperFeatureExtractor

from triptych.errors import ConfigError
from triptych.model.families.audio import AudioModality, Samples, pooled, whisper_extractor
from triptych.model.families.base import Modality, Parts, Tensors
from triptych.model.families.qwen_video import Qwen2Video, Qwen3Video, Qwen25Video
from triptych.model.families.qwen_vl import QwenVL

_CHUNKS_PER_UNIT = 5  # 10 seconds, 250 rows: about as much as a tile of a picture
_MIN_PIXELS, _MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28  # of a frame: the family's processor insists on them


class Qwen25Omni(QwenVL):
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_omni_thinker",)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        audio = self.config.audio_config
        if audio.n_window % 2:
            raise ConfigError(f"n_window {audio.n_window}: chunks of the audio encoder end within an embedding row")
        sound = _Chunks(
            whisper_extractor(parts, audio.num_mel_bins),
            parts.token(self.config.audio_token_id),
            start=parts.token(self.config.audio_start_token_id),
            end=parts.token(self.config.audio_end_token_id),
            frames_per_unit=2 * audio.n_window * _CHUNKS_PER_UNIT,
        )
        return [*super().modalities(parts), sound]

    @property
    def video_class(self) -> type[Qwen2Video | Qwen3Video]:
        return _Video


class _Video(Qwen25Video):
    seconds = "second_per_grids"

    @classmethod
    def read(cls, parts: Parts, vision: Any, token: str, *, start: str, end: str) -> Qwen2Video:
        video = super().read(parts, vision, token, start=start, end=end)
        settings = dataclasses.replace(video.settings, min_pixels=_MIN_PIXELS, max_pixels=_MAX_PIXELS)
        return cls(settings, token, markup=video.markup)


class _Chunks(AudioModality):
    """The encoder convolves and attends within chunks of the spectrogram, and pairs rows within them."""

    def __init__(
        self, extractor: WhisperFeatureExtractor, token: str, *, start: str, end: str, frames_per_unit: int
    ) -> None:
        super().__init__(extractor, token, markup=f"{start}{token}{end}")
        self._frames_per_unit = frames_per_unit

    def rows_of_windows(self, num_samples: int) -> Iterable[int]:
        num_frames, size = self.num_frames(num_samples), self._frames_per_unit
        return [pooled(min(size, num_frames - start)) for start in range(0, num_frames, size)]

    def positions(self, num_samples: int) -> Mapping[str, Any]:
        return {"audio_seqlens": self.num_frames(num_samples)}

    def extract(self, samples: Samples) -> Tensors:
        """The family pads every clip to the longest one that it takes. Silence beyond the reach of the last frame's
        transform changes nothing, so that less of it will do."""
        hop, size = int(self.extractor.hop_length), self._frames_per_unit
        enough = -(-(len(samples) + self.extractor.n_fft) // hop) * hop
        outputs = self.extractor(
            samples,
            sampling_rate=self.sampling_rate,
            padding="max_length",
            max_length=min(enough, self.extractor.n_samples),
            return_tensors="pt",
        )
        num_frames = self.num_frames(len(samples))
        spectrogram = outputs["input_features"][0, :, :num_frames]  # [mel bins, frames]
        spectrogram = functional.pad(spectrogram, (0, -num_frames % size))
        is_sound = torch.arange(spectrogram.shape[1]) < num_frames
        return {
            "input_features": spectrogram.reshape(len(spectrogram), -1, size).transpose(0, 1),
            "feature_attention_mask": is_sound.view(-1, size).long(),
        }
