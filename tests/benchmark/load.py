"""load.c in Python, for a machine without a C compiler: the same arguments and output, but slower.

load.py echo PID PORT SECONDS CLIENTS
load.py pings PID PORT SECONDS
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

MESSAGE = 64
BLOCK = 256 * 1024
PINGS = b"ping" * (BLOCK // 4 + 1)
TIMEOUT = 30  # seconds to wait for the server


class Clock:
    """The measured time: a span of seconds that starts after the warm-up."""

    def __init__(self, pid: int, span: float) -> None:
        """Start the warm-up."""
        self.server = ~pid << 3 | 2  # clock_getcpuclockid(3)
        self.span = span
        self.warm = time.monotonic() + span / 5
        self.begun = self.seconds = self.cpu = 0.0  # seconds: the measured time, 0 until its end

    def measuring(self, now: float) -> bool:
        """Return whether data that arrived now counts."""
        if self.seconds or now < self.warm:
            return False
        if not self.begun:
            self.begun, self.cpu = now, time.clock_gettime(self.server)
            return False
        if now >= self.begun + self.span:
            self.seconds, self.cpu = now - self.begun, time.clock_gettime(self.server) - self.cpu
        return True


class Client:
    """A connection, its last message, and the part of the reply that has arrived."""

    def __init__(self, port: int, number: int) -> None:
        """Connect."""
        self.sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number, self.count = number, 0
        self.message = self.reply = b""
        self.since = 0.0

    def send_message(self) -> None:
        """Send a message that differs from all others."""
        self.count += 1
        self.message = (f"message {self.count} of client {self.number} ".encode() * 4)[:MESSAGE]
        self.reply = b""
        self.since = time.monotonic()
        self.sock.send(self.message)

    def has_reply(self) -> bool:
        """Read a part of the reply; return whether it is complete."""
        self.reply += self.receive(MESSAGE - len(self.reply))
        if not self.message.startswith(self.reply):
            sys.exit("a reply has wrong bytes")
        return len(self.reply) == MESSAGE

    def receive(self, size: int) -> bytes:
        """Read the data that has arrived, at most `size` bytes."""
        return self.sock.recv(size) or sys.exit("the server has closed a connection")


class Clients:
    """All clients, and an epoll object that reports the readable ones."""

    def __init__(self, port: int, size: int) -> None:
        """Connect all of them."""
        self.epoll = select.epoll()
        self.clients: dict[int, Client] = {}
        for number in range(size):
            client = Client(port, number)
            self.clients[client.sock.fileno()] = client
            self.epoll.register(client.sock, select.EPOLLIN)

    def ready(self) -> list[Client]:
        """Wait for readable clients."""
        return [self.clients[fd] for fd, _ in self.epoll.poll(TIMEOUT)] or sys.exit("no data from the server")


def echo(pid: int, port: int, seconds: float, size: int) -> dict[str, float]:
    """Run clients that send a message, wait for its echo and send the next one."""
    everyone = Clients(port, size)
    for client in everyone.clients.values():
        client.send_message()
    clock, latencies, active = Clock(pid, seconds), [], size
    while active:
        for client in everyone.ready():
            if client.has_reply():
                now = time.monotonic()
                if clock.measuring(now):
                    latencies.append(now - client.since)
                if clock.seconds:
                    active -= 1
                else:
                    client.send_message()
    for client in everyone.clients.values():
        client.sock.shutdown(socket.SHUT_WR)
    for client in everyone.clients.values():
        if client.sock.recv(1):
            sys.exit("after the last reply: no end of file")
    latencies.sort()
    figures = {"echoes": len(latencies), "seconds": clock.seconds, "cpu": clock.cpu}
    return {**figures, "median": latencies[len(latencies) // 2], "p99": latencies[len(latencies) * 99 // 100]}


def pings(pid: int, port: int, seconds: float) -> dict[str, float]:
    """Run two clients that read as fast as they can."""
    everyone = Clients(port, 2)
    clock, received, counted = Clock(pid, seconds), [0, 0], [0, 0]
    while not clock.seconds:
        for client in everyone.ready():
            data, phase = client.receive(BLOCK), received[client.number] % 4
            if data != PINGS[phase : phase + len(data)]:
                sys.exit("a ping has wrong bytes")
            received[client.number] += len(data)
            if clock.measuring(time.monotonic()):
                counted[client.number] += len(data)
    return {"bytes": counted[0], "other": counted[1], "seconds": clock.seconds, "cpu": clock.cpu}


def main(kind: str, pid: str, port: str, seconds: str, size: str = "2") -> None:
    """Run one load and print its figures."""
    where = int(pid), int(port), float(seconds)
    try:
        figures = echo(*where, int(size)) if kind == "echo" else pings(*where)
    except OSError as error:
        sys.exit(str(error))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
