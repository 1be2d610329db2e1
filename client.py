#!/usr/bin/env python3
"""A client for non_block_io_server.py: it sends messages, and counts the pings that come.

It is an event loop like the server's, over one connection and standard input.  Read the
server first; new here is how to leave.  To close while pings lie unread makes the kernel
send a reset, and a reset may destroy what the server has not read yet.  So this client reads
all the time, and leaves politely: it half-closes ("I have said all"), reads on to the
server's end of file, and closes then.

    event                       what happens
    --------------------------  ---------------------------------------------------------
    the server has sent         pings are counted, anything else is shown
    the server takes more       what is still unsent is sent
    standard input has more     it is sent; a person is answered with the number of pings
    a moment has passed         where nothing has come, that is said
    SIGINT or SIGTERM           it leaves: politely, if that takes no more than a moment

In the interpreter, `import client; sock = client.connect()` gives a plain socket.
"""

from __future__ import annotations

import argparse
import codecs
import os
import re
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, Callable

HOST, PORT = "127.0.0.1", 10001
SIZE = 256 * 1024  # bytes of one read
PING = b"ping"
PINGS = PING * (SIZE // len(PING) + 1)  # what a piece of the stream is compared with, in one stroke
RUN = re.compile(rb"^(?:ping)+", re.MULTILINE)
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but tab and newline, DEL, C1
MOMENT = 1.0  # seconds
PROMPT = b"> "
SILENCE = "nothing from the server yet: it may be waiting for another client"


def connect(host: str = HOST, port: int = PORT) -> socket.socket:
    """A connected, blocking TCP socket.  Raises OSError where nobody listens."""
    return socket.create_connection((host, port))


def count(number: int, noun: str) -> str:
    """How a person writes it: `1 ping`, `1,204,113 pings`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class Loop:
    """Waits, looks up whose descriptor it is, hands over."""

    def __init__(self) -> None:
        self.running = True
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.interests: dict[int, int] = {}
        self.files: set[int] = set()  # always ready, and not to be watched: epoll_ctl(2)

    def run(self) -> None:
        """Hand over until `running` is false."""
        while self.running:
            ready = self.epoll.poll(0 if self.files else None)
            for descriptor, events in ready + [(file, select.EPOLLIN) for file in self.files]:
                self.handlers[descriptor](events)

    def watch(self, descriptor: int, interest: int, handler: Callable[[int], None]) -> None:
        """From now on call handler(events) when something of the interest is true of the descriptor."""
        before = self.interests.get(descriptor, 0)
        self.interests[descriptor], self.handlers[descriptor] = interest, handler
        try:
            if interest and before:
                self.epoll.modify(descriptor, interest)
            elif interest:
                self.epoll.register(descriptor, interest)
            elif before:
                self.epoll.unregister(descriptor)
        except PermissionError:
            (self.files.add if interest else self.files.discard)(descriptor)


def leave_at_once_when_told() -> None:
    """From now on SIGINT and SIGTERM end the program, wherever it stands."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(1))


class PingStream:
    """Tells the pings from anything else.

    A stream has no marks between one thing and the next.  So pings count where they stand at
    the beginning, or after another ping or a newline.  Any other byte begins a line that is
    none, even with a "ping" in it: the echo of `shopping`.
    """

    def __init__(self) -> None:
        self.pings = self.letters = 0  # whole ones; letters of the next
        self.in_line = False

    def feed(self, data: memoryview) -> bytes:
        """Count the pings of the stream's next bytes; return those bytes that are no pings."""
        letters = self.letters + len(data)
        if not self.in_line and PINGS.startswith(data, self.letters):
            self.pings, self.letters = self.pings + letters // len(PING), letters % len(PING)
            return b""
        line, rest = b"", PING[: self.letters] + data
        if self.in_line:
            end = rest.find(b"\n") + 1 or len(rest)
            line, rest = rest[:end], rest[end:]
        other = RUN.sub(b"", rest)
        self.pings += (len(rest) - len(other)) // len(PING)
        last = other[other.rfind(b"\n") + 1 :]
        self.letters = len(last) if PING.startswith(last) else 0
        self.in_line = last != PING[: self.letters] or (not rest and line[-1:] != b"\n")
        return line + other[: len(other) - self.letters]


def write(descriptor: int, data: bytes | memoryview) -> None:
    """Write all the bytes.  Whoever reads them may keep us waiting, and so, by TCP, the server."""
    data = memoryview(data)
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # somebody who shares it has set O_NONBLOCK
            select.select([], [descriptor], [])
        except OSError as error:
            sys.exit(f"standard output can no longer be written: {error.strerror}")


class Screen:
    """What is seen: anything that is no ping; and for a person a prompt, and the number of pings."""

    def __init__(self, raw: bool, person: bool) -> None:
        self.raw, self.person, self.stream = raw, person, PingStream()
        self.terminal = os.isatty(1)
        self.dialogue = 1 if self.terminal else 2
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.row_open = False  # what was shown last has no newline yet
        self.ask("")

    def take(self, data: memoryview) -> None:
        """Count the pings of what the server has sent, and show the rest; if raw, write all of it."""
        if self.raw:
            write(1, data)
        else:
            self.show(self.stream.feed(data))

    def show(self, data: bytes, final: bool = False) -> None:
        """Write bytes as they are; on a terminal as text, with its controls made visible."""
        if self.terminal:
            text = self.decoder.decode(data, final)
            data = CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text).encode()
        if data and self.terminal and self.person:  # over the prompt, and the prompt again
            data = data if self.row_open else b"\r" + data
            self.row_open = not data.endswith(b"\n")
            data = data if self.row_open else data + PROMPT
        write(1, data)

    def ask(self, answer: str) -> None:
        """Answer a person, and prompt."""
        if self.person:
            write(self.dialogue, answer.encode() + PROMPT)

    def answer(self) -> None:
        """Tell a person the number of pings so far, and prompt."""
        self.ask(f"{count(self.stream.pings, 'ping')} so far\n")

    def notice(self, line: str) -> None:
        """Say something that is no answer: to a person over the prompt, else on standard error."""
        if self.person:
            self.ask(f"\r{line}\n")
        else:
            with suppress(OSError):  # where nobody can be told, the exchange goes on all the same
                os.write(2, f"{line}\n".encode())

    def close(self, received: int) -> str:
        """Show what is cut off at the end; say in words what the bytes received were."""
        if self.person:
            write(self.dialogue, b"\n")
            self.person = False
        self.show(PING[: self.stream.letters], final=True)
        pings, others = self.stream.pings, received - self.stream.pings * len(PING)
        if self.raw:
            return count(received, "byte")
        return count(pings, "ping") + (f", {count(others, 'other byte')}" if others else "")


