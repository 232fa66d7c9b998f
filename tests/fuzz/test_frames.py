"""An inbox among frames that are no messages: it hands on the good ones, in order, and drops the others."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.builders import make_request
from tests.fuzz.noise import Noise
from tests.fuzz.size import numbers, randomness
from triptych import messages
from triptych.core import InstanceId, RequestId, Role
from triptych.engine.screening import contradiction
from triptych.engine.sockets import Inbox
from triptych.messages import Abort, Load, Peer, Ready, SlabDescription

ANY_TABLE = bytes(8)  # a version that every reader knows


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[tuple[Inbox, "zmq.Socket[bytes]"]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox = Inbox(context, f"ipc://{tmp_path}/inbox")
    sender = context.socket(zmq.PUSH)
    sender.connect(inbox.address)
    yield inbox, sender
    sender.close(linger=0)
    inbox.close()
    context.term()


def broken_frame(rng: random.Random) -> bytes:
    """What is no message, or one with some of its bytes changed, cut off or doubled."""
    frame = bytearray(messages.encode(Noise(rng, {"p0": "epoch"}).message()))
    match rng.randrange(8):
        case 0:
            return rng.randbytes(rng.randrange(64))
        case 1:
            return bytes(frame[: rng.randrange(len(frame))])
        case 2:
            return bytes(frame) + rng.randbytes(3)
        case 3:
            return msgspec.msgpack.encode(
                rng.choice([["Migrate", 1], {"type": "Abort"}, [], None, 7, "Abort", [[]] * 9])
            )
        case 4:
            return b"\x91" * 200_000  # an array in an array in an array
        case 5:
            return b"\xdd\xff\xff\xff\xff"  # four billion elements
        case _:
            for _ in range(rng.randrange(1, 4)):
                frame[rng.randrange(len(frame))] = rng.randrange(256)
            return bytes(frame)


def test_frames_that_are_no_messages_end_nothing(
    inbox: tuple[Inbox, "zmq.Socket[bytes]"], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    receiver, sender = inbox
    for number in numbers(short=1000):
        frame = broken_frame(randomness("frames", number))
        sender.send_multipart([ANY_TABLE, frame])
        sender.send_multipart([ANY_TABLE, messages.encode(Abort(RequestId(str(number))))])
        received: list[messages.AnyMessage] = []
        try:
            while Abort(RequestId(str(number))) not in received:
                assert receiver.socket.poll(10_000), "the message behind it never came"
                received += receiver.receive()
        except BaseException as error:
            error.add_note(f"TRIPTYCH_FUZZ_FIRST={number}; the frame: {frame[:200].hex()}")
            raise
        assert len(received) <= 2, f"one frame, and {len(received) - 1} messages"


@pytest.mark.parametrize(
    "frames",
    [
        [b"garbage"],
        [b""],
        [messages.encode(Abort(RequestId("r")))],
        [ANY_TABLE],
        [b"short", messages.encode(Abort(RequestId("r")))],
        [ANY_TABLE, b""],
        [ANY_TABLE, b"\xc1"],
        [ANY_TABLE, b"\xa1\xff"],
        [ANY_TABLE, ANY_TABLE, messages.encode(Abort(RequestId("r")))],
    ],
    ids=lambda frames: repr(frames)[:20],
)
def test_what_is_dropped_is_logged(
    inbox: tuple[Inbox, "zmq.Socket[bytes]"], frames: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    receiver, sender = inbox
    good = messages.encode(Abort(RequestId("good")))
    sender.send_multipart(frames)
    sender.send_multipart([ANY_TABLE, good])
    received: list[messages.AnyMessage] = []
    while not received:
        assert receiver.socket.poll(10_000)
        received += receiver.receive()
    assert received == [Abort(RequestId("good"))]
    assert "dropped" in caplog.text


def test_what_instances_say_is_no_contradiction() -> None:
    slab = SlabDescription({}, "host", "cpu", 0, {})
    ready = Ready(Peer(InstanceId("e0"), Role.E, "1", "ipc://e0", slab), 1.0)
    for message in (make_request("r", num_images=3), ready, Load(InstanceId("e0"), {}, {}, {"e": 1.0}, {}, {"e": 0.1})):
        assert contradiction(message) is None
