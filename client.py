#!/usr/bin/env python3
"""A client for non_block_io_server.py: it sends messages and counts the pings that it receives.

The server waits with epoll(7), because it has thousands of descriptors.  The client has five, so it
waits with select(2), which every system has.  Conversation.exchange is the loop:

    it waits for                     while                      and then calls
    -------------------------------  -------------------------  ---------------------------------------
    data from standard input         nothing is unsent          Connection.read_input
    space in the connection          a chunk is unsent          Connection.send
    data from the connection         everything is written      Connection.receive and Dialogue.show
    space in standard output         a chunk is unwritten       Output.flush
    the time of an answer            the user gets one          Dialogue.answer
    a signal                         always                     Conversation.stop, which sets a deadline

It never reads data that it cannot pass on, so a slow reader slows down the sender (backpressure).

It closes gracefully.  Closing a socket with unread data makes the kernel send a reset, which may
discard data still in transit to the server.  So the client half-closes (it sends its end of file),
reads until the server's end of file, and then closes.

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

TYPE_CHECKING = False  # as in typing, whose import would make the start slower
if TYPE_CHECKING:
    from typing import Any

HOST, PORT = "127.0.0.1", 10001
STANDARD_INPUT = 0  # the descriptor
SIZE = 256 * 1024  # bytes of one chunk
QUIET = 0.1  # seconds after a typed line until data is received, and again until the answer and prompt
SILENCE = 1.0  # seconds without a byte from the server until a notice reports that
GRACE = 0.8  # seconds to close gracefully after a signal
SHORT_GRACE = 0.1  # seconds after a second signal; not 0, because timeout(1) may send one signal twice
NEVER = float("inf")
NOTHING = memoryview(b"")

PING = b"ping"
PINGS = PING * (SIZE // len(PING) + 2)  # to compare a chunk with
NEWLINE_AND_PINGS = re.compile(rb"\n(?:ping)+")
PROMPT, DATA = "> ", "data"  # possible content of a terminal's last row
SILENCE_NOTICE = "nothing from the server yet: it may be waiting for another client\n"

# Any character but letters and digits of all scripts, printable ASCII, tabs, newlines and spaces
UNUSUAL = re.compile("[^\\w\t\n !-~\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
JOINERS = "\u200c\u200d"  # they form Persian words and emoji families

WINDOWS = sys.platform == "win32"  # select(2) accepts only sockets there


def connect(host: str = HOST, port: int = PORT) -> socket.socket:
    """Return a connected, blocking TCP socket.  Raises OSError if that fails."""
    address: Any = host.encode() if host.isascii() else host  # str needs the IDNA tables, 5 ms
    return socket.create_connection((address, port))


def count(number: int, noun: str) -> str:
    """Return `1 ping` or `1,204,113 pings`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def reason(error: Exception) -> str:
    """Return the cause of an error in words."""
    return "out of memory" if isinstance(error, MemoryError) else getattr(error, "strerror", "") or str(error)


# -------------------------------------------------------------------- the loop


