"""Qwen2-Audio: the first 30 seconds of a clip, padded to that length; rows of the padding are dropped."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from triptych.model.families.audio import AudioModality, Samples, convolved, pooled, whisper_extractor
from triptych.model.families.base import Family, Modality, Parts, Tensors, require_equal


class Qwen2Audio(Family):
    model_types = ("qwen2_audio",)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        audio = self.config.audio_config
        extractor = whisper_extractor(parts, audio.num_mel_bins)
        require_equal("frames of a clip", extractor.nb_max_frames, 2 * audio.max_source_positions)
        token = parts.token(self.config.audio_token_id)
        start = getattr(parts.tokenizer, "audio_bos_token", "<|audio_bos|>")
        end = getattr(parts.tokenizer, "audio_eos_token", "<|audio_eos|>")
        return [_PaddedClip(extractor, token, markup=f"{start}{token}{end}")]


class _PaddedClip(AudioModality):
    def rows_of_windows(self, num_samples: int) -> Iterable[int]:
        return [pooled(self.num_frames(num_samples))]

    def extract(self, samples: Samples) -> Tensors:
        outputs = self.extractor(
            samples,
            sampling_rate=self.sampling_rate,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"input_features": outputs["input_features"], "feature_attention_mask": outputs["attention_mask"]}

    def features(self, model: PreTrainedModel, inputs: Tensors) -> Tensor:
        """transformers has no feature function for this family: its forward pass calls the tower itself."""
        base, spectrograms = model.base_model, inputs["input_features"]
        num_frames = inputs["feature_attention_mask"].sum(-1)  # [clips]
        length = spectrograms.shape[-1] // 2  # behind the convolutions
        is_padding = torch.arange(length, device=num_frames.device) >= convolved(num_frames)[:, None]
        mask = torch.zeros(len(num_frames), 1, length, length, dtype=spectrograms.dtype, device=num_frames.device)
        mask.masked_fill_(is_padding[:, None, None, :], float("-inf"))
        hidden = base.audio_tower(spectrograms, attention_mask=mask).last_hidden_state  # [clips, length / 2, width]
        rows = base.multi_modal_projector(hidden)
        kept = torch.arange(rows.shape[1], device=num_frames.device) < pooled(num_frames)[:, None]
        return rows[kept]  # type: ignore[no-any-return]
