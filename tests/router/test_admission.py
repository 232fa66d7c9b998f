"""Who waits, who is refused, and when it is too late: the frontend with a window that is easily full."""

import asyncio
import time

import pytest

from tests.server import scripted
from tests.server.fakes import ANSWER, D, E, P, num_live
from tests.server.scripted import (
    SAMPLING,
    Wire,
    answer,
    ask,
    attempt_of,
    lose,
    num_attempts,
    on_loop,
    orders,
    publish,
    start,
    unit,
    until,
    updates,
)
from triptych.config import AdmissionConfig, Schedule
from triptych.core import InstanceId, Role, SamplingParams, Stage
from triptych.errors import RequestError
from triptych.messages import Abort, AnyMessage, Load, Located, PoolUsage, Submit, Tokens
from triptych.router import admission
from triptych.router.generation import Generation, PreparedPrompt
from triptych.router.waiting import MIN_SEQUENCES, Kind
from triptych.server.frontend import Frontend

# A prompt token takes 0.1 s, so that a prompt of 100 is 10 s of work, and the window is what may always go.
SLOW = {"p": 0.1, "e": 0.1, "d": 0.01}


def make_frontend(*placement: tuple[str, Role], admission: AdmissionConfig | None = None) -> tuple[Frontend, Wire]:
    """Equal prompts are as much work as others."""
    return scripted.make_frontend(*placement, admission=admission, prefix_caching=False)


def make_busy(frontend: Frontend) -> list[Generation]:
    """Fills the window of text."""
    set_pace(frontend)
    return [start(frontend) for _ in range(MIN_SEQUENCES)]


def set_pace(frontend: Frontend) -> None:
    for id in (E, P, D):
        frontend.handle(Load(id, {}, {}, {}, {}, SLOW))


def sent(wire: Wire, generations: list[Generation]) -> list[bool]:
    return [num_attempts(wire, generation) > 0 for generation in generations]


def counted(frontend: Frontend, reason: str) -> float:
    (line,) = [
        line
        for line in frontend._telemetry.exposition().decode().splitlines()
        if line.startswith("triptych:requests_refused_total") and f'"{reason}"' in line
    ]
    return float(line.split()[-1])


# ---- waiting


def test_with_nothing_before_it_a_request_is_sent_at_once() -> None:
    frontend, wire = make_frontend()
    generation = start(frontend, unit(1, 64))
    assert num_attempts(wire, generation) == 1


def test_no_more_is_sent_than_is_of_use_and_the_rest_when_there_is_place() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        before = make_busy(frontend)
        waiting = [start(frontend) for _ in range(3)]
        assert sent(wire, waiting) == [False] * 3
        answer(frontend, wire, before[0].outputs[0], upto=1)
        assert sent(wire, waiting) == [True, False, False], "the first token says that prefill has place"
        frontend.abort(before[1])
        assert sent(wire, waiting) == [True, True, False], "and so does the client that leaves"
        for generation in [*before, *waiting]:
            if generation is not before[1]:
                answer(frontend, wire, generation.outputs[0])
                await generation.wait()
                assert generation.outputs[0].take_text() == ANSWER
        assert not num_live(frontend)

    on_loop(scenario)


def test_after_a_hundred_videos_a_text_is_sent_at_once() -> None:
    frontend, wire = make_frontend(admission=AdmissionConfig(max_queue_s=10_000.0))
    set_pace(frontend)
    videos = [start(frontend, unit(i, 50, "video")) for i in range(100)]
    assert sum(sent(wire, videos)) == MIN_SEQUENCES
    assert sent(wire, [start(frontend), start(frontend, unit(200, 5))]) == [True, True]


def test_a_client_that_leaves_while_its_request_waits_costs_the_instances_nothing() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        before = make_busy(frontend)
        wire.sent.clear()
        async with start(frontend, n=2):
            assert num_live(frontend) == MIN_SEQUENCES + 2
        assert wire.sent == []
        assert num_live(frontend) == MIN_SEQUENCES
        frontend.abort(before[0])
        assert wire.receivers(Submit) == []

    on_loop(scenario)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("fcfs", ["long", "short", "urgent"]), ("sjf", ["short", "urgent", "long"])]
)
def test_the_schedule_says_who_is_next(schedule: Schedule, expected: list[str]) -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(admission=AdmissionConfig(schedule=schedule))
        before = make_busy(frontend)
        assert await order_of(frontend, wire, before) == expected

    on_loop(scenario)


