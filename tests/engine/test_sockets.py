"""Mailboxes: order, and who waits for a routing table."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from triptych.core import RequestId
from triptych.engine.sockets import Inbox, Post, make_context, most_peers
from triptych.errors import ConfigError
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


# ---- bounds of the process


class Limits:
    """Of open files, as a process finds and sets them."""

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def get(self, what: int) -> tuple[int, int]:
        return self.now

    def set(self, what: int, limits: tuple[int, int]) -> None:
        self.now = limits


@contextmanager
def limited(soft: int, hard: int) -> Iterator[Limits]:
    limits = Limits(soft, hard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resource, "getrlimit", limits.get)
        patch.setattr(resource, "setrlimit", limits.set)
        yield limits


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 10_000, reason="needs 10,000 open files")
def test_more_than_a_thousand_correspondents_have_room_in_a_process(tmp_path: Path) -> None:
    context = make_context()
    inboxes = [Inbox(context, f"ipc://{tmp_path}/{number}") for number in range(1100)]
    post = Post(context)
    for number, inbox in enumerate(inboxes):
        post.send(inbox.address, Abort(RequestId(str(number))))
    for number, inbox in enumerate(inboxes):
        assert inbox.socket.poll(5000), f"nothing came to {inbox.address}"
        assert inbox.receive() == [Abort(RequestId(str(number)))]
    post.close()
    for inbox in inboxes:
        inbox.close()
    context.term()


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (1024, 524_288, 65_536),
        (1024, 4096, 4096),
        (4096, 4096, 4096),
        (100_000, 524_288, 100_000),
        (1024, resource.RLIM_INFINITY, 65_536),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_a_process_may_have_as_many_files_open_as_it_is_allowed_to(soft: int, hard: int, raised: int) -> None:
    with limited(soft, hard) as limits:
        make_context().term()
        assert limits.now == (raised, hard)


def test_more_instances_than_files_may_be_open_are_refused_before_one_starts() -> None:
    with limited(1024, 4096), pytest.raises(ConfigError, match=r"--placement: 1000 .* at most 377, .* 4096"):
        make_context(1000)
    with limited(1024, 4096):
        make_context(100).term()


@pytest.mark.parametrize("hard", [512, 4096, resource.RLIM_INFINITY])
def test_a_placement_that_grows_may_have_as_many_instances_as_one_that_starts(hard: int) -> None:
    with limited(256, hard):
        most = most_peers()
        make_context(most).term()
        with pytest.raises(ConfigError, match=rf"--placement: {most + 1} instances, at most {most},"):
            make_context(most + 1)
