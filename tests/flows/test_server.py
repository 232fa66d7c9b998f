"""One real server on 1e1p1d, asked through the openai client: answers, streams, aborts, bad pictures, idle pools."""

import asyncio
import base64
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.checkpoints import make_checkpoint
from tests.flows.questions import Question, ask_all, differences, mixed_questions, picture, references
from tests.flows.servers import MODEL, cluster, is_idle, running, wait_until_idle

SEEDED: dict[str, Any] = {"temperature": 1.2, "seed": 7, "max_tokens": 12, "extra_body": {"top_k": 40, "min_p": 0.01}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with running(folder, "1e1p1d") as url:
        yield url


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=60, max_retries=0) as client:
        yield client


def question(num_pictures: int = 2, seed: int = 3) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    parts = [{"type": "image", "image": picture(rng, 90, 70)} for _ in range(num_pictures)]
    return Question([{"role": "user", "content": [*parts, {"type": "text", "text": "what is it"}]}], 8).as_openai()


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": question(), "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the second time, the prompt's KV is there


def test_a_seeded_sample_is_the_same_alone_and_in_a_crowd(server: str, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": question(), **SEEDED}
    alone = client.chat.completions.create(**asked).choices[0].message.content

    async def crowd() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as many:
            answers = await asyncio.gather(*(many.chat.completions.create(**asked) for _ in range(6)))
            return [answer.choices[0].message.content for answer in answers]

    assert set(asyncio.run(crowd())) == {alone}


def test_a_seeded_sample_does_not_depend_on_the_placement(folder: Path, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": question(), **SEEDED, "n": 3}
    here = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    with running(folder, "1epd") as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as other:
        there = [choice.message.content for choice in other.chat.completions.create(**asked).choices]
    assert here == there
    assert len(set(here)) > 1, "the choices of one request draw from different streams"


def test_logprobs_tell_the_greedy_choice_first(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=question(), max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None
    assert len(tokens) == answer.usage.completion_tokens  # type: ignore[union-attr]
    for token in tokens:
        assert token.token == token.top_logprobs[0].token
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )


def test_nixl_moves_the_same_bytes(folder: Path) -> None:
    """The whole path with one-sided reads by NIXL between real processes."""
    questions = mixed_questions(12, seed=5)
    with running(folder, "1e1p1d", transfer="nixl") as url:
        answers = asyncio.run(ask_all(url, questions))
        assert not differences(folder, answers, references(folder, 12, seed=5))
        wait_until_idle(url, timeout_s=2)


def test_a_client_that_leaves_frees_its_blocks_within_a_second(server: str) -> None:
    body = {"model": MODEL, "messages": question(3, seed=11), "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", f"{server}/v1/chat/completions", json=body) as response,
    ):
        lines = response.iter_lines()  # as long as it is held: httpx closes what nobody iterates over any more
        next(lines)
        deadline = time.monotonic() + 5
        while is_idle(view := cluster(server)):
            assert time.monotonic() < deadline, f"the request never showed up in the cluster's state: {view}"
            time.sleep(0.02)
    wait_until_idle(server, timeout_s=1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_truncated_picture_is_refused_by_name_and_the_next_request_succeeds(
    client: openai.OpenAI, server: str, stream: bool
) -> None:
    messages = question(2, seed=13)
    part = messages[0]["content"][1]
    head, _, data = part["image_url"]["url"].partition(",")
    part["image_url"]["url"] = f"{head},{base64.b64encode(base64.b64decode(data)[:-200]).decode()}"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, stream=stream)
    assert refused.value.param == "messages[0].content[1].image_url"
    assert "messages[0].content[1].image_url: the image cannot be decoded: " in refused.value.message
    assert client.chat.completions.create(model=MODEL, messages=question(), max_tokens=4).choices
    wait_until_idle(server, timeout_s=2)


def test_more_sequences_than_the_pools_hold_wait_their_turn(folder: Path) -> None:
    """Blocks for two or three sequences at a time: the rest queues, decodes are offloaded, nothing fails."""
    questions = [Question(q.messages, 60) for q in mixed_questions(10, seed=21, max_pictures=3)]
    with running(folder, "1e1pd", kv_cache_bytes=1 << 20, max_model_len=400, embedding_cache_bytes=1 << 16) as url:
        answers = asyncio.run(ask_all(url, questions, extra_body={"ignore_eos": True}))
        assert all(answer.usage.completion_tokens == 60 for answer in answers)
        wait_until_idle(url, timeout_s=2)
    with running(folder, "1e1pd") as url:
        assert [
            a.choices[0].message.content for a in asyncio.run(ask_all(url, questions, extra_body={"ignore_eos": True}))
        ] == [answer.choices[0].message.content for answer in answers]