def test_by_slack_the_one_with_a_deadline_is_next() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(admission=AdmissionConfig(schedule="slo", slo_ttft_ms=300_000.0))
        before = make_busy(frontend)
        assert await order_of(frontend, wire, before) == ["urgent", "long", "short"]

    on_loop(scenario)


async def order_of(frontend: Frontend, wire: Wire, before: list[Generation]) -> list[str]:
    now = time.monotonic()
    named = {
        "long": start(frontend, num_tokens=400, arrived_at=now),
        "short": start(frontend, num_tokens=50, arrived_at=now + 0.1),
        "urgent": start(frontend, num_tokens=51, arrived_at=now + 0.2, timeout_s=200.0),
    }
    order = []
    for generation in before[:3]:
        frontend.abort(generation)
        order += [name for name, one in named.items() if num_attempts(wire, one) and name not in order]
    return order


# ---- refusing


def test_a_request_that_would_wait_too_long_is_told_so_and_when_to_come_back() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(admission=AdmissionConfig(max_queue_s=25.0))
        make_busy(frontend)
        waiting = [start(frontend) for _ in range(3)]
        with pytest.raises(RequestError, match="overloaded") as caught:
            start(frontend)
        assert (caught.value.status, caught.value.code) == (503, "overloaded")
        assert caught.value.retry_after_s == pytest.approx(5.0, abs=0.5), "of 30 s of work, 25 are allowed"
        assert num_live(frontend) == MIN_SEQUENCES + 3
        assert counted(frontend, "overload") == 1
        with pytest.raises(RequestError, match="overloaded"):
            frontend.check_admission(Kind.TEXT)
        frontend.check_open()
        assert sent(wire, [start(frontend, unit(1, 10))]) == [True], "pictures have a line of their own"
        frontend.abort(waiting[0])
        start(frontend)

    on_loop(scenario)


def test_a_request_whose_time_would_be_up_before_its_turn_is_refused_at_once() -> None:
    async def scenario() -> None:
        frontend, _ = make_frontend()
        make_busy(frontend)
        for _ in range(2):
            start(frontend)
        with pytest.raises(RequestError, match="overloaded") as caught:
            start(frontend, timeout_s=12.0)
        assert caught.value.status == 503
        assert caught.value.retry_after_s == pytest.approx(8.0, abs=0.5)
        frontend.abort(start(frontend, timeout_s=25.0))

    on_loop(scenario)


def test_what_was_lost_is_taken_up_again_however_long_the_queue_is() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(admission=AdmissionConfig(max_queue_s=15.0))
        before = make_busy(frontend)
        start(frontend)
        start(frontend)
        lose(frontend, P)
        publish(frontend, (E, Role.E), (P, Role.P), (D, Role.D), epoch="later")
        assert [num_attempts(wire, generation) for generation in before] == [2] * MIN_SEQUENCES

    on_loop(scenario)


def test_when_too_many_wait_no_request_is_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_WAITING", 3)

    async def scenario() -> None:
        frontend, _ = make_frontend()
        make_busy(frontend)
        for _ in range(3):
            start(frontend)
        with pytest.raises(RequestError, match="overloaded") as caught:
            frontend.check_open()
        assert caught.value.retry_after_s == pytest.approx(30.0, abs=0.5)

    on_loop(scenario)


def test_media_of_all_requests_together_are_bounded() -> None:
    async def scenario() -> None:
        frontend, _ = make_frontend(admission=AdmissionConfig(max_media_held_bytes=2))
        first = ask(frontend, unit(1, 16), unit(2, 16))
        with pytest.raises(RequestError, match="2 of at most 2 bytes of bodies and media") as caught:
            ask(frontend, unit(3, 16))
        assert (caught.value.status, caught.value.code) == (503, "overloaded")
        start(frontend)
        frontend.abort(first)
        frontend.abort(ask(frontend, unit(1, 16), unit(2, 16), unit(3, 16)))  # alone, it may be as large as it is
        ask(frontend, unit(3, 16))

    on_loop(scenario)


