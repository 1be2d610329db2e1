#!/usr/bin/env python3
"""A client for non_block_io_server.py: it sends messages and counts the pings that it receives.

The server waits with epoll(7), because it has thousands of descriptors.  The client has five, so it
waits with select(2), which every system has.  Conversation.exchange is the loop:

    it waits for                     while                      and then calls
    -------------------------------  -------------------------  ---------------------------------------
    data from standard input         nothing is unsent          Input.read and Connection.queue
    space in the connection          a chunk is unsent          Connection.send
    data from the connection         everything is written      Connection.receive and Dialogue.show
    space in standard output         a chunk is unwritten       Output.write
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
import errno
import io
import os
import re
import select
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from typing import Any

HOST, PORT = "127.0.0.1", 10001
SIZE = 256 * 1024  # bytes of one chunk
WRITES = 1000  # writes of an output before the loop checks the deadline again
QUIET = 0.1  # seconds without input and data until an answer and a prompt
SILENCE = 1.0  # seconds without a byte from the server until a notice reports that
GRACE = 0.8  # seconds to close gracefully after a signal
NEVER = float("inf")
NOTHING = memoryview(b"")

PING = b"ping"
PINGS = PING * (SIZE // len(PING) + 2)  # to compare a chunk with
NEWLINE_AND_PINGS = re.compile(rb"\n(?:ping)+")
PROMPT, DATA = "> ", "data"  # possible content of a terminal's last row
SILENCE_NOTICE = "nothing from the server yet: it may be waiting for another client\n"

# These draw nothing, but are harmless: spaces, and the joiners of Persian words and emoji families.
BLANK = "\t\n \xa0\u1680\u2000-\u200a\u202f\u205f\u3000\u200c\u200d"
UNUSUAL = re.compile(f"[^!-~{BLANK}][^!-~{BLANK}]*")  # neither these nor printable ASCII (x+ is slower)
# These draw nothing, although str.isprintable() accepts them: U+034F, fillers, Khmer inherent vowels,
# variation selectors.  After a visible character, U+FE0F selects the form of an emoji and is harmless.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
    f"(?<![^{BLANK}\ufe0f]\ufe0f)"
)

WINDOWS = sys.platform == "win32"  # select(2) accepts only sockets there
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def connect(host: str = HOST, port: int = PORT) -> socket.socket:
    """Return a connected, blocking TCP socket.  Raises OSError or UnicodeError if that fails.

    If nothing listens on a local port, the kernel may choose it as the client's own port.  TCP then
    connects the socket to itself (a simultaneous open): this counts as refused.
    """
    address: Any = host.encode() if host.isascii() else host  # str needs the IDNA tables, 5 ms
    sock = socket.create_connection((address, port))
    with suppress(OSError):  # the connection is already reset
        if sock.getsockname() == sock.getpeername():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # frees the port
            sock.close()
    if sock.fileno() < 0:
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock


def count(number: int, noun: str) -> str:
    """Return `1 ping` or `1,204,113 pings`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def reason(error: Exception) -> str:
    """Return the cause of an error in words."""
    if isinstance(error, UnicodeError):
        return "this is not a valid host name"
    return "out of memory" if isinstance(error, MemoryError) else getattr(error, "strerror", "") or str(error)


# -------------------------------------------------------------------- the loop


