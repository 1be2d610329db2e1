"""The README's core, grown: it sends pings, as the lecture's script does, and survives tests/faults.py.

    python3 tests/faults.py all --server "python3 tests/exercises/grown.py"

A comment names the fault that a line removes.
"""

from __future__ import annotations

import codecs
import os
import select
import signal
import socket
import stat
import sys
import types
from contextlib import suppress
from typing import Coroutine, Generator

Task = Coroutine[int, int, None]

PORT = int(sys.argv[1]) if len(sys.argv) > 1 else 10001


@types.coroutine
def ready(interest: int) -> Generator[int, int, int]:
    return (yield interest)


async def flood(conn: socket.socket) -> None:
    """Read and send in the same turn."""
    decoder = codecs.getincrementaldecoder("utf8")("replace")  # split, bytes
    unsent = b""
    while True:
        events = await ready(select.EPOLLIN | select.EPOLLOUT)
        if events & select.EPOLLIN:
            data = conn.recv(1024)
            if not data:  # leave
                return
            show(decoder.decode(data))
        if events & select.EPOLLOUT:  # starve: no elif
            unsent = unsent or b"ping"
            unsent = unsent[conn.send(unsent) :]


async def accept(listener: socket.socket) -> None:
    while True:  # third
        await ready(select.EPOLLIN)
        with suppress(OSError):  # the connection was reset before accept
            conn, _ = listener.accept()
            start(conn, flood(conn))


def show(text: str) -> None:
    """Print a message, or drop it if that would block."""
    visible = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)  # escape
    with suppress(BlockingIOError):  # print
        os.write(output, f"data received...\n{visible}\n".encode())


def open_output() -> int:
    """Return a descriptor of standard output.  Its writes do not block, and those of other programs may."""
    if stat.S_ISFIFO(os.fstat(1).st_mode) or os.isatty(1):
        return os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return 1


def start(conn: socket.socket, task: Task) -> None:
    conn.setblocking(False)
    interest = task.send(None)  # type: ignore[arg-type]
    epoll.register(conn.fileno(), interest)
    tasks[conn.fileno()] = conn, task


def resume(descriptor: int, events: int) -> None:
    conn, task = tasks[descriptor]
    try:
        interest = task.send(events)
        epoll.modify(descriptor, interest)
    except (StopIteration, OSError):  # reset: only this client ends
        epoll.unregister(descriptor)
        del tasks[descriptor]
        conn.close()


for number in signal.SIGINT, signal.SIGTERM:  # stop
    signal.signal(number, lambda *_: sys.exit())
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # restart
sock.bind(("", PORT))
sock.listen()
output = open_output()
epoll = select.epoll()
tasks: dict[int, tuple[socket.socket, Task]] = {}
start(sock, accept(sock))
while True:
    for descriptor, events in epoll.poll():  # idle: no timeout
        if descriptor in tasks:  # an earlier event of this batch may have ended it
            resume(descriptor, events)
