"""A token hangs on its logits and on (seed, choice, position) alone, and never leaves what the filters allow."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.core import RequestId, SamplingParams, Sequence
from triptych.model.sampling import sample, uniform

torch.set_num_threads(1)
VOCAB = 64
EOS = (7, 9)


def make_sequence(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Sequence:
    prompt, output = prompt or [1, 2], output or []
    sampling = SamplingParams(**({"max_tokens": 100, "seed": 0} | params))
    return Sequence(RequestId("r"), prompt + output, len(prompt), sampling)


def tokens_of(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    return [token.token_id for token in sample(logits.clone(), sequences, EOS)]


def draws(logits: torch.Tensor, count: int, **params: Any) -> list[int]:
    sequences = [make_sequence(seed=seed, **params) for seed in range(count)]
    return tokens_of(logits.expand(count, -1), sequences)


params_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_p": st.sampled_from([0.01, 0.5, 0.95, 1.0]),
        "top_k": st.sampled_from([0, 1, 5, 200]),
        "min_p": st.sampled_from([0.0, 0.1, 1.0]),
        "seed": st.integers(-(2**63), 2**64),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "min_tokens": st.sampled_from([0, 3]),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(params_strategy, min_size=2, max_size=5), seed=st.integers(0, 100))
def test_a_token_does_not_hang_on_what_shares_its_batch(batch: list[dict[str, Any]], seed: int) -> None:
    logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    sequences = [make_sequence(output=[3, 3, 5], **params) for params in batch]
    together = tokens_of(logits, sequences)
    alone = [tokens_of(logits[i : i + 1], [sequence])[0] for i, sequence in enumerate(sequences)]
    assert together == alone
    assert tokens_of(logits.flip(0), sequences[::-1]) == together[::-1]


@settings(max_examples=60, deadline=None)
@given(
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.001, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(0.1, 3.0),
    seed=st.integers(0, 50),
)
def test_filters_keep_exactly_the_tokens_of_their_definition(
    top_k: int, top_p: float, min_p: float, temperature: float, seed: int
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    allowed = _allowed(logits.double().numpy() / temperature, top_k, top_p, min_p)
    drawn = draws(logits, 60, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    assert set(drawn) <= allowed


def _allowed(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """By the definitions, one filter after the other, with a little room for rounding at the nucleus' edge."""
    weights = np.exp(logits - logits.max())
    weights[weights < min_p - 1e-6] = 0
    if 0 < top_k < VOCAB:
        weights[weights < np.sort(weights)[-top_k]] = 0
    order = np.argsort(-weights)
    before = np.concatenate([[0], np.cumsum(weights[order] / weights.sum())[:-1]])
    return {
        int(token)
        for token, sum_before in zip(order, before, strict=True)
        if weights[token] and sum_before < top_p + 1e-5
    }


def test_large_vocabularies_with_flat_nuclei_are_cut_at_the_right_place() -> None:
    logits = torch.zeros(4000)
    logits[:2000] = 5.0
    drawn = draws(logits, 300, top_p=0.9)
    assert max(drawn) < 2000
    assert len(set(drawn)) > 200


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -math.inf])
    expected = (logits / temperature).softmax(-1).numpy() * 4000
    counts = np.bincount(draws(logits, 4000, temperature=temperature), minlength=6)
    assert counts[5] == 0
    chi_square = ((counts[:5] - expected[:5]) ** 2 / expected[:5]).sum()
    assert chi_square < 18.5  # 0.1% point of 4 degrees of freedom


def test_uniform_numbers_are_spread_over_seeds_choices_and_positions() -> None:
    for vary in range(3):
        keys = [[5, 1, 3] for _ in range(2000)]
        for i, key in enumerate(keys):
            key[vary] = i
        values = np.array([uniform(*key) for key in keys])
        assert ((values >= 0) & (values < 1)).all()
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert ((counts - 100) ** 2 / 100).sum() < 43.8  # 0.1% point of 19 degrees of freedom
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.08


def test_position_is_counted_in_output_tokens_so_that_a_resubmitted_request_goes_on_as_before() -> None:
    logits = torch.zeros(1, VOCAB)
    first = make_sequence(prompt=[1, 2], output=[3], seed=11)
    again = make_sequence(prompt=[1, 2], output=[3], seed=11)
    longer_prompt = make_sequence(prompt=[1, 2, 4, 4], output=[3], seed=11)
    assert tokens_of(logits, [first]) == tokens_of(logits, [again]) == tokens_of(logits, [longer_prompt])


def test_choices_of_one_request_differ() -> None:
    logits = torch.zeros(1, VOCAB)
    assert len({tokens_of(logits, [make_sequence(seed=1, choice=choice)])[0] for choice in range(20)}) > 8


def test_temperature_zero_takes_the_best_token() -> None:
    logits = torch.randn(3, VOCAB)
    sequences = [make_sequence(temperature=0.0) for _ in range(3)]
    assert tokens_of(logits, sequences) == logits.argmax(-1).tolist()


