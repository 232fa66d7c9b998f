"""`triptych serve` under load gets SIGTERM: streams finish, newcomers are sent away, and it ends well."""

import asyncio
import os
import random
import signal
from dataclasses import replace

import pytest

from tests.faults.asking import Answer, Ask, ask, ask_all, difference, make_client
from tests.faults.batches import body, image
from tests.faults.soak import served
from tests.flows.test_lifecycle import left_behind
from tests.model.builders import checkpoint

LONG_ANSWER = 400  # tokens


def long_asks() -> list[Ask]:
    rng = random.Random("long")
    bodies = [
        body(rng, [], max_tokens=LONG_ANSWER),
        body(rng, [image(rng)], max_tokens=LONG_ANSWER, temperature=0.8),
        body(rng, [image(rng)], max_tokens=LONG_ANSWER // 2, temperature=1.0, n=2),
    ]
    return [Ask(each, stream) for stream in (False, True) for each in bodies]


@pytest.mark.parametrize("placement", ["1e1p1d", "1epd"])
def test_running_answers_finish_and_new_requests_are_told_to_come_back(placement: str) -> None:
    before = left_behind()
    with served(checkpoint("qwen2_vl"), placement, "--drain-timeout-s", 30) as (url, pid):
        asks = long_asks()
        right = asyncio.run(ask_all(url, asks))
        answers, newcomers = asyncio.run(stopped_meanwhile(url, pid, asks))
        assert [found for each, wanted in zip(answers, right, strict=True) if (found := difference(each, wanted))] == []
        assert newcomers
        assert all(each.status == 503 for each in newcomers), newcomers
        assert all(int(each.retry_after or 0) >= 1 for each in newcomers), newcomers
    assert left_behind() <= before


async def stopped_meanwhile(url: str, pid: int, asks: list[Ask]) -> tuple[list[Answer], list[Answer]]:
    """What those who were there first got, and those who came after the signal as long as they were answered at all."""
    newcomer = replace(asks[0], body=asks[0].body | {"max_tokens": 1})
    async with make_client(url) as client:
        growing = [Answer() for _ in asks]
        running = [asyncio.create_task(ask(client, *each)) for each in zip(asks, growing, strict=True)]
        async with asyncio.timeout(30):  # those in one piece were sent first
            while not all(answer.times for answer, each in zip(growing, asks, strict=True) if each.stream):
                await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGTERM)
        late: list[Answer] = []
        while not all(task.done() for task in running):
            late.append(await ask(client, newcomer))
            await asyncio.sleep(0.01)
        while late and late[0].status == 200:  # those that were here before the signal was
            late.pop(0)
        while late and late[-1].status == 0:  # the last request is answered: it is gone
            late.pop()
        return [task.result() for task in running], late
