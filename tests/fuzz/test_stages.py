"""Engines of every role among random, stale, repeated and reordered messages: real requests do not notice."""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.builders import make_media, make_request
from tests.flows.engines import Hops, expected_answer, hops
from tests.fuzz.noise import Noise
from tests.fuzz.size import numbers, randomness
from triptych.core import InstanceId, UnitHash
from triptych.messages import Abort, AnyMessage, Encode, Submit, Wanted

PLACEMENTS: dict[str, dict[str, str]] = {
    "1e1p1d": {"e0": "e", "p0": "p", "d0": "d"},
    "1ep1d": {"e0": "ep", "d0": "d"},
    "1e1pd": {"e0": "e", "p0": "pd"},
    "1ed1p": {"e0": "ed", "p0": "p"},
    "1epd": {"e0": "epd"},
}
LONGEST_S = 10.0  # until a real request is answered, on a busy machine
BATCH = 20  # noise messages around each real request


def real_request(number: int, rng: random.Random) -> Submit:
    return make_request(
        f"real-{number}", num_images=rng.randrange(3), text=rng.randrange(1, 7), max_tokens=rng.randrange(1, 6)
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_noise_changes_no_answer_and_leaves_nothing_behind(placement: str, tmp_path: Path) -> None:
    cases = numbers(short=120, share=1 / len(PLACEMENTS))
    with hops(tmp_path, **PLACEMENTS[placement]) as engines:
        for first in range(cases.start, cases.stop, BATCH):
            play(engines, first, randomness(f"stages/{placement}", first))


def play(engines: Hops, number: int, rng: random.Random) -> None:
    """One real request among noise, then the end of all requests that the noise spoke of."""
    noise = Noise(rng, {name: peer.epoch for name, peer in engines.peers.items()})
    deliveries = [(rng.choice(list(engines.peers)), noise.message()) for _ in range(BATCH)]
    if rng.random() < 0.5:
        deliveries = shuffled_in(deliveries, damaged(orders(engines, noise.request()), rng), rng)
    order = real_request(number, rng)
    real = orders(engines, order)
    try:
        for to, message in shuffled_in(deliveries, real, rng):
            engines.send(to, message)
            if rng.random() < 0.3:
                engines.settle(quiet_turns=1)
        ends = [(name, Abort(request)) for name in engines.peers for request in [*noise.requests, "", "nobody"]]
        for to, message in ends:  # type: ignore[assignment]
            engines.send(to, message)
        settle(engines, order, dict(real_units(real)))
        assert engines.tokens_of(order) == expected_answer(order)
        engines.assert_idle()
    except BaseException as error:
        told = "\n".join(f"  {to} <- {message}" for to, message in deliveries)
        error.add_note(f"TRIPTYCH_FUZZ_FIRST={number}; the real request is {order}\nnoise:\n{told}")
        raise
    for to, message in real:  # late again: nobody knows it any more
        engines.send(to, message)
    settle(engines, order, {})
    engines.assert_idle()
    engines.received.clear()


def real_units(real: Sequence[tuple[str, AnyMessage]]) -> Iterator[tuple[UnitHash, tuple[str, Encode]]]:
    for to, message in real:
        if isinstance(message, Encode):
            yield message.units[0].hash, (to, message)


def settle(engines: Hops, order: Submit, real: dict[UnitHash, tuple[str, Encode]]) -> None:
    """Until the real request is answered and nothing happens any more. What a frontend does is done here: units that
    are asked for are ordered again."""
    num_seen, deadline = 0, time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        engines.settle()
        wanted = [message for message in engines.received[num_seen:] if isinstance(message, Wanted)]
        num_seen = len(engines.received)
        for message in wanted:
            for to, again in [real[unit] for unit in message.units if unit in real]:
                engines.send(to, again)
        if not wanted and len(engines.tokens_of(order)) == order.sampling.max_tokens and is_idle(engines):
            return


def is_idle(engines: Hops) -> bool:
    loads = [engine.load() for engine in engines.engines]
    return not any(any(load.queues.values()) or any(pool.used for pool in load.pools.values()) for load in loads)


def damaged(real: Sequence[tuple[str, AnyMessage]], rng: random.Random) -> list[tuple[str, AnyMessage]]:
    """In any order, some lost, some of what may come twice twice."""
    came: list[tuple[str, AnyMessage]] = []
    for one in real:
        came += [one] * rng.choice([0, 1, 1, 1, 2])
    return rng.sample(came, len(came))


def orders(engines: Hops, order: Submit) -> list[tuple[str, AnyMessage]]:
    """What a frontend sends for a request."""
    roles = {name: peer.role.value for name, peer in engines.peers.items()}
    encode = next(name for name, role in roles.items() if "e" in role)
    prefill = next(name for name, role in roles.items() if "p" in role)
    units = {unit.hash: unit for unit in order.units}.values()
    media = [(encode, Encode(order.request_id, make_media(), (unit,), InstanceId(prefill))) for unit in units]
    return [(prefill, order), *media]


def shuffled_in(
    noise: Sequence[tuple[str, AnyMessage]], real: Sequence[tuple[str, AnyMessage]], rng: random.Random
) -> list[tuple[str, AnyMessage]]:
    """The real ones in their order, anywhere among the others."""
    places = sorted(rng.randrange(len(noise) + 1) for _ in real)
    mixed = list(noise)
    for place, message in reversed(list(zip(places, real, strict=True))):
        mixed.insert(place, message)
    return mixed


def test_a_request_that_is_submitted_twice_is_taken_once(tmp_path: Path) -> None:
    order = make_request("twice", text=5, max_tokens=3)
    with hops(tmp_path, e0="e", p0="p", d0="d") as engines:
        engines.ask(order, "p0", "e0")
        engines.ask(order, "p0", "e0")
        engines.settle()
        assert engines.tokens_of(order) == expected_answer(order)
        engines.assert_idle()
