"""Chat completions over real HTTP, as the openai client sees them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.fakes import ANSWER, Stack, data_url, ids, image_part, picture, script
from triptych.messages import Abort, Encode, Submit

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack(script) as stack:
        yield stack


def test_an_answer_arrives_whole(stack: Stack) -> None:
    response = stack.openai.chat.completions.create(model="fake", messages=HI)
    assert response.choices[0].message.content == ANSWER
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].finish_reason == "stop"
    assert response.usage is not None
    assert response.usage.completion_tokens == len(ids(ANSWER)) + 1, "the end-of-sequence token counts"
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens
    stack.wait_until_idle()


def test_a_stream_is_the_answer_in_pieces(stack: Stack) -> None:
    chunks = list(stack.openai.chat.completions.create(model="fake", messages=HI, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_no_piece_of_a_stream_ends_inside_a_character(stack: Stack) -> None:
    chunks = list(stack.openai.chat.completions.create(model="fake", messages=HI, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert any("👋" in piece for piece in pieces)
    assert not any("�" in piece for piece in pieces)


def test_a_stream_ends_with_done_and_usage_comes_last_if_asked_for(stack: Stack) -> None:
    text = stack.chat(stream=True, stream_options={"include_usage": True}).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    bodies = [json.loads(event) for event in events[:-1]]
    assert bodies[-1]["choices"] == []
    assert bodies[-1]["usage"]["completion_tokens"] == len(ids(ANSWER)) + 1
    assert all(body["usage"] is None for body in bodies[:-1])


def test_the_final_piece_carries_what_was_held_back_for_a_stop_string(stack: Stack) -> None:
    for stream in (False, True):
        assert said(stack, stream=stream, stop=["👋!!"]) == (ANSWER, "stop", None)


def test_a_stop_string_ends_the_answer_before_it_and_takes_the_request_back(stack: Stack) -> None:
    stack.cluster.aborted.clear()
    assert said(stack, stop="rld", stream=True) == ("Hello, wö", "stop", "rld")
    assert said(stack, stop=["nothing", "ö"]) == ("Hello, w", "stop", "ö")
    stack.wait_until_idle()
    assert {instance for instance, _ in stack.cluster.aborted} == {"d0"}


def test_no_stop_string_before_min_tokens(stack: Stack) -> None:
    num_tokens = len(ids("Hello, w"))
    assert said(stack, stop="l", min_tokens=num_tokens)[0] == "Hello, wör"


def test_a_stop_token_ends_the_answer_and_is_named(stack: Stack) -> None:
    (comma,) = ids(",")
    assert said(stack, stop_token_ids=[comma]) == ("Hello", "stop", comma)


def test_max_tokens_bounds_the_answer(stack: Stack) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        text, reason, _ = said(stack, **{name: len(ids("Hello,"))})
        assert (text, reason) == ("Hello,", "length")


def test_max_tokens_defaults_to_the_rest_of_the_context(stack: Stack) -> None:
    stack.cluster.sent.clear()
    prompt_tokens = stack.chat().json()["usage"]["prompt_tokens"]
    (submit,) = stack.cluster.orders(Submit)
    assert submit.sampling.max_tokens == 512 - prompt_tokens


def test_choices_are_sequences_of_their_own_with_the_same_seed(stack: Stack) -> None:
    stack.cluster.sent.clear()
    red = image_part(data_url(picture(40, 40)))
    response = stack.openai.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": [red]}], n=3, seed=7
    )
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert all(choice.message.content == ANSWER for choice in response.choices)
    submits = stack.cluster.orders(Submit)
    assert [submit.sampling.choice for submit in submits] == [0, 1, 2]
    assert {submit.sampling.seed for submit in submits} == {7}
    assert len({submit.request_id for submit in submits}) == 3
    assert [order.request_id for order in stack.cluster.orders(Encode)] == [submits[0].request_id]


def test_streamed_choices_each_begin_with_a_role_and_end_with_a_reason(stack: Stack) -> None:
    chunks = list(stack.openai.chat.completions.create(model="fake", messages=HI, n=2, stream=True))
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == ANSWER
        assert [choice.finish_reason for choice in mine].count("stop") == 1


def test_log_probabilities_come_with_every_token(stack: Stack) -> None:
    for stream in (False, True):
        response = stack.chat(logprobs=True, top_logprobs=2, max_tokens=3, stream=stream)
        bodies = events(response.text) if stream else [response.json()]
        content = [entry for body in bodies for entry in (body["choices"][0]["logprobs"] or {}).get("content", [])]
        assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "".join(
            entry["token"] for entry in content
        )
        assert [entry["logprob"] for entry in content] == [-0.5, -0.5, -0.5]
        assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_log_probabilities_show_the_bytes_of_a_token_that_is_no_whole_character(stack: Stack) -> None:
    content = stack.chat(logprobs=True, max_tokens=len(ids(ANSWER))).json()["choices"][0]["logprobs"]["content"]
    assert any("�" in entry["token"] for entry in content)
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == ANSWER


@pytest.mark.parametrize(("given", "sent"), [(1e-6, 0.0), (1e-5, 1e-5), (100, 100.0)])
def test_a_temperature_that_is_almost_zero_means_greedy(stack: Stack, given: float, sent: float) -> None:
    stack.cluster.sent.clear()
    stack.chat(temperature=given)
    (submit,) = stack.cluster.orders(Submit)
    assert submit.sampling.temperature == sent


@pytest.mark.parametrize("name", ["enable_thinking", "template", "takes", "variables", "a b"])
def test_variables_of_any_name_go_to_the_template(stack: Stack, name: str) -> None:
    assert stack.chat(chat_template_kwargs={name: 1}).status_code == 200


def test_the_last_message_can_be_continued(stack: Stack) -> None:
    messages = [*HI, {"role": "assistant", "content": "Once upon"}]
    fields = {"messages": messages, "continue_final_message": True}
    (*_, last) = stack.http.post("/tokenize", json=fields).json()["tokens"]
    assert last == ids("Once upon")[-1]


def test_log_probabilities_without_alternatives(stack: Stack) -> None:
    content = stack.chat(logprobs=True, max_tokens=2).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[], []]


def test_a_picture_is_sent_once_to_encode_and_named_in_the_order_to_prefill(stack: Stack) -> None:
    stack.cluster.sent.clear()
    red, blue = data_url(picture(48, 40, "red")), data_url(picture(64, 48, "blue"))
    content = [image_part(red), image_part(blue), image_part(red), {"type": "text", "text": "Which?"}]
    response = stack.openai.chat.completions.create(model="fake", messages=[{"role": "user", "content": content}])
    assert response.choices[0].message.content == ANSWER
    (submit,) = stack.cluster.orders(Submit)
    assert len(submit.units) == 3
    assert submit.units[0].hash == submit.units[2].hash
    assert sorted(span.unit for span in submit.spans) == [0, 1, 2]
    assert len(stack.cluster.orders(Encode)) == 2
    assert response.usage is not None
    assert response.usage.prompt_tokens == len(submit.token_ids)


def test_usage_tells_how_much_of_the_prompt_was_cached(stack: Stack) -> None:
    for num_cached in (0, 5):
        stack.cluster.num_cached = num_cached
        usages = [stack.chat(n=2).json()["usage"]]
        for options in ({"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
            usages.append(events(stack.chat(stream=True, stream_options=options).text)[-1]["usage"])
        assert [usage["prompt_tokens_details"] for usage in usages] == [{"cached_tokens": num_cached}] * 3
    response = stack.openai.chat.completions.create(model="fake", messages=HI)
    assert response.usage is not None
    assert response.usage.prompt_tokens_details is not None
    assert response.usage.prompt_tokens_details.cached_tokens == 5
    stack.cluster.num_cached = 0


def test_text_only_never_touches_encode(stack: Stack) -> None:
    stack.cluster.sent.clear()
    stack.chat()
    assert stack.cluster.orders(Encode) == []


def test_sampling_fields_reach_the_order(stack: Stack) -> None:
    stack.cluster.sent.clear()
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "min_tokens": 2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "seed": 3,
        "max_tokens": 4,
    }
    stack.chat(**fields)
    (submit,) = stack.cluster.orders(Submit)
    assert {name: getattr(submit.sampling, name) for name in fields} == fields


def test_a_seed_is_drawn_for_a_request_without_one(stack: Stack) -> None:
    stack.cluster.sent.clear()
    stack.chat()
    stack.chat()
    first, second = stack.cluster.orders(Submit)
    assert first.sampling.seed != second.sampling.seed


def test_unknown_fields_and_neutral_values_are_accepted(stack: Stack) -> None:
    neutral = {"tools": [], "logit_bias": {}, "response_format": {"type": "text"}, "user": "u", "store": False, "x": 1}
    assert stack.chat(**neutral).status_code == 200


def test_a_developer_message_is_a_system_message(stack: Stack) -> None:
    as_developer = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    as_system = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    tokens = [stack.http.post("/tokenize", json={"messages": m}).json()["tokens"] for m in (as_developer, as_system)]
    assert tokens[0] == tokens[1]


def test_every_instance_forgets_a_finished_request_without_being_told(stack: Stack) -> None:
    stack.cluster.sent.clear()
    stack.chat()
    stack.wait_until_idle()
    assert stack.cluster.orders(Abort) == []


def said(stack: Stack, **fields: object) -> tuple[str, str, object]:
    """Text, finish reason and stop reason, whole or put together from a stream."""
    response = stack.chat(**fields)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        choice = response.json()["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]
    choices = [body["choices"][0] for body in events(response.text)]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    return text, choices[-1]["finish_reason"], choices[-1]["stop_reason"]


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.split("\n\n") if line and line != "data: [DONE]"]
