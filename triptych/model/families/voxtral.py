"""Voxtral: clips of any length, padded to whole windows of 30 seconds; all rows of the padding count."""

from collections.abc import Iterable, Sequence

from transformers import WhisperFeatureExtractor

from triptych.errors import ConfigError
from triptych.model.families.audio import AudioModality, Samples, whisper_extractor
from triptych.model.families.base import Family, Modality, Parts, Piece, Tensors, require_equal

_BEGIN = "[BEGIN_AUDIO]"  # the family's own tokeniser writes it before the rows of every clip


class Voxtral(Family):
    model_types = ("voxtral",)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        audio = self.config.audio_config
        extractor = whisper_extractor(parts, audio.num_mel_bins)
        require_equal("frames of a window", extractor.nb_max_frames, 2 * audio.max_source_positions)
        rows, rest = divmod(audio.max_source_positions * audio.hidden_size, audio.intermediate_size)
        if rest:
            raise ConfigError(f"a window's {audio.max_source_positions} positions make no whole number of rows")
        return [_Windows(extractor, parts.token(self.config.audio_token_id), rows_per_window=rows)]


class _Windows(AudioModality):
    def __init__(self, extractor: WhisperFeatureExtractor, token: str, *, rows_per_window: int) -> None:
        super().__init__(extractor, token)
        self._rows_per_window = rows_per_window

    def rows_of_windows(self, num_samples: int) -> Iterable[int]:
        return [self._rows_per_window] * -(-num_samples // self.extractor.n_samples)

    def pieces(self, num_rows: int) -> Sequence[Piece]:
        return [_BEGIN, num_rows]

    def extract(self, samples: Samples) -> Tensors:
        """One spectrogram of the whole clip, cut afterwards: its loudest frame scales all windows."""
        outputs = self.extractor(
            samples,
            sampling_rate=self.sampling_rate,
            padding=True,
            truncation=False,
            pad_to_multiple_of=self.extractor.n_samples,
            return_tensors="pt",
        )
        spectrogram = outputs["input_features"][0]  # [mel bins, frames]
        windows = spectrogram.view(len(spectrogram), -1, self.extractor.nb_max_frames)
        return {"input_features": windows.transpose(0, 1)}
