"""Exercise 1: send 2 MB on each of 50 connections to an echo server, in one thread; check every byte.

    python3 non_block_io_server.py --echo --quiet --connections 50 --wait-for 1
    python3 tests/exercises/fifty.py [PORT [BYTES [naive]]]

The naive way sends everything first.  It hangs if BYTES is more than the queues of one connection hold.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
from selectors import EVENT_READ, EVENT_WRITE
from typing import Tuple

CONNECTIONS = 50
CHUNK = 65536  # bytes per call
Exchange = Tuple[socket.socket, memoryview]  # a connection and its data


def naive(exchanges: list[Exchange]) -> None:
    """Send everything, then read everything."""
    for sock, data in exchanges:
        sock.sendall(data)
    for sock, data in exchanges:
        received = 0
        while received < len(data):
            received += check(sock.recv(CHUNK), data, received)


def at_the_same_time(exchanges: list[Exchange]) -> None:
    """Send and read what each connection is ready for."""
    selector = selectors.DefaultSelector()
    sent, received = {}, {}
    for sock, data in exchanges:
        sock.setblocking(False)
        sent[sock] = received[sock] = 0
        selector.register(sock, EVENT_READ | EVENT_WRITE, (sock, data))
    while selector.get_map():
        for key, events in selector.select():
            sock, data = key.data
            if events & EVENT_WRITE:
                sent[sock] += sock.send(data[sent[sock] : sent[sock] + CHUNK])  # it may accept fewer
                if sent[sock] == len(data):
                    selector.modify(sock, EVENT_READ, key.data)  # else the loop would never sleep
            if events & EVENT_READ:
                received[sock] += check(sock.recv(CHUNK), data, received[sock])
                if received[sock] == len(data):
                    selector.unregister(sock)


def check(chunk: bytes, data: memoryview, place: int) -> int:
    """Return the length of a chunk that was received, if it is right."""
    if not chunk:
        sys.exit(f"the connection ended after {place:,} bytes")
    if chunk != data[place : place + len(chunk)]:
        sys.exit(f"wrong bytes after {place:,} right ones")
    return len(chunk)


def main() -> None:
    port, size = int((sys.argv[1:] or ["10001"])[0]), int((sys.argv[2:] or ["2000000"])[0])
    block = memoryview(os.urandom(size + CONNECTIONS))
    exchanges = [
        (socket.create_connection(("127.0.0.1", port)), block[number : number + size])
        for number in range(CONNECTIONS)  # each connection has other data
    ]
    (naive if sys.argv[3:] == ["naive"] else at_the_same_time)(exchanges)
    print(f"{CONNECTIONS} connections, {size:,} bytes each: every byte is right")


if __name__ == "__main__":
    main()
