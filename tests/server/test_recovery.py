"""Instances are lost, fail for a while or leave their role: the client's answer is token for token the same."""

import asyncio
from collections.abc import Callable

import pytest

from tests.server.fakes import ANSWER, D, E, P, end_id, ids, num_live
from tests.server.scripted import (
    Wire,
    answer,
    ask,
    attempt_of,
    encoded,
    lose,
    make_frontend,
    num_attempts,
    on_loop,
    orders,
    publish,
    report,
    start,
    unit,
    until,
    updates,
    without,
)
from triptych.config import AdmissionConfig
from triptych.core import InstanceId, Role, SamplingParams, TokenLogprobs
from triptych.errors import RequestError
from triptych.messages import Abort, Evicted, Failed, Located, Submit, Tokens, TokenUpdate, Wanted
from triptych.router import router as router_module
from triptych.router.generation import Generation
from triptych.server.answers import usage_of
from triptych.server.frontend import Frontend

E1, P1, D1 = InstanceId("e1"), InstanceId("p1"), InstanceId("d1")
TWO_OF_EACH = ((E, Role.E), (E1, Role.E), (P, Role.P), (P1, Role.P), (D, Role.D), (D1, Role.D))
WHOLE = [*ids(ANSWER), end_id()]

Moment = Callable[[Frontend, Wire, Generation], None]


def nothing_yet(frontend: Frontend, wire: Wire, generation: Generation) -> None:
    """Encoding and prefilling cannot be told apart from here."""


def sent_ahead(frontend: Frontend, wire: Wire, generation: Generation) -> None:
    frontend.handle(Located(attempt_of(generation), D))


def first_token(frontend: Frontend, wire: Wire, generation: Generation) -> None:
    frontend.handle(Located(attempt_of(generation), D))
    frontend.handle(Tokens(P, updates(attempt_of(generation))[:1]))


def first_token_overtaken(frontend: Frontend, wire: Wire, generation: Generation) -> None:
    frontend.handle(Tokens(P, updates(attempt_of(generation))[:1]))
    frontend.handle(Tokens(D, updates(attempt_of(generation))[2:3]))
    frontend.handle(Located(attempt_of(generation), D))


def decoding(frontend: Frontend, wire: Wire, generation: Generation) -> None:
    first_token(frontend, wire, generation)
    frontend.handle(Tokens(D, updates(attempt_of(generation))[1:4]))


def all_but_the_last(frontend: Frontend, wire: Wire, generation: Generation) -> None:
    first_token(frontend, wire, generation)
    frontend.handle(Tokens(D, updates(attempt_of(generation))[1:-1]))


def the_last(frontend: Frontend, wire: Wire, generation: Generation) -> None:
    first_token(frontend, wire, generation)
    frontend.handle(Tokens(D, updates(attempt_of(generation))[1:]))


@pytest.mark.parametrize(
    ("moment", "lost", "again"),
    [
        (nothing_yet, E, True),
        (nothing_yet, P, True),
        (nothing_yet, D, False),
        (sent_ahead, E, True),
        (sent_ahead, P, True),
        (sent_ahead, D, True),
        (first_token, E, False),
        (first_token, P, True),
        (first_token, D, True),
        (first_token_overtaken, E, False),
        (first_token_overtaken, P, True),
        (first_token_overtaken, D, True),
        (decoding, E, False),
        (decoding, P, False),
        (decoding, D, True),
        (all_but_the_last, D, True),
        (the_last, E, False),
        (the_last, P, False),
        (the_last, D, False),
    ],
)
def test_the_loss_of_an_instance_costs_the_client_no_token(moment: Moment, lost: InstanceId, again: bool) -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        report(frontend, **{E1: 9.0, P1: 9.0, D1: 9.0})
        generation = start(frontend, unit(1, 64))
        (output,) = generation.outputs
        moment(frontend, wire, generation)
        said = output.take_text()
        prompt, before = list(generation.prompts[0].token_ids), list(output.token_ids)
        wire.sent = [(to, message) for to, message in wire.sent if isinstance(message, Submit)]
        lose(frontend, lost)
        assert num_attempts(wire, generation) == 1 + again
        if again:
            assert lost not in wire.receivers(Abort)
            order = orders(wire, output)[-1]
            assert order.request_id == attempt_of(generation, 2)
            assert order.token_ids == prompt + before
            assert order.num_prompt_tokens == len(prompt)
            late = updates(attempt_of(generation))
            frontend.handle(Tokens(lost, late))  # what the old attempt still says is about nobody
            assert output.token_ids == before
        if moment is not the_last and (again or moment not in (decoding, first_token, first_token_overtaken)):
            answer(frontend, wire, output)
        elif not again and moment is not the_last:
            frontend.handle(Tokens(D, updates(attempt_of(generation))[len(before) :]))
        await generation.wait()
        assert output.token_ids == WHOLE
        assert said + output.take_text() == ANSWER
        assert not num_live(frontend)

    on_loop(scenario)


