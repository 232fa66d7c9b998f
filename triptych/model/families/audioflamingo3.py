"""Audio Flamingo 3: windows of 30 seconds, each with a spectrogram of its own; only the last one may be shorter."""

from collections.abc import Iterable, Sequence

from transformers import WhisperFeatureExtractor

from triptych.errors import ConfigError
from triptych.model.families.audio import AudioModality, Samples, pooled, whisper_extractor
from triptych.model.families.base import Family, Modality, Parts, Tensors, require_equal

_MAX_SECONDS = 600  # what processors that do not say otherwise cut a clip to


class AudioFlamingo3(Family):
    model_types = ("audioflamingo3",)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        audio = self.config.audio_config
        extractor = whisper_extractor(parts, audio.num_mel_bins)
        require_equal("frames of a window", extractor.nb_max_frames, 2 * audio.max_source_positions)
        if extractor.nb_max_frames % 4:
            raise ConfigError(f"a window's {extractor.nb_max_frames} frames make no whole number of rows")
        max_windows = int(parts.arguments.get("max_audio_len", _MAX_SECONDS) // extractor.chunk_length)
        return [_Windows(extractor, parts.token(self.config.audio_token_id), max_windows=max_windows)]


class _Windows(AudioModality):
    def __init__(self, extractor: WhisperFeatureExtractor, token: str, *, max_windows: int) -> None:
        super().__init__(extractor, token)
        self._max_windows = max_windows

    @property
    def arguments(self) -> str:
        return f"{self._max_windows} {super().arguments}"

    def rows_of_windows(self, num_samples: int) -> Iterable[int]:
        size = self.extractor.n_samples
        lengths = [min(size, num_samples - start) for start in range(0, num_samples, size)]
        return [pooled(self.num_frames(length)) for length in lengths[: self._max_windows]]

    def extract(self, samples: Samples) -> Tensors:
        size = self.extractor.n_samples
        windows = [samples[start : start + size] for start in range(0, len(samples), size)]
        outputs = self.extractor(
            windows[: self._max_windows],
            sampling_rate=self.sampling_rate,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"input_features": outputs["input_features"], "input_features_mask": outputs["attention_mask"]}
