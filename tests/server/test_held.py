"""What the server holds of bodies and media of all requests together: bounded, told at once, and let go."""

import base64
import gc
import json
import random
import socket
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fakes import Stack, data_url, image_part, picture
from tests.server.test_leaving import body, on_loop, wait_until
from triptych.config import AdmissionConfig
from triptych.router import ledger
from triptych.router.ledger import body_cost
from triptych.server import http

KIB, MIB = 1 << 10, 1 << 20
BOUND = 8 * MIB  # 7 MiB of it for media
ROUTES = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]


@pytest.fixture
def stack() -> Iterator[Stack]:
    with make_stack() as stack:
        yield stack


@contextmanager
def make_stack(**changes: Any) -> Iterator[Stack]:
    admission = AdmissionConfig(max_media_held_bytes=BOUND)
    with Stack(admission=admission, allow_private_media_hosts=True, **changes) as stack:
        yield stack
        stack.wait_until_idle()
        stack.frontend.ledger.check_integrity()


def large_picture(num_bytes: int, number: int = 0) -> bytes:
    """Its header is all that the server looks at."""
    return picture() + number.to_bytes(4, "big") + bytes(num_bytes)


def ask(stack: Stack, *parts: Any, **fields: Any) -> httpx.Response:
    return stack.http.post("/v1/chat/completions", json=body(list(parts), **fields))


def connect(stack: Stack) -> socket.socket:
    host, port = stack.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def begin(stack: Stack, size: int, said: bytes = b"", *, route: str = ROUTES[0]) -> socket.socket:
    """A request with a body of that size, of which no more is said."""
    line = connect(stack)
    line.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (route.encode(), size, said))
    return line


def answer_of(line: socket.socket) -> tuple[int, dict[str, Any]]:
    response = HTTPResponse(line)
    response.begin()
    return response.status, json.loads(response.read())


