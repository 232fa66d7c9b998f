"""Typed mailboxes between processes over ZeroMQ: one PULL socket to listen on, one PUSH socket per correspondent."""

import zmq

from triptych import messages
from triptych.messages import AnyMessage


class Inbox:
    """Messages of everybody, in order per sender. The address is bound as long as this object lives."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.PULL)
        self.socket.set(zmq.RCVHWM, 0)
        self.socket.bind(address)
        self.address = self.socket.get_string(zmq.LAST_ENDPOINT)

    @property
    def fd(self) -> int:
        """For an event loop. Edge-triggered: it tells of the first message only, so always `receive` all."""
        fd = self.socket.get(zmq.FD)
        assert isinstance(fd, int)
        return fd

    def receive(self) -> list[AnyMessage]:
        """All messages that are here now, without waiting."""
        received: list[AnyMessage] = []
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return received
            received.append(messages.decode(frame))

    def close(self) -> None:
        self.socket.close(linger=0)


class Post:
    """Sends to addresses, connecting on first use. Never blocks: a peer that does not read costs memory here until
    the controller takes it out of the table, and `forget` drops what it never read."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def send(self, address: str, message: AnyMessage) -> None:
        socket = self._sockets.get(address)
        if socket is None:
            socket = self._sockets[address] = self._context.socket(zmq.PUSH)
            socket.set(zmq.SNDHWM, 0)
            socket.connect(address)
        socket.send(messages.encode(message), zmq.NOBLOCK)

    def forget(self, address: str) -> None:
        socket = self._sockets.pop(address, None)
        if socket is not None:
            socket.close(linger=0)

    def close(self, linger_ms: int = 200) -> None:
        """Gives what was sent last a moment to leave."""
        for socket in self._sockets.values():
            socket.close(linger=linger_ms)
        self._sockets.clear()