class Conversation:
    """The loop, and the signals and the deadline that end it."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.input = connection, Input()
        self.dialogue = Dialogue(connection)
        self.signalled = False
        self.deadline = NEVER  # the time when the conversation must end
        self.wakeup, self.wakeup_writer = socket.socketpair()  # Python sends a byte at a signal

    def run(self) -> int:
        """Handle signals, exchange data, and write the summary; return the exit status."""
        self.wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self.wakeup_writer.fileno(), warn_on_full_buffer=False)
        handle_stop_signals(self.stop)
        if self.dialogue.interactive:
            signal.signal(signal.SIGCONT, self.dialogue.resume)
        self.exchange()
        connection, output = self.connection, self.dialogue.output
        self.dialogue.show(connection.parser.held, final=True)  # the end has cut this ping
        self.exchange()  # until it is written
        if self.input.failure:
            connection.fail(f"standard input cannot be read: {self.input.failure}")
        if output.failure and not self.signalled:  # Ctrl-C may also end our reader
            connection.fail(f"standard output can no longer be written: {output.failure}")
        if connection.unsent:
            connection.fail("not everything was sent")
        lost = f"{count(len(output.unwritten), 'byte')} not written" if output.unwritten else ""
        summary = "; ".join(filter(None, [connection.failure, connection.summary(), lost]))
        self.dialogue.finish(f"{summary}\n", self.signalled)
        self.exchange()  # the same loop, now only until the summary is written
        handle_stop_signals(signal.SIG_IGN)  # the exit status is known
        signal.set_wakeup_fd(-1)  # before it is closed: SIGCONT may still come
        return 1 if connection.failure else 0

    def exchange(self) -> None:
        """Pass data on until everything is received and written, or until the deadline."""
        connection, dialogue = self.connection, self.dialogue
        output, errors = dialogue.output, dialogue.errors
        while not connection.at_eof or output.unwritten or errors.unwritten:
            now, due = time.monotonic(), dialogue.due() if self.deadline == NEVER else NEVER
            if now >= self.deadline:
                break
            if now >= due:
                dialogue.answer()
                continue
            readable, writable = self.wait(min(self.deadline, due) - now)
            if self.wakeup in readable:
                self.wakeup.recv(64)
            if self.input.descriptor in readable and not connection.input_ended:  # a signal may have ended it
                chunk = self.input.read()
                if chunk is not None:
                    connection.queue(chunk)
                    connection.send()
                    dialogue.note_input(chunk)
            if connection.sock in writable:
                connection.send()
            if connection.sock in readable:
                dialogue.show(connection.receive())
            output.write()
            errors.write()
            if output.failure:
                self.end()

    def wait(self, timeout: float) -> tuple[list[Any], list[Any]]:
        """Wait for descriptors, a signal or the timeout; return the ready (readable, writable) ones."""
        connection, dialogue = self.connection, self.dialogue
        reads: list[Any] = [self.wakeup]
        outputs = dialogue.output, dialogue.errors
        writes: list[Any] = [output.descriptor for output in outputs if output.unwritten]
        if not (connection.at_eof or dialogue.output.unwritten):
            reads.append(connection.sock)
        if connection.unsent or (connection.input_ended and not connection.half_closed):
            writes.append(connection.sock)
        elif not connection.input_ended:
            reads.append(self.input.descriptor)
        return select.select(reads, writes, [], None if timeout == NEVER else timeout)[:2]

    def stop(self, number: int, frame: Any) -> None:
        """Handle SIGINT, SIGTERM or SIGHUP: end within a second.  A further signal changes nothing."""
        self.signalled = True
        self.end()
        self.input.interrupt()

    def end(self) -> None:
        """Read no more input, write no more answers, and set the deadline."""
        self.deadline = min(self.deadline, time.monotonic() + GRACE)
        self.connection.queue(b"")


def handle_stop_signals(handler: Any) -> None:
    """Set the handler of the signals that end the program.  A signal that is ignored stays ignored."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


# -------------------------------------------------------------------- the connection


class Connection:
    """The connection to the server: unsent data, the end of both directions, and counts."""

    def __init__(self, sock: socket.socket, messages: bytes, raw: bool) -> None:
        sock.setblocking(False)
        with suppress(OSError):  # macOS: the connection is already reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # an urgent byte keeps its place
        self.sock, self.raw = sock, raw
        self.unsent = memoryview(messages)
        self.input_ended = bool(messages)  # nothing more is sent after `unsent`
        self.half_closed = False  # our end of file is sent
        self.at_eof = False  # the server's end of file is received, or the connection is broken
        self.sent = self.received = 0  # bytes
        self.parser = PingParser()
        self.failure = ""  # why the conversation is incomplete

    def queue(self, chunk: bytes) -> None:
        """Queue a chunk if nothing is unsent.  At any time, b"" ends the input."""
        self.unsent = self.unsent or memoryview(chunk)
        if not chunk:  # else leave it, because a signal may have ended the input
            self.input_ended = True

    def send(self) -> None:
        """Send as much as fits of `unsent`.  After the last byte, send our end of file."""
        try:
            if self.unsent:
                size = self.sock.send(self.unsent)
                self.sent += size
                self.unsent = self.unsent[size:] or NOTHING  # frees the chunk: the next one is faster
            if self.input_ended and not self.unsent:
                self.half_closed = True
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError as error:  # data that arrived before a reset can still be received
            self.fail(broken(error))

    def receive(self) -> bytes:
        """Receive a chunk and count its pings; return the bytes to show."""
        chunk = b""
        try:
            chunk = self.sock.recv(SIZE)
        except BlockingIOError:
            return b""
        except OSError as error:
            self.fail(broken(error))
        self.received, self.at_eof = self.received + len(chunk), not chunk
        if self.at_eof and (self.unsent or not self.input_ended):
            self.fail("the server has ended the conversation")
        return chunk if self.raw else self.parser.feed(chunk)

    def fail(self, failure: str) -> None:
        """Send nothing more but our end of file.  The summary reports the first failure."""
        self.failure = self.failure or failure
        self.unsent, self.input_ended = NOTHING, True

    def summary(self) -> str:
        """Return the totals of both directions, as text."""
        received = count(self.received, "byte")
        if not self.raw:
            pings, others = self.parser.pings, self.received - self.parser.pings * len(PING)
            received = count(pings, "ping") + (f", {count(others, 'other byte')}" if others else "")
        return f"sent {count(self.sent, 'byte')}; received {received}"


