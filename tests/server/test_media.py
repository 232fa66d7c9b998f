"""Media from everywhere, against a real web server, and never from where it must not come."""

import asyncio
import binascii
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.server.fakes import data_url, picture, processor, reservation
from triptych.config import ServerConfig
from triptych.errors import RequestError
from triptych.model.headers import ImageHeader
from triptych.server.fetch import Fetcher, is_public
from triptych.server.media import MediaItem, MediaLoader
from triptych.server.media_source import MAX_FETCHES, MediaSource

MiB = 1 << 20
PICTURE = picture(40, 30)
SIZES = [(40, 30), (8, 9), (40, 30)]
PRIVATE = (
    "10.0.0.1 172.16.3.4 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1 255.255.255.255 240.0.0.1 ::1 :: fe80::1 "
    "fe80::1%eth0 fc00::1 ff02::1 ::ffff:10.0.0.1 64:ff9b::10.0.0.1 2002:a00:1::"
)


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name, _, rest = self.path.removeprefix("/").partition("?")
        getattr(self, f"page_{name}")(rest)

    def page_picture(self, _: str) -> None:
        self.answer(200, PICTURE, [("content-length", str(len(PICTURE)))])

    def page_to(self, target: str) -> None:
        self.answer(302, b"", [("location", target), ("content-length", "0")])

    def page_loop(self, _: str) -> None:
        self.page_to("/loop")

    def page_missing(self, _: str) -> None:
        self.answer(404, b"", [("content-length", "0")])

    def page_declared(self, _: str) -> None:
        self.answer(200, b"", [("content-length", "1000000")])

    def page_endless(self, _: str) -> None:
        self.answer(200, b"x" * 200_000, [])

    def page_slow(self, _: str) -> None:
        self.answer(200, b"x", [("content-length", "10")])
        time.sleep(1)

    def page_garbage(self, _: str) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def answer(self, status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def get(url: str, *, is_allowed: Callable[[str], bool] = lambda address: True, timeout_s: float = 5) -> bytes:
    async def run() -> bytes:
        fetcher = Fetcher(max_bytes=100_000, timeout_s=timeout_s, is_allowed=is_allowed)
        try:
            return await fetcher.get(url, lambda num_bytes: None)
        finally:
            await fetcher.close()

    return asyncio.run(run())


def load(*urls: str, **changes: object) -> list[MediaItem]:
    async def run() -> list[MediaItem]:
        loader = MediaLoader(ServerConfig(**changes), processor().modalities)  # type: ignore[arg-type]
        try:
            sources = [MediaSource(f"field{i}", "image", url=url) for i, url in enumerate(urls)]
            return await loader.load(sources, reservation())
        finally:
            await loader.close()

    return asyncio.run(run())


def test_a_picture_is_fetched_also_behind_a_redirect(port: int) -> None:
    base = f"http://127.0.0.1:{port}"
    for url in (
        f"{base}/picture",
        f"http://localhost:{port}/picture",
        f"{base}/to?/picture",
        f"{base}/to?{base}/picture",
    ):
        assert get(url) == PICTURE


def test_items_come_in_order_with_size_hash_and_field(port: int) -> None:
    url = f"http://127.0.0.1:{port}/picture"
    first, second, third = load(url, data_url(picture(8, 9)), url, allow_private_media_hosts=True)
    assert [item.header for item in (first, second, third)] == [ImageHeader(*size) for size in SIZES]
    assert first.hash == third.hash != second.hash
    assert len(first.hash) == 16
    assert [item.field for item in (first, second, third)] == ["field0", "field1", "field2"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "[::ffff:127.0.0.1]"]
)
def test_this_host_is_refused_however_it_is_spelt(port: int, host: str) -> None:
    with pytest.raises(RequestError, match=r"not on the public internet|cannot resolve"):
        get(f"http://{host}:{port}/picture", is_allowed=is_public)


