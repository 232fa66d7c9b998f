"""What a newcomer calls first says what is wrong in one line."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NOBODY = "http://127.0.0.1:9"  # no port that anybody listens on


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=60)


class Served(http.server.BaseHTTPRequestHandler):
    """A list of models, and answers in two pieces that repeat what was asked."""

    asked: list[Any]

    def do_GET(self) -> None:
        self._send("application/json", json.dumps({"object": "list", "data": [{"id": "first", "object": "model"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        texts = [body["model"], " said so"]
        chunks = [{"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"} for _ in texts]
        for chunk, text in zip(chunks, texts, strict=True):
            chunk["choices"] = [{"index": 0, "delta": {"content": text}}]  # type: ignore[assignment]
        self._send("text/event-stream", "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks))

    def _send(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Served.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_picture_is_drawn_and_asked_about(url: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    assert run("examples/draw.py", "red", "circle", picture).returncode == 0
    assert run("examples/ask.py", "What is it?", picture, picture, "--url", url).stdout == "first said so\n"
    assert run("examples/ask.py", "And?", "--url", f"{url}/", "--model", "other").stdout == "other said so\n"
    parts = Served.asked[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert parts[-1]["text"] == "What is it?"


@pytest.mark.parametrize("end", ["/v1", "/v1/"])
def test_the_address_of_a_server_may_have_its_end_and_no_scheme(url: str, end: str) -> None:
    for given in (f"{url}{end}", f"{url.removeprefix('http://')}{end}"):
        assert run("examples/ask.py", "What is it?", "--url", given).stdout == "first said so\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["examples/ask.py", "What?", "--url", NOBODY], f"{NOBODY}: Connection error.\n"),
        (["examples/ask.py", "What?", "nowhere.png", "--url", NOBODY], "nowhere.png: No such file or directory\n"),
        (["examples/ask.py"], "error: the following arguments are required: question"),
        (["examples/ask.py", "What?", "--url", "ftp://there"], "--url: 'ftp://there' is not the address of a server, "),
        (["examples/ask.py", "What?", "--url", "http://me:port"], "such as http://127.0.0.1:8000\n"),
        (["examples/draw.py", "rde", "circle", "x.png"], "x.png: unknown color specifier: 'rde'\n"),
        (["examples/draw.py", "red"], "error: the following arguments are required"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(arguments: list[str], said: str) -> None:
    called = run(*arguments)
    assert called.returncode != 0
    assert said in called.stderr and "Traceback" not in called.stderr


def test_the_package_is_the_command() -> None:
    assert run("-m", "triptych", "version").stdout == run("-m", "triptych.cli", "version").stdout != ""
    refused = run("-m", "triptych", "simulate", "--placement", "1e")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "triptych: placement '1e': no instance serves prefill or decode\n"
