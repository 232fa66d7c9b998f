"""The listening socket: what it must be so that tokens leave at once."""

import asyncio
import socket

from triptych.server.running import bind


def test_tokens_are_not_held_back_for_the_clients_acknowledgement() -> None:
    """asyncio switches Nagle's algorithm off only where the socket names its protocol: otherwise 40 ms a token."""

    async def accepted_nodelay() -> int:
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bind("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            nodelay = await seen
            writer.close()
            return nodelay

    assert asyncio.run(accepted_nodelay()) != 0
