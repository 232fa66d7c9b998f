"""Hostile requests to a real server on real instances: each is answered, none does harm."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import httpx
import pytest

from tests.fuzz.bodies import Request, hostile_request, media_request, url_request
from tests.fuzz.size import numbers, randomness
from tests.fuzz.victim import Victim

TOGETHER = 4  # requests at the same time
BATCH = 100  # requests between two looks at the server
LONGEST_S = 30.0
DOCUMENTED = {503, 504}  # beside 200 and what begins with 4
KINDS: dict[
    str, tuple[Callable[..., Request], int, float]
] = {  # what, how many in the short form, share of the long one
    "bodies": (hostile_request, 150, 0.35),
    "media": (media_request, 150, 0.25),
    "urls": (url_request, 60, 0.1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(3600)
def test_every_request_is_answered_and_none_does_harm(target: Victim, kind: str) -> None:
    make, short, share = KINDS[kind]
    cases = numbers(short, share)
    with httpx.Client(base_url=target.url, timeout=LONGEST_S) as client, ThreadPoolExecutor(TOGETHER) as pool:
        for first in range(cases.start, cases.stop, BATCH):
            batch = range(first, min(first + BATCH, cases.stop))
            faults = [fault for fault in pool.map(lambda n: tried(client, target, kind, make, n), batch) if fault]
            assert not faults, "\n".join(faults)
            target.check_answers()
    target.check_unharmed()


def tried(client: httpx.Client, target: Victim, kind: str, make: Callable[..., Request], number: int) -> str | None:
    """What is wrong with the answer to one request."""
    path, body, what = make(randomness(kind, number))
    name = f"TRIPTYCH_FUZZ_FIRST={number}: {kind}, {what!r:.300}"
    began = monotonic()
    try:
        response = client.post(path, content=body)
    except httpx.HTTPError as error:
        return f"{name}: no answer after {monotonic() - began:.1f} s: {error!r}"
    seconds = monotonic() - began
    target.note(response.status_code, seconds, name)
    fine = response.status_code == 200 or 400 <= response.status_code < 500 or response.status_code in DOCUMENTED
    whole = response.status_code != 200 or _is_whole(response)
    if fine and whole:
        return None
    return f"{name}: {response.status_code} {response.text[:500]}\n  {body[:300]!r}"


def _is_whole(response: httpx.Response) -> bool:
    """Whether a stream that has begun came to its end; an error in it is told as it would be without a stream."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return "error" not in response.json()
    return response.text.endswith("data: [DONE]\n\n") or '"invalid_request_error"' in response.text
