"""From a packed batch and picture features to the loss on answers, and to exact-match scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch.nn.functional as functional
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from triptych.demo.batches import Batch
from triptych.demo.forward import think, token_mask
from triptych.demo.loop import Scores
from triptych.demo.rows import Scene

Features = Callable[[Sequence[Scene]], Tensor]  # scenes -> [pictures, MAX_TOKENS, width]


@dataclass(slots=True)
class Answers:
    """What the model says at each answer token, one entry per token."""

    logits: Tensor  # [tokens, vocabulary]
    targets: Tensor  # [tokens]
    places: Tensor  # [tokens, 2] row and column
    states: list[Tensor]  # after each layer [rows, length, width]

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.logits.float(), self.targets)


def answer(model: Qwen2VLForConditionalGeneration, batch: Batch, features: Tensor | None) -> Answers:
    device = model.lm_head.weight.device
    ids = batch.ids.to(device)
    embeds = model.model.language_model.embed_tokens(ids)
    is_picture = ids == model.config.image_token_id
    if features is not None:
        mask = token_mask([scene.grid for scene in batch.scenes]).to(device)
        embeds = embeds.masked_scatter(is_picture[..., None], features[mask].to(embeds.dtype))
    states = think(model, embeds, batch.positions.to(device), batch.allowed.to(device))
    places = batch.learn.nonzero().to(device)
    rows, columns = places.unbind(1)
    return Answers(model.lm_head(states[-1][rows, columns - 1]), ids[rows, columns], places, states)


def exact_scores(answers: Iterable[tuple[Batch, Answers]]) -> Scores:
    """Share of branch questions whose every token is the likeliest, which is what greedy decoding would give.

    Keys: "all", "n=<pictures>", and the kinds of question.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    for batch, told in answers:
        right = (told.logits.argmax(-1) == told.targets).tolist()
        by_question: dict[tuple[int, int], bool] = {}
        for (row, column), ok in zip(told.places.tolist(), right, strict=True):
            key = row, int(batch.branches[row, column])
            by_question[key] = by_question.get(key, True) and ok
        pictures = len(batch.scenes) // len(batch.questions)
        for (row, branch), ok in by_question.items():
            for name in ("all", f"n={pictures}", batch.questions[row][branch - 1].kind):
                hits[name].append(ok)
    return {name: sum(oks) / len(oks) for name, oks in sorted(hits.items())}
