"""What many slow uploads at once do to a server that may hold little: memory, refusals, and text beside them.

    python benchmarks/slow_uploads.py

200 clients begin at the same moment to send a picture of 10 MB each, slowly, to a server with 64 MiB for bodies and
media; once with the length in the head, once in chunks of a body whose length nobody knows. Text is asked for
meanwhile, one request at a time. Told are what the server process grew by, how long refused clients waited for their
503 (from the head where it says the length, else from the last piece that they sent), and how long text took.
"""

import argparse
import asyncio
import base64
import io
import json
import math
import threading
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from measuring import add_result_options, verdict, write_result
from PIL import Image
from servers import triptych_server

from triptych.bench.report import percentile

MIB = 1 << 20
BOUND_MIB = 64
SIZE = 10_000_000  # bytes of a body
PIECE_S = 0.1
REFUSED_WITHIN_S = 0.1
TEXT = {"prompt": "hello", "max_tokens": 4}


def main() -> None:
    options = _options()
    with triptych_server("--placement", "1epd", "--max-media-held-mib", BOUND_MIB) as (url, pid):
        for _ in range(5):
            httpx.post(f"{url}/v1/completions", json=TEXT, timeout=30).raise_for_status()
        rows = {
            name: asyncio.run(_phase(url, pid, name, chunked, options))
            for name, chunked in {"one upload": None, "length told": False, "length unknown": True}.items()
        }
    verdicts = []
    for name in ("length told", "length unknown"):
        row = rows[name]
        verdicts += [
            verdict(f"{name}: growth of the server / bound", row["grown_bytes"] / (BOUND_MIB * MIB), 2.0),
            verdict(f"{name}: slowest refusal, s", row["refused_after_s"]["max"], REFUSED_WITHIN_S),
            verdict(f"{name}: answers that were neither 200 nor 503", row["others"], 0),
            verdict(f"{name}: text requests that were not answered", row["text_failures"], 0),
        ]
    write_result("slow-uploads", options, rows=rows, verdicts=verdicts)


def _times(seconds: list[float]) -> dict[str, float]:
    """Of nothing: never, so that a run in which nothing came is no success."""
    return {
        "p50": percentile(seconds, 50) if seconds else math.inf,
        "max": max(seconds, default=math.inf),
        "number": len(seconds),
    }


async def _phase(url: str, pid: int, name: str, chunked: bool | None, options: argparse.Namespace) -> dict[str, Any]:
    """`chunked` None: a single upload, for what one costs."""
    memory, ended = MemoryWatch(pid), asyncio.Event()
    text = asyncio.create_task(_ask_for_text(url, ended))
    body = _body()
    uploads = [_upload(url, body, bool(chunked), options) for _ in range(1 if chunked is None else options.clients)]
    outcomes = await asyncio.gather(*uploads)
    ended.set()
    text_s, text_failures = await text
    statuses = Counter(status for status, _ in outcomes)
    refused = sorted(after_s for status, after_s in outcomes if status == 503)
    row = {
        "statuses": {str(status): count for status, count in statuses.items()},
        "others": sum(count for status, count in statuses.items() if status not in (200, 503)),
        "refused_after_s": _times(refused),
        "text_s": _times(sorted(text_s)),
        "text_failures": text_failures,
        **memory.stop(),
    }
    print(f"    {name:16s} {row}", flush=True)
    return row


async def _upload(url: str, body: bytes, chunked: bool, options: argparse.Namespace) -> tuple[int, float]:
    """Status of the answer, and how long after what was said last it began."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    length = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % len(body)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%b\r\n\r\n" % length)
    answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
    said_at = time.perf_counter()
    step = int(len(body) * PIECE_S / options.seconds)
    for start in range(0, len(body), step):
        await asyncio.wait([answer], timeout=PIECE_S)
        if answer.done():
            break
        piece = body[start : start + step]
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        said_at = time.perf_counter() if chunked else said_at
    else:
        if chunked:
            writer.write(b"0\r\n\r\n")
    head = await answer
    after_s = time.perf_counter() - said_at
    writer.close()
    return int(head.split()[1]), after_s


async def _ask_for_text(url: str, ended: asyncio.Event) -> tuple[list[float], int]:
    """Seconds of each request, and how many were not answered."""
    took_s, failures = [], 0
    async with httpx.AsyncClient(timeout=30) as client:
        while not ended.is_set():
            began = time.perf_counter()
            response = await client.post(f"{url}/v1/completions", json=TEXT)
            took_s.append(time.perf_counter() - began)
            failures += response.status_code != 200
            await asyncio.sleep(PIECE_S)
    return took_s, failures


class MemoryWatch:
    """What the server process has in memory, from now on."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._first = self._most = self._process.memory_info().rss
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        self._stopped.set()
        self._thread.join()
        last = self._process.memory_info().rss
        grown = self._most - self._first
        return {"first_bytes": self._first, "most_bytes": self._most, "last_bytes": last, "grown_bytes": grown}

    def _watch(self) -> None:
        while not self._stopped.wait(0.02):
            self._most = max(self._most, self._process.memory_info().rss)


def _body() -> bytes:
    """A request with one picture, of which all but the beginning is filling."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    data = picture.getvalue() + bytes(SIZE * 3 // 4 - 1000)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 4}).encode()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0, help="that an upload takes")
    add_result_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.clients, options.seconds = 20, 2.0
    return options


if __name__ == "__main__":
    main()
