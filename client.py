#!/usr/bin/env python3
"""A client for non_block_io_server.py: it sends messages and counts the pings that it receives.

The server waits with epoll(7), because it has thousands of descriptors.  The client has four, so it
waits with select(2), which every system has:

    it waits for                     while                      and then
    -------------------------------  -------------------------  --------------------------------
    data from standard input         nothing is unsent          reads a chunk and sends it
    room in the connection           a chunk is unsent          sends what fits
    data from the connection         standard output has room   receives a chunk and prints it
    a signal, by a socket pair       always                     leaves within a second
    a point in time                  an answer is due           answers the user and prompts

It never reads what it cannot pass on, so a slow reader slows down the sender (backpressure).

It closes gracefully.  Closing a socket with unread data makes the kernel send a reset, which may
discard data still in transit to the server.  So the client half-closes (it sends its end of file),
reads until the server's end of file, and closes then.

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
import stat
import sys
import time
from contextlib import suppress
from typing import Any

HOST, PORT = "127.0.0.1", 10001
SIZE = 256 * 1024  # bytes of one chunk
QUIET = 0.1  # seconds without a new line until an interactive user gets the answer and a prompt
SILENCE = 1.0  # seconds without a byte from the server until a line reports that
GRACE = 0.8  # seconds to close gracefully after a signal
SHORT_GRACE = 0.1  # seconds after a second signal; not 0, because timeout(1) may send one signal twice
NEVER = float("inf")

PING = b"ping"
PINGS = PING * (SIZE // len(PING) + 2)  # what a chunk of pings is compared with
RUN_OF_PINGS = re.compile(rb"^(?:ping)+", re.MULTILINE)
PROMPT, DATA = "> ", "data"
SILENCE_NOTICE = "nothing from the server yet: it may be waiting for another client\n"

UNUSUAL = re.compile(r"[^\w !-~\t\n]")  # any character but letters, digits and what ASCII prints
SPACES = "\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
JOINERS = "\u200c\u200d"  # hold Persian words and emoji families together

WINDOWS = sys.platform == "win32"  # select(2) takes nothing but sockets there


def connect(host: str = HOST, port: int = PORT) -> socket.socket:
    """Return a connected, blocking TCP socket.  Raises OSError if that fails."""
    address: Any = host.encode() if host.isascii() else host  # str needs the IDNA tables, 5 ms
    return socket.create_connection((address, port))


def count(number: int, noun: str) -> str:
    """Return `1 ping` or `1,204,113 pings`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# -------------------------------------------------------------------- what is received


class PingParser:
    """Separates pings from other bytes.

    A byte stream has no message boundaries.  `ping` counts at the start of the stream, after
    another ping, or after a newline.  Any other byte begins a line that is no ping up to its
    newline, even with a `ping` in it: the echo of `shopping`.

    The state is what the next chunk continues:
        b""                 the start of a line, or a whole ping
        b"p", b"pi", b"pin" a ping that the end of the chunk has cut
        OTHER               another line
    """

    OTHER = b"-"

    def __init__(self) -> None:
        self.pings, self.state = 0, b""

    def feed(self, chunk: bytes | memoryview) -> bytes:
        """Count the pings in the next bytes of the stream; return the other bytes."""
        if self.state != self.OTHER and PINGS.startswith(chunk, len(self.state)):  # nothing but pings
            size = len(self.state) + len(chunk)
            self.pings, self.state = self.pings + size // len(PING), PING[: size % len(PING)]
            return b""
        data = self.state + chunk  # OTHER before it keeps a `ping` from standing at the start of a line
        others = RUN_OF_PINGS.sub(b"", data)
        self.pings += (len(data) - len(others)) // len(PING)
        start = len(self.OTHER) if self.state == self.OTHER else 0
        last_line = others[others.rfind(b"\n") + 1 :]
        if PING.startswith(last_line):
            self.state = last_line
            return others[start : len(others) - len(last_line)]
        self.state = self.OTHER
        return others[start:]

    def finish(self) -> bytes:
        """Return the bytes of a ping that the end of the stream has cut."""
        return b"" if self.state == self.OTHER else self.state


def escape(text: str) -> str:
    """Escape what could harm a terminal or its reader: `\\x1b`, `\\u202e`, `\\U000e0041`.

    These are controls, separators of lines, invisible characters, and characters that change
    the order of others: all that str.isprintable() refuses, except tab, newline, spaces, and
    joiners between two visible characters.
    """

    def escaped(found: re.Match[str]) -> str:
        """Return the character, or its escape."""
        character, code = found[0], ord(found[0])
        if character.isprintable() or character in SPACES:
            return character
        before, after = text[found.start() - 1 : found.start()], text[found.end() : found.end() + 1]
        if character in JOINERS and is_visible(before) and is_visible(after):
            return character
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return UNUSUAL.sub(escaped, text)