def test_min_tokens_forbids_end_and_stop_tokens_until_then() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 9, 12]] = torch.tensor([30.0, 20.0, 10.0])
    early = make_sequence(output=[3], temperature=0.0, min_tokens=2, stop_token_ids=(12,))
    due = make_sequence(output=[3, 3], temperature=0.0, min_tokens=2, stop_token_ids=(12,))
    assert tokens_of(logits, [early])[0] not in (7, 9, 12)
    assert tokens_of(logits, [due]) == [7]


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.full((1, VOCAB), -1.0)
    logits[0, [1, 3, 4]] = torch.tensor([2.0, 1.9, 1.5])
    sequence = make_sequence(prompt=[1, 2, 1, 9999], output=[3], temperature=0.0, repetition_penalty=1.5)
    assert tokens_of(logits, [sequence]) == [4]
    logits[0] = -10.0
    logits[0, [1, 4]] = torch.tensor([-1.0, -1.4])
    assert tokens_of(logits, [sequence]) == [4]  # a negative score is multiplied


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [1, 3, 4]] = torch.tensor([5.0, 5.9, 5.5])
    once = make_sequence(prompt=[1, 1], output=[3], temperature=0.0, presence_penalty=0.6)
    assert tokens_of(logits, [once]) == [4]
    logits[0, 4] = 4.9
    thrice = make_sequence(prompt=[1, 1], output=[3, 3, 3], temperature=0.0, frequency_penalty=0.4)
    assert tokens_of(logits, [thrice]) == [1]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(2, VOCAB)
    raw = logits.log_softmax(-1)
    params = {"temperature": 0.5, "top_k": 1, "presence_penalty": 1.0, "logprobs": 3}
    with_top, chosen_only = sample(
        logits.clone(), [make_sequence(**params), make_sequence(temperature=0.0, logprobs=0)], EOS
    )
    assert with_top.logprobs is not None
    assert with_top.logprobs.logprob == pytest.approx(raw[0, with_top.token_id].item(), abs=1e-5)
    assert with_top.logprobs.top_ids == raw[0].topk(3).indices.tolist()
    assert with_top.logprobs.top_logprobs == pytest.approx(raw[0].topk(3).values.tolist(), abs=1e-5)
    assert chosen_only.logprobs is not None
    assert chosen_only.logprobs.top_ids == []


def test_a_temperature_that_is_almost_zero_is_greedy() -> None:
    logits = torch.randn(3, VOCAB)
    sequences = [make_sequence(temperature=temperature) for temperature in (1e-320, 1e-40, 9e-6)]
    assert tokens_of(logits, sequences) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_that_the_vocabulary_does_not_have_are_no_stops(temperature: float) -> None:
    sequence = make_sequence(temperature=temperature, min_tokens=5, stop_token_ids=(3, VOCAB, 2**32 - 1))
    tokens = {tokens_of(torch.zeros(1, VOCAB), [replaced(sequence, seed)])[0] for seed in range(100)}
    assert tokens.isdisjoint({3, *EOS})
    assert tokens <= set(range(VOCAB))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ban_of_every_token_bans_none(temperature: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 11] = 100.0
    sequence = make_sequence(temperature=temperature, min_tokens=5, stop_token_ids=tuple(range(VOCAB)))
    assert tokens_of(logits, [sequence]) == [11]


def replaced(sequence: Sequence, seed: int) -> Sequence:
    sampling = msgspec.structs.replace(sequence.sampling, seed=seed)
    return Sequence(sequence.request_id, sequence.token_ids, sequence.num_prompt_tokens, sampling)


def extremes(low: float, high: float, *named: float) -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from([low, high, *named]), st.floats(low, high))


def whole_range() -> st.SearchStrategy[dict[str, Any]]:
    """All that a client may ask for, and more."""
    stops = st.one_of(st.just(tuple(range(VOCAB + 3))), st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple))
    return st.fixed_dictionaries(
        {
            "temperature": extremes(0.0, 2.0, 5e-324, 1e-320, 1e-40, 1e-5, 1.1e-5, 1e-3),
            "top_p": extremes(5e-324, 1.0, 1e-40, 1e-9, 1 - 1e-9),
            "top_k": st.sampled_from([-1, 0, 1, VOCAB - 1, VOCAB, 2**31]),
            "min_p": extremes(0.0, 1.0, 5e-324, 1e-40, 1 - 1e-9),
            "repetition_penalty": extremes(5e-324, 1e6, 1e-40, 1e-6, 1.0),
            "presence_penalty": extremes(-1e300, 1e300, -2.0, 0.0, 2.0),
            "frequency_penalty": extremes(-1e300, 1e300, -2.0, 0.0, 2.0),
            "min_tokens": st.sampled_from([0, 1, 4, 2**31]),
            "stop_token_ids": stops,
            "seed": st.integers(0, 2**63 - 1),
            "choice": st.integers(0, 127),
            "logprobs": st.sampled_from([None, 0, 20]),
        }
    )


@settings(max_examples=300, deadline=None)
@given(
    batch=st.lists(whole_range(), min_size=1, max_size=4),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4, 1e30]),
    seed=st.integers(0, 100),
)
def test_no_request_can_get_a_token_that_the_vocabulary_does_not_have(
    batch: list[dict[str, Any]], scale: float, seed: int
) -> None:
    logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    sequences = [make_sequence(prompt=[1, 2, 9999], output=[3, 3, 5], **params) for params in batch]
    tokens = tokens_of(logits, sequences)
    assert all(0 <= token < VOCAB for token in tokens)
    assert tokens == [tokens_of(logits[i : i + 1], [sequence])[0] for i, sequence in enumerate(sequences)]


@settings(max_examples=30, deadline=None)
@given(params=whole_range(), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_logits_that_are_no_numbers_give_a_token_all_the_same(params: dict[str, Any], bad: float) -> None:
    logits = torch.full((2, VOCAB), bad)
    logits[1, 5:] = 1.0
    assert all(0 <= token < VOCAB for token in tokens_of(logits, [make_sequence(output=[3], **params)] * 2))
