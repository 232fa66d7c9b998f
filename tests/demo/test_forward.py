"""The training forward must be the library's own forward, question by question."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from triptych.demo.answering import Answers, answer
from triptych.demo.batches import Batch
from triptych.demo.drawing import draw
from triptych.demo.facts import random_facts
from triptych.demo.forward import MAX_TOKENS, see
from triptych.demo.model import new_model
from triptych.demo.packing import Packer
from triptych.demo.pool import MAX_PATCHES, MAX_PIXELS, MIN_PIXELS, PATCH_VALUES, cut_patches
from triptych.demo.rows import Scene
from triptych.demo.tokenizer import new_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return new_tokenizer(num_questions=2000)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return new_model(tokenizer, seed=0).eval()


@pytest.mark.parametrize("num_pictures", [0, 1, 4])
def test_packed_branches_equal_prompts_with_one_question(
    model: Any, tokenizer: PreTrainedTokenizerFast, num_pictures: int
) -> None:
    rng = random.Random(num_pictures)
    facts = [random_facts(rng) for _ in range(2 * num_pictures)]
    pictures = [draw(one, rng) for one in facts]
    cuts = [cut_patches(picture) for picture in pictures]
    scenes = [Scene(one, grid, i) for i, (one, (_, grid)) in enumerate(zip(facts, cuts, strict=True))]
    conversations = [scenes[:num_pictures], scenes[num_pictures:]]
    batch = Packer(tokenizer).pack(conversations, 2, rng, only_branches=True)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS})
    with torch.no_grad():
        patches = torch.zeros(len(cuts), MAX_PATCHES, PATCH_VALUES, dtype=torch.uint8)
        for i, (cut, _) in enumerate(cuts):
            patches[i, : len(cut)] = torch.from_numpy(cut)
        features = see(model.model.visual, patches, [grid for _, grid in cuts]) if cuts else None
        told = answer(model, batch, features)
        for row, own in enumerate(conversations):
            pixels = processor([pictures[scene.index] for scene in own], return_tensors="pt") if own else {}
            for branch in range(1, 3):
                expected = _library_logits(model, batch, row, branch, pixels)
                torch.testing.assert_close(_logits(told, batch, row, branch), expected, atol=1e-4, rtol=0)


def test_turns_and_text_before_pictures_are_rendered_as_the_chat_template_does(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rng = random.Random(0)
    packer = Packer(tokenizer)
    for _ in range(60):
        scenes = [Scene(random_facts(rng), (4, 4)) for _ in range(2)]
        batch = packer.pack([scenes], 1, rng)
        text = tokenizer.decode(batch.ids[0][batch.branches[0] >= 0])
        again = tokenizer.apply_chat_template(_messages(text), tokenize=False)
        again = again.replace("<|image_pad|>", "<|image_pad|>" * 4)
        ids = tokenizer.encode(again, add_special_tokens=False)
        packed = batch.ids[0][batch.branches[0] >= 0].tolist()
        assert ids[: len(packed)] == packed, (text, again)


def test_short_pictures_are_padded(model: Any) -> None:
    tokens = see(model.model.visual, torch.zeros(2, MAX_PATCHES, PATCH_VALUES, dtype=torch.uint8), [(4, 4), (8, 8)])
    assert tokens.shape[:2] == (2, MAX_TOKENS)


def _library_logits(model: Any, batch: Batch, row: int, branch: int, pixels: dict[str, Tensor]) -> Tensor:
    keep = (batch.branches[row] == 0) | (batch.branches[row] == branch)
    ids = batch.ids[row][keep][None]
    kinds = (ids == model.config.image_token_id).int()
    output = model(input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **pixels)
    logits: Tensor = output.logits[0]
    num_answers = int((batch.learn[row] & (batch.branches[row] == branch)).sum())
    return logits[-1 - num_answers : -1]


def _logits(told: Answers, batch: Batch, row: int, branch: int) -> Tensor:
    own = [i for i, (r, c) in enumerate(told.places.tolist()) if r == row and batch.branches[r, c] == branch]
    return told.logits[own]


def _messages(text: str) -> list[dict[str, object]]:
    """Reads a rendered conversation back into messages."""
    messages: list[dict[str, object]] = []
    for turn in text.split("<|im_start|>")[1:]:
        role, _, body = turn.partition("\n")
        body = body.partition("<|im_end|>")[0]
        content: list[dict[str, str]] = []
        pieces = body.replace("<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>", "\0").split("\0")
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            words = piece if last else piece[: piece.rindex("Picture ")].removesuffix("\n")
            content += [{"type": "text", "text": words}] if words else []
            content += [] if last else [{"type": "image_url", "image_url": "..."}]
        messages.append({"role": role, "content": content if len(content) > 1 else body})
    return messages