def is_visible(character: str) -> bool:
    """Return whether it is one printable character and no space."""
    return bool(character.strip()) and character.isprintable()


class TerminalText:
    """Turns bytes into text that is safe on a terminal, however the stream is cut into chunks."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.before = ""  # the last character, if it is visible: a joiner may follow
        self.held = ""  # a carriage return or a joiner: what it means depends on the next character

    def feed(self, data: bytes, final: bool) -> str:
        """Return the text of the next bytes, escaped.  CR LF ends a line like LF."""
        text = self.before + self.held + self.decoder.decode(data, final)
        shown = len(self.before)
        self.held = text[-1] if text.endswith(("\r", *JOINERS)) and not final else ""
        text = text[: len(text) - len(self.held)]
        self.before = text[-1:] if is_visible(text[-1:]) else ""
        return escape(text.replace("\r\n", "\n"))[shown:]


# -------------------------------------------------------------------- the conversation


def handle_stop_signals(handler: Any) -> None:
    """Set the handler of the signals that end the program.  A signal that is ignored stays ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def is_file(descriptor: int) -> bool:
    """Return whether a write to the descriptor never waits for a reader."""
    mode = os.fstat(descriptor).st_mode
    return WINDOWS or stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def open_output() -> tuple[int, int]:
    """Return a descriptor of standard output, and how many bytes one write to it may hold.

    A write that does not fit waits, although select has reported the descriptor as writable.
    O_NONBLOCK prevents that, but on an inherited descriptor it affects every process that shares
    it, such as the shell.  So reopen it.  Where this is not possible, PIPE_BUF bytes always fit.
    """
    if is_file(1):
        return 1, SIZE
    with suppress(OSError):
        descriptor = os.open("/dev/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        if not os.get_blocking(descriptor):  # on macOS opening it is a dup(2), which shares the flag
            return descriptor, SIZE
        os.close(descriptor)
    return 1, select.PIPE_BUF


class Conversation:
    """The connection, standard input and output, and the signals that end it."""

    def __init__(self, sock: socket.socket, messages: bytes, raw: bool) -> None:
        """Prepare to send the messages or, without any, standard input."""
        self.sock, self.raw = sock, raw
        self.interactive = os.isatty(0) and not messages and not raw
        self.terminal = os.isatty(1)
        self.output, self.write_size = open_output()
        self.buffer = memoryview(bytearray(SIZE))
        self.parser, self.terminal_text = PingParser(), TerminalText()
        self.unsent = memoryview(messages)
        self.input_ended = bool(messages)  # standard input's end of file, or no need of it
        self.half_closed = self.at_eof = False  # our end of file is sent; the server's is received
        self.sent = self.received = self.unwritten = 0  # bytes
        self.newlines, self.last_byte = messages.count(b"\n"), messages[-1:]  # of what was read
        self.failure = self.output_failure = ""  # the first failure; the one of standard output
        self.unanswered = self.silence_reported = False
        # When to answer the user and prompt, or to report that the server is silent
        self.answer_time = time.monotonic() + SILENCE if messages else NEVER
        self.hold_time = 0.0  # receive nothing before: the user may be pasting lines
        self.signals, self.deadline = 0, NEVER  # number of stop signals; end of the conversation
        self.row = ""  # what the last row of the terminal holds: nothing, PROMPT or DATA
        sock.setblocking(False)
        self.wakeup, self.wakeup_writer = socket.socketpair()  # Python writes a byte there at a signal
        self.wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self.wakeup_writer.fileno(), warn_on_full_buffer=False)
        handle_stop_signals(self.stop)
        if self.interactive:
            signal.signal(signal.SIGCONT, self.resume)
            self.answer()

    def run(self) -> int:
        """Exchange data until the server's end of file or the deadline; return the exit status."""
        while not self.at_eof and time.monotonic() < self.deadline:
            is_held = time.monotonic() < self.hold_time
            reads: list[Any] = [] if is_held else [self.sock]
            writes: list[Any] = []
            if self.unsent or (self.input_ended and not self.half_closed):
                writes = [self.sock]
            elif not self.input_ended:
                reads += [0]
            readable, writable = self.wait(reads, writes, self.hold_time if is_held else self.answer_time)
            if 0 in readable:
                self.read_input()
            if self.sock in writable:
                self.send()
            if self.sock in readable:
                self.receive()
            if time.monotonic() >= self.answer_time:
                self.answer()
        self.report_summary()
        return 1 if self.failure else 0

    def wait(self, reads: list[Any], writes: list[Any], until: float = NEVER) -> tuple[list[Any], list[Any]]:
        """Wait for readiness, a signal or a time; return what is readable, and what is writable."""
        seconds = min(until, self.deadline) - time.monotonic()
        timeout = None if seconds == NEVER else max(seconds, 0)
        readable, writable, _ = select.select([self.wakeup, *reads], writes, [], timeout)
        if self.wakeup in readable:
            self.wakeup.recv(64)
        return readable, writable

    def fail(self, what: str, error: OSError | None = None) -> None:
        """Note the first failure, for the summary and the exit status."""
        self.failure = self.failure or (f"{what}: {error.strerror}" if error else what)

    # ---------------------------------------------------------------- signals

    def stop(self, number: int, frame: Any) -> None:
        """Handle SIGINT, SIGTERM or SIGHUP: end within a second, after a second one almost at once."""
        self.signals += 1
        if self.signals > 1:
            handle_stop_signals(signal.SIG_DFL)  # a third one kills
        self.end_within(GRACE if self.signals == 1 else SHORT_GRACE)

    def end_within(self, seconds: float) -> None:
        """Read no more input; set the deadline for the rest of the conversation."""
        self.input_ended, self.deadline = True, min(self.deadline, time.monotonic() + seconds)
        self.unanswered, self.answer_time = False, NEVER

    def resume(self, number: int, frame: Any) -> None:
        """Handle SIGCONT: prompt again after Ctrl-Z and `fg`."""
        if self.row == PROMPT:
            self.row, self.answer_time = "", 0.0

    # ---------------------------------------------------------------- to the server

    def read_input(self) -> None:
        """Read a chunk of standard input, and send what the connection takes."""
        try:
            chunk = os.read(0, SIZE)
        except BlockingIOError:  # another program has read it
            return
        except OSError as error:
            self.fail("standard input cannot be read", error)
            chunk = b""
        if not chunk:
            self.input_ended = True
        elif not self.raw:
            self.newlines, self.last_byte = self.newlines + chunk.count(b"\n"), chunk[-1:]
        if self.interactive and chunk.endswith(b"\n"):  # Ctrl-D sends a line without its end
            self.unanswered, self.row = True, ""
        self.hold_time = time.monotonic() + QUIET if self.interactive else 0.0
        silence = QUIET if self.received or self.silence_reported else SILENCE
        self.answer_time = max(self.hold_time, time.monotonic()) + silence
        self.unsent = memoryview(chunk)
        self.send()

    def send(self) -> None:
        """Send what the connection takes and, after everything, our end of file."""
        try:
            if self.unsent:
                size = self.sock.send(self.unsent)
                self.sent, self.unsent = self.sent + size, self.unsent[size:]
            if self.input_ended and not self.unsent:
                self.half_closed = True
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError as error:  # data that arrived before a reset can still be received
            self.fail("the connection is broken", error)
            self.unsent, self.input_ended, self.half_closed = memoryview(b""), True, True

    # ---------------------------------------------------------------- from the server

    def receive(self) -> None:
        """Receive a chunk; count its pings and show the rest, or in raw mode show all of it."""
        try:
            size = self.sock.recv_into(self.buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self.fail("the connection is broken", error)
            size = 0
        if not self.received:
            self.answer_time = min(self.answer_time, time.monotonic() + QUIET)
        self.received, self.at_eof = self.received + size, not size
        data: bytes | memoryview = self.buffer[:size]
        if not self.raw:
            data = self.parser.finish() if self.at_eof else self.parser.feed(data)
            if self.terminal:
                data = self.terminal_text.feed(data, final=self.at_eof).encode()
        if data:
            self.show(data)
        if self.at_eof and (self.unsent or not self.input_ended):
            self.fail("the server has ended the conversation")

    def show(self, data: bytes | memoryview) -> None:
        """Print received data.  Below a prompt, never over it: the user may have typed half a line."""
        if self.terminal:
            data = b"\n" + data if self.row == PROMPT else data
            self.row = "" if data[-1:] == b"\n" else DATA
        if self.interactive:
            self.unanswered, self.answer_time = False, time.monotonic() + QUIET
        self.print(data)

    def print(self, data: bytes | memoryview) -> None:
        """Write to standard output.  If that fails, discard the data and end the conversation."""
        if not self.output_failure:
            try:
                self.unwritten += self.write(self.output, data)
            except OSError as error:
                self.output_failure = f"standard output can no longer be written: {error.strerror}"
                self.end_within(GRACE)

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        """Write data; return how many bytes are unwritten when a signal's deadline ends the wait."""
        data = memoryview(data)
        while data:
            _, writable = ([], [descriptor]) if is_file(descriptor) else self.wait([], [descriptor])
            if writable:
                with suppress(BlockingIOError):
                    data = data[os.write(descriptor, data[: self.write_size]) :]
            elif time.monotonic() >= self.deadline:
                break
        return len(data)

    # ---------------------------------------------------------------- to the user

    def answer(self) -> None:
        """Answer an interactive user, and prompt.  Report once that the server is silent."""
        text = ""
        if self.unanswered and (self.parser.pings or not self.received):  # an echo is the answer itself
            text = f"{count(self.parser.pings, 'ping')} so far\n"
        if not self.received and not self.silence_reported and (self.sent or self.input_ended):
            text, self.silence_reported = text + SILENCE_NOTICE, True
        if text and self.row:
            text, self.row = "\n" + text, ""
        if self.interactive and not self.input_ended and not self.row:
            text, self.row = text + PROMPT, PROMPT
        self.unanswered, self.answer_time = False, NEVER
        self.report(text)

    def report(self, text: str) -> None:
        """Write to an interactive user's terminal, or else to standard error, whose errors do not matter."""
        if self.interactive and self.terminal:
            self.print(text.encode())
        else:
            with suppress(OSError):
                self.write(2, text.encode())

    def report_summary(self) -> None:
        """Write the summary to standard error, in a row of its own; with the reason of a failure."""
        if self.output_failure and not self.signals:  # Ctrl-C also ends the program that reads the output
            self.fail(self.output_failure)
        if self.unsent:
            self.fail("not everything was sent")
        if self.signals > 1 and not self.at_eof:
            self.fail("a second signal has ended the conversation")
        if (self.row or self.signals) and (self.interactive or (self.terminal and os.isatty(2))):
            self.report("\n")
        sent, received = count(self.sent, "byte"), count(self.received, "byte")
        if not self.raw:
            partial = self.last_byte not in (b"", b"\n") and not self.unsent
            messages = self.newlines - bytes(self.unsent).count(b"\n") + partial
            others = self.received - self.parser.pings * len(PING)
            sent = f"{count(messages, 'message')}, {sent}"
            received = count(self.parser.pings, "ping")
            received += f", {count(others, 'other byte')}" if others else ""
        failure = f"{self.failure}; " if self.failure else ""
        unwritten = f"; {count(self.unwritten, 'byte')} not written" if self.unwritten else ""
        self.interactive = False
        self.report(f"{failure}sent {sent}; received {received}{unwritten}\n")


# -------------------------------------------------------------------- the command line

DESCRIPTION = "Send messages to non_block_io_server.py, count its pings, and show any other bytes."
EPILOG = """\
Without a MESSAGE it sends what you type, or its standard input as it is.
To edit what you type, and to get earlier lines back:  rlwrap python3 client.py
Put -- before a MESSAGE that begins with a dash:       python3 client.py -- -1

Exit status: 0 after the server's end of file, or after SIGINT, SIGTERM or SIGHUP;
1 if the conversation cannot be completed (one line says why); 2 for wrong usage."""


def arguments() -> argparse.Namespace:
    """Return the options.  Wrong usage ends the program, with argparse's message and status 2."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default=HOST, help="the server's address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="the server's port (default: %(default)s)")
    parser.add_argument(
        "--raw", action="store_true", help="write all received bytes as they are; count no pings"
    )
    parser.add_argument(
        "message", nargs="*", metavar="MESSAGE", help="a line to send (default: standard input)"
    )
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        parser.error("argument --port: must be from 1 to 65535")
    if not options.host:
        parser.error("argument --host: must not be empty")
    return options


def reason(error: Exception) -> str:
    """Return the cause of an error in words."""
    return "out of memory" if isinstance(error, MemoryError) else getattr(error, "strerror", "") or str(error)


def main() -> int:
    """Hold one conversation; return the exit status."""
    handle_stop_signals(signal.SIG_DFL)  # until there is a connection, a signal ends the program
    options = arguments()
    if WINDOWS and not options.message:
        sys.exit("cannot watch standard input on Windows: give each MESSAGE as an argument")
    try:
        while os.open(os.devnull, os.O_RDWR) <= 2:  # a closed standard stream must not become the socket
            pass
        try:
            sock = connect(options.host, options.port)
        except (OSError, UnicodeError) as error:
            hint = "; is the server running?" if isinstance(error, ConnectionRefusedError) else ""
            sys.exit(f"cannot connect to {options.host}, port {options.port}: {reason(error)}{hint}")
        messages = b"".join(os.fsencode(message) + b"\n" for message in options.message)
        return Conversation(sock, messages, options.raw).run()
    except (OSError, MemoryError, ValueError) as error:  # select(2) cannot watch descriptors above 1023
        sys.exit(f"cannot continue: {reason(error)}")


if __name__ == "__main__":
    sys.exit(main())
