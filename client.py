#!/usr/bin/env python3
"""A client for non_block_io_server.py: it sends messages, and counts the pings that come.

It is an event loop like the server's, over one connection and standard input.  Read the
server first; new here is how to leave.  To close while pings lie unread makes the kernel
send a reset, and a reset may destroy what the server has not read yet.  So this client reads
all the time, and leaves politely: it half-closes ("I have said all"), reads on to the
server's end of file, and closes then.

    event                      what happens
    -------------------------  ----------------------------------------------------------
    the server has sent        pings are counted, anything else is shown
    the server takes more      what is still unsent is sent
    standard input has more    it is sent; a person at a terminal gets the count of pings

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
from typing import Callable

HOST, PORT = "127.0.0.1", 10001
SIZE = 256 * 1024  # bytes of one read
PING = b"ping"
PINGS = PING * (SIZE // len(PING) + 1)  # what a piece of the stream is compared with, in one stroke
RUN = re.compile(rb"\A(?:ping)*")
MOMENT = 1.0  # seconds without a word from the server, until that is said
PROMPT = b"> "
SILENCE = "nothing from the server yet: it may be waiting for another client"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but tab and newline, DEL, C1


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
        self.files: set[int] = set()  # are always ready, and cannot be watched: epoll_ctl(2)
        self.patience: float | None = MOMENT
        self.idle: Callable[[], None] = lambda: None

    def stop(self) -> None:
        """Hand over no more."""
        self.running = False

    def run(self) -> None:
        """Hand over until `running` is false.  Call idle() when there was nothing for a while."""
        while self.running:
            ready = self.epoll.poll(0 if self.files else self.patience)
            ready += [(descriptor, select.EPOLLIN) for descriptor in self.files]
            for descriptor, events in ready:
                self.handlers[descriptor](events)
            if not ready:
                self.patience = None
                self.idle()

    def watch(self, descriptor: int, interest: int, handler: Callable[[int], None]) -> None:
        """From now on call handler(events) when something of the interest is true of the descriptor."""
        before, self.interests[descriptor] = self.interests.get(descriptor, 0), interest
        self.handlers[descriptor] = handler
        try:
            if interest and before:
                self.epoll.modify(descriptor, interest)
            elif interest:
                self.epoll.register(descriptor, interest)
            elif before:
                self.epoll.unregister(descriptor)
        except PermissionError:
            self.files = {descriptor} if interest else set()


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
        rest, other = PING[: self.letters] + data, b""
        self.letters = 0
        while rest:
            if not self.in_line:
                start = len(rest)
                rest = RUN.sub(b"", rest, 1)
                self.pings += (start - len(rest)) // len(PING)
                if PING.startswith(rest):  # no byte, or the first letters of one more
                    self.letters = len(rest)
                    break
            line, newline, rest = rest.partition(b"\n")
            self.in_line = not newline
            other += line + newline
        return other


def write(descriptor: int, data: bytes | memoryview) -> None:
    """Write all the bytes.  Whoever reads them may keep us waiting, and so, by TCP, the server."""
    data = memoryview(data)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        sys.exit(f"standard output can no longer be written: {error.strerror}")


class Screen:
    """What is seen: anything that is no ping, and to a person a prompt and the number of pings.

    Bytes are written as they are; on a terminal as text, with its controls made visible.
    """

    def __init__(self, raw: bool, person: bool) -> None:
        self.raw, self.person, self.stream = raw, person, PingStream()
        self.output = sys.stdout.fileno() if sys.stdout else os.open(os.devnull, os.O_WRONLY)
        terminal = os.isatty(self.output)
        self.dialogue = self.output if terminal else 2
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace") if terminal and not raw else None

    def take(self, data: memoryview) -> None:
        """Count the pings of what the server has sent, and show the rest; if raw, write all of it."""
        if self.raw:
            write(self.output, data)
        elif other := self.stream.feed(data):
            self.show(other)

    def show(self, data: bytes, final: bool = False) -> None:
        if self.decoder:
            text = self.decoder.decode(data, final)
            data = CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text).encode()
        if data and self.person and self.decoder:
            data = b"\r" + data + PROMPT
        write(self.output, data)

    def ask(self, answer: str = "") -> None:
        """Answer a person's line, and prompt for the next."""
        if self.person:
            write(self.dialogue, answer.encode() + PROMPT)

    def answer(self) -> None:
        self.ask(f"{count(self.stream.pings, 'ping')} so far\n")

    def notice(self, line: str) -> None:
        """Say what is no answer: to a person over the prompt, else on standard error."""
        if self.person:
            self.ask(f"\r{line}\n")
        elif sys.stderr:
            sys.stderr.write(f"{line}\n")

    def close(self, received: int) -> str:
        """Show what is cut off at the end, and say in words what of the bytes received were pings."""
        if self.person:
            write(self.dialogue, b"\n")  # after the prompt
            self.person = False
        self.show(PING[: self.stream.letters], final=True)
        pings, others = count(self.stream.pings, "ping"), received - self.stream.pings * len(PING)
        if self.raw:
            return count(received, "byte")
        return f"{pings}, {count(others, 'other byte')}" if others else pings