def test_before_the_first_table_and_without_a_stage_requests_are_refused() -> None:
    frontend, _ = make_frontend((P, Role.P), (D, Role.D))
    frontend.check_open()
    with pytest.raises(RequestError, match="encode") as caught:
        frontend.check_admission(Kind.IMAGE)
    assert (caught.value.status, caught.value.code) == (503, "unavailable")
    assert caught.value.retry_after_s
    publish(frontend, (P, Role.P), (E, Role.E))
    with pytest.raises(RequestError, match="decode"):
        frontend.check_open()
    assert counted(frontend, "unavailable") == 2


# ---- deadlines


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "between attempts", "without an instance"])
def test_a_deadline_is_kept_at_every_stage(state: str) -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        if state == "waiting":
            make_busy(frontend)
        generation = start(frontend, timeout_s=0.05)
        if state == "decoding":
            answer(frontend, wire, generation.outputs[0], upto=3)
        if state == "between attempts":
            lose(frontend, D, suspects=[])
            frontend.handle(Tokens(P, updates(attempt_of(generation))[:1]))
            frontend.handle(Located(attempt_of(generation), D))
        if state == "without an instance":
            lose(frontend, P)
        wire.sent.clear()
        with pytest.raises(RequestError, match="timeout") as caught:
            await generation.wait()
        assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
        holders = {"prefilling": [P], "decoding": [D]}
        assert wire.receivers(Abort) == holders.get(state, [])
        assert num_live(frontend) == (MIN_SEQUENCES if state == "waiting" else 0)
        assert counted(frontend, "deadline") == 1

    on_loop(scenario)


def test_a_deadline_that_was_kept_is_forgotten() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        generation = start(frontend, timeout_s=0.02)
        answer(frontend, wire, generation.outputs[0])
        await asyncio.sleep(0.05)
        await generation.wait()
        assert counted(frontend, "deadline") == 0

    on_loop(scenario)


def test_a_deadline_that_has_passed_already_is_told() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        with pytest.raises(RequestError, match="timeout") as caught:
            start(frontend, timeout_s=-1.0)
        assert caught.value.status == 504
        assert wire.sent == []

    on_loop(scenario)


# ---- the end


def test_a_server_that_drains_answers_what_it_has_and_takes_nothing_new() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        await asyncio.wait_for(frontend.drained(), 1)
        before = make_busy(frontend)
        waiting = start(frontend)
        frontend.drain()
        for refused in (lambda: start(frontend), frontend.check_open, lambda: frontend.check_admission(Kind.TEXT)):
            with pytest.raises(RequestError, match="shutting down") as caught:
                refused()
            assert (caught.value.status, caught.value.code) == (503, "shutting_down")
            assert caught.value.retry_after_s
        draining = asyncio.create_task(frontend.drained())
        for generation in [*before, waiting]:
            await asyncio.sleep(0)
            assert not draining.done()
            answer(frontend, wire, generation.outputs[0])
            await generation.wait()
        await asyncio.wait_for(draining, 1)

    on_loop(scenario)


def test_a_server_that_closes_sends_nothing_of_what_waited() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        before = make_busy(frontend)
        waiting = [start(frontend) for _ in range(3)]
        wire.sent.clear()
        frontend.close()
        assert wire.receivers(Submit) == []
        assert wire.receivers(Abort) == [P] * MIN_SEQUENCES
        for generation in [*before, *waiting]:
            with pytest.raises(RequestError, match="shutting down"):
                await generation.wait()

    on_loop(scenario)


# ---- what is told to others


def test_room_is_what_decode_instances_could_take() -> None:
    frontend, _ = make_frontend((E, Role.E), ("pd0", Role.PD), ("d1", Role.D), ("d2", Role.D), (P, Role.P))
    publish(frontend, (E, Role.E), ("pd0", Role.PD), ("d1", Role.D), ("d2", Role.D), (P, Role.P), leaving="d1")
    for id in ("pd0", "d1", P):
        frontend.handle(Load(InstanceId(id), {}, {"kv": PoolUsage(10, 5, 3, 2)}, {}, {}, {}))
    assert frontend.room() == {"pd0": 7}


