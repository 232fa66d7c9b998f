"""Clients that leave, instances that fail, servers that stop: nobody keeps anything."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.fakes import D, E, P, Stack, data_url, ids, image_part, picture
from triptych.core import FinishReason, InstanceId, RequestId, Role
from triptych.messages import Abort, AnyMessage, Failed, Located, Tokens, TokenUpdate

LONG = ids("abc ") * 100


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack(lambda order: LONG, step_s=0.01) as stack:
        yield stack
        stack.wait_until_idle()


def test_a_client_that_leaves_a_stream_takes_its_request_along(stack: Stack) -> None:
    with stack.http.stream("POST", "/v1/chat/completions", json=body(stream=True)) as response:
        next(response.iter_lines())
    stack.wait_until_idle()
    assert D in {instance for instance, _ in stack.cluster.aborted} <= {P, D}


def test_a_client_that_leaves_before_the_first_token_takes_its_request_along(stack: Stack) -> None:
    stack.cluster.frozen = True
    content = [image_part(data_url(picture()))]
    for stream in (False, True):
        stack.cluster.aborted.clear()
        with pytest.raises(httpx.ReadTimeout):
            stack.http.post("/v1/chat/completions", json=body(content, stream=stream), timeout=0.2)
        stack.wait_until_idle()
        assert {instance for instance, _ in stack.cluster.aborted} == {E, P}


def test_a_client_that_leaves_while_it_waits_for_a_whole_answer_takes_all_choices_along(stack: Stack) -> None:
    with pytest.raises(httpx.ReadTimeout):
        stack.http.post("/v1/chat/completions", json=body(n=3), timeout=0.2)
    stack.wait_until_idle()
    assert len({request for instance, request in stack.cluster.aborted if instance == D}) == 3


def test_a_failure_before_the_first_token_is_a_status_also_for_a_stream(stack: Stack) -> None:
    stack.cluster.frozen = True
    for stream in (False, True):
        response = fail_while(stack, Failed(RequestId(""), "too long for the pool: 9 blocks of 4", 400), stream)
        assert response.status_code == 400
        assert "9 blocks of 4" in response.json()["error"]["message"]


def test_a_failure_after_the_first_token_is_the_last_event_of_a_stream(stack: Stack) -> None:
    with stack.http.stream("POST", "/v1/chat/completions", json=body(stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        tell_about_all(stack, Failed(RequestId(""), "broken", 500))
        events = [line for line in lines if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["message"] == "broken"
    stack.wait_until_idle()
    assert D in {instance for instance, _ in stack.cluster.aborted}


@pytest.mark.parametrize("lost", [E, P, D])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_does_not_notice_that_an_instance_is_lost(stack: Stack, lost: InstanceId, stream: bool) -> None:
    fields = {"messages": body([image_part(data_url(picture()))])["messages"], "max_tokens": 40}
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(stack.chat, stream=stream, **fields)
        wait_until(lambda: bool(stack.cluster.decoding if lost == D else stack.cluster.sent))
        on_loop(stack, lambda: stack.cluster.lose(lost))
        time.sleep(0.02)
        on_loop(stack, lambda: stack.cluster.restore(lost, Role(lost[0])))
        text = asking.result().text
    if stream:
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
        assert "".join(pieces) == "abc " * 10
    else:
        assert json.loads(text)["choices"][0]["message"]["content"] == "abc " * 10


def test_messages_about_unknown_requests_give_back_what_is_held(stack: Stack) -> None:
    unknown = RequestId("gone")
    on_loop(stack, lambda: stack.frontend.handle(Tokens(D, [TokenUpdate(unknown, 1, 0)])))
    on_loop(stack, lambda: stack.frontend.handle(Tokens(D, [TokenUpdate(unknown, 1, 0, FinishReason.STOP)])))
    on_loop(stack, lambda: stack.frontend.handle(Located(unknown, InstanceId("d7"))))
    on_loop(stack, lambda: stack.frontend.handle(Failed(unknown, "x", 500)))
    assert stack.cluster.sent == [(D, Abort(unknown)), (InstanceId("d7"), Abort(unknown))]


def test_a_stopping_server_says_so(stack: Stack) -> None:
    with stack.http.stream("POST", "/v1/chat/completions", json=body(stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        on_loop(stack, stack.frontend.close)
        assert "shutting down" in "".join(lines)


def test_a_server_that_drains_finishes_what_runs_and_refuses_what_is_new(stack: Stack) -> None:
    async def drained() -> None:
        await stack.frontend.drained()

    with ThreadPoolExecutor() as pool:
        asking = pool.submit(stack.chat, max_tokens=40)
        wait_until(lambda: bool(stack.cluster.decoding))
        on_loop(stack, stack.frontend.drain)
        draining = asyncio.run_coroutine_threadsafe(drained(), stack.loop)
        refused = stack.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        assert not draining.done()
        assert asking.result().json()["choices"][0]["message"]["content"] == "abc " * 10
        draining.result(5)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def body(content: object = "Hi", **fields: object) -> dict[str, object]:
    return {"model": "fake", "messages": [{"role": "user", "content": content}]} | fields


def on_loop(stack: Stack, action: object) -> None:
    async def run() -> None:
        action()  # type: ignore[operator]

    asyncio.run_coroutine_threadsafe(run(), stack.loop).result(5)


def tell_about_all(stack: Stack, failure: Failed) -> None:
    def tell() -> None:
        for request_id in [*stack.cluster.prefilling, *stack.cluster.decoding]:
            message: AnyMessage = Failed(request_id, failure.message, failure.status, failure.code, failure.unit)
            stack.frontend.handle(message)

    on_loop(stack, tell)


def fail_while(stack: Stack, failure: Failed, stream: bool) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(base_url=stack.url) as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=body(stream=stream)))
            deadline = time.monotonic() + 5
            while stack.cluster.idle and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            tell_about_all(stack, failure)
            return await asking

    return asyncio.run(ask())