def test_a_request_that_waits_for_its_turn_does_not_notice_a_loss() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH, admission=AdmissionConfig(dispatch_s=1e-6))
        before = [start(frontend) for _ in range(8)]
        waiting = start(frontend)
        assert num_attempts(wire, waiting) == 0
        lose(frontend, P)
        assert num_attempts(wire, waiting) == 0, "the older ones go first"
        on_p1 = [g for g in before if (P1, orders(wire, g.outputs[0])[-1]) in wire.sent]
        assert len(on_p1) == 4
        for generation in [*on_p1, *(g for g in before if g not in on_p1)]:
            answer(frontend, wire, generation.outputs[0])
            assert generation.outputs[0].token_ids == WHOLE
        answer(frontend, wire, waiting.outputs[0])
        assert num_attempts(wire, waiting) == 1
        for generation in [*before, waiting]:
            await generation.wait()

    on_loop(scenario)


def test_every_choice_is_taken_up_by_itself() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        report(frontend, p1=9.0)
        generation = start(frontend, unit(1, 64), n=3)
        done, running, early = generation.outputs
        answer(frontend, wire, done)
        answer(frontend, wire, running, upto=5)
        lose(frontend, D)
        assert [len(orders(wire, output)) for output in generation.outputs] == [1, 2, 1]
        lose(frontend, P)
        assert [len(orders(wire, output)) for output in generation.outputs] == [1, 3, 2]
        answer(frontend, wire, early)
        answer(frontend, wire, running)
        await generation.wait()
        assert [output.take_text() for output in generation.outputs] == [ANSWER] * 3
        assert [order.sampling.choice for order in orders(wire, running)] == [1, 1, 1]

    on_loop(scenario)


def test_stop_strings_log_probabilities_and_usage_stay_right() -> None:
    async def scenario() -> None:
        frontend, _ = make_frontend(*TWO_OF_EACH)
        sampling = SamplingParams(max_tokens=50, seed=1, logprobs=1)
        generation = start(frontend, stop=("wörld",), sampling=sampling)
        (output,) = generation.outputs

        def said(token: TokenUpdate) -> TokenUpdate:
            scores = TokenLogprobs(-float(token.index), [], [])
            return TokenUpdate(token.request_id, token.token_id, token.index, token.finish, scores, num_cached=33)

        for update in updates(attempt_of(generation))[:8]:
            frontend.handle(Tokens(P if update.index == 0 else D, [said(update)]))
        lose(frontend, D)
        for update in updates(attempt_of(generation, 2))[8:]:
            frontend.handle(Tokens(P if update.index == 8 else D1, [said(update)]))
        await generation.wait()
        assert output.take_text() == "Hello, "
        assert (output.finish, output.stop_reason) == ("stop", "wörld")
        assert [scores.logprob for _, scores in output.take_tokens()] == [-float(i) for i in range(output.num_tokens)]
        usage = usage_of(generation)
        assert usage.completion_tokens == output.num_tokens < len(WHOLE)
        assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (100, 33)

    on_loop(scenario)


def test_units_of_a_lost_encoder_are_ordered_from_another_one() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        report(frontend, e1=9.0, p1=9.0)
        generation = ask(frontend, unit(1, 16), unit(2, 16))
        assert encoded(wire) == [(E, 1), (E, 2)]
        lose(frontend, E)
        submits = [order for _, order in wire.sent if isinstance(order, Submit)]
        assert submits[-1].ordered == (unit(1, 16).hash, unit(2, 16).hash)
        assert (P, Abort(attempt_of(generation))) in wire.sent
        assert encoded(wire) == [(E1, 1), (E1, 2)]

    on_loop(scenario)


