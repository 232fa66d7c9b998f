"""Writes the Hugging Face folder that plain `transformers` loads: weights, tokenizer, template, image processor."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from triptych.demo.pool import MAX_PIXELS, MIN_PIXELS

# Qwen2-VL's own processor asks for a video processor, which needs torchvision. This one of the same library takes
# pictures only, and writes the same tokens for them.
_PROCESSOR_CLASS = "PaddleOCRVLProcessor"


def export(model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Pictures of any size are brought to what training has seen: 9 to 16 tokens each.
    sizes = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    Qwen2VLImageProcessorPil(size=sizes).save_pretrained(folder)
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        _set_processor_class(folder / name)


def _set_processor_class(path: Path) -> None:
    config = json.loads(path.read_text())
    config["processor_class"] = _PROCESSOR_CLASS
    path.write_text(json.dumps(config, indent=2) + "\n")
