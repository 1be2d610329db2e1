"""The echo servers that the benchmark compares with ours, each in the plain style of its library.

peers.py NAME             an echo server on a free port of 127.0.0.1, which it reports on standard error
peers.py NAME OPTION ...  a variant of this server, with its options
peers.py --versions       the versions of the libraries outside the standard library
"""

from __future__ import annotations

import asyncio
import re
import select
import socket
import sys
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
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


def threads() -> None:
    """Serve with a thread for each client, in which every call blocks."""

    def echo(sock: socket.socket) -> None:
        with sock:
            while data := sock.recv(READ_SIZE):
                sock.sendall(data)

    listener = socket.create_server((HOST, 0), backlog=BACKLOG)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    report(listener.getsockname())
    while True:
        Thread(target=echo, args=listener.accept()[:1], daemon=True).start()


def core() -> None:
    """Serve with the README's core, on a free port.  It prints nothing, like this server with --quiet."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    marks = "def ready(", "async def echo(", "def start(", '("", 10001)', "sock.listen()\n"
    for program in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if all(mark in program for mark in marks):
            program = program.replace('("", 10001)', f'("{HOST}", 0)')
            program = program.replace("sock.listen()\n", "sock.listen(); report(sock.getsockname())\n")
            exec(program, {"report": report, "print": lambda *_: None})
    sys.exit("README.md has no program that defines ready, echo and start")


def three_lines() -> None:
    """Serve with this server and the README's echo of three lines."""

    async def echo(client: Any) -> None:
        while data := await client.read():
            await client.write(data)

    this_server().main(protocol=echo)


def timeouts() -> None:
    """Serve with this server and an echo that waits an hour for the next data, at most."""

    async def echo(client: Any) -> None:
        while data := await client.read(timeout=3600):
            await client.write(data)

    this_server().main(protocol=echo)


def no_busy_polls() -> None:
    """Serve with this server, which sleeps as soon as no descriptor is ready."""
    server = this_server()
    assert server.BUSY_POLLS  # the constant still has this name
    server.BUSY_POLLS = 0
    server.main()


def this_server() -> Any:
    """Return this server's module."""
    sys.path[0] = str(ROOT)
    return import_module("non_block_io_server")


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


SERVERS = {
    "plain": plain,
    "threads": threads,
    "core": core,
    "three-lines": three_lines,
    "timeouts": timeouts,
    "no-busy-polls": no_busy_polls,
    "trio": trio,
}


def main() -> None:
    """Run the server that the first argument names."""
    name = sys.argv.pop(1)
    library, _, kind = name.partition("-")
    if name == "--versions":
        print(*(f"{each} {import_module(each).__version__}" for each in ("uvloop", "trio")), sep=", ")
    elif name in SERVERS:
        SERVERS[name]()
    else:
        loop: asyncio.AbstractEventLoop = import_module(library).new_event_loop()
        loop.run_until_complete(protocol() if kind == "protocol" else streams())


if __name__ == "__main__":
    main()
