"""The oracle: what plain transformers answers, with its own processors, its own placeholder expansion and `generate`.

Nothing of Triptych is imported here. The processor classes are the families' own without their video half, which would
need torchvision.
"""

import base64
import copy
import importlib
import inspect
import io
import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils.logging import disable_progress_bar
from transformers.video_utils import VideoMetadata

disable_progress_bar()
processing_smolvlm.num2words = processing_smolvlm.num2words or str  # SmolVLM insists on a package that only videos use
# Pixtral's insists on a module that needs torchvision, for a function that the one on Pillow has as well.
sys.modules.setdefault("transformers.models.pixtral.image_processing_pixtral", image_processing_pil_pixtral)
transformers.PixtralProcessor = importlib.import_module(
    "transformers.models.pixtral.processing_pixtral"
).PixtralProcessor

Messages = list[dict[str, Any]]

_OTHERS = ("text", "audio", "video")  # types of parts that are no pictures


@dataclass(frozen=True)
class Video:
    """What a family's own video processor would make of the frames of one video: that needs torchvision."""

    tensors: dict[str, torch.Tensor]  # pixel_values_videos, and video_grid_thw where the family has one
    metadata: VideoMetadata


@dataclass(frozen=True)
class Reference:
    """A greedy answer. `gaps[i]` is how far the best logit was ahead of the second best at output token i."""

    prompt_ids: list[int]
    token_ids: list[int]
    gaps: list[float]


def reference_tokens(folder: Path, messages: Messages, max_new_tokens: int) -> list[int]:
    """The greedy answer in float32, up to and including an end-of-sequence token."""
    return reference(folder, messages, max_new_tokens).token_ids


def reference(folder: Path, messages: Messages, max_new_tokens: int) -> Reference:
    """`messages` as a client sends them, pictures as data: URLs; or {"type": "image", "image": PIL image or bytes}, or
    {"type": "audio", "audio": samples at the model's rate}, or {"type": "video", "video": Video}."""
    inputs = reference_inputs(folder, messages)
    model = reference_model(folder)
    prompt_len = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(output.logits)[:, 0].float().topk(2).values  # [new tokens, 2]
    return Reference(
        prompt_ids=inputs["input_ids"][0].tolist(),
        token_ids=output.sequences[0, prompt_len:].tolist(),
        gaps=(best[:, 0] - best[:, 1]).tolist(),
    )


def reference_inputs(folder: Path, messages: Messages) -> Any:
    """What the family's own processor makes of the conversation: input_ids, pixel_values and the like."""
    processor: Any = reference_processor(folder)
    template = ProcessorMixin.apply_chat_template(
        processor, _hugging_face(messages), tokenize=False, add_generation_prompt=True
    )
    bos = processor.tokenizer.bos_token
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    pictures = [upright(_picture(part)) for part in parts if part["type"] not in _OTHERS]
    clips = [part["audio"] for part in parts if part["type"] == "audio"]
    videos = [part["video"] for part in parts if part["type"] == "video"]
    media: dict[str, Any] = {"images": [pictures]} if pictures else {}  # nested, as one prompt's: some count them
    if videos:
        processor = copy.copy(processor)
        processor.video_processor = _Processed(videos)
        media["videos"] = [np.zeros((2, 8, 8, 3), np.uint8)] * len(videos)  # only their number counts
        media["videos_kwargs"] = {"fps": _frames_per_second(videos[0])}  # Qwen2.5-Omni takes it from there
    return processor(
        text=[template],
        return_tensors="pt",
        add_special_tokens=not (bos and template.startswith(bos)),  # as its apply_chat_template(tokenize=True) does
        **media,
        **({"audio": clips} if clips else {}),
    )


def upright(image: Image.Image | bytes) -> Image.Image:
    """The picture as transformers' own `load_image` turns it, before the colour conversion of the processor."""
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    return ImageOps.exif_transpose(image)


def _picture(part: dict[str, Any]) -> Image.Image | bytes:
    if part["type"] == "image":
        return part["image"]
    return base64.b64decode(part["image_url"]["url"].partition(",")[2])