def broken(error: OSError) -> str:
    """Return why a connection is broken.  Which error reports a close depends on what arrives first."""
    if isinstance(error, ConnectionError) or error.errno == errno.ENOTCONN:
        return "the server has closed the connection"
    return f"the connection is broken: {reason(error)}"


class PingParser:
    """A parser that separates pings from other bytes.

    A byte stream has no message boundaries.  `ping` counts at the start of the stream, after
    another ping, or after a newline.  After any other byte, nothing counts until the next newline,
    not even the `ping` in the echo of `shopping`.
    """

    def __init__(self) -> None:
        self.pings = 0
        self.in_line = False  # nothing counts until the next newline
        self.held = b""  # the first bytes of a ping that the end of the chunk has cut

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

    Data is shown below a prompt, never behind it, because the user may have typed half a line.
    The client does not see what the user types before the prompt: data may continue that row.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.interactive = os.isatty(0) and not connection.input_ended and not connection.raw
        self.output, self.errors = Output(1), Output(2)
        self.terminal = os.isatty(1)
        self.terminal_text = TerminalText() if self.terminal and not connection.raw else None
        self.screen = self.output if self.interactive and self.terminal else self.errors
        self.row = ""  # content of the terminal's last row: nothing, PROMPT or DATA
        self.asked = False  # the last line that the user has typed has no answer
        self.silence_reported = False
        self.idle_since = time.monotonic() - QUIET  # the last input or shown data; at first, a prompt is due

    def note_input(self, chunk: bytes) -> None:
        """Note a chunk that was read from standard input."""
        if self.interactive and chunk.endswith(b"\n"):  # Ctrl-D sends a line without its end
            self.row, self.asked = "", True
        self.idle_since = time.monotonic()

    def show(self, data: bytes, final: bool = False) -> None:
        """Write received data; `final` means that no more data follows."""
        if self.terminal_text:
            data = self.terminal_text.feed(data, final).encode()
        if data and self.row == PROMPT and self.terminal:
            data = b"\n" + data
        self.output.write(data)
        if data and self.terminal:  # after the write, because resume() may change the row at any time
            self.row, self.asked = "" if data.endswith(b"\n") else DATA, False
            self.idle_since = time.monotonic()  # more data may follow before the prompt

    def is_silent(self) -> bool:
        """Return whether the server has not answered any input, and no notice has reported that."""
        connection = self.connection
        heard = connection.received or connection.at_eof or self.silence_reported
        return not heard and (connection.sent > 0 or connection.half_closed)

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
            newline = "\n" if self.row == PROMPT else ""
            text, self.silence_reported = f"{text}{newline}{SILENCE_NOTICE}", True
        prompt = PROMPT if self.interactive and not self.connection.input_ended else ""
        self.row, self.asked = prompt, False
        self.screen.write((text + prompt).encode())  # last, because resume() may change the row at any time

    def resume(self, number: int, frame: Any) -> None:
        """Handle SIGCONT after Ctrl-Z and `fg`: the shell has begun a new row, so prompt again."""
        if self.row == PROMPT or not self.screen.unwritten:  # else unwritten data begins this row
            self.row = ""

    def finish(self, summary: str, signalled: bool) -> None:
        """Write the summary to standard error, on a terminal in its own row."""
        shares_row = self.interactive or (self.terminal and os.isatty(2))
        if shares_row and (signalled or self.row):  # a terminal shows Ctrl-C as ^C
            self.screen.write(b"\n")
        self.errors.write(summary.encode())


class Input:
    """Standard input.  A read does not wait, or a signal ends it.

    Two programs may share a terminal: a shell and its job, or two clients.  select reports a line to
    both, one reads it, and the read of the other waits unless the terminal can be opened again.
    """

    def __init__(self) -> None:
        self.descriptor = open_again(0, os.O_RDONLY) if os.isatty(0) and not WINDOWS else 0
        self.may_wait, self.stopped, self.failure = False, False, ""
        self.chunks: list[bytes] = []

    def read(self) -> bytes | None:
        """Return a chunk, b"" at the end of file or after an error, or None if nothing is left to read."""
        try:
            self.may_wait = os.get_blocking(self.descriptor)
            if not self.stopped:  # else a signal has arrived just before the read, which may wait
                # extend() is C code: no handler runs between the read and the store of its chunk.
                self.chunks.extend(map(os.read, [self.descriptor], [SIZE]))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.may_wait = False  # from here on, interrupt() must not raise
            self.failure = reason(error)
            return b""
        finally:
            self.may_wait = False
        return self.chunks.pop() if self.chunks else None

    def interrupt(self) -> None:
        """End a read that waits, from a signal's handler.  Only an exception ends it (PEP 475)."""
        self.stopped = True
        if self.may_wait:
            self.may_wait = False
            raise InterruptedError


