"""Roles change while clients ask without a pause: nobody is refused, and the others hardly notice."""

import asyncio
import itertools
import os
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.faults.asking import Answer, Ask, ask, difference, make_client
from tests.faults.batches import body, image
from tests.flows.servers import cluster, running, wait_until_idle
from tests.model.builders import checkpoint

LONG = bool(os.environ.get("TRIPTYCH_SOAK"))
CLIENTS = 6
ANSWER_TOKENS = 40
QUIET_S = 3.0 if LONG else 0.5  # before the first switch, and after each
NUM_QUESTIONS = 24

# Of an instance that has this role, to that one: everything that a placement of three kinds can do, and back.
SWITCHES = [("d", "p"), ("p", "d"), ("p", "e"), ("e", "p"), ("d", "e"), ("e", "d"), ("p", "epd"), ("epd", "p")]


@dataclass(frozen=True)
class Switch:
    """Times of the clock of the event loop: since when nothing was ordered, when it was ordered and done."""

    name: str
    quiet_since: float
    began: float
    ended: float
    steps_s: dict[str, float]


@dataclass
class Load:
    """What clients of a closed loop got, and when their tokens came."""

    url: str
    asks: list[Ask]
    right: list[Answer]
    wrong: list[str] = field(default_factory=list)
    num_answered: int = 0
    gaps: list[tuple[float, float]] = field(default_factory=list)  # when, and seconds since the token before
    stopping: bool = False

    async def run(self) -> None:
        turns = itertools.count()
        async with make_client(self.url) as client:
            await asyncio.gather(*(self._client(client, turns) for _ in range(CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, turns: Iterator[int]) -> None:
        while not self.stopping:
            which = next(turns) % len(self.asks)
            answer = await ask(client, self.asks[which])
            self.num_answered += 1
            self.gaps += [(later, later - earlier) for earlier, later in itertools.pairwise(answer.times)]
            if found := difference(answer, self.right[which]):
                self.wrong.append(f"{which}: {found}")

    def gaps_ms(self, spans: list[tuple[float, float]]) -> list[float]:
        """Times per token that ended within these."""
        return [1e3 * gap for at, gap in self.gaps if any(began <= at <= ended for began, ended in spans)]


def questions() -> list[Ask]:
    rng = random.Random("switching")
    made = []
    for index in range(NUM_QUESTIONS):
        pictures = [image(rng) for _ in range(index % 3)]
        sampling: dict[str, Any] = {"temperature": 0.9} if index % 2 else {}
        made.append(Ask(body(rng, pictures, max_tokens=ANSWER_TOKENS, **sampling), stream=True))
    return made


async def switch(url: str, was: str, becomes: str) -> Switch:
    """Of the instance of that role that is named last, after a time in which nothing changes."""
    loop = asyncio.get_running_loop()
    quiet_since = loop.time()
    await asyncio.sleep(QUIET_S)
    instances = (await asyncio.to_thread(cluster, url))["instances"]
    chosen = [each for each in instances if each["role"] == was][-1]
    began = loop.time()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        response = await client.post(f"/cluster/instances/{chosen['id']}/role", json={"role": becomes})
    assert response.status_code == 200, response.text
    return Switch(f"{was} -> {becomes}", quiet_since, began, loop.time(), response.json()["steps_s"])


async def under_load(load: Load) -> list[Switch]:
    """One after the other."""
    clients = asyncio.create_task(load.run())
    try:
        await asyncio.sleep(QUIET_S)
        return [await switch(load.url, *each) for each in SWITCHES * (3 if LONG else 1)]
    finally:
        load.stopping = True
        await clients


async def alone(url: str, asks: list[Ask]) -> list[Answer]:
    async with make_client(url) as client:
        return [await ask(client, each) for each in asks]


def test_no_request_fails_while_roles_change_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    with running(checkpoint("qwen2_vl"), "2e2p2d") as url:
        asks = questions()
        load = Load(url, asks, asyncio.run(alone(url, asks)))
        switches = asyncio.run(under_load(load))
        wait_until_idle(url, timeout_s=5)
    assert load.wrong == []
    assert load.num_answered > len(switches)
    if LONG:
        with capsys.disabled():
            report(load, switches)


def report(load: Load, switches: list[Switch]) -> None:
    """Of each kind of switch, what it took and what it did to the others; then of all."""
    for name in dict.fromkeys(each.name for each in switches):
        alike = [each for each in switches if each.name == name]
        took = 1e3 * statistics.mean(each.ended - each.began for each in alike)
        total = 1e3 * statistics.mean(each.steps_s["total"] for each in alike)
        sys.stdout.write(f"\n{name}: {total:.0f} ms, answered after {took:.0f} ms, {pace(load, alike)}")
    sys.stdout.write(f"\nall: {pace(load, switches)}\n")


def pace(load: Load, switches: list[Switch]) -> str:
    before = load.gaps_ms([(each.quiet_since, each.began) for each in switches])
    during = load.gaps_ms([(each.began, each.ended) for each in switches])
    figures = [f"{statistics.mean(gaps):.1f} ms ({len(gaps)} tokens)" for gaps in (before, during) if gaps]
    return f"time per token {' -> '.join(figures)}"