def test_a_prefix_that_was_only_promised_is_not_counted_on() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        report(frontend, e1=9.0, p1=9.0)
        generation = ask(frontend, unit(1, 16))
        lose(frontend, E)
        assert encoded(wire) == [(E, 1), (E1, 1)], "prefill has not seen the prompt yet, so needs the picture"
        assert generation.outputs[0].num_tokens == 0

    on_loop(scenario)


# ---- for a while


@pytest.mark.parametrize(("code", "reason"), [("transfer_failed", "transfer"), ("moved", "moved"), (None, "transfer")])
def test_a_failure_of_the_moment_is_not_told_to_the_client(code: str | None, reason: str) -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        generation = start(frontend)
        first_token(frontend, wire, generation)
        wire.sent.clear()
        frontend.handle(Failed(attempt_of(generation), "gone", 500, code, retry=True))
        assert sorted(wire.receivers(Abort)) == [D, P]
        answer(frontend, wire, generation.outputs[0])
        await generation.wait()
        assert generation.outputs[0].take_text() == ANSWER
        assert f'request_retries_total{{model_name="m",reason="{reason}"}} 1.0' in exposition(frontend)

    on_loop(scenario)


def test_failures_in_a_row_without_a_new_token_end_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(router_module, "LONGEST_PAUSE_S", 0.001)

    async def scenario() -> None:
        frontend, wire = make_frontend()
        generation = start(frontend)
        (output,) = generation.outputs
        for round in range(2):
            for number in range(router_module.MAX_FAILURES):
                done = round * router_module.MAX_FAILURES + number + 1
                frontend.handle(Failed(attempt_of(generation, done), "no luck", 500, "transfer_failed", retry=True))
                await until(lambda done=done: len(orders(wire, output)) == done + 1)  # type: ignore[misc]
            answer(frontend, wire, output, upto=1 + round)
            assert output.num_tokens == 1 + round, "a new token: it counts anew"
        for number in range(router_module.MAX_FAILURES + 1):
            done = 2 * router_module.MAX_FAILURES + number + 1
            frontend.handle(Failed(attempt_of(generation, done), "no luck", 503, "transfer_failed", retry=True))
            await until(lambda done=done: not num_live(frontend) or len(orders(wire, output)) == done + 1)  # type: ignore[misc]
        with pytest.raises(RequestError, match="no luck") as caught:
            await generation.wait()
        assert (caught.value.status, caught.value.code) == (500, "transfer_failed")
        assert not num_live(frontend)

    on_loop(scenario)


def test_a_client_that_leaves_between_two_attempts_is_not_taken_up_again() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        async with start(frontend) as generation:
            for number in (1, 2):
                frontend.handle(Failed(attempt_of(generation, number), "x", 500, retry=True))
            assert num_live(frontend) == 1
        assert not num_live(frontend)
        await asyncio.sleep(2 * router_module.FIRST_PAUSE_S)
        assert num_attempts(wire, generation) == 2

    on_loop(scenario)


# ---- nobody is left


@pytest.mark.parametrize("lost", [E, P, D])
def test_a_stage_without_an_instance_is_waited_for(lost: InstanceId) -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        generation = start(frontend, unit(1, 64))
        if lost is D:
            first_token(frontend, wire, generation)
        lose(frontend, lost)
        with pytest.raises(RequestError, match="no instance serves") as caught:
            start(frontend, unit(1, 64))
        assert (caught.value.status, caught.value.code) == (503, "unavailable")
        assert caught.value.retry_after_s
        assert num_attempts(wire, generation) == 1
        publish(frontend, (E, Role.E), (P, Role.P), (D, Role.D), epoch="later")
        assert num_attempts(wire, generation) == 2
        answer(frontend, wire, generation.outputs[0])
        await generation.wait()
        assert generation.outputs[0].take_text() == ANSWER

    on_loop(scenario)