class Conversation:
    """The loop, and the signals and the deadline that end it."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.dialogue = connection, Dialogue(connection)
        self.signals, self.deadline = 0, NEVER  # number of stop signals; end of the conversation
        self.wakeup, self.wakeup_writer = socket.socketpair()  # Python writes a byte there at a signal
        self.wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self.wakeup_writer.fileno(), warn_on_full_buffer=False)
        handle_stop_signals(self.stop)
        if self.dialogue.interactive:
            signal.signal(signal.SIGCONT, self.resume)

    def run(self) -> int:
        """Exchange data and write the summary; return the exit status."""
        self.exchange()
        connection, output = self.connection, self.dialogue.output
        self.dialogue.show(connection.parser.held, final=True)  # the end has cut this ping
        if output.failure and not self.signals:  # Ctrl-C also ends the program that reads the output
            connection.fail(f"standard output can no longer be written: {output.failure}")
        if connection.unsent:
            connection.fail("not everything was sent")
        if self.signals > 1 and not connection.at_eof:
            connection.fail("a second signal has ended the conversation")
        lost = f"{count(len(output.unwritten), 'byte')} not written" if output.unwritten else ""
        summary = "; ".join(filter(None, [connection.failure, connection.summary(), lost]))
        self.dialogue.finish(f"{summary}\n", self.signals > 0)
        self.exchange()  # the same loop, now only until the summary is written
        return 1 if connection.failure else 0

    def exchange(self) -> None:
        """Pass data on until the server's end of file is received and everything is written.

        The deadline ends this earlier.
        """
        connection, dialogue = self.connection, self.dialogue
        output, errors = dialogue.output, dialogue.errors
        while not connection.at_eof or output.unwritten or errors.unwritten:
            if time.monotonic() >= self.deadline:
                break
            if time.monotonic() >= dialogue.due():
                dialogue.answer()
            readable, writable = self.wait()
            if self.wakeup in readable:
                self.wakeup.recv(64)
            if STANDARD_INPUT in readable and not connection.input_ended:  # after Ctrl-C, a read could block
                dialogue.note_input(connection.read_input())
            if connection.sock in writable:
                connection.send()
            if connection.sock in readable:
                dialogue.show(connection.receive())
            output.flush()
            errors.flush()
            if output.failure:
                self.end_within(GRACE)

    def wait(self) -> tuple[list[Any], list[Any]]:
        """Wait for descriptors, a signal or a time; return the ready (readable, writable) ones."""
        connection, dialogue, now = self.connection, self.dialogue, time.monotonic()
        may_be_paste = now < dialogue.idle_since
        reads: list[Any] = [self.wakeup]
        outputs = dialogue.output, dialogue.errors
        writes: list[Any] = [output.descriptor for output in outputs if output.unwritten]
        if not (connection.at_eof or dialogue.output.unwritten or may_be_paste):
            reads.append(connection.sock)
        if connection.unsent or (connection.input_ended and not connection.half_closed):
            writes.append(connection.sock)
        elif not connection.input_ended:
            reads.append(STANDARD_INPUT)
        until = min(self.deadline, dialogue.idle_since if may_be_paste else dialogue.due())
        timeout = None if until == NEVER else max(until - now, 0)
        return select.select(reads, writes, [], timeout)[:2]

    def stop(self, number: int, frame: Any) -> None:
        """Handle SIGINT, SIGTERM or SIGHUP: end within a second; after two of them, sooner."""
        self.signals += 1
        self.end_within(GRACE if self.signals == 1 else SHORT_GRACE)
        if self.signals > 1:
            handle_stop_signals(signal.SIG_DFL)  # a third one kills

    def end_within(self, seconds: float) -> None:
        """Read no more input, write no more answers, and set the deadline."""
        self.connection.input_ended = self.dialogue.silence_reported = True
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def resume(self, number: int, frame: Any) -> None:
        """Handle SIGCONT after Ctrl-Z and `fg`: the shell has begun a new row, so prompt again."""
        self.dialogue.row = ""


def handle_stop_signals(handler: Any) -> None:
    """Set the handler of the signals that end the program.  A signal that is ignored stays ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


# -------------------------------------------------------------------- the connection


