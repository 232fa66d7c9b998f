"""Chat completions over real HTTP, as the openai client sees them."""

from collections.abc import Iterator

import pytest

from tests.server.fakes import ANSWER, Stack, data_url, ids, image_part, picture
from triptych.messages import Encode, Submit

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack() as stack:
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


def test_a_picture_is_sent_once_to_encode_and_named_in_the_order_to_prefill(stack: Stack) -> None:
    stack.cluster.sent.clear()
    red, blue = data_url(picture(colour="red")), data_url(picture(64, 48, colour="blue"))
    content = [image_part(red), image_part(blue), image_part(red), {"type": "text", "text": "Which?"}]
    response = stack.openai.chat.completions.create(model="fake", messages=[{"role": "user", "content": content}])
    assert response.choices[0].message.content == ANSWER
    (submit,) = [message for _, message in stack.cluster.sent if isinstance(message, Submit)]
    assert len(submit.units) == 3
    assert submit.units[0].hash == submit.units[2].hash
    assert sorted(span.unit for span in submit.spans) == [0, 1, 2]
    assert stack.cluster.num_sent(Encode) == 2
    assert response.usage is not None
    assert response.usage.prompt_tokens == len(submit.token_ids)