def test_but_not_for_ever() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(admission=AdmissionConfig(recovery_timeout_s=0.05))
        decodes, waits = start(frontend), start(frontend)
        answer(frontend, wire, decodes.outputs[0], upto=3)
        lose(frontend, P)
        with pytest.raises(RequestError, match="no instance serves prefill") as caught:
            await waits.wait()
        assert (caught.value.status, caught.value.code) == (503, "unavailable")
        assert caught.value.retry_after_s
        assert num_live(frontend) == 1, "what decodes needs no prefill"
        frontend.handle(Tokens(D, updates(attempt_of(decodes))[3:]))
        await decodes.wait()

    on_loop(scenario)


def test_nobody_waits_longer_because_others_are_tried_one_at_a_time_before() -> None:
    async def play() -> None:
        frontend, _ = make_frontend(admission=AdmissionConfig(recovery_timeout_s=0.2))
        generations = [start(frontend) for _ in range(5)]
        attempts = [attempt_of(generation) for generation in generations]
        lose(frontend, P, suspects=attempts)
        async with asyncio.timeout(0.4):  # one after the other it would take 1 s
            for generation in generations:
                with pytest.raises(RequestError) as failed:
                    await generation.wait()
                assert failed.value.status == 503
        assert num_live(frontend) == 0

    on_loop(play)


def test_a_stage_of_an_instance_that_changes_its_role_is_waited_for_by_newcomers_too() -> None:
    async def play() -> None:
        frontend, wire = make_frontend()
        publish(frontend, (E, Role.E), (P, Role.P), (D, Role.D), leaving=P)
        generation = start(frontend)
        assert num_attempts(wire, generation) == 0
        publish(frontend, (E, Role.E), (P, Role.PD), (D, Role.D))
        assert num_attempts(wire, generation) == 1

    on_loop(play)


def test_a_sequence_that_loses_one_instance_after_the_other_is_given_up_some_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play() -> None:
        monkeypatch.setattr(router_module, "MAX_LOSSES", 3)
        frontend, _ = make_frontend(*TWO_OF_EACH)
        generation = start(frontend)
        for _ in range(4):
            (gone,) = {attempt.prefill for attempt in frontend._router.attempts.values()}
            lose(frontend, gone)
            publish(frontend, *TWO_OF_EACH)
        with pytest.raises(RequestError) as failed:
            await generation.wait()
        assert failed.value.status == 503
        assert failed.value.retry_after_s is not None

    on_loop(play)


def test_a_unit_that_is_wanted_while_nobody_encodes_is_ordered_when_somebody_does() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        generation = ask(frontend, unit(1, 16))
        frontend.handle(Tokens(P, []))
        publish(frontend, (E, Role.E), (P, Role.P), (D, Role.D), leaving=E)
        wire.sent.clear()
        frontend.handle(Wanted(attempt_of(generation), (unit(1, 16).hash,)))
        assert wire.sent == []
        publish(frontend, (E1, Role.E), (P, Role.P), (D, Role.D))
        assert encoded(wire) == [(E1, 1)]
        publish(frontend, (E1, Role.E), (P, Role.P), (D, Role.D))
        assert encoded(wire) == []

    on_loop(scenario)


def test_a_unit_that_is_wanted_while_nobody_encodes_is_not_waited_for_for_ever() -> None:
    async def scenario() -> None:
        frontend, _ = make_frontend(admission=AdmissionConfig(recovery_timeout_s=0.05))
        generation = ask(frontend, unit(1, 16))
        without(frontend, E)
        frontend.handle(Wanted(attempt_of(generation), (unit(1, 16).hash,)))
        with pytest.raises(RequestError, match="no instance serves encode") as caught:
            await generation.wait()
        assert caught.value.status == 503

    on_loop(scenario)


def test_a_unit_that_is_wanted_goes_to_an_encoder_that_stays() -> None:
    frontend, wire = make_frontend(*TWO_OF_EACH)
    report(frontend, e1=9.0, p1=9.0)
    generation = ask(frontend, unit(1, 16))
    publish(frontend, *TWO_OF_EACH, leaving=E)
    wire.sent.clear()
    frontend.handle(Wanted(attempt_of(generation), (unit(1, 16).hash,)))
    assert encoded(wire) == [(E1, 1)]


# ---- leaving a role