class Conversation:
    """The connection and standard input.

    Input is read only while nothing is unsent: it waits for the server, and memory does not grow.
    """

    def __init__(self, loop: Loop, sock: socket.socket, screen: Screen) -> None:
        self.loop, self.sock, self.screen = loop, sock, screen
        self.source = -1  # the descriptor of standard input, if it is to be sent
        self.buffer = memoryview(bytearray(SIZE))
        self.unsent = memoryview(b"")
        self.received = self.bytes = self.messages = 0  # a message is a line
        self.line_open = False  # the last one lacks its newline
        self.said_all = False
        self.failure = ""
        sock.setblocking(False)

    def update(self) -> None:
        """Tell epoll what to wait for."""
        writing = select.EPOLLOUT if self.unsent else 0
        self.loop.watch(self.sock.fileno(), select.EPOLLIN | writing, self.ready)
        if self.source >= 0:
            reading = 0 if self.unsent or self.said_all else select.EPOLLIN
            self.loop.watch(self.source, reading, self.read_source)

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
        self.loop.stop()

    def read_source(self, events: int) -> None:
        """Standard input is ready: send a piece of it; at its end, finish."""
        data = os.read(self.source, SIZE)
        if data:
            self.put(data)
            self.screen.answer()
        else:
            self.finish()

    def put(self, data: bytes) -> None:
        """Send data, which is none or more lines or a piece of one, as the server takes it."""
        self.bytes += len(data)
        self.messages += data.count(b"\n") - self.line_open
        self.line_open = not data.endswith(b"\n")
        self.messages += self.line_open
        self.unsent = memoryview(data)
        self.send()

    def finish(self) -> None:
        """Nothing more will be put: half-close, when all is sent, and be told what still comes."""
        self.said_all = True
        self.send()

    def send(self) -> None:
        """Send what is taken at once; after all of it, our end of file."""
        try:
            if self.unsent:
                self.unsent = self.unsent[self.sock.send(self.unsent) :]
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


def arguments() -> argparse.Namespace:
    """The command line.  Wrong usage ends the program, with argparse's message and status 2."""
    parser = argparse.ArgumentParser(description="Send messages to the server, and count its pings.")
    parser.add_argument("--host", default=HOST, help="the server's address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="its port (default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="write what comes as it is, and count nothing")
    parser.add_argument(
        "message", nargs="*", metavar="MESSAGE", help="a line to send (default: standard input)"
    )
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        parser.error("argument --port: must be from 1 to 65535")
    return options


def converse(sock: socket.socket, options: argparse.Namespace) -> int:
    """Send what is to be sent, leave, and sum up; return the exit status."""
    person = bool(sys.stdin and sys.stdin.isatty() and not options.message and not options.raw)
    loop, screen = Loop(), Screen(options.raw, person)
    talk = Conversation(loop, sock, screen)
    loop.idle = lambda: None if talk.received else screen.notice(SILENCE)
    screen.ask()
    if options.message:
        talk.put(b"".join(os.fsencode(message) + b"\n" for message in options.message))
    elif sys.stdin:
        talk.source = sys.stdin.fileno()
    if talk.source < 0:
        talk.finish()
    talk.update()
    try:
        loop.run()
    except KeyboardInterrupt:  # leave politely, where that takes no more than a moment
        loop.patience, loop.idle = MOMENT, loop.stop
        talk.finish()
        loop.run()
    failure = talk.failure or ("not everything was sent" if talk.unsent else "")
    sent = f"sent {count(talk.messages, 'message')}, {count(talk.bytes, 'byte')}"
    received = screen.close(talk.received)
    screen.notice(f"{failure}{'; ' if failure else ''}{sent}; received {received}")
    return 1 if failure else 0


def main() -> int:
    """Connect, and converse; return the exit status."""
    options = arguments()
    if not hasattr(select, "epoll"):
        sys.exit("this system has no epoll: run the client on Linux, in a container or WSL, say")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with connect(options.host, options.port) as sock:
            return converse(sock, options)
    except KeyboardInterrupt:  # the second one: leave at once
        return 1
    except (OSError, UnicodeError) as error:
        sys.exit(f"cannot go on with {options.host}, port {options.port}: {error}")


if __name__ == "__main__":
    sys.exit(main())
