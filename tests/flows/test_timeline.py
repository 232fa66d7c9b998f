"""`triptych serve --timeline`: what a real server did is in the file, whole, however it was told to stop."""

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import openai
import pytest

from tests.checkpoints import make_checkpoint
from tests.faults.soak import served
from tests.flows.questions import Question, picture
from tests.flows.servers import MODEL, running, wait_until_idle
from triptych.errors import ConfigError

TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("checkpoint"))


def ask(url: str, max_tokens: int = TOKENS, model: str = MODEL) -> None:
    parts = [{"type": "image", "image": picture(random.Random(1), 90, 70)}, {"type": "text", "text": "what is it"}]
    messages = Question([{"role": "user", "content": parts}], max_tokens).as_openai()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        extra = {"ignore_eos": True}
        client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, extra_body=extra)


def test_steps_requests_and_switches_of_a_server_are_on_one_clock(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with running(folder, "1e1p2d", timeline=str(path), streamed_prefill=False) as url:
        ask(url)
        assert httpx.post(f"{url}/cluster/instances/i3/role", json={"role": "p"}, timeout=60).status_code == 200
        wait_until_idle(url, 10.0)
        assert httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": 7}).status_code == 400
        assert httpx.post(f"{url}/cluster/placement", json={"placement": "1e1p1d"}, timeout=60).status_code == 200
    events = json.loads(path.read_text())
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sorted(tracks.values()) == ["i0", "i1", "i2", "i3"]
    marks = [(tracks[event["tid"]], event["name"]) for event in events if event["ph"] == "i"]
    assert marks[:4] == [("i0", "e"), ("i1", "p"), ("i2", "d"), ("i3", "d")]
    assert ("i3", "d to p") in marks
    assert [name for _, name in marks].count("stopped") == 1, "one that is no longer wanted is not lost"
    steps = [event for event in events if event["ph"] == "X"]
    made = Counter((tracks[step["tid"]][:2], step["name"]) for step in steps)
    assert made["i0", "encode"] == made["i1", "prefill"] == 1
    assert sum(count for (_, name), count in made.items() if name == "decode") == TOKENS - 1
    request = [event for event in events if event.get("cat") == "request"]
    begun, first, ended = request[0]["ts"], request[2]["ts"], request[-1]["ts"]
    assert request[-1]["args"] == {"outcome": "finished", "tokens": TOKENS}
    encode, prefill = (next(step for step in steps if step["name"] == name) for name in ("encode", "prefill"))
    assert begun < encode["ts"] < encode["ts"] + encode["dur"] < prefill["ts"]
    assert prefill["ts"] + prefill["dur"] < first < ended
    assert all(begun < step["ts"] < ended for step in steps)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_file_is_whole_after_a_signal_in_the_middle_of_an_answer(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "trace.json"
    with served(folder, "1epd", "--timeline", path, "--drain-timeout-s", 0.1) as (url, pid):
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        asking = threading.Thread(target=_ask_and_be_left, args=(url, name))
        asking.start()
        while b'"decode"' not in path.read_bytes():
            assert asking.is_alive(), "the answer came too soon"
            time.sleep(0.02)
        os.kill(pid, number)
        asking.join()
    events = json.loads(path.read_text())
    request = [event for event in events if event.get("cat") == "request"]
    assert request[-1]["args"]["outcome"] == "shutting_down"
    assert [event["ph"] for event in request] == list("bbebee")


def _ask_and_be_left(url: str, model: str) -> None:
    with contextlib.suppress(openai.OpenAIError):
        ask(url, 1500, model)


def test_a_file_that_cannot_be_written_is_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"--timeline: .* cannot be written"),
        running(folder, "1epd", timeline=str(tmp_path / "missing" / "trace.json")),
    ):
        pass