class Output:
    """Standard output or standard error.  Data that does not fit stays unwritten.

    os.write() waits if not all data fits, even after select has reported the descriptor as writable.
    So the output is opened again without blocking.  If that is impossible, a write has at most
    PIPE_BUF bytes (pipe(7)), and one byte on a terminal.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.limit: int | None = None  # bytes of a write, if a longer one could wait
        self.unwritten, self.failure = NOTHING, ""
        mode = os.fstat(descriptor).st_mode
        has_reader = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)
        if has_reader and not WINDOWS:
            self.descriptor = open_again(descriptor, os.O_WRONLY)
            if os.get_blocking(self.descriptor):
                self.limit = 1 if os.isatty(descriptor) else select.PIPE_BUF

    def write(self, data: bytes = b"") -> None:
        """Write as much as fits of the unwritten and the new data.  After an error, discard everything."""
        if data and not self.failure:
            self.unwritten = memoryview(bytes(self.unwritten) + data)  # no copy if nothing is unwritten
        try:
            for _ in range(WRITES):
                if not self.unwritten or (self.limit and not select.select([], [self.descriptor], [], 0)[1]):
                    break
                size = os.write(self.descriptor, self.unwritten[: self.limit])
                self.unwritten = self.unwritten[size:] or NOTHING  # frees the chunk
        except BlockingIOError:
            pass
        except OSError as error:
            self.unwritten, self.failure = NOTHING, reason(error)


def open_again(descriptor: int, access: int) -> int:
    """Return a non-blocking descriptor of the same terminal or pipe, or the given one if this is impossible.

    O_NONBLOCK on an inherited descriptor affects every process that shares it, such as the shell.
    On macOS, opening it again is only a dup(2), which ignores the flag.
    """
    path = f"/dev/fd/{descriptor}"
    with suppress(OSError):  # a socket, or another user's terminal
        if not os.path.realpath(path).endswith(("/ptmx", "/tty")):  # opening these gives another terminal
            return os.open(path, access | os.O_NONBLOCK | os.O_NOCTTY)
    return descriptor


class TerminalText:
    """A filter that turns bytes into text that is safe on a terminal.  Chunks may end anywhere."""

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.decoder = io.IncrementalNewlineDecoder(decoder, translate=False)  # never splits CR LF
        self.last = " "  # the last shown character, because U+FE0F may follow

    def feed(self, data: bytes, final: bool) -> str:
        """Return the text of the next bytes; escape what could harm or mislead: `\\x1b`, `\\u202e`."""
        text = self.decoder.decode(data, final).replace("\r\n", "\n").replace("\r", "\\x0d")
        text = self.last + text
        selected = text.endswith("\ufe0f")
        if not text.isascii():  # else it finds nothing
            text = INVISIBLE.sub(lambda found: ascii(found[0])[1:-1], text)
        text = UNUSUAL.sub(lambda found: repr(found[0])[1:-1], text)  # escapes what is not printable
        self.last = " " if selected else text[-1]  # only one U+FE0F may follow a character
        return text[1:]


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
    options.host = options.host.strip("[]")  # the server shows an IPv6 address in brackets
    if not options.host:
        parser.error("argument --host: must not be empty")
    return options


def main() -> int:
    """Connect and run one conversation; return the exit status."""
    handle_stop_signals(signal.SIG_DFL)  # until there is a connection, a signal ends the program
    if not WINDOWS:  # our parent may have blocked these
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [*STOP_SIGNALS, signal.SIGCONT])
    options = arguments()
    if WINDOWS and not options.message:
        sys.exit("cannot watch standard input on Windows: give each MESSAGE as an argument")
    messages = b"".join(os.fsencode(message) + b"\n" for message in options.message)
    task = f"open {os.devnull}"
    try:
        for stream in sys.stdin, sys.stdout, sys.stderr:
            if stream is None:  # its descriptor is closed, and the socket must not get that number
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        task = f"connect to {options.host}, port {options.port}"
        sock = connect(options.host, options.port)
        task = "continue"
        with sock:
            conversation = Conversation(Connection(sock, messages, options.raw))
            with conversation.wakeup, conversation.wakeup_writer:
                return conversation.run()
    except (OSError, MemoryError, ValueError) as error:  # ValueError: select(2) has a limit of 1,023
        hint = "; is the server running?" if isinstance(error, ConnectionRefusedError) else ""
        sys.exit(f"cannot {task}: {reason(error)}{hint}")


if __name__ == "__main__":
    sys.exit(main())
