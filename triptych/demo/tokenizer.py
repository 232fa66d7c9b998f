"""The tokenizer and the chat template, made from our own questions and answers. Every word they use is one token."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from triptych.demo.facts import MAX_PICTURES, random_facts
from triptych.demo.questions import ask
from triptych.demo.wordings import SYSTEMS

IMAGE = "<|image_pad|>"
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    IMAGE,
    "<|video_pad|>",
)
MAX_VOCABULARY = 1024

# Newlines are written as expressions: Jinja eats those next to its own tags.
CHAT_TEMPLATE = (
    "{%- set seen = namespace(pictures=0) -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ['image', 'image_url', 'input_image'] -%}"
    "{%- set seen.pictures = seen.pictures + 1 -%}"
    "{{- 'Picture ' ~ seen.pictures ~ ':<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] + ('' if loop.last else '\\n') -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def new_tokenizer(seed: int = 0, num_questions: int = 20_000) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=list(SPECIALS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(_texts(random.Random(seed), num_questions), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        extra_special_tokens={
            "image_token": IMAGE,
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _texts(rng: random.Random, num_questions: int) -> Iterator[str]:
    for _ in range(num_questions):
        pictures = [random_facts(rng) for _ in range(rng.randint(0, MAX_PICTURES))]
        question = ask(pictures, rng, held_out=rng.random() < 0.3)
        yield question.text
        yield question.answer
    yield from (f"Picture {k}:" for k in range(1, MAX_PICTURES + 1) for _ in range(100))
    yield from [*SYSTEMS * 50, *["user\n", "assistant\n", "system\n"] * 100]
