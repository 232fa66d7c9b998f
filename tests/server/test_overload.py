"""What clients are told when there is too much to do, or when their time is up."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.fakes import D, E, P, Stack, ids, image_part
from tests.server.test_leaving import on_loop, wait_until
from triptych.config import AdmissionConfig
from triptych.core import Role
from triptych.messages import Load
from triptych.router.waiting import MIN_SEQUENCES

LONG = ids("abc ") * 100


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack(lambda order: LONG, step_s=0.01, admission=AdmissionConfig(max_queue_s=1.0)) as stack:
        yield stack
        stack.wait_until_idle()


def fill(stack: Stack, pool: ThreadPoolExecutor, extra: int) -> None:
    """All of the window of text, with requests of which each seems to take long, and a queue behind it."""
    slow = Load(P, {}, {}, {}, {}, {"p": 0.1})
    on_loop(stack, lambda: stack.frontend.handle(slow))
    stack.cluster.frozen = True
    for i in range(MIN_SEQUENCES + extra):
        pool.submit(stack.chat, messages=[{"role": "user", "content": f"{i} " * 20}], timeout=2.0)
    wait_until(lambda: len(stack.cluster.prefilling) == MIN_SEQUENCES)


def test_an_overloaded_server_says_so_at_once_and_when_to_come_back(stack: Stack) -> None:
    with ThreadPoolExecutor(16) as pool:
        fill(stack, pool, extra=1)
        wait_until(lambda: stack.frontend.pressure().queued_s["p"] > 1.0)  # type: ignore[index]
        for fields in ({}, {"stream": True}):
            began = time.monotonic()
            response = stack.chat(**fields)
            assert time.monotonic() - began < 0.5
            assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "server_error"
        assert "triptych:requests_refused_total" in stack.http.get("/metrics").text
        assert stack.http.get("/health").status_code == 200


def test_without_instances_a_request_is_refused_before_it_is_read(stack: Stack) -> None:
    on_loop(stack, lambda: stack.cluster.lose(P))
    response = stack.http.post("/v1/chat/completions", content=b"not even JSON")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert int(response.headers["retry-after"]) >= 1
    health = stack.http.get("/health")
    assert (health.status_code, health.headers["retry-after"]) == (503, "1")
    on_loop(stack, lambda: stack.cluster.restore(P, Role.P))
    assert stack.chat(max_tokens=2).status_code == 200


def test_a_picture_is_refused_without_an_encoder_and_text_is_not(stack: Stack) -> None:
    on_loop(stack, lambda: stack.cluster.lose(E))
    content = [image_part("http://127.0.0.1:1/that-nobody-may-fetch.png")]
    assert stack.chat(messages=[{"role": "user", "content": content}]).status_code == 503, "it is not even looked at"
    assert stack.chat(max_tokens=2).status_code == 200
    on_loop(stack, lambda: stack.cluster.restore(E, Role.E))


# ---- deadlines


@pytest.mark.parametrize(
    ("fields", "headers"),
    [({"timeout": 0.1}, {}), ({}, {"x-request-timeout": "0.1"}), ({"timeout": 60}, {"x-request-timeout": "1e-1"})],
)
def test_a_request_whose_time_is_up_gets_504(stack: Stack, fields: dict[str, float], headers: dict[str, str]) -> None:
    body = {"model": "fake", "prompt": "Hi"} | fields
    began = time.monotonic()
    response = stack.http.post("/v1/completions", json=body | {"max_tokens": 300}, headers=headers)
    assert 0.1 <= time.monotonic() - began < 1.0
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    stack.wait_until_idle()


def test_in_a_stream_that_began_it_is_the_last_event(stack: Stack) -> None:
    response = stack.chat(stream=True, timeout=0.2)
    assert response.status_code == 200
    *_, last = [line for line in response.text.splitlines() if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert D in {instance for instance, _ in stack.cluster.aborted}


def test_media_that_do_not_come_in_time_end_the_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, Stack(allow_private_media_hosts=True) as stack:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/picture.png"
        began = time.monotonic()
        response = stack.chat(messages=[{"role": "user", "content": [image_part(url)]}], timeout=0.2)
        assert time.monotonic() - began < 2.0
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert 'requests_refused_total{model_name="fake",reason="deadline"} 1.0' in stack.http.get("/metrics").text


def test_a_body_that_does_not_come_in_time_ends_the_request(stack: Stack) -> None:
    def body() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.5)
        yield b"}"

    response = stack.http.post("/v1/chat/completions", content=body(), headers={"x-request-timeout": "0.1"})
    assert response.status_code == 504


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "86401"])
def test_a_header_that_is_no_time_is_refused_by_its_name(stack: Stack, value: str) -> None:
    response = stack.http.post("/v1/chat/completions", json={}, headers={"x-request-timeout": value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "x-request-timeout"
    assert "at most 86400" in error["message"]


@pytest.mark.parametrize("value", [0, -1, 86401])
def test_a_timeout_has_a_valid_range(stack: Stack, value: float) -> None:
    response: httpx.Response = stack.chat(timeout=value)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "timeout"
    assert "more than 0 and at most 86400" in error["message"]


def test_a_request_that_is_in_time_does_not_notice_its_deadline(stack: Stack) -> None:
    assert stack.chat(max_tokens=2, timeout=60).status_code == 200