def test_an_instance_that_leaves_its_role_keeps_its_requests_and_gets_no_new_ones() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        report(frontend, p1=9.0)
        generation = start(frontend)
        wire.sent.clear()
        publish(frontend, *TWO_OF_EACH, leaving=P)
        assert wire.sent == []
        start(frontend)
        assert wire.receivers(Submit) == [P1]
        frontend.handle(Tokens(P, updates(attempt_of(generation))))
        await generation.wait()

    on_loop(scenario)


@pytest.mark.parametrize("role", [Role.P, Role.PD])
def test_an_instance_that_is_back_from_a_change_of_role_is_thought_to_hold_nothing(role: Role) -> None:
    frontend, wire = make_frontend()
    ask(frontend, unit(1, 16))
    publish(frontend, (E, Role.E), (P, Role.P), (D, Role.D), leaving=P)
    publish(frontend, (E, Role.E), (P, role), (D, Role.D))
    wire.sent.clear()
    ask(frontend, unit(1, 16))
    assert encoded(wire) == [(E, 1)], "its prefix cache and its embeddings are gone"


def test_what_an_instance_that_leaves_seems_to_hold_is_not_asked_for() -> None:
    frontend, wire = make_frontend(*TWO_OF_EACH)
    report(frontend, p1=9.0)
    ask(frontend, unit(1, 16))
    frontend.handle(Evicted(E, [unit(1, 16).hash], []))
    publish(frontend, *TWO_OF_EACH, leaving=P)
    wire.sent.clear()
    ask(frontend, unit(1, 16), token=2)
    order = next(message for _, message in wire.sent if isinstance(message, Submit))
    assert (order.held, order.ordered) == ({}, (unit(1, 16).hash,))


def test_a_sequence_that_is_handed_from_one_decode_instance_to_another_depends_on_the_newest() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        generation = start(frontend)
        (output,) = generation.outputs
        tokens = updates(attempt_of(generation))
        answer(frontend, wire, output, upto=4)
        frontend.handle(Tokens(D1, tokens[5:6]))  # overtakes what the old one has to say
        frontend.handle(Tokens(D, tokens[4:5]))
        frontend.handle(Located(attempt_of(generation), D1))
        frontend.handle(Tokens(D1, tokens[6:7]))
        lose(frontend, D)
        assert num_attempts(wire, generation) == 1
        frontend.handle(Tokens(D1, tokens[7:8]))
        lose(frontend, D1)
        publish(frontend, *TWO_OF_EACH, epoch="later")
        assert orders(wire, output)[-1].token_ids[100:] == WHOLE[:8]
        assert num_attempts(wire, generation) == 2

    on_loop(scenario)


# ---- what is heard late


def test_a_request_that_was_handed_to_an_instance_that_is_lost_by_then_is_taken_up_again() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        report(frontend, p1=9.0)
        generation = start(frontend)
        lose(frontend, D)
        frontend.handle(Tokens(P, updates(attempt_of(generation))[:1]))
        assert num_attempts(wire, generation) == 1
        frontend.handle(Located(attempt_of(generation), D))
        assert (P, Abort(attempt_of(generation))) in wire.sent
        answer(frontend, wire, generation.outputs[0])
        await generation.wait()
        assert generation.outputs[0].take_text() == ANSWER

    on_loop(scenario)


@pytest.mark.parametrize(("epoch", "again"), [("", True), ("epoch", True), ("later", False)])
def test_also_if_that_instance_is_back_by_then(epoch: str, again: bool) -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend()
        generation = start(frontend)
        lose(frontend, D)
        publish(frontend, (E, Role.E), (P, Role.P), (D, Role.D), epoch="later")
        frontend.handle(Located(attempt_of(generation), D, epoch))
        assert num_attempts(wire, generation) == 1 + again

    on_loop(scenario)


def test_a_token_that_an_instance_said_before_it_was_lost_is_not_believed_to_be_followed_by_more() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        generation = start(frontend)
        tokens = updates(attempt_of(generation))
        frontend.handle(Tokens(P, tokens[:1]))
        lose(frontend, D)
        frontend.handle(Tokens(D, tokens[1:2]))
        assert num_attempts(wire, generation) == 2

    on_loop(scenario)


def test_what_was_said_twice_by_an_instance_that_is_lost_changes_nothing() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        generation = start(frontend)
        tokens = updates(attempt_of(generation))
        frontend.handle(Tokens(P, tokens[:1]))
        frontend.handle(Tokens(D, tokens[1:3]))
        lose(frontend, P)
        frontend.handle(Tokens(P, tokens[:1]))
        assert num_attempts(wire, generation) == 1

    on_loop(scenario)