class Conversation:
    """The connection, standard input, and the signals that end it.

    Input is read only while nothing is unsent: it waits for the server, and memory does not grow.
    """

    def __init__(self, loop: Loop, sock: socket.socket, screen: Screen) -> None:
        self.loop, self.sock, self.screen = loop, sock, screen
        self.buffer = memoryview(bytearray(SIZE))
        self.unsent = memoryview(b"")
        self.received = self.sent = self.newlines = 0
        self.last = b"\n"  # byte sent
        self.said_all = self.interrupted = False
        self.failure = ""
        sock.setblocking(False)
        self.signals, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, self.interrupt)
        signal.setitimer(signal.ITIMER_REAL, MOMENT)
        loop.watch(self.signals, select.EPOLLIN, self.read_signals)

    def update(self) -> None:
        """Tell epoll what to wait for."""
        reading = 0 if self.unsent or self.said_all else select.EPOLLIN
        writing = select.EPOLLOUT if self.unsent else 0
        self.loop.watch(0, reading, self.read_input)
        self.loop.watch(self.sock.fileno(), select.EPOLLIN | writing, self.ready)

    def ready(self, events: int) -> None:
        """The connection is ready: receive a piece, then send one."""
        if events & select.EPOLLIN:
            self.receive()
        if events & select.EPOLLOUT and self.loop.running:
            self.send()

    def receive(self) -> None:
        """Take a piece.  With the server's end of file, or a reset, the conversation is over."""
        try:
            size = self.sock.recv_into(self.buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(error)
            size = 0
        self.received += size
        if size:
            self.screen.take(self.buffer[:size])
            return
        if self.unsent or not self.said_all:
            self.failure = self.failure or "the server has ended the conversation"
        self.loop.running = False

    def read_input(self, events: int) -> None:
        """Standard input is ready: send a piece of it; at its end, finish."""
        try:
            data = os.read(0, SIZE) if not self.said_all else b""
        except OSError as error:
            data, self.failure = b"", f"standard input cannot be read: {error.strerror}"
        if data:
            self.put(data)
            self.screen.answer()
        else:
            self.finish()

    def put(self, data: bytes) -> None:
        """Send data, as the server takes it.  Nothing else may be unsent."""
        self.unsent = memoryview(data)
        self.send()

    def finish(self) -> None:
        """Nothing more will be put: half-close, when all is sent."""
        if not self.said_all:
            self.said_all = True
            self.send()

    def send(self) -> None:
        """Send what is taken at once; after the last of it, our end of file."""
        try:
            if self.unsent:
                sent = bytes(self.unsent[: self.sock.send(self.unsent)])
                self.sent, self.newlines = self.sent + len(sent), self.newlines + sent.count(b"\n")
                self.unsent, self.last = self.unsent[len(sent) :], sent[-1:]
            if self.said_all and not self.unsent:
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError as error:  # what came before the reset is still to be received
            self.fail(error)
        self.update()

    def fail(self, error: OSError) -> None:
        """The connection is broken."""
        self.failure = self.failure or f"the connection is broken: {error.strerror}"
        self.unsent = memoryview(b"")

    def interrupt(self, number: int, frame: Any) -> None:
        """A signal is told to the loop by a byte in a pipe; the second one ends everything at once."""
        if number != signal.SIGALRM:
            leave_at_once_when_told()

    def read_signals(self, events: int) -> None:
        """A moment has passed, or it is time to leave."""
        if set(os.read(self.signals, 16)) != {signal.SIGALRM}:
            self.interrupted = True
            signal.setitimer(signal.ITIMER_REAL, MOMENT)
            self.finish()
        elif self.interrupted:
            self.loop.running = False
        elif not self.received:
            self.screen.notice(SILENCE)

    def summary(self) -> str:
        """What went wrong, if anything; what was sent, and what was received."""
        if self.unsent and not self.failure:
            self.failure = "not everything was sent"
        messages = self.newlines + (self.last != b"\n")
        sent = f"sent {count(messages, 'message')}, {count(self.sent, 'byte')}"
        failure = f"{self.failure}; " if self.failure else ""
        return f"{failure}{sent}; received {self.screen.close(self.received)}"


def arguments() -> argparse.Namespace:
    """The command line.  Wrong usage ends the program, with argparse's message and status 2."""
    parser = argparse.ArgumentParser(description="Send messages to the server, and count its pings.")
    parser.add_argument("--host", default=HOST, help="the server's address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="its port (default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="write what comes as it is, and count nothing")
    parser.add_argument("message", nargs="*", metavar="MESSAGE", help="a line (default: standard input)")
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        parser.error("argument --port: must be from 1 to 65535")
    return options


def main() -> int:
    """Hold one conversation; return the exit status."""
    leave_at_once_when_told()
    options = arguments()
    if not hasattr(select, "epoll"):
        sys.exit("this system has no epoll: run the client on Linux, in a container or WSL, say")
    while os.open(os.devnull, os.O_RDWR) < 3:  # or the socket takes the place of a closed stream
        pass
    try:
        sock = connect(options.host, options.port)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        sys.exit(f"cannot connect to {options.host}, port {options.port}: {why}; is the server running?")
    person = os.isatty(0) and not options.message and not options.raw
    loop, screen = Loop(), Screen(options.raw, person)
    talk = Conversation(loop, sock, screen)
    if options.message:
        talk.put(b"".join(os.fsencode(message) + b"\n" for message in options.message))
        talk.finish()
    talk.update()
    loop.run()
    screen.notice(talk.summary())
    return 1 if talk.failure else 0


if __name__ == "__main__":
    sys.exit(main())