@lru_cache(maxsize=16)
def reference_model(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


@lru_cache(maxsize=16)
def reference_processor(folder: Path) -> ProcessorMixin:
    """Built by hand, because AutoProcessor asks for the video half too."""
    file = next(
        folder / name for name in ("processor_config.json", "tokenizer_config.json") if (folder / name).exists()
    )
    arguments = json.loads(file.read_text())
    name = arguments.pop("processor_class")
    full_class = _OWN_WAYS.get(name) or getattr(transformers, name)
    takes = inspect.signature(full_class).parameters
    if "image_processor" in takes:
        arguments["image_processor"] = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if "feature_extractor" in takes:
        arguments["feature_extractor"] = AutoFeatureExtractor.from_pretrained(folder)
    return _without_video(full_class)(
        tokenizer=AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(),
        **{name: value for name, value in arguments.items() if name in takes and not isinstance(value, dict)},
    )


def _without_video(full_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same class, minus the video processor: ProcessorMixin reads its parts off the signature of __init__."""
    takes = inspect.signature(full_class).parameters
    if "video_processor" not in takes:
        return full_class

    class ImagesOnly(full_class):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **arguments):
            super().__init__(
                image_processor=image_processor,
                tokenizer=tokenizer,
                video_processor=None,
                chat_template=chat_template,
                **arguments,
            )

    class ImagesAndAudio(full_class):
        def __init__(self, image_processor=None, feature_extractor=None, tokenizer=None, chat_template=None):
            marks = ("vision_bos", "vision_eos", "audio_bos", "audio_eos")
            for kind in ("image", "video", "audio", *marks):
                setattr(self, f"{kind}_token", getattr(tokenizer, f"{kind}_token"))
                setattr(self, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
            self.video_processor = image_processor  # some versions ask for its numbers whatever there is in the prompt
            ProcessorMixin.__init__(self, image_processor, feature_extractor, tokenizer, chat_template=chat_template)

    return ImagesAndAudio if "feature_extractor" in takes else ImagesOnly


class _Processed:
    """In the place of a video processor."""

    merge_size = temporal_patch_size = 2

    def __init__(self, videos: list[Video]) -> None:
        self.outputs: dict[str, Any] = {
            name: torch.cat([video.tensors[name] for video in videos]) for name in videos[0].tensors
        }
        self.outputs["video_metadata"] = [video.metadata for video in videos]

    def __call__(self, videos: object, **arguments: object) -> dict[str, Any]:
        return dict(self.outputs)


def _frames_per_second(video: Video) -> float:
    """Of the frames that are looked at."""
    metadata = video.metadata
    return len(metadata.frames_indices) / metadata.total_num_frames * metadata.fps


class _ManyClips(transformers.AudioFlamingo3Processor):
    """The family's own refuses more than one clip in a prompt; its expansion does not mind."""

    def validate_inputs(self, *_: Any, **__: Any) -> None: ...


class _VoxtralByText(ProcessorMixin):
    """The family's own takes a tokeniser of another library, which writes the tokens of a clip itself: a begin token,
    then 375 for each window of 30 seconds; here as many as the tower of a tiny model gives. The features are its own.
    """

    def __init__(self, feature_extractor=None, tokenizer=None, chat_template=None, rows_per_window=375):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.rows_per_window = rows_per_window

    def __call__(self, text, audio=(), **arguments):
        extractor = self.feature_extractor
        as_its_own = {
            "sampling_rate": extractor.sampling_rate,
            "padding": True,
            "truncation": False,
            "pad_to_multiple_of": extractor.n_samples,
            "max_source_positions": extractor.nb_max_frames,
            "return_tensors": "pt",
        }
        features = [
            transformers.VoxtralProcessor._retrieve_input_features(self, [clip], **as_its_own) for clip in audio
        ]
        pieces = text[0].split("[AUDIO]")
        runs = ["[BEGIN_AUDIO]" + "[AUDIO]" * (len(windows) * self.rows_per_window) for windows in features]
        expanded = pieces[0] + "".join(run + piece for run, piece in zip(runs, pieces[1:], strict=True))
        return {
            **self.tokenizer([expanded], **arguments),
            **({"input_features": torch.cat(features)} if features else {}),
        }


_OWN_WAYS = {"AudioFlamingo3Processor": _ManyClips, "VoxtralProcessor": _VoxtralByText}


def _hugging_face(messages: Messages) -> Messages:
    """Copies without the pictures, with every content as a list of parts: all templates take that."""
    return [message | {"content": _parts(message["content"])} for message in messages]


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    names = {name: name for name in _OTHERS}
    return [part if part["type"] == "text" else {"type": names.get(part["type"], "image")} for part in content]