class Connection:
    """The connection to the server: unsent data, the end of both directions, and counts."""

    def __init__(self, sock: socket.socket, messages: bytes, raw: bool) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # an urgent byte keeps its place
        self.sock, self.raw = sock, raw
        self.unsent = memoryview(messages)
        self.input_ended = bool(messages)  # no more standard input is read
        self.half_closed = False  # our end of file is sent
        self.at_eof = False  # the server's end of file is received, or the connection is broken
        self.sent = self.received = 0  # bytes
        self.messages = 0  # sent messages: each ends with a newline or with our end of file
        self.partial = False  # a part of a message is sent
        self.parser = PingParser()
        self.failure = ""  # why the conversation is incomplete

    def read_input(self) -> bytes:
        """Read a chunk of standard input and send as much as fits; return the chunk."""
        chunk = b""
        try:
            chunk = os.read(STANDARD_INPUT, SIZE)
        except BlockingIOError:  # another program has read it
            return b""
        except OSError as error:
            self.fail(f"standard input cannot be read: {reason(error)}")
        if not chunk:
            self.input_ended = True
        self.unsent = memoryview(chunk)
        self.send()
        return chunk

    def send(self) -> None:
        """Send as much as fits.  After the last byte, send our end of file."""
        try:
            if self.unsent:
                size = self.sock.send(self.unsent)
                self.sent += size
                if not self.raw:
                    data = bytes(self.unsent[:size])
                    self.messages += data.count(b"\n")
                    self.partial = not data.endswith(b"\n")
                self.unsent = self.unsent[size:] or NOTHING  # frees the chunk: the next one is faster
            if self.input_ended and not self.unsent:
                self.half_closed = True
                self.messages += self.partial
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError as error:  # data that arrived before a reset can still be received
            self.fail(f"the connection is broken: {reason(error)}")

    def receive(self) -> bytes:
        """Receive a chunk and count its pings; return the bytes to show."""
        chunk = b""
        try:
            chunk = self.sock.recv(SIZE)
        except BlockingIOError:
            return b""
        except OSError as error:
            self.fail(f"the connection is broken: {reason(error)}")
        self.received, self.at_eof = self.received + len(chunk), not chunk
        if self.at_eof and (self.unsent or not self.input_ended):
            self.fail("the server has ended the conversation")
        return chunk if self.raw else self.parser.feed(chunk)

    def fail(self, failure: str) -> None:
        """Send nothing more but our end of file.  The summary reports the first failure."""
        self.failure = self.failure or failure
        self.unsent, self.input_ended, self.partial = NOTHING, True, False

    def summary(self) -> str:
        """Return the totals of both directions, as text."""
        sent, received = count(self.sent, "byte"), count(self.received, "byte")
        if not self.raw:
            pings, others = self.parser.pings, self.received - self.parser.pings * len(PING)
            sent = f"{count(self.messages, 'message')}, {sent}"
            received = count(pings, "ping") + (f", {count(others, 'other byte')}" if others else "")
        return f"sent {sent}; received {received}"


class PingParser:
    """A parser that separates pings from other bytes.

    A byte stream has no message boundaries.  `ping` counts at the start of the stream, after
    another ping, or after a newline.  After any other byte, nothing counts until the next newline,
    not even the `ping` in the echo of `shopping`.

    A regular expression removes the pings after each newline.  Between two chunks the parser
    remembers whether a newline is needed first (`in_line`), and holds back the first bytes of a
    ping that the end of the chunk has cut.
    """

    def __init__(self) -> None:
        self.pings, self.in_line, self.held = 0, False, b""

    def feed(self, chunk: bytes) -> bytes:
        """Count the pings in the next bytes of the stream; return the other bytes."""
        if not self.in_line and PINGS.startswith(chunk, len(self.held)):  # nothing but pings: no copy
            size = len(self.held) + len(chunk)
            self.pings, self.held = self.pings + size // len(PING), PING[: size % len(PING)]
            return b""
        data = (b"-" if self.in_line else b"\n") + self.held + chunk  # pings count after a newline
        others = NEWLINE_AND_PINGS.sub(b"\n", data)
        self.pings += (len(data) - len(others)) // len(PING)
        last_line = others[others.rfind(b"\n") + 1 :]
        self.in_line = not PING.startswith(last_line)
        self.held = b"" if self.in_line else last_line
        return others[1 : len(others) - len(self.held)]


# -------------------------------------------------------------------- the user