def test_pressure_is_what_waits_and_how_fast_answers_come() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(admission=AdmissionConfig(slo_ttft_ms=1000.0, slo_tpot_ms=50.0))
        quiet = frontend.pressure()
        assert set(quiet.queued_s.values()) == {0.0}
        assert (quiet.ttft_s, quiet.tpot_s, quiet.ttft_slack_s, quiet.tpot_slack_s) == (None, None, None, None)
        before = make_busy(frontend)
        start(frontend, n=2, sampling=SamplingParams(max_tokens=50, seed=1))
        answer(frontend, wire, before[1].outputs[0], upto=0)
        pressure = frontend.pressure()
        assert pressure.queued_s == pytest.approx({Stage.ENCODE: 0.0, Stage.PREFILL: 10.0, Stage.DECODE: 1.0}, rel=0.1)
        assert pressure.waiting == {Kind.TEXT: 2, Kind.IMAGE: 0, Kind.VIDEO: 0, Kind.AUDIO: 0}
        assert pressure.predicted_wait_s[Kind.TEXT] == pytest.approx(10.0, rel=0.1)
        await asyncio.sleep(0.01)
        answer(frontend, wire, before[0].outputs[0])
        pressure = frontend.pressure()
        assert pressure.ttft_s is not None and 0.01 <= pressure.ttft_s < 1.0
        assert pressure.ttft_slack_s == pytest.approx(1.0 - pressure.ttft_s)
        assert pressure.tpot_s is not None and 0.0 <= pressure.tpot_s < 0.05
        assert pressure.tpot_slack_s == pytest.approx(0.05 - pressure.tpot_s)

    on_loop(scenario)


def test_decodes_of_what_is_prefilled_are_on_their_way_and_then_with_an_instance() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        assert frontend.pressure().decode_ahead_s == 0.0
        set_pace(frontend)
        first = start(frontend, sampling=SamplingParams(max_tokens=50, seed=1))
        second = start(frontend, sampling=SamplingParams(max_tokens=100, seed=1))
        each_s = frontend.pressure().decode_ahead_s / 150
        assert each_s == pytest.approx(SLOW["d"])
        answer(frontend, wire, second.outputs[0], upto=1)
        assert frontend.pressure().decode_ahead_s == pytest.approx(50 * each_s)
        frontend.abort(first)
        assert frontend.pressure().decode_ahead_s == 0.0

    on_loop(scenario)


def test_metrics_show_who_waits() -> None:
    frontend, _ = make_frontend()
    make_busy(frontend)
    start(frontend, n=3)
    text = frontend._telemetry.exposition().decode()
    assert 'triptych:requests_waiting{kind="text",model_name="m"} 3.0' in text
    assert 'triptych:requests_waiting{kind="video",model_name="m"} 0.0' in text
    assert 'vllm:num_requests_waiting{model_name="m"} 3.0' in text
    (line,) = [line for line in text.splitlines() if line.startswith('triptych:predicted_wait_seconds{kind="text"')]
    assert float(line.split()[-1]) == pytest.approx(10.0, rel=0.1)


def test_an_order_that_cannot_be_sent_ends_its_request_and_leaves_the_window_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        set_pace(frontend)

        def refuse(instance: InstanceId, message: object) -> None:
            raise ValueError("broken wire")

        send, wire.send = wire.send, refuse  # type: ignore[method-assign]
        broken = [start(frontend, n=2) for _ in range(MIN_SEQUENCES)]
        wire.send = send  # type: ignore[method-assign]
        for generation in broken:
            with pytest.raises(RequestError, match="internal server error"):
                await generation.wait()
        sound = [start(frontend) for _ in range(MIN_SEQUENCES)]
        assert sent(wire, sound) == [True] * MIN_SEQUENCES
        assert orders(wire, sound[0].outputs[0])
        await until(lambda: num_live(frontend) == MIN_SEQUENCES)

    on_loop(scenario)
    assert "broken wire" in caplog.text


def test_a_request_of_many_prompts_of_which_one_cannot_be_sent_ends_as_a_whole() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        send = wire.send

        def refuse_the_second(instance: InstanceId, message: AnyMessage) -> None:
            if isinstance(message, Submit) and message.token_ids[0] == 2:
                raise ValueError("broken wire")
            send(instance, message)

        wire.send = refuse_the_second  # type: ignore[method-assign]
        prompts = [PreparedPrompt([number] * 10) for number in (1, 2, 3)]
        generation = frontend.generate(prompts, [SAMPLING] * 3)
        with pytest.raises(RequestError, match="internal server error"):
            await generation.wait()
        assert wire.receivers(Submit) == [P], "the third one is not sent any more"
        assert wire.receivers(Abort) == [P]
        assert not num_live(frontend)

    on_loop(scenario)
