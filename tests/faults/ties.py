"""What plain transformers could have said: one answer, or several where two tokens are as good as equally due.

A drawn token is where a random number falls among cumulated probabilities, or which tokens make up `top_p`: rounding
decides where that is nearer to an edge than sums of float32 are exact, and rounding differs from batch to batch.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tests.reference import reference_inputs, reference_model, reference_processor
from triptych.core import RequestId, SamplingParams, Sequence
from triptych.model.sampling import sample

ROUNDING = 1e-5  # of a logit: ten times what batches of different sizes make of it
NUM_TRIALS = 60
MAX_ANSWERS = 16
_TAKEN = ("max_tokens", "seed", "temperature", "top_p", "top_k")


class _Steered(LogitsProcessor):
    """Goes along a path, then on with what is drawn; notes where else it could have gone."""

    def __init__(self, path: list[int], sampling: SamplingParams, num_prompt_tokens: int) -> None:
        self.path = list(path)
        self.turnings: list[list[int]] = []
        self._given = len(path)
        self._sampling = sampling
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        position = input_ids.shape[1] - self._num_prompt_tokens
        if position >= self._given:
            token, *others = self._drawn(input_ids[0].tolist(), scores[0].float())
            self.turnings += [[*self.path, other] for other in others]
            self.path.append(token)
        steered = torch.full_like(scores, -torch.inf)
        steered[0, self.path[position]] = 0.0
        return steered

    def _drawn(self, token_ids: list[int], logits: torch.Tensor) -> list[int]:
        """What is drawn, then what would be if the last bits of the logits were others."""
        sequence = Sequence(RequestId("tie"), token_ids, self._num_prompt_tokens, self._sampling)
        noise = torch.rand(NUM_TRIALS, len(logits), generator=torch.Generator().manual_seed(0)) * 2 - 1
        noise[0] = 0.0
        rows = logits + ROUNDING * noise
        return list(dict.fromkeys(token.token_id for token in sample(rows, [sequence] * NUM_TRIALS, [])))


def possible_texts(folder: Path, body: dict[str, Any], choice: int) -> set[str]:
    """Of one choice of a request that runs to its full length."""
    inputs = reference_inputs(folder, body["messages"])
    sampling = SamplingParams(choice=choice, **{name: body[name] for name in _TAKEN if name in body})
    config = GenerationConfig(max_new_tokens=sampling.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    texts: set[str] = set()
    paths: list[list[int]] = [[]]
    while paths and len(texts) < MAX_ANSWERS:
        steered = _Steered(paths.pop(), sampling, inputs["input_ids"].shape[1])
        with torch.inference_mode():
            reference_model(folder).generate(
                **inputs, generation_config=config, logits_processor=LogitsProcessorList([steered])
            )
        paths += steered.turnings
        tokenizer = reference_processor(folder).tokenizer
        texts.add(tokenizer.decode(steered.path, skip_special_tokens=True))
    return texts