class Dialogue:
    """The user's view: received data and, if standard input is a terminal, prompts and answers.

    Data is shown below a prompt, never over it: the user may have typed half a line.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.interactive = os.isatty(STANDARD_INPUT) and not connection.input_ended and not connection.raw
        self.output, self.errors = Output(1), Output(2)
        self.terminal = os.isatty(1)
        self.terminal_text = TerminalText() if self.terminal and not connection.raw else None
        self.screen = self.output if self.interactive and self.terminal else self.errors
        self.row = ""  # content of the terminal's last row: nothing, PROMPT or DATA
        self.asked = False  # the last line that the user has typed has no answer
        self.silence_reported = False
        # The time of the last input or data; 0.0 before the first.  After a typed line, it is in
        # the future, and nothing is received until then: the user may be pasting more lines.
        self.idle_since = time.monotonic() if connection.unsent else 0.0

    def note_input(self, chunk: bytes) -> None:
        """Note a chunk that was read from standard input."""
        if self.interactive and chunk.endswith(b"\n"):  # Ctrl-D sends a line without its end
            self.row, self.asked = "", True
        self.idle_since = time.monotonic() + (QUIET if self.interactive else 0.0)

    def show(self, data: bytes, final: bool = False) -> None:
        """Write received data; `final` means that no more data follows."""
        if self.terminal_text:
            data = self.terminal_text.feed(data, final).encode()
        if data and self.terminal:
            if self.row == PROMPT:
                data = b"\n" + data
            self.row, self.asked = "" if data.endswith(b"\n") else DATA, False
            self.idle_since = time.monotonic()
        self.output.write(data)

    def is_silent(self) -> bool:
        """Return whether the server has not answered any input, and no notice has reported that."""
        heard = self.connection.received or self.connection.at_eof or self.silence_reported
        return self.idle_since > 0 and not heard

    def due(self) -> float:
        """Return the time of the next answer, or NEVER."""
        if self.is_silent():
            return self.idle_since + SILENCE
        if self.interactive and not self.connection.input_ended and not self.row:
            return self.idle_since + QUIET
        return NEVER

    def answer(self) -> None:
        """Write a count of pings, a notice of silence, and a prompt, as needed."""
        pings, received, text = self.connection.parser.pings, self.connection.received, ""
        if self.asked and (pings or not received):  # else the data is the answer, as in an echo
            text = f"{count(pings, 'ping')} so far\n"
        if self.is_silent():
            text, self.silence_reported = text + SILENCE_NOTICE, True
        if self.interactive and not self.connection.input_ended:
            text += PROMPT
        if self.row:
            text = "\n" + text
        self.row, self.asked = PROMPT if text.endswith(PROMPT) else "", False
        self.screen.write(text.encode())  # last, because resume() may change the row at any time

    def finish(self, summary: str, signalled: bool) -> None:
        """Write the summary to standard error, on a terminal in its own row."""
        shares_row = self.interactive or (self.terminal and os.isatty(2))
        if shares_row and (signalled or self.row):  # a terminal shows Ctrl-C as ^C
            self.screen.write(b"\n")
        self.errors.write(summary.encode())


class Output:
    """Standard output or standard error.  A write never waits: the rest stays unwritten.

    A write that does not fit waits, even if select has reported the descriptor as writable.
    O_NONBLOCK prevents that, but on an inherited descriptor it affects every process that shares
    it, such as the shell.  So the output is opened again.  If this is not possible, a write has at
    most PIPE_BUF bytes (pipe(7)), and one byte on a terminal.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.limit: int | None = None  # bytes of a write, if a longer one could wait
        self.unwritten, self.failure = NOTHING, ""
        mode = os.fstat(descriptor).st_mode
        if not (WINDOWS or stat.S_ISREG(mode) or stat.S_ISBLK(mode)):  # a file has no reader to wait for
            with suppress(OSError):
                self.descriptor = os.open(f"/dev/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            if os.get_blocking(self.descriptor):  # on macOS, opening it is only a dup(2)
                self.limit = 1 if os.isatty(self.descriptor) else select.PIPE_BUF

    def write(self, data: bytes) -> None:
        """Write as much as fits.  After an error, discard everything."""
        if not self.failure:
            self.unwritten = memoryview(bytes(self.unwritten) + data)  # no copy if nothing is unwritten
            self.flush()

    def flush(self) -> None:
        """Write as much of `unwritten` as fits."""
        try:
            while self.unwritten:
                if self.limit and not select.select([], [self.descriptor], [], 0)[1]:
                    break
                size = os.write(self.descriptor, self.unwritten[: self.limit])
                self.unwritten = self.unwritten[size:] or NOTHING  # frees the chunk
        except BlockingIOError:
            pass
        except OSError as error:
            self.unwritten, self.failure = NOTHING, reason(error)


class TerminalText:
    """A filter that turns bytes into text that is safe on a terminal.  Chunks may end anywhere."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.before = " "  # the last character, or a space if it is invisible: a joiner may follow
        self.held = ""  # a carriage return or a joiner: its meaning depends on the next character

    def feed(self, data: bytes, final: bool) -> str:
        """Return the text of the next bytes, escaped.  CR LF ends a line like LF."""
        text = self.before + self.held + self.decoder.decode(data, final)
        self.held = text[-1] if text.endswith(("\r", *JOINERS)) and not final else ""
        text = text[: len(text) - len(self.held)]
        self.before = text[-1] if text[-1].isprintable() else " "
        return UNUSUAL.sub(escape, text.replace("\r\n", "\n"))[1:]


def escape(found: re.Match[str]) -> str:
    """Return an unusual character, escaped if it could harm or mislead: `\\x1b`, `\\u202e`.

    The harmful ones are controls, line separators, invisible characters, and characters that
    change the order of others.  A joiner between two visible characters is kept.
    """
    character, code = found[0], ord(found[0])
    neighbours = found.string[found.start() - 1] + found.string[found.end() : found.end() + 1]
    are_visible = neighbours.isprintable() and len(neighbours.strip()) == 2
    if character.isprintable() or (character in JOINERS and are_visible):
        return character
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# -------------------------------------------------------------------- the command line

DESCRIPTION = "Send messages to non_block_io_server.py, count its pings, and show any other bytes."
EPILOG = """\
Without a MESSAGE it sends what you type, or its standard input as it is.
To edit what you type, and to get earlier lines back:  rlwrap python3 client.py
Put -- before a MESSAGE that begins with a dash:       python3 client.py -- -1

Exit status: 0 after the server's end of file, or after SIGINT, SIGTERM or SIGHUP;
1 if the conversation cannot be completed (one line gives the reason); 2 for wrong usage."""


def arguments() -> argparse.Namespace:
    """Return the options.  Wrong usage ends the program, with argparse's message and status 2."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--host", default=HOST, help="the server's address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="the server's port (default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="write received bytes as they are; count no pings")
    parser.add_argument("message", nargs="*", metavar="MESSAGE", help="send a line (default: standard input)")
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        parser.error("argument --port: must be from 1 to 65535")
    if not options.host:
        parser.error("argument --host: must not be empty")
    return options


def main() -> int:
    """Connect and run one conversation; return the exit status."""
    handle_stop_signals(signal.SIG_DFL)  # until there is a connection, a signal ends the program
    options = arguments()
    if WINDOWS and not options.message:
        sys.exit("cannot watch standard input on Windows: give each MESSAGE as an argument")
    try:
        while os.open(os.devnull, os.O_RDWR) <= 2:  # a closed standard stream must not become the socket
            pass
        sock = connect(options.host.strip("[]"), options.port)  # the server shows an IPv6 address in brackets
    except (OSError, UnicodeError) as error:
        hint = "; is the server running?" if isinstance(error, ConnectionRefusedError) else ""
        sys.exit(f"cannot connect to {options.host}, port {options.port}: {reason(error)}{hint}")
    messages = b"".join(os.fsencode(message) + b"\n" for message in options.message)
    try:
        return Conversation(Connection(sock, messages, options.raw)).run()
    except (OSError, MemoryError, ValueError) as error:  # select(2) cannot watch descriptors above 1023
        sys.exit(f"cannot continue: {reason(error)}")


if __name__ == "__main__":
    sys.exit(main())
