"""A model family that takes pictures, videos and sounds, so far as a server has to know: no weights, no tensors."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, WhisperFeatureExtractor

from tests.server.clips import SAMPLING_RATE
from triptych.core import Media
from triptych.model.families.audio import AudioModality, Samples
from triptych.model.families.base import Family, ItemLayout, Modality, Parts, Tensors
from triptych.model.headers import ImageHeader, VideoHeader
from triptych.model.processor import Processor

IMAGE, VIDEO, AUDIO = "<|image_pad|>", "<|video_pad|>", "<|audio_pad|>"
SLICE_ROWS = 2  # of each frame of a video

# Pictures first, then videos, then sounds, then text, as some templates have it.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for kind, token in [('image', '<|image_pad|>'), ('video', '<|video_pad|>'), ('audio', "
    "'<|audio_pad|>')] %}{% for part in message.content %}{% if part.type == kind %}{{ token }}{% endif %}{% endfor %}"
    "{% endfor %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}"
)


class Pictures(Modality):
    """One row for each 16 x 16 pixels or part of it."""

    name = "image"

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        rows = -(-header.width // 16) * -(-header.height // 16)
        return self.item([rows], [rows])

    @property
    def arguments(self) -> str:
        return "16"

    def prepare(self, media: Media) -> Any:
        raise NotImplementedError

    def inputs(self, prepared: Any, index: int) -> Tensors:
        raise NotImplementedError


class Videos(Pictures):
    """Every frame that is looked at is a unit."""

    name = "video"

    def _lay_out(self, header: VideoHeader, num_items: int) -> ItemLayout:
        num_frames = len(header.frames)
        return self.item([SLICE_ROWS * num_frames], [SLICE_ROWS] * num_frames)


class Sounds(AudioModality):
    """A row for every tenth of a second, a unit for every second."""

    def rows_of_windows(self, num_samples: int) -> Iterable[int]:
        rows = num_samples * 10 // SAMPLING_RATE
        return [10] * (rows // 10) + [rows % 10]

    def extract(self, samples: Samples) -> Tensors:
        raise NotImplementedError


class Senses(Family):
    model_types = ("senses",)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        return [Pictures(IMAGE), Videos(VIDEO), Sounds(WhisperFeatureExtractor(), AUDIO)]

    def reserved_texts(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
        return frozenset({IMAGE, VIDEO, AUDIO})


@cache
def senses(folder: Path) -> Processor:
    """On the tokenizer of a checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, VIDEO, AUDIO]})
    return Processor(
        Senses(PreTrainedConfig()),
        Parts(folder, tokenizer),
        chat_template=TEMPLATE,
        eos_token_ids=frozenset({tokenizer.eos_token_id}),
        identity="senses",
    )
