"""The echo servers that the benchmark compares with ours, each in the plain style of its library.

peers.py NAME          an echo server on a free port of 127.0.0.1, which it reports on standard error
peers.py --versions    the versions of the libraries outside the standard library
"""

from __future__ import annotations

import asyncio
import select
import socket
import sys
from importlib import import_module
from typing import Any

HOST = "127.0.0.1"
BACKLOG = 4096
READ_SIZE = 65536


def report(address: tuple[str, int]) -> None:
    """Report the address."""
    print(f"listening on {HOST}:{address[1]}", file=sys.stderr, flush=True)


def plain() -> None:
    """Serve with the least code: no handlers, no error handling, no backpressure."""
    listener = socket.create_server((HOST, 0), backlog=BACKLOG)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connections: dict[int, socket.socket] = {}
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    report(listener.getsockname())
    while True:
        for fd, _ in epoll.poll():
            if fd in connections:
                data = connections[fd].recv(READ_SIZE)
                if data:
                    connections[fd].send(data)
                else:
                    connections.pop(fd).close()
            else:
                sock = listener.accept()[0]
                connections[sock.fileno()] = sock
                epoll.register(sock, select.EPOLLIN)


class Echo(asyncio.Protocol):
    """A protocol of asyncio."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Send the data back."""
        self.transport.write(data)


async def protocol() -> None:
    """Serve with callbacks."""
    await forever(await asyncio.get_running_loop().create_server(Echo, HOST, 0, backlog=BACKLOG))


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back everything that one client sends."""
    data = await reader.read(READ_SIZE)
    while data:
        writer.write(data)
        await writer.drain()
        data = await reader.read(READ_SIZE)
    writer.close()


async def streams() -> None:
    """Serve with one coroutine for each client."""
    await forever(await asyncio.start_server(echo, HOST, 0, backlog=BACKLOG))


async def forever(server: asyncio.Server) -> None:
    """Serve until the process ends."""
    report(server.sockets[0].getsockname())
    await server.serve_forever()


def trio() -> None:
    """Serve with one coroutine for each client."""
    library = import_module("trio")

    async def echo(stream: Any) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def main() -> None:
        listeners = await library.open_tcp_listeners(0, host=HOST, backlog=BACKLOG)
        report(listeners[0].socket.getsockname())
        await library.serve_listeners(echo, listeners)

    library.run(main)


def main(name: str) -> None:
    """Run the server of this name."""
    library, _, kind = name.partition("-")
    if name == "--versions":
        print(*(f"{each} {import_module(each).__version__}" for each in ("uvloop", "trio")), sep=", ")
    elif name == "plain":
        plain()
    elif name == "trio":
        trio()
    else:
        loop: asyncio.AbstractEventLoop = import_module(library).new_event_loop()
        loop.run_until_complete(protocol() if kind == "protocol" else streams())


if __name__ == "__main__":
    main(sys.argv[1])
