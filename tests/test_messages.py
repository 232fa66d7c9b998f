"""The wire: every struct of the union survives it, and nothing else gets in."""

import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_config, make_embedded, make_request
from triptych import messages
from triptych.config import InstanceConfig
from triptych.core import FinishReason, RequestId, Role, SamplingParams

KINDS = typing.get_args(messages.AnyMessage)
integers = st.integers(-(1 << 31), 1 << 53)
SCALARS = {
    str: st.text(max_size=8),
    bytes: st.binary(max_size=20),
    int: integers,
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    type(None): st.none(),
    typing.Any: st.lists(integers, max_size=3),  # a position argument
    Role: st.sampled_from(Role),
    FinishReason: st.sampled_from(FinishReason),
    InstanceConfig: st.sampled_from(Role).map(lambda role: make_config("i0", role)),
}


def values(annotation: object) -> st.SearchStrategy:
    """What a field of this type can hold."""
    if isinstance(annotation, typing.NewType):
        return values(annotation.__supertype__)
    if annotation in SCALARS:
        return SCALARS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return structs(annotation)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return st.lists(values(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if origin is tuple:
        if args[-1] is ...:
            return st.lists(values(args[0]), max_size=3).map(tuple)
        return st.tuples(*map(values, args))
    assert args, f"no message had a {annotation} so far"
    return st.one_of(*map(values, args))  # a union


def structs(kind: type[msgspec.Struct]) -> st.SearchStrategy:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in msgspec.structs.fields(kind)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_arrives_as_it_was_sent(kind):
    @given(structs(kind))
    @settings(max_examples=40, deadline=None)
    def arrives(message):
        assert messages.decode(messages.encode(message)) == message

    arrives()


def test_every_message_of_the_module_is_in_the_union():
    defined = {
        kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, messages.Message)
    } - {messages.Message}
    assert defined == set(KINDS)


@pytest.mark.parametrize(
    "wire",
    [
        ["Migrate", "r"],  # an unknown tag
        ["Abort", 3],  # a wrong type
        ["Abort"],  # a missing field
        {"type": "Abort", "request_id": "r"},
        [],
        None,
    ],
)
def test_what_is_no_message_is_rejected(wire):
    with pytest.raises(msgspec.ValidationError):
        messages.decode(msgspec.msgpack.encode(wire))


def test_a_message_cut_short_is_rejected():
    wire = messages.encode(make_request("r", num_images=2))
    with pytest.raises(msgspec.DecodeError):
        messages.decode(wire[:-1])


def test_messages_do_not_change_in_transit():
    with pytest.raises(AttributeError):
        make_embedded().request_id = RequestId("other")


def test_a_ticket_is_small_enough_to_log():
    assert len(messages.encode(make_embedded())) < 100


def test_sampling_params_send_only_what_is_set():
    plain = len(msgspec.msgpack.encode(SamplingParams(max_tokens=5, seed=1)))
    assert plain < len(msgspec.msgpack.encode(SamplingParams(max_tokens=5, seed=1, top_k=3)))