def metric(stack: Stack, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(stack.http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    (value,) = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
    return float(value)


def assert_refused(response: httpx.Response) -> None:
    assert response.status_code == 503, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("overloaded", None)
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_that_does_not_fit_is_refused_from_its_head_and_others_are_answered(stack: Stack, route: str) -> None:
    with begin(stack, 3 * MIB, b"{", route=route):
        wait_until(lambda: stack.frontend.ledger.num_bytes == body_cost(3 * MIB))
        began = time.monotonic()
        with begin(stack, 3 * MIB) as second:
            status, answer = answer_of(second)
            assert time.monotonic() - began < 0.5
            assert (status, answer["error"]["code"]) == (503, "overloaded")
        assert_refused(ask(stack, image_part(data_url(large_picture(2 * MIB)))))
        assert stack.chat(max_tokens=2).status_code == 200
        assert metric(stack, "triptych:media_held_bytes") == body_cost(3 * MIB)
        assert metric(stack, "triptych:requests_refused_total", reason="overload") == 2
    stack.wait_until_idle()
    assert ask(stack, image_part(data_url(large_picture(2 * MIB)))).status_code == 200


def test_a_body_of_unknown_length_is_refused_as_soon_as_it_is_too_much(stack: Stack) -> None:
    with begin(stack, 2 * MIB):
        wait_until(lambda: stack.frontend.ledger.num_bytes > 0)
        response = stack.http.post(ROUTES[0], content=(bytes(64 * KIB) for _ in range(64)))
        assert_refused(response)


def test_a_request_that_is_alone_may_be_larger_than_the_bound(stack: Stack) -> None:
    assert ask(stack, image_part(data_url(large_picture(12 * MIB)))).status_code == 200
    assert stack.http.post("/tokenize", json={"prompt": "x" * (12 * MIB)}).status_code == 400


def test_who_is_refused_can_ask_again_on_the_same_connection(stack: Stack) -> None:
    with begin(stack, 3 * MIB) as first, begin(stack, 3 * MIB, bytes(MIB)) as second:
        wait_until(lambda: stack.frontend.ledger.num_bytes > 0)
        assert answer_of(second)[0] == 503
        first.close()
        second.sendall(bytes(2 * MIB))
        text = json.dumps(body(max_tokens=2)).encode()
        second.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (ROUTES[0].encode(), len(text)))
        second.sendall(text)
        assert answer_of(second)[0] == 200


@pytest.mark.parametrize("num_said", [0, 1])
def test_a_body_that_comes_slowly_gives_way_to_others(
    stack: Stack, num_said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "FAIR_GRACE_S", 0.2)
    with begin(stack, 3 * MIB, b"{" * num_said) as slow:
        wait_until(lambda: stack.frontend.ledger.num_bytes > 0)
        assert_refused(ask(stack, image_part(data_url(large_picture(2 * MIB)))))
        time.sleep(0.3)
        assert stack.chat(max_tokens=2).status_code == 200
        assert stack.frontend.ledger.num_bytes == body_cost(3 * MIB), "nobody needed its place"
        assert ask(stack, image_part(data_url(large_picture(2 * MIB)))).status_code == 200
        status, answer = answer_of(slow)
        assert (status, answer["error"]["code"]) == (408, "request_timeout")
        assert "overloaded" in answer["error"]["message"]


def test_clients_that_trickle_cannot_hold_the_budget(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FAIR_GRACE_S", 0.2)
    monkeypatch.setattr(http, "BODY_GRACE_S", 30.0)
    ended = threading.Event()
    with ExitStack() as lines:
        slow = [lines.enter_context(begin(stack, MIB)) for _ in range(4)]

        def trickle() -> None:
            while not ended.wait(0.02):
                for line in list(slow):
                    try:
                        line.sendall(b" ")
                    except OSError:
                        slow.remove(line)

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            time.sleep(0.4)
            for _ in range(3):
                assert ask(stack, image_part(data_url(large_picture(3 * MIB)))).status_code == 200
        finally:
            ended.set()
            thread.join()


# ---- from the body to the answer


@contextmanager
def unanswered(stack: Stack, *parts: Any) -> Iterator[None]:
    """Requests with a part each, that instances have and do not answer before the end of the block."""
    stack.cluster.frozen = True
    with ThreadPoolExecutor() as pool:
        futures = []
        for part in parts:
            futures.append(pool.submit(ask, stack, part, max_tokens=2))
            wait_until(lambda: len(stack.cluster.prefilling) == len(futures))
        yield
        on_loop(stack, stack.cluster.thaw)
    assert [future.result().status_code for future in futures] == [200] * len(parts)


def test_while_a_request_is_answered_its_media_count_and_not_their_text(stack: Stack) -> None:
    pictures = [large_picture(MIB, number) for number in range(3)]
    pictures += [pictures[0]] * 2
    with unanswered(stack, *[image_part(data_url(one)) for one in pictures]):
        assert stack.frontend.ledger.num_bytes == sum(map(len, pictures))
        assert_refused(ask(stack, image_part(data_url(pictures[0]))))
        assert metric(stack, "triptych:media_held_bytes") == sum(map(len, pictures))


def test_the_text_that_media_came_from_is_let_go(stack: Stack) -> None:
    """Memory of this process, with clients that keep nothing of what they said."""
    size, number = 600 * KIB, 8
    tracemalloc.start()
    try:
        stack.cluster.frozen = True
        before = tracemalloc.get_traced_memory()[0]
        with ExitStack() as lines:
            for i in range(number):
                said = json.dumps(body([image_part(data_url(large_picture(size, i)))])).encode()
                lines.enter_context(begin(stack, len(said), said))
                wait_until(lambda held=i + 1: len(stack.cluster.prefilling) == held)  # type: ignore[misc]
            del said
            held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert number * size < held < 1.2 * number * size
    wait_until(lambda: stack.frontend.ledger.num_bytes == 0)


def test_media_that_are_named_count_for_each_request_that_holds_them(stack: Stack) -> None:
    data = large_picture(2 * MIB)
    named = image_part(data_url(data)) | {"uuid": "a"}
    assert ask(stack, named, max_tokens=2).status_code == 200
    with unanswered(stack, *[{"type": "image_url", "uuid": "a"}] * 3):
        assert stack.frontend.ledger.num_bytes == 3 * len(data)
        assert_refused(ask(stack, {"type": "image_url", "uuid": "a"}))


def test_a_file_counts_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(large_picture(4 * MIB))
    with make_stack(allowed_local_media_path=str(tmp_path)) as stack:
        part = image_part(f"file://{tmp_path}/a.png")
        with unanswered(stack, part):
            assert_refused(ask(stack, part))


class Endless(BaseHTTPRequestHandler):
    """A picture that goes on for ever."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            self.wfile.write(picture())
            while True:
                self.wfile.write(bytes(64 * KIB))
                time.sleep(0.001)
        except OSError:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


def test_what_is_fetched_counts_as_it_comes(stack: Stack) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/endless.png"
            with unanswered(stack, image_part(data_url(picture()))):
                held = stack.frontend.ledger.num_bytes
                assert_refused(ask(stack, image_part(url)))
                wait_until(lambda: stack.frontend.ledger.num_bytes == held)
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    "content",
    [b"no JSON", json.dumps(body([image_part("data:image/png;base64,@@@@")])).encode(), b'{"model": "other"}'],
)
@pytest.mark.parametrize("route", ROUTES)
def test_a_request_that_fails_holds_nothing(stack: Stack, route: str, content: bytes) -> None:
    assert stack.http.post(route, content=content).status_code in (400, 404)
    stack.wait_until_idle()


def refused_in_its_body(stack: Stack) -> None:
    with begin(stack, 3 * MIB):
        wait_until(lambda: stack.frontend.ledger.num_bytes > 0)
        line = connect(stack)
        with line:
            line.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            line.sendall(b"%x\r\n" % (2 * MIB) + bytes(2 * MIB))
            assert answer_of(line)[0] == 503
    stack.wait_until_idle()


def left_in_its_body(stack: Stack) -> None:
    with begin(stack, 2 * MIB, bytes(MIB)):
        wait_until(lambda: stack.frontend.ledger.num_bytes > 0)
    stack.wait_until_idle()


def bad(content: bytes) -> Callable[[Stack], None]:
    def ask_badly(stack: Stack) -> None:
        with begin(stack, len(content), content) as line:
            assert answer_of(line)[0] == 400

    return ask_badly


FILLING = base64.b64encode(bytes(MIB)).decode()
FAILURES = {
    "refused": refused_in_its_body,
    "left": left_in_its_body,
    "no JSON": bad(b"[" + bytes(2 * MIB)),
    "no base64": bad(json.dumps(body([image_part(f"data:image/png;base64,{FILLING}@@@@")])).encode()),
    "not ASCII": bad(json.dumps(body([image_part(f"data:image/png;base64,{FILLING}é")])).encode()),
    "no picture": bad(json.dumps(body([image_part(f"data:image/png;base64,{FILLING}")])).encode()),
    "one of many": bad(json.dumps(body([image_part(data_url(large_picture(MIB))), image_part("ftp://x")])).encode()),
    "bad field": bad(json.dumps(body([image_part(data_url(large_picture(MIB)))], temperature=-1)).encode()),
    "too long": bad(json.dumps(body("x" * 2 * MIB)).encode()),
    "too much": bad(json.dumps(body([image_part(data_url(large_picture(MIB)))], max_tokens=9999)).encode()),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_is_let_go_at_once(stack: Stack, failure: str) -> None:
    """Without waiting for the garbage collector: it may not come for minutes."""
    FAILURES[failure](stack)  # what is imported or cached by the first one stays
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(3):
            FAILURES[failure](stack)
        stack.wait_until_idle()
        wait_until(lambda: tracemalloc.get_traced_memory()[0] - before < MIB)
    finally:
        tracemalloc.stop()
        gc.enable()


def test_a_client_that_leaves_in_its_body_holds_nothing(stack: Stack) -> None:
    with begin(stack, 3 * MIB, b"{" * MIB):
        wait_until(lambda: stack.frontend.ledger.num_bytes > 0)
    stack.wait_until_idle()


def test_base64_with_other_characters_is_refused_before_it_is_decoded(stack: Stack) -> None:
    text = "data:image/png;base64," + base64.b64encode(bytes(2 * MIB)).decode() + "é"
    response = ask(stack, image_part(text))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_base64")


def test_whatever_clients_do_together_nothing_stays_held(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FAIR_GRACE_S", 0.05)
    content = json.dumps(body([image_part(data_url(large_picture(MIB)))])).encode()
    answers: Counter[int] = Counter()

    def upload(rng: random.Random) -> None:
        """Some say all of it, some wait in between, some leave."""
        with begin(stack, len(content)) as line:
            for start in range(0, len(content), 300 * KIB):
                if rng.random() < 0.05:
                    return
                time.sleep(rng.choice([0.0, 0.0, 0.03]))
                line.sendall(content[start : start + 300 * KIB])
            answers[answer_of(line)[0]] += 1

    def leave_an_answer(rng: random.Random) -> None:
        part = image_part(data_url(large_picture(rng.randrange(2 * MIB))))
        with stack.http.stream("POST", ROUTES[0], json=body([part], stream=True)) as response:
            answers[response.status_code] += 1

    def run_out_of_time(rng: random.Random) -> None:
        part = image_part(data_url(large_picture(2 * MIB)))
        answers[ask(stack, part, timeout=rng.choice([0.001, 0.01, 0.1])).status_code] += 1

    def ask_for_text(rng: random.Random) -> None:
        response = stack.chat(max_tokens=2)
        assert response.status_code == 200, response.text

    def be_a_client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(12):
            with suppress(ConnectionError):  # 408 ends a connection, with what is still on its way to the server
                rng.choice([upload, upload, leave_an_answer, run_out_of_time, ask_for_text])(rng)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(be_a_client, range(12)))
    assert set(answers) <= {200, 408, 503, 504}, answers
    assert {200, 503} <= set(answers), answers
    stack.wait_until_idle()
