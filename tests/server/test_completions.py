"""Completions, tokenize and detokenize over real HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.fakes import ANSWER, Stack, ids
from triptych.messages import Submit


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack(max_model_len=256) as stack:
        yield stack


def complete(stack: Stack, **fields: Any) -> dict[str, Any]:
    response = stack.http.post("/v1/completions", json={"model": "fake", "max_tokens": 200} | fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_a_text_is_continued(stack: Stack) -> None:
    response = stack.openai.completions.create(model="fake", prompt="Once", max_tokens=200)
    assert (response.choices[0].text, response.choices[0].finish_reason) == (ANSWER, "stop")
    assert response.usage is not None
    assert response.usage.prompt_tokens == len(ids("Once"))


def test_sixteen_tokens_by_default(stack: Stack) -> None:
    stack.cluster.sent.clear()
    stack.http.post("/v1/completions", json={"prompt": "Once"})
    (submit,) = stack.cluster.orders(Submit)
    assert submit.sampling.max_tokens == 16


def test_token_ids_are_taken_as_they_are(stack: Stack) -> None:
    stack.cluster.sent.clear()
    complete(stack, prompt=[5, 6, 7])
    (submit,) = stack.cluster.orders(Submit)
    assert submit.token_ids == [5, 6, 7]


@pytest.mark.parametrize("prompts", [["a", "bc"], [[1, 2], [3]]])
def test_several_prompts_with_several_choices_each(stack: Stack, prompts: list[Any]) -> None:
    stack.cluster.sent.clear()
    answer = complete(stack, prompt=prompts, n=2, seed=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    submits = stack.cluster.orders(Submit)
    assert [submit.sampling.choice for submit in submits] == [0, 1, 0, 1]
    assert submits[0].token_ids == submits[1].token_ids != submits[2].token_ids
    assert answer["usage"]["prompt_tokens"] == len(submits[0].token_ids) + len(submits[2].token_ids)


def test_echo_says_the_prompt_first(stack: Stack) -> None:
    answer = complete(stack, prompt=["Once ", "Twice "], echo=True)
    assert [choice["text"] for choice in answer["choices"]] == [f"Once {ANSWER}", f"Twice {ANSWER}"]


def test_a_stream_is_the_answer_in_pieces(stack: Stack) -> None:
    stream = stack.openai.completions.create(
        model="fake", prompt="Once ", max_tokens=200, echo=True, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == f"Once {ANSWER}"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids(ANSWER)) + 1


def test_usage_counts_what_was_cached_once_for_each_prompt(stack: Stack) -> None:
    stack.cluster.num_cached = 3
    usage = complete(stack, prompt=["a", "bc"], n=2)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 6}
    stack.cluster.num_cached = 0
    assert complete(stack, prompt="a")["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_log_probabilities_know_where_their_token_stands(stack: Stack) -> None:
    choice = complete(stack, prompt="Once", logprobs=2, max_tokens=4)["choices"][0]
    logprobs = choice["logprobs"]
    pairs = zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
    assert all(choice["text"][offset:].startswith(token) for offset, token in pairs)
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert all(len(alternatives) == 2 for alternatives in logprobs["top_logprobs"])


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([""], "prompt[0]"),
        (["a", 1], "prompt[1]"),
        ([1, 2, 10**9], "prompt[2]"),
        ([[1], [-1]], "prompt[1][0]"),
        ([1, "a"], "prompt[0]"),
        ([[]], "prompt[0]"),
        (None, "prompt"),
        ("<|image_pad|>", "prompt"),
        ("a" * 5000, "prompt"),
    ],
)
def test_a_bad_prompt_is_named(stack: Stack, prompt: object, param: str) -> None:
    response = stack.http.post("/v1/completions", json={"model": "fake", "prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize("fields", [{"suffix": "x"}, {"best_of": 3}, {"echo": True, "logprobs": 1}])
def test_what_is_not_supported_is_refused(stack: Stack, fields: dict[str, Any]) -> None:
    response = stack.http.post("/v1/completions", json={"prompt": "a"} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(fields))


def test_tokenize_and_detokenize_are_inverse(stack: Stack) -> None:
    text = "Grüße aus Zürich 😀"
    tokenized = stack.http.post("/tokenize", json={"model": "fake", "prompt": text, "return_token_strs": True}).json()
    assert tokenized["tokens"] == ids(text)
    assert tokenized["count"] == len(tokenized["tokens"]) == len(tokenized["token_strs"])
    assert tokenized["max_model_len"] == 256
    detokenized = stack.http.post("/detokenize", json={"tokens": tokenized["tokens"]}).json()
    assert detokenized == {"prompt": text}


def test_tokenize_counts_what_a_chat_would_send(stack: Stack) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    count = stack.http.post("/tokenize", json={"messages": messages}).json()["count"]
    used = stack.http.post("/v1/chat/completions", json={"messages": messages}).json()["usage"]["prompt_tokens"]
    assert count == used


def test_bad_tokens_are_named(stack: Stack) -> None:
    response = stack.http.post("/detokenize", json={"tokens": [1, 10**6]})
    assert json.loads(response.text)["error"]["param"] == "tokens[1]"
