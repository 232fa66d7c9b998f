"""The load generator against a real server, and against servers that misbehave."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server.fakes import Stack, ids
from triptych.bench import BenchOptions, Kind, run
from triptych.errors import InstanceError
from triptych.messages import Submit

FIELDS: dict[str, Any] = {"requests": 12, "output_tokens": 5, "text_words": 4, "image_sizes": ("32x32", "48x32")}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack(lambda order: ids("one two three four five six"), step_s=0.002, max_model_len=4096) as stack:
        yield stack


def measured(stack: Stack, path: Path, **fields: Any) -> dict[str, Any]:
    assert run(BenchOptions(**FIELDS | {"url": stack.url, "json_path": str(path)} | fields)) == 0
    return dict(json.loads(path.read_text()))


def test_a_closed_loop_measures_every_request(stack: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(stack, tmp_path / "r.json", concurrency=4, images=2, slo_ttft_ms=10_000.0)
    assert [record["index"] for record in result["requests"]] == list(range(12))
    assert all(record["completion_tokens"] == 5 for record in result["requests"])
    assert all(0 < record["ttft_s"] <= record["e2e_s"] for record in result["requests"])
    assert result["summary"]["slo_attainment"] == 1
    assert result["summary"]["num_failed"] == 0
    assert result["environment"]["cpu"]
    assert "api_key" not in result["options"]
    shown = capsys.readouterr().out
    assert "TTFT" in shown
    assert "goodput" in shown


def test_poisson_arrivals_follow_the_seed(stack: Stack, tmp_path: Path) -> None:
    first, second = (measured(stack, tmp_path / "r.json", rate=200.0, seed=3) for _ in range(2))
    due = [[record["scheduled_s"] for record in result["requests"]] for result in (first, second)]
    assert due[0] == due[1] == sorted(due[0])
    assert due[0][-1] > 0
    assert all(record["sent_s"] > record["scheduled_s"] - 0.002 for record in first["requests"])


def test_all_at_once(stack: Stack, tmp_path: Path) -> None:
    result = measured(stack, tmp_path / "r.json", rate=float("inf"))
    assert result["options"]["rate"] == "inf"
    assert {record["scheduled_s"] for record in result["requests"]} == {0}


def test_prompt_tokens_are_found_by_asking(stack: Stack, tmp_path: Path) -> None:
    result = measured(stack, tmp_path / "r.json", prompt_tokens=200)
    counts = [record["prompt_tokens"] for record in result["requests"]]
    assert sum(counts) / len(counts) == pytest.approx(200, rel=0.15)


def test_the_figures_of_a_mix_are_told_apart(stack: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = (Kind(name="text", prompt_tokens=150, output_tokens=3), Kind(name="pictures", images=2, output_tokens=5))
    result = measured(stack, tmp_path / "r.json", kinds=kinds, rate=500.0)
    figures = result["summary"]["kinds"]
    assert {name: figures[name]["num_requests"] for name in figures} == {"text": 6, "pictures": 6}
    assert result["summary"]["num_requests"] == 12
    for record in result["requests"]:
        assert record["completion_tokens"] == {"text": 3, "pictures": 5}[record["kind"]]
    assert result["summary"]["images_per_s"] > 0
    assert "pictures TTFT" in capsys.readouterr().out


def test_the_cpu_time_of_the_server_and_of_others_is_told_apart(stack: Stack, tmp_path: Path) -> None:
    result = measured(stack, tmp_path / "r.json", server_pid=os.getpid(), requests=100)  # longer than a clock tick
    cpu_s = result["summary"]["cpu_s"]
    assert cpu_s["server"] > 0
    assert cpu_s["others"] >= 0


def test_ignore_eos_is_sent_only_if_asked_for(stack: Stack, tmp_path: Path) -> None:
    stack.cluster.sent.clear()
    measured(stack, tmp_path / "r.json", ignore_eos=True, requests=1, warmup=0)
    (submit,) = stack.cluster.orders(Submit)
    assert submit.sampling.ignore_eos


def test_the_key_is_sent() -> None:
    with Stack(api_key="secret") as stack:
        options = FIELDS | {"url": f"{stack.url}/v1", "requests": 2}
        assert run(BenchOptions(**options, api_key="secret")) == 0
        with pytest.raises(InstanceError, match="401"):
            run(BenchOptions(**options))


def test_failed_requests_are_counted_shown_and_make_the_exit_code(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    options = BenchOptions(**FIELDS | {"url": stack.url, "model": "other", "warmup": 0})
    assert run(options) == 1
    shown = capsys.readouterr().out
    assert "12 failed" in shown
    assert "12 x status 404" in shown


def test_no_server_is_said_at_once() -> None:
    with pytest.raises(InstanceError, match="connection"):
        run(BenchOptions(url="http://127.0.0.1:9", requests=1))


@contextmanager
def broken_server(*answers: bytes) -> Iterator[str]:
    """Gives each connection one of the answers, then closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)
        assert not thread.is_alive()


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
TEXT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
ERROR = b'data: {"error":{"message":"it broke"}}\n\n'


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "not an event stream"),
        (STREAM, "no token"),
        (STREAM + TEXT, "without [DONE]"),
        (STREAM + TEXT + ERROR + b"data: [DONE]\n\n", "it broke"),
        (STREAM + b"data: {nonsense\n\n", "unreadable"),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 4\r\n\r\nbang", "status 500: bang"),
        (b"garbage\r\n\r\n", "unreadable"),
    ],
)
def test_a_broken_answer_is_a_failure_with_its_reason(
    answer: bytes, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with broken_server(answer) as url:
        assert run(BenchOptions(url=url, model="m", requests=1, warmup=0, timeout_s=5)) == 1
    assert text in capsys.readouterr().out


def test_a_silent_server_is_given_up_on(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert run(BenchOptions(url=url, model="m", requests=1, warmup=0, timeout_s=0.2)) == 1
    assert "within 0.2 s" in capsys.readouterr().out