@pytest.mark.parametrize(
    "address",
    PRIVATE.split(),
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


def test_each_redirect_is_checked_again(port: int) -> None:
    url = f"http://127.0.0.1:{port}/to?http://127.0.0.2:{port}/picture"
    with pytest.raises(RequestError, match=r"127\.0\.0\.2.* is not on the public internet"):
        get(url, is_allowed=lambda address: address == "127.0.0.1")
    for scheme in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x"):
        with pytest.raises(RequestError, match="only http and https"):
            get(f"http://127.0.0.1:{port}/to?{scheme}")


def test_a_name_is_asked_for_once_so_that_a_second_answer_cannot_matter(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["127.0.0.1", "127.0.0.2"])

    def resolve(host: str, port: int, **options: object) -> list[tuple[object, ...]]:
        return [(2, 1, 6, "", (next(answers), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = f"http://rebinding.example:{port}/picture"
    assert get(url, is_allowed=lambda address: address == "127.0.0.1") == PICTURE
    assert next(answers) == "127.0.0.2"


def test_names_that_nobody_resolves_hold_up_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of the event loop, which read headers and decode base64, are not those that wait for name servers."""
    answered, asked = threading.Event(), []

    def resolve(host: str, port: int, **options: object) -> list[tuple[object, ...]]:
        asked.append(host)
        assert answered.wait(20)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    async def compete() -> None:
        fetcher = Fetcher(max_bytes=1000, timeout_s=20)
        lost = [asyncio.create_task(fetcher.get(f"http://a{i}.example/", lambda n: None)) for i in range(MAX_FETCHES)]
        try:
            async with asyncio.timeout(10):
                while len(asked) < min(MAX_FETCHES, (os.cpu_count() or 1) + 4):  # as many as the loop has threads
                    await asyncio.sleep(0.01)
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 10) == "done"
        finally:
            answered.set()
            outcomes = await asyncio.gather(*lost, return_exceptions=True)
            await fetcher.close()
        assert {getattr(outcome, "code", None) for outcome in outcomes} == {"media_unreachable"}

    asyncio.run(compete())


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("loop", "redirects"),
        ("missing", "status 404"),
        ("declared", "larger than the limit of 100000"),
        ("endless", "larger than the limit of 100000"),
        ("garbage", "fetching failed"),
    ],
)
def test_what_goes_wrong_is_told(port: int, page: str, text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        get(f"http://127.0.0.1:{port}/{page}")
    assert caught.value.status == 400


@pytest.mark.parametrize("target", ["http://[foo", "http://a..b/x", "//[", "http://x:99999/"])
def test_redirects_that_lead_nowhere_are_told(port: int, target: str) -> None:
    with pytest.raises(RequestError) as caught:
        get(f"http://127.0.0.1:{port}/to?{target}")
    assert caught.value.status == 400


def test_a_host_outside_ascii_is_asked_for_by_its_ascii_name(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(host: str, port: int, **options: object) -> list[tuple[object, ...]]:
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert get(f"http://münchen.example:{port}/picture") == PICTURE
    assert asked == ["xn--mnchen-3ya.example"]


def test_the_media_of_a_request_are_bounded_together(port: int) -> None:
    url = f"http://127.0.0.1:{port}/picture"
    room = 2 * len(PICTURE) + 1
    assert len(load(url, data_url(PICTURE), allow_private_media_hosts=True, max_body_bytes=room)) == 2
    for urls in ([url] * 3, [data_url(PICTURE)] * 3, [url, data_url(PICTURE), url]):
        with pytest.raises(RequestError, match=rf"field\d: .*limit of {room} bytes") as caught:
            load(*urls, allow_private_media_hosts=True, max_body_bytes=room)
        assert (caught.value.status, caught.value.code) == (413, "media_too_large")


def test_fetches_of_all_requests_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0

    async def get(self: Fetcher, url: str, count: object, accept: str) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return PICTURE

    monkeypatch.setattr(Fetcher, "get", get)
    load(*["http://a/"] * (2 * MAX_FETCHES), limit_mm_per_prompt={})
    assert most == MAX_FETCHES


def test_a_large_picture_is_decoded_in_pieces_and_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    large = PICTURE + bytes(range(256)) * 20_000
    threads = set()
    decode = binascii.a2b_base64

    def watched(text: str, strict_mode: bool) -> bytes:
        threads.add(threading.current_thread())
        assert len(text) <= MiB // 4, "one call lets no other thread run"
        return decode(text, strict_mode=strict_mode)

    monkeypatch.setattr(binascii, "a2b_base64", watched)
    (item,) = load(data_url(large))
    assert item.data == large
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(
    "text", ["AAA=" * 400_000, "A" * 2_000_001, "A" * 2_000_000 + "=A==", "A" * (MiB // 4 - 4) + "AA==AAAA"]
)
def test_large_text_that_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="base64") as caught:
        load(f"data:image/png;base64,{text}")
    assert caught.value.code == "invalid_base64"


def test_the_whole_fetch_is_bounded_in_time(port: int) -> None:
    with pytest.raises(RequestError, match=r"longer than 0\.2 s"):
        get(f"http://127.0.0.1:{port}/slow", timeout_s=0.2)


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://a:99999/x", "http://no.such.host.invalid/x", "http:///x"]
)
def test_urls_that_lead_nowhere(url: str) -> None:
    with pytest.raises(RequestError):
        get(url)


def test_files_come_only_from_the_allowed_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        (folder / "a b.png").write_bytes(PICTURE)
    (inside / "link.png").symlink_to(outside / "a b.png")
    (inside / "good.png").symlink_to(inside / "a b.png")
    for name in ("a%20b.png", "good.png"):
        (item,) = load(f"file://{inside}/{name}", allowed_local_media_path=str(inside))
        assert item.data == PICTURE
    for url in (
        f"file://{inside}/link.png",
        f"file://{inside}/../outside/a%20b.png",
        f"file://{outside}/a%20b.png",
        f"file://{inside}",
        f"file://{inside}/missing.png",
        f"file://elsewhere{inside}/good.png",
        "file:///etc/passwd%00",
    ):
        with pytest.raises(RequestError, match="no such file") as caught:
            load(url, allowed_local_media_path=str(inside))
        assert caught.value.param == "field0"
    with pytest.raises(RequestError, match="not allowed"):
        load(f"file://{inside}/good.png")


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(bytes(2000))
    with pytest.raises(RequestError, match="1000 bytes"):
        load(f"file://{tmp_path}/big.png", allowed_local_media_path=str(tmp_path), max_media_bytes=1000)
