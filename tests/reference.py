"""The oracle: what plain transformers answers, with its own processors, its own placeholder expansion and `generate`.

Nothing of Triptych is imported here. The processor classes are the families' own without their video half, which would
need torchvision.
"""

import base64
import inspect
import io
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageOps
from transformers import AutoConfig, AutoTokenizer, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
processing_smolvlm.num2words = processing_smolvlm.num2words or str  # SmolVLM insists on a package that only videos use

Messages = list[dict[str, Any]]


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
    """`messages` as a client sends them, pictures as data: URLs; or {"type": "image", "image": PIL image or bytes}."""
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
    processor = reference_processor(folder)
    template = ProcessorMixin.apply_chat_template(
        processor, _hugging_face(messages), tokenize=False, add_generation_prompt=True
    )
    bos = processor.tokenizer.bos_token
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return processor(
        text=[template],
        images=[upright(_picture(part)) for part in parts if part["type"] != "text"] or None,
        return_tensors="pt",
        add_special_tokens=not (bos and template.startswith(bos)),  # as its apply_chat_template(tokenize=True) does
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
    full_class = getattr(transformers, arguments.pop("processor_class"))
    takes = inspect.signature(full_class).parameters
    return _without_video(full_class)(
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(),
        **{name: value for name, value in arguments.items() if name in takes and not isinstance(value, dict)},
    )


def _without_video(full_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same class, minus the video processor: ProcessorMixin reads its parts off the signature of __init__."""
    if "video_processor" not in inspect.signature(full_class).parameters:
        return full_class

    class ImagesOnly(full_class):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **arguments):
            super().__init__(image_processor, tokenizer, video_processor=None, chat_template=chat_template, **arguments)

    return ImagesOnly


def _hugging_face(messages: Messages) -> Messages:
    """Copies without the pictures, with every content as a list of parts: all templates take that."""
    return [message | {"content": _parts(message["content"])} for message in messages]


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part if part["type"] == "text" else {"type": "image"} for part in content]
