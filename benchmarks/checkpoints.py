"""Checkpoints for measurements: real architectures of chosen sizes, with everything but the weights.

Serve them with `--load-format dummy`. In their tokenizer every word of the load generator is one token.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from triptych.bench.workload import WORDS

MAX_MODEL_LEN = 32768


@dataclass(frozen=True)
class Tower:
    width: int
    depth: int
    heads: int
    ffn: int


@dataclass(frozen=True)
class Decoder:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True)
class Checkpoint:
    """What is written: `whole` pictures are one unit each (Qwen2.5-VL), `tiled` ones many (InternVL)."""

    kind: str
    tower: Tower
    decoder: Decoder
    tile: int = 0  # side in pixels
    max_tiles: int = 0

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        recipe = _RECIPES[self.kind]
        tokenizer = _tokenizer(recipe.special_tokens, recipe.named_tokens)
        config = recipe.config(self, tokenizer)
        config.architectures = [recipe.model_class]
        config.dtype = "float32"
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        recipe.image_processor(self).save_pretrained(folder)
        template = _TEMPLATE.replace("PICTURE", recipe.picture)
        (folder / "chat_template.jinja").write_text(template)
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": recipe.processor_class}))
        return folder

    def described(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class _Recipe:
    model_class: str
    processor_class: str
    config: Callable[[Checkpoint, PreTrainedTokenizerFast], PreTrainedConfig]
    image_processor: Callable[[Checkpoint], BaseImageProcessor]
    picture: str  # what the chat template writes for one
    special_tokens: tuple[str, ...]
    named_tokens: dict[str, str]


_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' %}PICTURE{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _tokenizer(special_tokens: tuple[str, ...], named_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    roles = "system\nuser\nassistant\n"
    backend.train_from_iterator([roles, *(text for word in WORDS for text in (word, f"x {word}"))] * 3, trainer)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *special_tokens)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named_tokens,
        clean_up_tokenization_spaces=False,
    )


def _text(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, **extra: object) -> dict[str, object]:
    decoder = checkpoint.decoder
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.ffn,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "max_position_embeddings": MAX_MODEL_LEN,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **extra,
    }


def _whole(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    tower, decoder = checkpoint.tower, checkpoint.decoder
    pairs = decoder.hidden // decoder.heads // 2
    section = [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    token_id = tokenizer.convert_tokens_to_ids
    return transformers.Qwen2_5_VLConfig(
        text_config=_text(checkpoint, tokenizer, rope_parameters=rope),
        vision_config={
            "depth": tower.depth,
            "hidden_size": tower.width,
            "num_heads": tower.heads,
            "intermediate_size": tower.ffn,
            "out_hidden_size": decoder.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [tower.depth // 2 - 1, tower.depth - 1],
        },
        tie_word_embeddings=False,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def _tiled(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    tower = checkpoint.tower
    return transformers.InternVLConfig(
        vision_config={
            "hidden_size": tower.width,
            "num_hidden_layers": tower.depth,
            "num_attention_heads": tower.heads,
            "intermediate_size": tower.ffn,
            "image_size": [checkpoint.tile, checkpoint.tile],
            "patch_size": [14, 14],
        },
        text_config=_text(checkpoint, tokenizer, model_type="qwen2"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(checkpoint.tile // 28) ** 2,
        downsample_ratio=0.5,
    )


def _whole_pictures(checkpoint: Checkpoint) -> BaseImageProcessor:
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 1280 * 28 * 28}
    return Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, size=size)


def _tiles(checkpoint: Checkpoint) -> BaseImageProcessor:
    size = {"height": checkpoint.tile, "width": checkpoint.tile}
    return GotOcr2ImageProcessorPil(size=size, min_patches=1, max_patches=checkpoint.max_tiles)


_RECIPES = {
    "whole": _Recipe(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
        _whole,
        _whole_pictures,
        "<|vision_start|><|image_pad|><|vision_end|>",
        ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    ),
    "tiled": _Recipe(
        "InternVLForConditionalGeneration",
        "InternVLProcessor",
        _tiled,
        _tiles,
        "<IMG_CONTEXT>\n",
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
}
