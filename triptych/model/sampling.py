"""Chooses next tokens from logits. A token is a function of its row of logits and of (seed, choice, position) alone.

Order as in vLLM: penalties, forbidden stops, temperature, min_p, top_k, top_p. Log-probabilities are those of the raw
logits. Randomness is one hashed uniform number per token, put through the inverse of the cumulated distribution.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from triptych.core import SampledToken, SamplingParams, Sequence, TokenLogprobs

_MASK64 = (1 << 64) - 1
_NUCLEUS_GUESS = 512  # most nuclei are smaller; only larger ones pay for sorting the whole vocabulary
_MIN_TEMPERATURE = 1e-5  # what is below counts as 0, as in vLLM: logits divided by it would leave the range of float32
_LARGEST_SCORE = 1e30  # of a penalised token: finite, also after the division by the smallest temperature
_MIN_REPETITION_PENALTY = 1e-30  # a smaller one would be 0 in float32


def sample(logits: Tensor, sequences: Seq[Sequence], eos_token_ids: Seq[int]) -> list[SampledToken]:
    """One token per row of logits [len(sequences), vocab]. `logits` may be changed."""
    if all(_is_plain_greedy(sequence) for sequence in sequences):
        return [SampledToken(token) for token in _best(logits)]
    logits = logits.float()
    raw = logits.clone() if any(s.sampling.logprobs is not None for s in sequences) else logits
    for row, sequence in zip(logits, sequences, strict=True):
        _penalise(row, sequence)
        _forbid_stops(row, sequence, eos_token_ids)
    tokens = logits.argmax(-1)
    drawn = [i for i, sequence in enumerate(sequences) if not _is_greedy(sequence.sampling)]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [sequences[i] for i in drawn])
    chosen = tokens.tolist()
    return [
        SampledToken(token, _logprobs(row, token, sequence.sampling.logprobs))
        for row, token, sequence in zip(raw, chosen, sequences, strict=True)
    ]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its three keys only (splitmix64 over each in turn)."""
    state = 0
    for key in (seed, choice, position):
        state = _mix((state ^ key) & _MASK64)
    return (state >> 12) * 2.0**-52


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _best(logits: Tensor) -> list[int]:
    if logits.is_cuda:
        best: list[int] = logits.argmax(-1).tolist()
    else:
        best = logits.float().numpy().argmax(-1).tolist()  # 10 times as fast as torch's
    return best


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _MIN_TEMPERATURE


def _is_plain_greedy(sequence: Sequence) -> bool:
    params = sequence.sampling
    return (
        _is_greedy(params)
        and params.logprobs is None
        and not _has_penalties(params)
        and params.min_tokens <= sequence.num_output_tokens
    )


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _penalise(row: Tensor, sequence: Sequence) -> None:
    """In place. Repetition counts prompt and output, presence and frequency the output only."""
    params = sequence.sampling
    if not _has_penalties(params):
        return
    output = sequence.token_ids[sequence.num_prompt_tokens :]
    if params.repetition_penalty != 1:
        seen, _ = _counts(sequence.token_ids, row)
        penalty = max(params.repetition_penalty, _MIN_REPETITION_PENALTY)
        score = row[seen]
        row[seen] = _bounded(torch.where(score > 0, score / penalty, score * penalty))
    if output and (params.presence_penalty or params.frequency_penalty):
        seen, counts = _counts(output, row)
        row[seen] = _bounded(
            row[seen]
            - (counts * params.frequency_penalty).clamp(-_LARGEST_SCORE, _LARGEST_SCORE)
            - min(max(params.presence_penalty, -_LARGEST_SCORE), _LARGEST_SCORE)
        )


def _bounded(scores: Tensor) -> Tensor:
    return scores.clamp(-_LARGEST_SCORE, _LARGEST_SCORE)


def _counts(token_ids: Seq[int], row: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids and how often each occurs; placeholder ids beyond the vocabulary have no logit."""
    ids, counts = np.unique(np.asarray(token_ids), return_counts=True)
    known = ids < row.shape[0]
    return torch.from_numpy(ids[known]).to(row.device), torch.from_numpy(counts[known]).to(row.device, row.dtype)


def _forbid_stops(row: Tensor, sequence: Sequence, eos_token_ids: Seq[int]) -> None:
    """In place. A ban of all tokens is none: there has to be a next one."""
    if sequence.num_output_tokens < sequence.sampling.min_tokens:
        vocab = row.shape[0]
        stops = {token for token in (*eos_token_ids, *sequence.sampling.stop_token_ids) if 0 <= token < vocab}
        if len(stops) < vocab:
            row[list(stops)] = -torch.inf


def _draw(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Token ids [rows]: the inverse of the cumulated probabilities, in vocabulary order, at one uniform number."""
    params = [sequence.sampling for sequence in sequences]
    logits = logits / _column([p.temperature for p in params], logits)
    if any(p.min_p > 0 for p in params):
        _keep_min_p(logits, params)
    if any(0 < p.top_k < logits.shape[1] for p in params):
        _keep_top_k(logits, params)
    if any(p.top_p < 1 for p in params):
        _keep_top_p(logits, params)
    # In double precision the sum of many small numbers keeps its order; vocabulary order is stable under near ties.
    cumulated = logits.softmax(-1).double().cumsum(-1)
    points = [uniform(p.seed, p.choice, s.num_output_tokens) for p, s in zip(params, sequences, strict=True)]
    target = torch.tensor(points, dtype=torch.float64, device=logits.device)[:, None] * cumulated[:, -1:]
    # Logits that are no numbers (a model can overflow) make every comparison false: without the bound, a token too far.
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _keep_min_p(logits: Tensor, params: Seq[SamplingParams]) -> None:
    """Drops tokens less likely than min_p times the most likely one."""
    floor = _column([p.min_p for p in params], logits).log() + logits.amax(-1, keepdim=True)
    logits.masked_fill_(logits < floor, -torch.inf)


def _keep_top_k(logits: Tensor, params: Seq[SamplingParams]) -> None:
    """Keeps the k best of each row, and all that equal the k-th."""
    vocab = logits.shape[1]
    counts = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    largest = max(k for k in counts if k < vocab)
    best = logits.topk(largest).values
    index = torch.tensor([min(k, largest) - 1 for k in counts], device=logits.device)[:, None]
    limited = torch.tensor([k < vocab for k in counts], device=logits.device)[:, None]
    logits.masked_fill_((logits < best.gather(1, index)) & limited, -torch.inf)


def _keep_top_p(logits: Tensor, params: Seq[SamplingParams]) -> None:
    """Keeps the smallest set of best tokens that reaches top_p, and all that equal its last."""
    wanted = _column([p.top_p for p in params], logits)
    log_total = logits.logsumexp(-1, keepdim=True)
    for count in (min(_NUCLEUS_GUESS, logits.shape[1]), logits.shape[1]):
        best = logits.topk(count).values
        before = (best - log_total).exp().cumsum(-1).roll(1, -1)
        before[:, 0] = 0.0
        inside = before < wanted
        inside[:, 0] = True
        if count == logits.shape[1] or not bool((inside[:, -1:] & (wanted < 1)).any()):
            break
    last = inside.sum(-1, keepdim=True) - 1
    logits.masked_fill_((logits < best.gather(1, last)) & (wanted < 1), -torch.inf)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _logprobs(row: Tensor, token: int, count: int | None) -> TokenLogprobs | None:
    if count is None:
        return None
    scores = row.log_softmax(-1)
    top = scores.topk(min(count, scores.shape[0]))
    return TokenLogprobs(float(scores[token]), top.indices.tolist(), top.values.tolist())
