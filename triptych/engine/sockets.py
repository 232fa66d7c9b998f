"""Typed mailboxes between processes over ZeroMQ: one PULL socket to listen on, one PUSH socket per correspondent.

A message is two frames: the version of the routing table that its sender had, and the message.
"""

import logging
import resource
import struct

import msgspec
import zmq

from triptych import messages
from triptych.errors import ConfigError, TriptychError
from triptych.messages import AnyMessage

logger = logging.getLogger(__name__)

_SHOWN_BYTES = 32  # of a frame that is no message, in the log
_VERSION = struct.Struct("<Q")

_MOST_FILES = 65_536  # more than that nobody needs, and some hosts allow a thousand million
_FILES_PER_PEER = 10  # a mailbox and its connection, what comes from there, and the pipes to a process
_OTHER_FILES = 256  # of a server: libraries, the listener, media that are fetched
_FEWEST_CLIENTS = 64


def make_context(num_peers: int = 0) -> zmq.Context[zmq.Socket[bytes]]:
    """For as many correspondents as this process may have files open: libzmq's own bound is 1,023 sockets, and the
    usual soft bound of a process 1,024 files, which is raised as far as it may be. Raises ConfigError where it is known
    that `num_peers` of them will not do: in the middle of it all libzmq would end the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed, most = _allowed(hard), most_peers()
    if num_peers > most:
        why = f"by the {allowed} files that the server may have open (ulimit -Hn)"
        raise ConfigError(f"--placement: {num_peers} instances, at most {most}, {why}")
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    limit = context.get(zmq.SOCKET_LIMIT)
    assert isinstance(limit, int), f"libzmq's bound of sockets is {limit}"
    context.set(zmq.MAX_SOCKETS, min(allowed, limit))
    return context


def room_for_clients(num_peers: int) -> int:
    """How many connections of clients a server may hold beside so many instances. Without a file left for an instance
    that connects, libzmq ends the process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(_allowed(soft) - _OTHER_FILES - num_peers * _FILES_PER_PEER, _FEWEST_CLIENTS)


def most_peers() -> int:
    """How many instances a server may have: as many as `make_context` would take."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(_allowed(hard) - _OTHER_FILES - _FEWEST_CLIENTS, 0) // _FILES_PER_PEER


def _allowed(limit: int) -> int:
    return _MOST_FILES if limit == resource.RLIM_INFINITY else min(limit, _MOST_FILES)


class Inbox:
    """Messages of everybody, in order per sender. The address is bound as long as this object lives.

    Whoever sent one may know more of the cluster than its reader: who came, who is gone, who was carved anew. So it
    waits until the reader knows as much. What the same sender says later has no older version, and waits as well.

    Only processes of the same user can reach it (the socket lies in a folder of mode 0700), so that whoever sends is
    trusted to mean well, not to be whole: a frame that is no message is logged and dropped, and ends nothing.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.PULL)
        self.socket.set(zmq.RCVHWM, 0)
        self.socket.bind(address)
        self.address = self.socket.get_string(zmq.LAST_ENDPOINT)
        self._held: list[tuple[int, AnyMessage]] = []

    @property
    def fd(self) -> int:
        """For an event loop. Edge-triggered: it tells of the first message only, so always `receive` all."""
        fd = self.socket.get(zmq.FD)
        assert isinstance(fd, int)
        return fd

    def receive(self, known_version: int | None = None) -> list[AnyMessage]:
        """All messages that are here now, without waiting. `known_version`: of the reader's routing table; None: it is
        never behind."""
        arrived = self._held + self._read()
        if known_version is None:
            return [message for _, message in arrived]
        self._held = [(version, message) for version, message in arrived if version > known_version]
        return [message for version, message in arrived if version <= known_version]

    def _read(self) -> list[tuple[int, AnyMessage]]:
        read: list[tuple[int, AnyMessage]] = []
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return read
            message = self._decoded(frames)
            if message is not None:
                read.append(message)

    def _decoded(self, frames: list[bytes]) -> tuple[int, AnyMessage] | None:
        """None for what is no message: a process of another version, or one that died while it wrote."""
        try:
            header, frame = frames
            (version,) = _VERSION.unpack(header)
            message: AnyMessage = messages.decode(frame)
        # Beside msgspec's own: text that is no UTF-8, too many frames, arrays without end, a refused configuration.
        except (msgspec.MsgspecError, ValueError, struct.error, RecursionError, TriptychError) as error:
            shown = frames[0][:_SHOWN_BYTES].hex()
            total = sum(map(len, frames))
            logger.error("%s: dropped %d bytes that are no message (%s): %s", self.address, total, error, shown)
            return None
        return version, message

    def close(self) -> None:
        self.socket.close(linger=0)


class Post:
    """Sends to addresses, connecting on first use. Never blocks: a peer that does not read costs memory here until
    the controller takes it out of the table, and `forget` drops what it never read."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def send(self, address: str, message: AnyMessage, version: int = 0) -> None:
        """`version`: of the table that the sender has; 0 where the reader cannot be behind."""
        socket = self._sockets.get(address)
        if socket is None:
            socket = self._sockets[address] = self._context.socket(zmq.PUSH)
            socket.set(zmq.SNDHWM, 0)
            socket.connect(address)
        socket.send_multipart((_VERSION.pack(version), messages.encode(message)), zmq.NOBLOCK)

    def forget(self, address: str) -> None:
        socket = self._sockets.pop(address, None)
        if socket is not None:
            socket.close(linger=0)

    def close(self, linger_ms: int = 200) -> None:
        """Gives what was sent last a moment to leave."""
        for socket in self._sockets.values():
            socket.close(linger=linger_ms)
        self._sockets.clear()