# ---- poison


def test_a_request_that_is_computed_in_two_crashes_is_refused_and_nobody_else() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        report(frontend, p1=9.0)
        poison, innocent, bystander = start(frontend), start(frontend), start(frontend)
        lose(frontend, P, suspects=[attempt_of(poison), attempt_of(innocent)])
        counts = [num_attempts(wire, generation) for generation in (poison, innocent, bystander)]
        assert counts == [2, 1, 2], "suspects go one at a time, others at once"
        publish(frontend, *TWO_OF_EACH, epoch="later")
        lose(frontend, P1, suspects=[attempt_of(poison, 2)])
        with pytest.raises(RequestError, match="second time") as caught:
            await poison.wait()
        assert (caught.value.status, caught.value.code) == (500, "poison")
        for generation in (innocent, bystander):
            answer(frontend, wire, generation.outputs[0])
            await generation.wait()
        assert num_attempts(wire, poison) == 2
        assert 'requests_refused_total{model_name="m",reason="poison"} 1.0' in exposition(frontend)

    on_loop(scenario)


def test_a_suspect_that_gets_past_the_point_where_it_died_is_one_no_more() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        first, second = start(frontend), start(frontend)
        for generation in (first, second):
            answer(frontend, wire, generation.outputs[0], upto=3)
        lose(frontend, D, suspects=[attempt_of(first), attempt_of(second)])
        assert [num_attempts(wire, generation) for generation in (first, second)] == [2, 1]
        frontend.handle(Tokens(P, updates(attempt_of(first, 2))[3:4]))
        assert num_attempts(wire, second) == 1, "prefill sampled that: the decode instance has not computed it again"
        frontend.handle(Tokens(D1, updates(attempt_of(first, 2))[4:5]))
        assert num_attempts(wire, second) == 2
        publish(frontend, *TWO_OF_EACH, epoch="later")
        lose(frontend, D1, suspects=[attempt_of(first, 2)])
        assert num_live(frontend) == 2, "its first blame again"
        frontend.abort(second)
        assert num_attempts(wire, first) == 3, "nobody else is tried now"
        answer(frontend, wire, first.outputs[0])
        await first.wait()
        assert first.outputs[0].take_text() == ANSWER

    on_loop(scenario)


def test_a_suspect_whose_client_leaves_makes_place_for_the_next() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        generations = [start(frontend) for _ in range(3)]
        lose(frontend, P, suspects=[attempt_of(generation) for generation in generations])
        first, second, third = generations
        assert [num_attempts(wire, generation) for generation in generations] == [2, 1, 1]
        frontend.abort(second)
        assert num_attempts(wire, third) == 1
        frontend.abort(first)
        assert num_attempts(wire, third) == 2
        assert num_attempts(wire, second) == 1

    on_loop(scenario)


def test_a_suspect_that_loses_an_instance_without_being_computed_stays_the_one_that_is_tried() -> None:
    async def scenario() -> None:
        frontend, wire = make_frontend(*TWO_OF_EACH)
        first, second = start(frontend), start(frontend)
        for generation in (first, second):
            frontend.handle(Located(attempt_of(generation), D))
        lose(frontend, D, suspects=[attempt_of(first), attempt_of(second)])
        frontend.handle(Located(attempt_of(first, 2), D1))
        publish(frontend, *TWO_OF_EACH, epoch="later")
        lose(frontend, D1)
        assert [num_attempts(wire, generation) for generation in (first, second)] == [3, 1]
        answer(frontend, wire, first.outputs[0])
        assert num_attempts(wire, second) == 2

    on_loop(scenario)


def test_suspects_that_are_unknown_by_now_are_nobodys_business() -> None:
    async def scenario() -> None:
        frontend, _ = make_frontend(*TWO_OF_EACH)
        async with start(frontend) as generation:
            pass
        lose(frontend, P, suspects=[attempt_of(generation), attempt_of(generation, 7)])
        assert not num_live(frontend)

    on_loop(scenario)


def exposition(frontend: Frontend) -> str:
    return frontend._telemetry.exposition().decode()
