"""A client that looks closely: every event of a stream, every choice, every token, and what is wrong with them."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT_S = 120.0
MAX_RETURNS = 10


@dataclass
class Choice:
    """`tokens` are (text, bytes) as the log-probabilities name them, with their values in `logprobs`."""

    text: str = ""
    tokens: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Answer:
    """`wrong` is what no answer may have: an error, or a stream that is none."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: tuple[int, int] | None = None  # tokens of the prompt and of the answer
    wrong: str | None = None
    code: str | None = None  # of the error
    status: int = 0
    retry_after: str | None = None
    times: list[float] = field(default_factory=list)  # when events with content came


@dataclass(frozen=True)
class Ask:
    """One request: `body` without the fields that are the same for all. A client that leaves does so after
    `leaves_after` events of the stream, or, of an answer in one piece, that many milliseconds. One that `comes_again`
    does what it is told when a stage is missing."""

    body: dict[str, Any]
    stream: bool
    leaves_after: int | None = None
    comes_again: bool = False


async def ask_all(url: str, asks: list[Ask]) -> list[Answer]:
    """All at once."""
    async with make_client(url) as client:
        return await asyncio.gather(*(ask(client, each) for each in asks))


def make_client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)


async def ask(client: httpx.AsyncClient, wanted: Ask, growing: Answer | None = None) -> Answer:
    """Never raises: what goes wrong is in the answer. `growing` can be watched while it is filled."""
    answer = await _ask_once(client, wanted, growing or Answer())
    for _ in range(MAX_RETURNS):
        if not (wanted.comes_again and answer.code == "unavailable" and answer.retry_after and not answer.choices):
            break
        await asyncio.sleep(float(answer.retry_after))
        answer = await _ask_once(client, wanted, Answer())
    return answer


async def _ask_once(client: httpx.AsyncClient, wanted: Ask, answer: Answer) -> Answer:
    body = {"stream": wanted.stream} | wanted.body
    if wanted.stream:
        body["stream_options"] = {"include_usage": True}
    try:
        if wanted.stream:
            await _stream(client, body, answer, wanted.leaves_after)
        elif wanted.leaves_after is None:
            await _whole(client, body, answer)
        else:
            await _leave(client, body, answer, wanted.leaves_after / 1e3)
    except httpx.HTTPError as error:
        answer.wrong = f"{type(error).__name__}: {error}"
    return answer


async def _whole(client: httpx.AsyncClient, body: dict[str, Any], answer: Answer) -> None:
    response = await client.post("/v1/chat/completions", json=body)
    if not _is_fine(response, response.text, answer):
        return
    content = response.json()
    for each in content["choices"]:
        choice = answer.choices[each["index"]] = Choice(each["message"]["content"] or "", finish=each["finish_reason"])
        _take_logprobs(choice, each)
    _take_usage(answer, content)


async def _leave(client: httpx.AsyncClient, body: dict[str, Any], answer: Answer, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await _whole(client, body, answer)
    except TimeoutError:
        return


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], answer: Answer, leaves_after: int | None) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if not _is_fine(response, (await response.aread()).decode() if response.status_code != 200 else "", answer):
            return
        done, count = False, 0
        async for line in _lines(response):
            if count == leaves_after:
                return
            count += 1
            if done:
                answer.wrong = f"goes on after its end: {line}"
            done |= line == "data: [DONE]"
            if not done:
                _take_event(answer, json.loads(line[6:]))
    if not done and answer.wrong is None:
        answer.wrong = "the stream has no end"


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Of the events' data. Only line feeds end them: httpx's own takes all that Unicode calls an end of a line."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield line.decode()


def _is_fine(response: httpx.Response, text: str, answer: Answer) -> bool:
    answer.status, answer.retry_after = response.status_code, response.headers.get("retry-after")
    if response.status_code != 200:
        answer.wrong = f"{response.status_code}: {text[:300]}"
        answer.code = _code(text)
    return response.status_code == 200


def _code(text: str) -> str | None:
    try:
        found: str | None = json.loads(text)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return found


def _take_event(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.wrong, answer.code = f"an error in the stream: {event['error']}", event["error"].get("code")
        return
    answer.times.append(asyncio.get_running_loop().time())
    for each in event["choices"]:
        choice = answer.choices.setdefault(each["index"], Choice())
        if choice.finish is not None:
            answer.wrong = f"choice {each['index']} goes on after it finished: {each}"
        choice.text += each["delta"].get("content") or ""
        choice.finish = each.get("finish_reason")
        _take_logprobs(choice, each)
    _take_usage(answer, event)


def _take_logprobs(choice: Choice, each: dict[str, Any]) -> None:
    for token in (each.get("logprobs") or {}).get("content") or []:
        choice.tokens.append((token["token"], tuple(token["bytes"] or ())))
        choice.logprobs.append(token["logprob"])


def _take_usage(answer: Answer, content: dict[str, Any]) -> None:
    if usage := content.get("usage"):
        answer.usage = (usage["prompt_tokens"], usage["completion_tokens"])


def departed(answer: Answer, wanted: Answer) -> str | None:
    """How what a client got before it left is not the beginning of what it should have got."""
    if answer.wrong is not None:
        return answer.wrong
    for index, choice in answer.choices.items():
        if not wanted.choices[index].text.startswith(choice.text):
            return f"choice {index} began as {choice.text!r}, not as {wanted.choices[index].text!r}"
    return None


def difference(answer: Answer, wanted: Answer) -> str | None:
    """How an answer is not the one that it should be: by text, every token, reasons to finish, counts."""
    if answer.wrong is not None:
        return answer.wrong
    if wanted.wrong is not None:
        return f"nothing to compare with: {wanted.wrong}"
    if answer.choices.keys() != wanted.choices.keys():
        return f"choices {sorted(answer.choices)}, not {sorted(wanted.choices)}"
    for index, choice in answer.choices.items():
        other = wanted.choices[index]
        if (choice.text, choice.tokens, choice.finish) != (other.text, other.tokens, other.finish):
            return f"choice {index} is {choice}, not {other}"
        if any(abs(a - b) > 1e-3 for a, b in zip(choice.logprobs, other.logprobs, strict=True)):
            return f"choice {index} has log-probabilities {choice.logprobs}, not {other.logprobs}"
    if answer.usage != wanted.usage:
        return f"usage {answer.usage}, not {wanted.usage}"
    return None
