"""Mailboxes: order, and who waits for a routing table."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from triptych.core import RequestId
from triptych.engine.sockets import Inbox, Post
from triptych.messages import Abort, AnyMessage


class Mail:
    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox = Inbox(self._context, f"ipc://{folder}/inbox")
        self._senders: dict[str, Post] = {}

    def send(self, sender: str, name: str, version: int) -> None:
        post = self._senders.setdefault(sender, Post(self._context))
        post.send(self.inbox.address, Abort(RequestId(name)), version)

    def receive(self, count: int, known_version: int | None) -> list[str]:
        """Names of that many messages."""
        received: list[AnyMessage] = []
        while len(received) < count:
            received += self.inbox.receive(known_version)
        return [message.request_id for message in received if isinstance(message, Abort)]

    def close(self) -> None:
        for post in self._senders.values():
            post.close()
        self.inbox.close()
        self._context.term()


@pytest.fixture
def mail(tmp_path: Path) -> Iterator[Mail]:
    mail = Mail(tmp_path)
    yield mail
    mail.close()


def test_a_message_waits_until_its_reader_knows_as_much_as_its_sender(mail: Mail) -> None:
    mail.send("ahead", "later", 3)
    mail.send("behind", "now", 1)
    assert mail.receive(1, known_version=1) == ["now"]
    mail.inbox.socket.poll(1000)
    assert mail.inbox.receive(2) == []
    assert mail.receive(1, known_version=3) == ["later"]


def test_messages_of_one_sender_keep_their_order_while_they_wait(mail: Mail) -> None:
    for number, version in enumerate([1, 1, 2, 2, 4]):
        mail.send("sender", str(number), version)
    received = [name for known in (1, 2, 3, 4) for name in mail.receive({1: 2, 2: 2, 3: 0, 4: 1}[known], known)]
    assert received == ["0", "1", "2", "3", "4"]


def test_a_reader_that_is_never_behind_gets_everything(mail: Mail) -> None:
    mail.send("sender", "far ahead", 1 << 40)
    assert mail.receive(1, None) == ["far ahead"]
