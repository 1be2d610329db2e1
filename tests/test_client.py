"""Tests of the client, with the real server and with servers that the tests play."""

from __future__ import annotations

import fcntl
import os
import platform
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import pytest
from conftest import (
    CLIENT,
    COMPILED,
    DEADLINE,
    ROOT,
    Server,
    Stream,
    at_once,
    eventually,
    read_all,
    read_exactly,
)

from client import Input, PingParser, TerminalText

PIPE, NULL = subprocess.PIPE, subprocess.DEVNULL
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
TTY = object()  # as a standard stream: a terminal of the client's own
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
SHORT_TIMEOUTS = "assert client.GRACE; client.GRACE = client.SILENCE = client.QUIET = 0.01"  # seconds
NOTICE = "nothing from the server yet.*another client.*\n"


class Screen(Stream):
    """The text on a terminal.  Its end of file: the last program has closed the terminal."""

    def read(self) -> None:
        try:
            super().read()
        except OSError:  # EIO
            with self.changed:
                self.ended = True
                self.changed.notify_all()

    def rows(self) -> list[str]:
        """Return the rows without empty ones and bare prompts.  No row is ever overwritten."""
        assert "\r" not in self.text
        return [row for row in re.sub(NOTICE, "", self.text).split("\n") if row not in ("", "> ")]


class Client(Server):
    """The client as a process: after Python code, with a shell's redirections or in a wrapper."""

    server: socket.socket  # the other end of its connection, if the test plays the server

    def __init__(
        self,
        *arguments: str | bytes,
        before: str = "",
        redirect: str = "",
        wrapper: Sequence[str] = (),
        **streams: Any,
    ) -> None:
        streams = {"stdin": NULL, "stdout": PIPE, "stderr": PIPE, **streams}
        script = ["-c", f"import os, sys, client\n{before}\nsys.exit(client.main())"] if before else [CLIENT]
        shell = ["sh", "-c", f'exec "$@" {redirect}', "sh"] if redirect else list(wrapper)
        self.keyboard, end = os.openpty()
        attributes = termios.tcgetattr(end)
        attributes[1] &= ~termios.OPOST  # the terminal shows the written bytes unchanged
        termios.tcsetattr(end, termios.TCSANOW, attributes)
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        streams = {name: end if stream is TTY else stream for name, stream in streams.items()}
        encoded = [word.encode() if isinstance(word, str) else word for word in arguments]  # in any locale
        self.process = subprocess.Popen([*shell, sys.executable, *script, *encoded], cwd=ROOT, **streams)
        os.close(end)
        self.screen = Screen(os.fdopen(self.keyboard, "rb", 0))
        self.out = Stream(self.process.stdout) if self.process.stdout else self.screen
        self.err = Stream(self.process.stderr) if self.process.stderr else self.screen
        self.clients: list[socket.socket] = []

    def type(self, data: bytes, last: bool = False) -> None:
        """Write to its standard input; close it after the last data."""
        pipe = self.process.stdin
        while data:
            data = data[os.write(pipe.fileno() if pipe else self.keyboard, data) :]
        if last and pipe:
            pipe.close()

    def answer(self, data: bytes) -> bytes:
        """Act as the server: read to the end of file, send data, close; return the bytes read."""
        received = read_all(self.server)
        self.server.sendall(data)
        self.server.close()
        return received

    def shown(self) -> bytes:
        """Return everything that it writes to standard output."""
        eventually(lambda: self.out and self.out.ended, "the end of standard output")
        return self.out.data if self.out else b""

    def ended(self, status: int) -> str:
        """Wait until it ends with the status; return its standard error without the notice of silence."""
        return re.sub(NOTICE, "", super().ended(status))

    def line(self, status: int = 1) -> str:
        """Wait until it ends with the status; return its only line on standard error."""
        lines = self.ended(status).splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    def close(self) -> None:
        self.type(b"", last=True)
        super().close()
        self.screen.thread.join(DEADLINE)
        self.screen.pipe.close()


Start = Callable[..., Server]
Launch = Callable[..., Client]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Yield a function that starts clients of a server, or of the test itself; end them after the test."""
    clients: list[Client] = []

    def launch(*arguments: str | bytes, port: int = 0, host: str = "127.0.0.1", **how: Any) -> Client:
        with socket.create_server((host, 0)) as listener:
            client = Client("--port", str(port or listener.getsockname()[1]), *arguments, **how)
            clients.append(client)
            if not port:
                listener.settimeout(DEADLINE)
                client.server = listener.accept()[0]
                client.server.settimeout(DEADLINE)
                client.clients = [client.server]
        return client

    yield launch
    for client in clients:
        client.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


# ---------------------------------------------------------------- messages and the summary


def test_messages_arrive_during_a_flood_of_pings(start: Start, launch: Launch) -> None:
    server = start("--connections", "1")
    for number in range(1, 6):
        line = launch("first", f"second {number}", port=server.port, stdin=PIPE).line(0)
        server.messages(rf"^data received\.\.\. \(client {number}, .*\)\nfirst\n  second {number}$")
        # No ping is missing, and the connection ended without a reset.
        left = server.err.wait_for(rf"^client {number} left: 15 bytes received, ([\d,]+ pings?) sent, 0 of")
        assert line == f"sent 15 bytes; received {left[1]}"


@pytest.mark.parametrize("env", [ASCII, None], ids=["ascii", ""])
@pytest.mark.parametrize(
    ("messages", "typed", "pings", "other", "summary"),
    [
        (["a"], b"", 0, b"", "sent 2 bytes; received 0 pings"),
        (["b", ""], b"", 1, b"", "sent 3 bytes; received 1 ping"),
        ([b"caf\xe9", "\xe9"], b"", 1, b"x", "sent 8 bytes; received 1 ping, 1 other byte"),
        (["M" * 15, "N" * 14], b"", 1204113, b"", "sent 31 bytes; received 1,204,113 pings"),
        ([], b"", 1, b"hello\n", "sent 0 bytes; received 1 ping, 6 other bytes"),
        ([], b"\n", 0, b"", "sent 1 byte; received 0 pings"),
        ([], b"one\ntwo", 0, b"", "sent 7 bytes; received 0 pings"),
        ([], b"one\ntwo\n", 0, b"", "sent 8 bytes; received 0 pings"),
    ],
)
def test_writes_a_summary(
    launch: Launch, messages: Any, typed: bytes, pings: int, other: bytes, summary: str, env: Any
) -> None:
    client = launch(*messages, stdin=PIPE, env=env)
    for chunk in re.findall(rb"(?s).{1,3}", typed):
        client.type(chunk)
        assert read_exactly(client.server, len(chunk)) == chunk
    client.type(b"", last=True)
    lines = [(message.encode() if isinstance(message, str) else message) + b"\n" for message in messages]
    assert client.answer(b"ping" * pings + other) == b"".join(lines)
    assert client.ended(0) == f"{summary}\n"
    assert client.shown() == other


@pytest.mark.parametrize("kind", ["pipe", "file", "null", "closed"])
def test_an_echo_returns_standard_input(start: Start, launch: Launch, tmp_path: Path, kind: str) -> None:
    port, redirect = start("--echo", "--connections", "1", "--quiet").port, "<&-" if kind == "closed" else ""
    data = os.urandom(5_000_000) if kind in ("pipe", "file") else b""
    (tmp_path / "input").write_bytes(data)
    with (tmp_path / "input").open("rb") as file, (tmp_path / "output").open("wb") as output:
        source = {"pipe": PIPE, "null": NULL}.get(kind, file)
        client = launch("--raw", port=port, stdin=source, stdout=output, redirect=redirect)
    client.type(data if kind == "pipe" else b"", last=True)
    assert client.line(0) == f"sent {len(data):,} bytes; received {len(data):,} bytes"
    assert (tmp_path / "output").read_bytes() == data


def test_reads_while_it_sends_and_memory_stays_bounded(launch: Launch, tmp_path: Path) -> None:
    """The data is larger than the sockets' buffers; the server reads nothing while its data is unread."""
    (tmp_path / "input").touch()
    os.truncate(tmp_path / "input", 60_000_000)  # zeros, which use no disk space
    with (tmp_path / "input").open("rb") as file:
        client = launch("--raw", stdin=file, stdout=NULL)
    client.settled()  # the sockets are full
    before = client.status("VmHWM")
    client.server.sendall(bytes(30_000_000))
    for data in iter(lambda: client.server.recv(1 << 20), b""):
        client.server.sendall(data)
    assert client.status("VmHWM") - before < 24_000 + COMPILED, "kB at most"
    client.server.close()
    assert client.line(0) == "sent 60,000,000 bytes; received 90,000,000 bytes"


# ---------------------------------------------------------------- received data, and where it is shown


@pytest.mark.parametrize("size", [1, 3, 5, 7, 262144])
def test_the_size_of_a_chunk_changes_no_count_and_no_output(launch: Launch, size: int) -> None:
    client = launch(before=f"assert client.SIZE; client.SIZE = {size}")
    client.answer(b"ping" * 100 + b"hello\npingpingshopping\nhoping\npinpin\n" + b"ping" * 9 + b"pin")
    assert client.line(0) == "sent 0 bytes; received 111 pings, 32 other bytes"
    assert client.shown() == b"hello\nshopping\nhoping\npinpin\npin"


def slowly(stream: bytes) -> tuple[int, bytes]:
    """Return the number of pings and the other bytes, found byte by byte."""
    pings, others, matched, in_line = 0, b"", 0, False
    for byte in stream:
        if not in_line and byte == b"ping"[matched]:
            matched += 1
            pings, matched = pings + matched // 4, matched % 4
        else:
            others += b"ping"[:matched] + bytes([byte])
            matched, in_line = 0, byte != ord("\n")
    return pings, others + b"ping"[:matched]


@pytest.mark.parametrize(
    "alphabet", [[b"ping"], [b"ping", b"\n"], [b"ping", b"p", b"in", b"g", b"\n", b"-", b"\r"]]
)
def test_the_parser_agrees_with_a_slow_one(alphabet: list[bytes]) -> None:
    for seed in range(300):
        chance = random.Random(seed)
        stream = b"".join(chance.choices(alphabet, k=chance.randrange(40)))
        parser, others, left = PingParser(), b"", stream
        while left:
            size = chance.randint(1, 9)
            others, left = others + parser.feed(left[:size]), left[size:]
        assert (parser.pings, others + parser.held) == slowly(stream), (seed, stream)


def test_short_lines_are_not_slow(launch: Launch) -> None:
    client = launch()
    client.answer(b"\n" * 4_000_000)
    client.ended(0)
    assert client.shown() == b"\n" * 4_000_000


@pytest.mark.parametrize("size", [1, 262144])
@pytest.mark.parametrize("stdout", [TTY, PIPE], ids=["terminal", "pipe"])
def test_controls_are_escaped_on_a_terminal_only(launch: Launch, stdout: Any, size: int) -> None:
    client = launch(stdout=stdout, before=f"assert client.SIZE; client.SIZE = {size}")
    wild = b"\x1b[31mred\x07\0\x7f\r\xc2\x9b\ttab \xe2\x98\x83 \xff\nend\xe2\x98"
    client.answer(wild)
    client.ended(0)
    tame = "\\x1b[31mred\\x07\\x00\\x7f\\x0d\\x9b\ttab \u2603 \ufffd\nend\ufffd"
    assert client.shown() == (tame.encode() if stdout is TTY else wild)


FAMILY, PERSIAN = "\U0001f468\u200d\U0001f469", "\u0645\u06cc\u200c\u062e"


ESCAPED = {
    "caf\u00e9 \u4e2d\u6587 e\u0301 \U0001f600\ufe0f 1\ufe0f\u20e3": None,
    f"{FAMILY} {PERSIAN}": None,
    "a\u200d \u200c|\u200d\u200d|\u200c": None,
    "\t|\xa0|\u1680|\u2000|\u200a|\u202f|\u205f|\u3000|": None,
    "\u2028|\u2029|\x85|\x0b|\x0c|": r"\u2028|\u2029|\x85|\x0b|\x0c|",
    "\u202e|\u2066|\u200f|\u061c|": r"\u202e|\u2066|\u200f|\u061c|",
    "\u200b|\xad|\ufeff|\u2060|\u180e|": r"\u200b|\xad|\ufeff|\u2060|\u180e|",
    "\U000e0041|\ue000|\U0010ffff|\u0378|": r"\U000e0041|\ue000|\U0010ffff|\u0378|",
    "\u3164a\u115f\u1160\uffa0|a\u034f|\u17b4\u17b5|": r"\u3164a\u115f\u1160\uffa0|a\u034f|\u17b4\u17b5|",
    "\u180b|\u180f|\ufe00|\ufe0e|": r"\u180b|\u180f|\ufe00|\ufe0e|",
    "\U000e0100|\U000e01ef|": r"\U000e0100|\U000e01ef|",
    "a\ufe0f\ufe0f|\u2764\ufe0f\ufe0f| \ufe0f": "a\ufe0f\\ufe0f|\u2764\ufe0f\\ufe0f| \\ufe0f",
    "b \ufe0f\ufe0f\ufe0f": "b \\ufe0f\\ufe0f\\ufe0f",
    "\ufe0f|\u200d\ufe0f|\u3000\ufe0f": "\\ufe0f|\u200d\\ufe0f|\u3000\\ufe0f",
    "\u2764\ufe0f\u200d\U0001f525|a\u200d\u202e": "\u2764\ufe0f\u200d\U0001f525|a\u200d\\u202e",
    "one\r\ntwo\r|\r\r\n\n\r": "one\ntwo\\x0d|\\x0d\n\n\\x0d",
}


@pytest.mark.parametrize("size", [1, 2, 262144])
def test_a_terminal_gets_escapes_for_harmful_characters_only(launch: Launch, size: int) -> None:
    client = launch(stdout=TTY, before=f"assert client.SIZE; client.SIZE = {size}")
    client.answer("\n".join(ESCAPED).encode())
    client.ended(0)
    assert client.shown().decode() == "\n".join(shown or text for text, shown in ESCAPED.items())


def test_a_character_is_escaped_if_it_is_invisible_or_a_control() -> None:
    kept = "\t\n\xa0\u1680\u202f\u205f\u3000\u200c\u200d" + "".join(map(chr, range(0x2000, 0x200B)))
    codes = [*range(0x34F, 0x350), *range(0x180B, 0x1810), *range(0xFE00, 0xFE0F), *range(0xE0100, 0xE01F0)]
    hidden = {*map(chr, codes), *"\u115f\u1160\u17b4\u17b5\u3164\uffa0"}
    for first in (*range(0, 0xD800, 256), *range(0xE000, 0x110000, 256)):
        given = expected = ""
        for code in range(first, first + 256):
            text = shown = chr(code)
            if text not in kept and (not text.isprintable() or text in hidden):
                shown = (
                    f"x{code:02x}" if code < 0x100 else f"u{code:04x}" if code < 0x10000 else f"U{code:08x}"
                )
                shown = f"\\{shown}"
            given, expected = f"{given}|{text}|", f"{expected}|{shown}|"
        assert TerminalText().feed(given.encode(), True) == expected


@pytest.mark.parametrize(("stdin", "stdout"), [(TTY, TTY), (NULL, TTY), (NULL, PIPE)])
def test_raw_data_is_unchanged_and_its_pings_are_not_counted(launch: Launch, stdin: Any, stdout: Any) -> None:
    client = launch("--raw", stdin=stdin, stdout=stdout)
    client.type(b"\4")  # Ctrl-D
    data = b"ping" * 1000 + bytes(range(256)) + b"ping" * 1000 + b"pi"
    client.answer(data)
    assert "ping" not in client.line(0)
    assert client.shown() == data


def test_an_input_that_cannot_be_read_is_reported(launch: Launch) -> None:
    with open(os.devnull, "wb") as write_only:
        client = launch(stdin=write_only)
    assert client.answer(b"ping") == b""
    reason = "standard input cannot be read: Bad file descriptor"
    assert client.line() == f"{reason}; sent 0 bytes; received 1 ping"


STEAL = "read = os.read; os.read = lambda *how: (setattr(os, 'read', read), read(*how), read(*how))[-1]"


def no_reopen(descriptor: int) -> str:
    return (
        "real = os.open; "
        f"os.open = lambda path, *how: real('/nowhere' if path == '/dev/fd/{descriptor}' else path, *how)"
    )


def test_waits_for_more_input_after_another_program_has_read_some(launch: Launch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    client = launch(stdin=reader, before=f"{STEAL}; {SHORT_TIMEOUTS}")
    os.write(writer, b"stolen\n")
    client.settled()
    assert client.err.text == "", "an input that another program has read is no input"
    os.write(writer, b"hello\n")
    assert read_exactly(client.server, 6) == b"hello\n"
    for descriptor in (reader, writer):
        os.close(descriptor)
    client.answer(b"")
    client.ended(0)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("stdin", "before"),
    [(TTY, ""), (TTY, no_reopen(0)), (PIPE, "")],
    ids=["terminal", "terminal of another user", "pipe"],
)
def test_a_signal_ends_it_after_another_program_has_read_its_input(
    launch: Launch, stdin: Any, before: str, number: int
) -> None:
    client = launch(stdin=stdin, before=f"{before}; {STEAL}" if before else STEAL)
    client.type(b"stolen\n")
    client.settled()
    client.server.sendall(b"shown\n")
    if stdin is TTY and not before:
        client.messages("^shown$")
    client.process.send_signal(number)
    assert client.answer(b"") == b""
    assert client.ended(0).endswith("\nsent 0 bytes; received 0 pings, 6 other bytes\n"[stdin is PIPE :])


def test_two_clients_share_a_terminal(launch: Launch) -> None:
    late = "real = select.select; select.select = lambda *how: (real(*how), time.sleep(0.02))[0]"
    master, slave = os.openpty()
    clients = [launch(stdin=slave, before=f"import select, time; {late}") for _ in range(2)]
    os.close(slave)
    for number in range(1, 4):
        for client in clients:
            client.settled()
        os.write(master, b"hello\n")  # select(2) reports it to both, and one of them reads it
        ready, _, _ = select.select([client.server for client in clients], [], [], DEADLINE)
        assert [read_exactly(sock, 6) for sock in ready] == [b"hello\n"]
        for client in clients:
            client.server.sendall(b"shown\n")
            client.messages(rf"\A(shown\n){{{number}}}\Z")
    for client in clients:
        client.process.send_signal(signal.SIGINT)
        client.answer(b"")
        client.ended(0)
    os.close(master)


def test_its_terminal_does_not_become_its_controlling_terminal(launch: Launch) -> None:
    client = launch(stdin=TTY, stdout=TTY, stderr=TTY, start_new_session=True)
    client.messages(r"\A> \Z")
    state = Path(f"/proc/{client.process.pid}/stat").read_text().rpartition(")")[2].split()
    assert state[4] == "0", "tty_nr, proc(5)"
    client.type(b"\4")
    client.answer(b"")
    client.ended(0)


def test_the_master_of_a_pseudo_terminal_is_not_opened_again(launch: Launch) -> None:
    """Opening it makes a new pseudo-terminal, whose other side has no reader and no writer."""
    master, slave = os.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    client = launch("--raw", stdin=master, stdout=master)
    client.server.sendall(b"hello\n")
    received = b""
    while received != b"hello\n":
        assert select.select([slave], [], [], DEADLINE)[0], received
        received += os.read(slave, 100)
    os.write(slave, b"typed")
    assert read_exactly(client.server, 5) == b"typed"
    client.process.send_signal(signal.SIGTERM)
    client.answer(b"")
    client.ended(0)
    for descriptor in (master, slave):
        os.close(descriptor)


def test_a_closed_output_is_no_failure(launch: Launch) -> None:
    client = launch("x", redirect=">&-")
    assert client.answer(b"pinghello") == b"x\n"
    assert client.line(0) == "sent 2 bytes; received 1 ping, 5 other bytes"


def test_a_broken_output_is_reported(start: Start, launch: Launch) -> None:
    server, (reader, writer) = start("--connections", "1"), os.pipe()
    client = launch("--raw", "message", port=server.port, stdout=writer)
    os.close(writer)
    assert os.read(reader, 4) == b"ping"
    os.close(reader)
    assert "output" in client.line()
    server.messages("^message$")


def test_a_full_device_is_reported(launch: Launch) -> None:
    with open("/dev/full", "wb") as output:
        client = launch(stdin=PIPE, stdout=output, before=SHORT_TIMEOUTS)
    client.server.sendall(b"hello")
    assert read_all(client.server) == b""  # the client does not wait for the server's close
    assert client.line().startswith("standard output can no longer be written: No space left on device; sent")


def test_ctrl_c_that_also_ends_the_reader_is_no_failure(launch: Launch) -> None:
    reader, writer = os.pipe()
    client = launch(stdin=PIPE, stdout=writer, before="client.GRACE = 1000")
    os.close(writer)
    os.close(reader)
    client.server.sendall(b"hello")
    assert read_all(client.server) == b""
    client.process.send_signal(signal.SIGINT)
    assert client.answer(b"") == b""
    assert client.line(0) == "sent 0 bytes; received 0 pings, 5 other bytes"


def test_waits_for_a_full_output_that_does_not_block(launch: Launch) -> None:
    """Another process that shares the pipe may have set O_NONBLOCK."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    client = launch("--raw", "x", stdout=writer)
    os.close(writer)
    client.out = Stream(os.fdopen(reader, "rb", 0), paused=True)
    client.answer(b"x" * 1_000_000)
    client.settled()  # the pipe is full
    client.out.going.set()
    client.ended(0)
    assert client.shown() == b"x" * 1_000_000


# ---------------------------------------------------------------- an interactive user; signals


def test_a_terminal_shows_prompts_answers_and_data(launch: Launch) -> None:
    client = launch(stdin=TTY, stdout=TTY, stderr=TTY)
    client.messages(r"\A> ")
    for number, text in (1, b"hello\n"), (2, b"caf\xc3\xa9\n"):
        client.server.sendall(b"pingca")
        client.messages("ca")
        client.server.sendall(b"me\n")
        client.messages(r"me\n> \Z")
        client.type(text)
        assert read_exactly(client.server, len(text)) == text
        client.messages(rf"^{number} pings? so far\n> \Z")
    client.type(b"\4")
    assert client.answer(b"ping") == b""
    client.ended(0)
    first, second = ["came", "> hello", "1 ping so far"], ["came", "> café", "2 pings so far"]
    summary = "sent 12 bytes; received 3 pings, 10 other bytes"
    assert client.screen.rows() == [*first, *second, summary]


def test_a_half_typed_line_stays_on_the_screen(launch: Launch) -> None:
    client = launch(stdin=TTY, stdout=TTY, stderr=TTY, before=SHORT_TIMEOUTS)
    client.messages(r"\A> \Z")
    client.type(b"hel")
    client.messages(r"\A> hel\Z")
    client.server.sendall(b"news\n")
    client.messages(r"\A> hel\nnews\n> \Z")
    client.type(b"lo\n")
    assert read_exactly(client.server, 6) == b"hello\n"
    client.type(b"\4")
    client.answer(b"")
    client.ended(0)


def test_the_prompt_waits_for_more_data(launch: Launch) -> None:
    """The time of the last shown data counts, not only that of the last input."""
    look = (
        "show = client.Dialogue.show; client.Dialogue.show = lambda self, *data, **how: (setattr(self, "
        "'idle_since', 0.0), show(self, *data, **how), os.write(2, b'%d' % (self.idle_since > 0)))"
    )
    client = launch(stdin=TTY, stdout=TTY, before=look)
    client.server.sendall(b"news\n")
    client.err.wait_for(r"\A1\Z")
    client.messages("^news$")
    client.type(b"\4")
    client.answer(b"")
    client.ended(0)


def test_pings_answer_a_line_immediately(launch: Launch) -> None:
    client = launch(stdin=TTY, stdout=TTY, before="client.SILENCE = 1000")
    client.type(b"hello\n")
    assert read_exactly(client.server, 6) == b"hello\n"
    client.server.sendall(b"ping")
    client.messages(r"^(> )?1 ping so far\n> \Z")
    client.type(b"\4")
    client.answer(b"")
    client.ended(0)


def test_no_count_is_shown_if_no_pings_have_arrived(launch: Launch) -> None:
    """A chat server sends lines, but none in answer to this line."""
    client = launch(stdin=TTY, stdout=TTY)
    client.server.sendall(b"news\n")
    client.messages(r"^news\n> \Z")
    client.type(b"hello\n")
    client.messages(r"^> hello\n> \Z")
    client.type(b"\4")
    client.answer(b"")
    client.ended(0)


def test_an_echo_answers_a_line(start: Start, launch: Launch) -> None:
    client = launch(port=start("--echo", "--wait-for", "1").port, stdin=TTY, stdout=TTY, stderr=TTY)
    for text in "one", "ping", "two":
        client.messages(r"^> \Z")
        client.type(text.encode() + b"\n")
        client.messages(rf"^> {text}\n{text if text != 'ping' else ''}\n> \Z")
    client.type(b"\4")
    client.ended(0)
    rows = ["> one", "one", "> ping", "> two", "two"]
    assert client.screen.rows() == [*rows, "sent 13 bytes; received 1 ping, 9 other bytes"]


def test_a_paste_of_many_lines_gets_one_answer(start: Start, launch: Launch) -> None:
    client = launch(port=start("--quiet", "--wait-for", "1").port, stdin=TTY, stdout=TTY, stderr=TTY)
    client.messages(r"\A> \Z")
    lines = [f"line {number}" for number in range(500)]
    client.type(b"".join(line.encode() + b"\n" for line in lines))
    client.messages(r"^line 499\n[\d,]+ pings so far\n> \Z")
    client.type(b"\4")
    client.ended(0)
    first, *rows, answer, _ = client.screen.rows()
    assert [first, *rows] == ["> line 0", *lines[1:]]
    assert re.match(r"[\d,]+ pings so far$", answer)


def test_an_echo_of_a_paste_is_complete(start: Start, launch: Launch) -> None:
    client = launch(port=start("--echo", "--wait-for", "1").port, stdin=TTY, stdout=TTY, stderr=TTY)
    client.messages(r"\A> \Z")
    client.type(b"12345678\n" * 5000)
    eventually(lambda: client.screen.data.count(b"8") == 10000, "everything is typed and echoed")
    client.type(b"\4")
    assert client.ended(0).endswith("\nsent 45,000 bytes; received 0 pings, 45,000 other bytes\n")


def test_ctrl_d_within_a_line_sends_the_typed_part(launch: Launch) -> None:
    client = launch(stdin=TTY, stdout=TTY, stderr=TTY)
    client.messages(r"\A> \Z")
    client.server.sendall(b"ping")
    for typed, sent in (b"hel\4", b"hel"), (b"lo\n", b"lo\n"):
        client.type(typed)
        assert read_exactly(client.server, len(sent)) == sent
    client.messages(r"\A> hello\n1 ping so far\n> \Z")
    client.type(b"bye\4\4")
    assert client.answer(b"") == b"bye"
    client.ended(0)
    summary = "sent 9 bytes; received 1 ping"
    assert client.screen.rows() == ["> hello", "1 ping so far", "> bye", summary]


def test_the_longest_line_of_a_terminal_is_sent(launch: Launch) -> None:
    client = launch(stdin=TTY, stdout=TTY, stderr=TTY)
    client.messages(r"\A> \Z")
    line = b"x" * 4094 + b"\n"
    client.type(line)
    assert read_exactly(client.server, len(line)) == line
    client.server.sendall(line)
    client.messages(r"^x{4094}\n> \Z")
    client.process.send_signal(signal.SIGWINCH)  # a resize
    client.type(b"\4")
    client.answer(b"")
    client.ended(0)


@pytest.mark.skipif(not shutil.which("bash") or not shutil.which("setsid"), reason="needs bash and setsid")
def test_prompts_again_after_ctrl_z_and_fg(launch: Launch) -> None:
    shell = ["setsid", "-c", "bash", "--norc", "--noprofile", "-ic", '"$@"; fg', "bash"]
    client = launch(stdin=TTY, stdout=TTY, stderr=TTY, wrapper=shell)
    client.messages(r"^> \Z")
    client.type(b"half\x1a")
    client.messages(r"^> .*\^Z\s*(?:[^>\n].*\n)+> \Z")
    client.type(b"hello\n\4")
    assert client.answer(b"ping") == b"hello\n"
    client.ended(0)


def test_a_hangup_of_the_terminal_ends_it(launch: Launch) -> None:
    master, slave = os.openpty()
    open_terminal = "os.open(os.ttyname(0), os.O_RDWR)"
    client = launch(stdin=slave, stdout=slave, before=open_terminal, start_new_session=True)
    os.close(slave)
    os.write(master, b"hello\n")
    assert read_exactly(client.server, 6) == b"hello\n"
    os.close(master)
    assert client.answer(b"ping") == b""
    assert client.line(0) == "sent 6 bytes; received 1 ping"


@pytest.mark.parametrize(("data", "newline"), [(b"ping", "\n"), (b"pong\n", "")])
def test_the_summary_begins_on_its_own_line(launch: Launch, data: bytes, newline: str) -> None:
    client = launch("--raw", "x", stdin=TTY, stdout=TTY, stderr=TTY)
    client.answer(data)
    client.ended(0)
    assert client.screen.text == f"{data.decode()}{newline}sent 2 bytes; received {len(data)} bytes\n"


@pytest.mark.skipif(not shutil.which("rlwrap"), reason="rlwrap is not installed")
def test_rlwrap_edits_the_line(launch: Launch, tmp_path: Path) -> None:
    environment = {**os.environ, "TERM": "xterm", "RLWRAP_HOME": str(tmp_path), "HOME": str(tmp_path)}
    client = launch(stdin=TTY, stdout=TTY, stderr=TTY, wrapper=["rlwrap"], env=environment)
    client.messages("> ")
    client.type(b"help\x7flo\n")  # backspace
    assert read_exactly(client.server, 6) == b"hello\n"
    client.server.sendall(b"ping")
    client.messages("1 ping so far")
    client.type(b"\x1b[A\n")  # arrow up
    assert read_exactly(client.server, 6) == b"hello\n"
    client.type(b"\4")
    client.answer(b"")
    client.ended(0)
    assert "sent 12 bytes; received 1 ping" in client.screen.text


@pytest.mark.parametrize("redirect", ["", "2>&-"])
def test_the_prompt_goes_to_standard_error_or_nowhere(launch: Launch, redirect: str) -> None:
    """It goes neither to a redirected output nor to the server, whose socket must not get descriptor 2."""
    client = launch(stdin=TTY, redirect=redirect)
    client.type(b"hello\n\4")
    assert client.answer(b"pingshown\n") == b"hello\n"
    assert ("> " in client.ended(0)) is not bool(redirect)
    assert client.shown() == b"shown\n"


def test_a_signal_during_a_flood_loses_no_ping(start: Start, launch: Launch) -> None:
    server = start("--connections", "3", "--wait-for", "1", "--quiet")

    def interrupt(number: int) -> str:
        client = launch(port=server.port, stdin=TTY, stdout=TTY)
        client.type(b"x\n")
        client.messages("so far$")
        client.process.send_signal(number)
        return client.line(0)

    lines = at_once(interrupt, SIGNALS)
    left = re.findall(r"^client \d left: (2 bytes) received, ([\d,]+ pings?) sent", server.stop(), re.M)
    assert sorted(lines) == sorted(f"sent {sent}; received {pings}" for sent, pings in left)


def test_ctrl_c_at_a_terminal_ends_it(launch: Launch) -> None:
    open_terminal = "os.open(os.ttyname(0), os.O_RDWR)"  # makes it the controlling terminal: tty_ioctl(4)
    client = launch(stdin=TTY, stdout=TTY, before=open_terminal, start_new_session=True)
    client.type(b"hello\n")
    assert read_exactly(client.server, 6) == b"hello\n"
    client.type(b"\3")
    assert client.answer(b"ping") == b""
    assert client.line(0) == "sent 6 bytes; received 1 ping"


def test_a_signal_ends_it_without_the_end_of_file_of_the_server(launch: Launch) -> None:
    client = launch(stdin=PIPE, before=SHORT_TIMEOUTS)
    client.type(b"x")
    assert client.server.recv(1) == b"x"
    client.process.send_signal(signal.SIGINT)
    assert read_all(client.server) == b""
    assert client.ended(0) == "sent 1 byte; received 0 pings\n"


def test_further_signals_change_nothing(launch: Launch) -> None:
    client = launch(stdin=PIPE, before="client.GRACE = 1000")
    client.type(b"x")
    assert client.server.recv(1) == b"x"
    for number in (signal.SIGINT, *SIGNALS):
        client.process.send_signal(number)
        client.settled()
    assert client.answer(b"late\n") == b""
    assert client.ended(0) == "sent 1 byte; received 0 pings, 5 other bytes\n"
    assert client.shown() == b"late\n"


def test_the_second_signal_sets_no_new_deadline(launch: Launch) -> None:
    client = launch(stdin=PIPE, before="client.GRACE = 0.2")
    client.type(b"x")
    assert client.server.recv(1) == b"x"

    def has_ended() -> bool:
        client.process.send_signal(signal.SIGINT)
        return client.process.poll() is not None

    eventually(has_ended, "it ends although signals continue to arrive")
    assert client.ended(0) == "sent 1 byte; received 0 pings\n"


@pytest.mark.skipif(platform.python_implementation() != "CPython", reason="needs a destructor at the exit")
def test_a_signal_during_the_exit_changes_no_status(launch: Launch) -> None:
    """Python restores the default actions before it destroys the modules."""
    kill = "lambda self, kill=os.kill, pid=os.getpid(): kill(pid, 15)"
    client = launch("x", before=f"sys.late = type('Late', (), {{'__del__': {kill}}})()")
    client.answer(b"")
    assert client.line(0) == "sent 2 bytes; received 0 pings"


def test_a_stale_event_of_its_input_does_not_stop_it_from_obeying_a_signal(launch: Launch) -> None:
    """A terminal drops its input at Ctrl-C; select(2) may have reported it just before."""
    before = (
        "real, stop = client.select.select, client.Conversation.stop; signals = []; "
        "client.Conversation.stop = lambda *of: signals.append(1) or stop(*of); "
        "client.select.select = lambda reads, *of: "
        "(lambda found: ([*found[0], 0], *found[1:]) if signals else found)(real(reads, *of))"
    )
    client = launch(stdin=PIPE, before=before)
    client.type(b"x")
    assert client.server.recv(1) == b"x"
    client.settled(0.1)  # it waits
    client.process.send_signal(signal.SIGINT)
    assert client.answer(b"") == b""
    assert client.ended(0) == "sent 1 byte; received 0 pings\n"


def test_a_signal_that_is_sent_twice_ends_it_gracefully(launch: Launch) -> None:
    """timeout(1) sends its signal twice; the second one may arrive while the first one is handled."""
    client = launch(stdin=PIPE)
    client.type(b"x\n")
    assert read_exactly(client.server, 2) == b"x\n"
    for _ in range(2):
        client.process.send_signal(signal.SIGTERM)
    assert client.answer(b"ping") == b""
    assert client.line(0) == "sent 2 bytes; received 1 ping"


@pytest.mark.parametrize("stdout", [PIPE, TTY], ids=["pipe", "terminal"])
def test_a_signal_shows_a_part_of_a_ping(launch: Launch, stdout: Any) -> None:
    client = launch(stdin=PIPE, stdout=stdout, before=SHORT_TIMEOUTS)
    client.server.sendall(b"pingpi")
    client.settled()
    client.process.send_signal(signal.SIGTERM)
    assert client.line(0) == "sent 0 bytes; received 1 ping, 2 other bytes"
    assert client.shown() == b"pi"


def test_a_signal_shows_a_part_of_a_character(launch: Launch) -> None:
    client = launch(stdin=PIPE, stdout=TTY, before=SHORT_TIMEOUTS)
    client.server.sendall(b"caf\xc3")
    client.messages("caf")
    client.process.send_signal(signal.SIGTERM)
    client.ended(0)
    assert client.shown().decode() == "caf\ufffd"


def test_an_urgent_byte_keeps_its_place(launch: Launch) -> None:
    client = launch()
    for data, flags in (b"a", 0), (b"b", socket.MSG_OOB), (b"c\n", 0):
        client.server.send(data, flags)
    client.messages("^abc$")
    client.answer(b"")
    client.ended(0)


def test_unsent_data_after_a_signal_is_reported(launch: Launch) -> None:
    with open("/dev/zero", "rb") as endless:
        client = launch(stdin=endless, before=SHORT_TIMEOUTS)
    client.settled()  # the sockets are full
    client.process.send_signal(signal.SIGTERM)
    assert re.match(r"not everything was sent; sent [\d,]+ bytes; received 0 pings$", client.line())


def test_no_count_is_shown_after_a_signal(launch: Launch) -> None:
    client = launch(stdin=TTY, before="client.SILENCE = 1000")
    client.type(b"hello\n")
    assert read_exactly(client.server, 6) == b"hello\n"
    client.process.send_signal(signal.SIGINT)
    assert client.answer(b"ping") == b""
    assert client.ended(0) == "> \nsent 6 bytes; received 1 ping\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_its_parent_has_blocked_ends_it(launch: Launch, number: int) -> None:
    client = launch(stdin=PIPE, before=f"import signal; signal.pthread_sigmask(0, [{int(number)}])")
    client.type(b"hello\n")
    assert read_exactly(client.server, 6) == b"hello\n"
    client.process.send_signal(number)
    assert client.answer(b"") == b""
    client.ended(0)


def test_prompts_again_although_its_parent_has_blocked_sigcont(launch: Launch) -> None:
    block = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])"
    client = launch(stdin=TTY, stdout=TTY, before=block)
    client.messages(r"\A> \Z")
    client.process.send_signal(signal.SIGCONT)
    client.messages(r"\A> > \Z")
    client.type(b"\4")
    client.answer(b"")
    client.ended(0)


def test_only_the_first_signal_interrupts_a_read() -> None:
    source = Input()
    source.may_wait = True
    with pytest.raises(InterruptedError):
        source.interrupt()
    source.interrupt()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(launch: Launch, number: int) -> None:
    client = launch(stdin=PIPE, before=f"import signal; signal.signal({int(number)}, signal.SIG_IGN)")
    client.server.sendall(b"shown\n")
    client.messages("shown")
    client.process.send_signal(number)
    client.settled()
    client.type(b"hello\n", last=True)
    assert client.answer(b"") == b"hello\n"
    client.ended(0)


def unread(kind: str, path: Path) -> tuple[int, int]:
    """Return two descriptors: an output that no program reads, and the other end, which keeps it open."""
    if kind == "fifo":
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        return os.open(path, os.O_WRONLY), reader
    if kind == "socket":
        ours, theirs = socket.socketpair()
        return theirs.detach(), ours.detach()
    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    return writer, reader


UNREAD = (
    ("pipe", ""),
    ("fifo", ""),
    ("socket", ""),
    ("terminal", ""),
    ("pipe", no_reopen(1)),
    ("fifo", no_reopen(1)),
    ("terminal", no_reopen(1)),
)


def test_a_signal_ends_it_while_its_output_is_stalled(launch: Launch, tmp_path: Path) -> None:
    """Run all cases at the same time, because each one takes GRACE seconds."""

    def check(case: tuple[tuple[str, str], int]) -> None:
        (kind, before), number = case
        writer, reader = unread(kind, tmp_path / f"fifo {number} {len(before)}")
        client = launch("--raw", "x", stdout=writer, before=before)
        os.close(writer)
        client.server.setblocking(False)
        with suppress(BlockingIOError):
            while client.server.send(bytes(100_000)):
                pass
        client.settled()  # the output is full
        client.process.send_signal(number)
        client.process.wait(DEADLINE)
        os.close(reader)
        assert re.match(r"sent .*bytes; received .*; [\d,]+ bytes not written$", client.line(0)), case

    at_once(check, product(UNREAD, SIGNALS))


def test_a_signal_ends_it_while_it_writes_single_bytes(launch: Launch) -> None:
    """A megabyte takes seconds in single bytes, also if the terminal accepts all of them."""
    client = launch("x", stdout=TTY, before=f"{no_reopen(1)}; client.GRACE = 0.01")
    client.server.sendall(b"\x01" * 262144)
    client.messages("x01")
    client.process.send_signal(signal.SIGTERM)
    assert re.search("; [\\d,]+ bytes not written$", client.line(0))


def test_a_signal_ends_it_while_its_standard_error_is_stalled(launch: Launch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while os.write(writer, bytes(4096)):
            pass
    os.set_blocking(writer, True)
    client = launch("x", stderr=writer, before="client.GRACE = 0.1")
    os.close(writer)
    assert client.answer(b"ping") == b"x\n"
    client.settled()  # the summary does not fit
    client.process.send_signal(signal.SIGTERM)
    assert client.process.wait(DEADLINE) == 0
    os.close(reader)


RESOLVES = (
    "import socket; ends = socket.socketpair(); socket.getaddrinfo = lambda *how, **more: ends[0].recv(1)"
)


@pytest.mark.parametrize("before", ["", RESOLVES], ids=["connects", "resolves"])
def test_a_signal_ends_it_before_it_is_connected(launch: Launch, before: str) -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # enough to fill the backlog, so the kernel answers no further connect
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())

        def check(number: int) -> None:
            client = launch("x", port=full.getsockname()[1], before=before)
            client.settled()
            client.process.send_signal(number)
            assert client.process.wait(DEADLINE) == -number
            assert client.err.rest() == ""

        at_once(check, SIGNALS)


# ---------------------------------------------------------------- a server that is missing, ends or waits


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid", "x" * 64, "\u00e9" * 64])
def test_a_failed_connect_is_reported_in_one_line(launch: Launch, host: str) -> None:
    with socket.socket() as bound:  # but does not listen
        bound.bind(("127.0.0.1", 0))
        port, locale = bound.getsockname()[1], {**os.environ, "LC_ALL": "C.UTF-8"}
        line = launch("--host", host, port=port, env=locale).line()
    assert line.startswith(f"cannot connect to {host}, port {port}: ")
    assert ("is the server running?" in line) is (host == "127.0.0.1")


def test_after_a_failed_send_nothing_is_sent_but_the_end_of_file(launch: Launch) -> None:
    """Else the server would get data with a gap.  The connection itself is not broken."""
    fail = "import errno, socket; send = socket.socket.send; socket.socket.send = fail"
    define = (
        "def fail(sock, data):\n if b'lost' in bytes(data): raise OSError(errno.ENOBUFS, 'No buffer space')\n"
    )
    client = launch(stdin=PIPE, before=f"exec({define!r} + ' return send(sock, data)'); {fail}")
    client.type(b"first\n")
    assert read_exactly(client.server, 6) == b"first\n"
    client.type(b"lost\n")
    assert read_exactly(client.server, 1) == b""
    client.type(b"later\n", last=True)
    assert client.answer(b"") == b""
    assert client.line() == "the connection is broken: No buffer space; sent 6 bytes; received 0 pings"


def test_a_connection_to_itself_is_refused(launch: Launch) -> None:
    """The kernel may choose any free port, so also the one to which the client connects."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    choose = (
        "real = client.socket.create_connection; client.socket.create_connection = "
        f"lambda address: real(address, source_address=('127.0.0.1', {port}))"
    )
    line = launch("hello", port=port, before=choose).line()
    assert line == f"cannot connect to 127.0.0.1, port {port}: Connection refused; is the server running?"
    socket.create_server(("127.0.0.1", port)).close()


def test_a_host_name_that_is_no_text_is_reported_plainly(launch: Launch) -> None:
    line = launch("--host", b"a\xff", port=1).line()
    assert line == r"cannot connect to a\udcff, port 1: this is not a valid host name"


NO_NULL = "real = os.open; os.open = lambda path, *how: real(path.replace(os.devnull, '/nowhere'), *how)"


def test_needs_no_null_device_if_its_streams_are_open(launch: Launch) -> None:
    client = launch("hello", before=NO_NULL)
    assert client.answer(b"") == b"hello\n"
    client.ended(0)
    assert launch(port=1, before=NO_NULL, redirect="<&-").line() == (
        "cannot open /dev/null: No such file or directory"
    )


def test_an_option_that_cannot_be_set_is_no_failure(launch: Launch) -> None:
    fail = "client.socket.socket.setsockopt = lambda *how: os.close(-1)"
    client = launch("hello", before=fail)
    assert client.answer(b"") == b"hello\n"
    client.ended(0)


@pytest.mark.parametrize("end", ["summary", "signal", "failure"])
def test_it_closes_what_it_has_opened(launch: Launch, end: str) -> None:
    environment = {**os.environ, "PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
    fail = "client.Dialogue = lambda *how: os.close(-1)" if end == "failure" else "client.GRACE = 0.1"
    client = launch(stdin=PIPE, before=fail, env=environment)
    if end == "signal":
        client.type(b"x")
        assert client.server.recv(1) == b"x"
        client.process.send_signal(signal.SIGTERM)
    client.type(b"", last=True)
    if end == "summary":
        client.answer(b"")
    client.line(int(end == "failure"))


def test_help_shows_the_defaults_and_the_exit_status() -> None:
    text = subprocess.run([sys.executable, CLIENT, "--help"], stdout=PIPE, text=True, timeout=DEADLINE).stdout
    for part in (
        "(default: 127.0.0.1)",
        "(default: 10001)",
        "rlwrap python3 client.py",
        " -- -",
        "status",
        "SIGHUP",
    ):
        assert part in text


def test_a_message_may_begin_with_a_dash(launch: Launch) -> None:
    client = launch("--raw", "--", "-x", "--raw")
    assert client.answer(b"") == b"-x\n--raw\n"
    client.ended(0)


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE"


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("client.SIZE = 1 << 60", "out of memory"),
        (f"{LIMIT}, (5, 5))", "Too many open files"),
        (f"{LIMIT}, (2000, 2000)); [os.dup(0) for _ in range(1100)]", "select"),
    ],
)
def test_a_lack_of_resources_is_reported_in_one_line(launch: Launch, before: str, reason: str) -> None:
    client = launch("x", before=before)
    with suppress(OSError):  # some clients have ended
        client.server.sendall(b"ping")
    assert re.match(f"cannot continue: .*{reason}", client.line())


@pytest.mark.parametrize("stdin", [NULL, TTY])
def test_an_error_of_standard_error_is_no_failure(launch: Launch, stdin: Any) -> None:
    with open("/dev/full", "wb") as full:
        client = launch(stdin=stdin, stderr=full)
    client.type(b"hello\n\4" if stdin is TTY else b"")
    client.answer(b"shown\n")
    assert client.process.wait(DEADLINE) == 0
    assert client.shown() == b"shown\n"


@pytest.mark.parametrize(
    "usage", ["--port=0", "--port=65536", "--port=http", "--what", "--host=", "--host=[]"]
)
def test_wrong_usage_ends_it_with_status_2(launch: Launch, usage: str) -> None:
    assert launch(usage, port=1).ended(2).startswith("usage: ")


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "[127.0.0.1]"])
def test_connects_to_another_host(launch: Launch, host: str) -> None:
    client = launch("--host", host, "hello", host=host.strip("[]"))
    assert client.answer(b"") == b"hello\n"
    client.ended(0)


@pytest.mark.parametrize("end", [reset, half_close])
@pytest.mark.parametrize("source", ["idle", "/dev/zero"])
def test_an_early_end_of_the_server_is_reported(
    launch: Launch, source: str, end: Callable[[socket.socket], None]
) -> None:
    with open("/dev/zero", "rb") as endless:
        client = launch(stdin=PIPE if source == "idle" else endless)
    client.server.sendall(b"pingshown\n")
    client.messages("^shown$")
    end(client.server)
    assert re.search("connection|conversation", client.line())


@pytest.mark.parametrize("end", [reset, socket.socket.close])
def test_a_server_that_closes_immediately_is_reported(
    launch: Launch, end: Callable[[socket.socket], None]
) -> None:
    """The message may be lost, so the status is 1."""
    wait_for_end = (
        "real = client.Connection; client.Connection = lambda sock, *how: "
        "(select.select([sock], [], []), real(sock, *how))[1]; import select"
    )
    client = launch("hello", before=wait_for_end)
    end(client.server)
    line = client.line()
    assert line.startswith("the server has closed the connection; sent ")


def test_a_reset_after_the_last_message_is_reported(launch: Launch) -> None:
    client = launch("hello")
    assert read_all(client.server) == b"hello\n"
    reset(client.server)
    assert "connection" in client.line()


def test_a_silent_server_is_reported_once(start: Start, launch: Launch) -> None:
    server = start()
    first = launch("early", port=server.port, before=SHORT_TIMEOUTS)
    first.err.wait_for(NOTICE)
    first.settled()
    launch("second", port=server.port).ended(0)
    first.ended(0)
    assert re.match(rf"{NOTICE}sent.*\n\Z", first.err.text)
    server.messages("^early$")


@pytest.mark.parametrize("stdin", [PIPE, TTY])
def test_a_silent_server_is_reported_after_a_typed_line(launch: Launch, stdin: Any) -> None:
    client = launch(stdin=stdin, before=SHORT_TIMEOUTS)
    client.settled()
    assert "nothing" not in client.err.text, "an echo is also silent"
    client.type(b"hello\n")
    client.err.wait_for(NOTICE)
    client.type(b"again\n")
    if stdin is TTY:
        client.err.wait_for(rf"> 0 pings so far\n{NOTICE}> 0 pings so far\n> \Z")
    client.settled()
    client.type(b"\4" if stdin is TTY else b"", last=True)
    client.answer(b"")
    assert client.process.wait(DEADLINE) == 0
    assert len(re.findall(NOTICE, client.err.rest())) == 1


def test_no_silence_is_reported_after_data_from_the_server(launch: Launch) -> None:
    def check(case: tuple[Any, bytes]) -> None:
        stdin, data = case
        client = launch(stdin=stdin, before=SHORT_TIMEOUTS)
        client.server.sendall(data)
        client.settled()
        client.type(b"hello\n")
        assert read_exactly(client.server, 6) == b"hello\n"
        client.settled()
        client.type(b"\4" if stdin is TTY else b"", last=True)
        client.settled()
        client.answer(b"")
        assert client.process.wait(DEADLINE) == 0
        assert "nothing" not in client.err.rest(), case

    at_once(check, product([PIPE, TTY], [b"ping", b"hello\n"]))


def test_a_silent_server_is_reported_after_an_empty_input(launch: Launch) -> None:
    client = launch(stdin=NULL, before=SHORT_TIMEOUTS)
    client.err.wait_for(NOTICE)
    client.answer(b"")
    client.ended(0)


def test_no_silence_is_reported_after_a_signal(launch: Launch) -> None:
    shorten = (
        "end = client.Conversation.end; client.SILENCE = client.GRACE = 1000; "
        "client.Conversation.end = lambda self: (setattr(client, 'SILENCE', 0.01), end(self))"
    )
    client = launch(stdin=PIPE, before=shorten)
    client.type(b"hello\n")
    assert read_exactly(client.server, 6) == b"hello\n"
    client.process.send_signal(signal.SIGTERM)
    assert read_all(client.server) == b""
    client.settled()
    client.answer(b"")
    assert client.err.rest() == "sent 6 bytes; received 0 pings\n"


# ---------------------------------------------------------------- on other systems


def python(*statements: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "; ".join(statements)]
    return subprocess.run(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True, timeout=DEADLINE)


MACOS = (
    "import socket, select; [delattr(module, name) for module, names in ((select, 'epoll poll'),"
    " (os, 'pipe2 sendfile memfd_create eventfd splice')) for name in names.split() if hasattr(module, name)]"
)
WINDOWS = (
    f"{MACOS}; import signal; sys.platform = 'win32'; real = select.select;"
    " select.select = lambda *sets: real(*[[sock.fileno() for sock in some] for some in sets[:3]], *sets[3:])"
    " and real(*sets); del signal.SIGHUP, signal.SIGCONT, os.get_blocking, os.O_NONBLOCK, os.O_NOCTTY,"
    " select.PIPE_BUF; sys.modules.pop('client', None); import client;"
    " sys.platform = 'linux'"
)


@pytest.mark.parametrize("system", ["pass", MACOS, WINDOWS], ids=["linux", "macos", "windows"])
def test_connect_returns_a_plain_socket(system: str) -> None:
    look = "print(type(sock), sock.gettimeout(), client.connect.__defaults__); sock.sendall(b'hi')"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = python(
            "import os, sys",
            system,
            "import client",
            f"sock = client.connect('127.0.0.1', port={port})",
            look,
        )
        assert done.stdout == "<class 'socket.socket'> None ('127.0.0.1', 10001)\n", done.stderr
        connection, _ = listener.accept()
        with connection:
            assert read_all(connection) == b"hi"


@pytest.mark.parametrize("stdin", [TTY, PIPE], ids=["terminal", "pipe"])
def test_runs_without_functions_that_only_linux_has(launch: Launch, stdin: Any) -> None:
    client = launch(stdin=stdin, before=MACOS)
    client.type(b"hello\n\4" if stdin is TTY else b"hello\n", last=True)
    assert client.answer(b"pingping\nshown\n") == b"hello\n"
    assert "sent 6 bytes; received 2 pings, 7 other bytes\n" in client.ended(0)
    assert client.shown() == b"\nshown\n"


def test_sends_messages_on_windows(launch: Launch) -> None:
    client = launch("one", "two", before=WINDOWS)
    assert client.answer(b"ping" + b"shown\n" * 100_000) == b"one\ntwo\n"
    assert client.line(0) == "sent 8 bytes; received 1 ping, 600,000 other bytes"
    assert client.shown() == b"shown\n" * 100_000


def test_opens_no_terminal_again_on_windows(launch: Launch) -> None:
    client = launch("one", stdin=TTY, stdout=TTY, before=WINDOWS)
    assert client.answer(b"ping") == b"one\n"
    assert client.line(0) == "sent 4 bytes; received 1 ping"


def test_reads_no_standard_input_on_windows(launch: Launch) -> None:
    assert "MESSAGE" in launch(port=1, before=WINDOWS).line()


# ---------------------------------------------------------------- events between two calls


def test_a_signal_loses_no_byte_that_has_been_read(launch: Launch) -> None:
    """What the client has read from a pipe when a signal arrives, it sends; the rest is still in the pipe."""
    wait = random.Random(1)

    def attempt(delay: float) -> str:
        reader, writer = os.pipe()
        client = launch(stdin=reader)
        client.server.settimeout(DEADLINE)
        client.settled()
        os.write(writer, b"hello\n")
        end = time.perf_counter() + delay
        while time.perf_counter() < end:
            pass
        client.process.send_signal(signal.SIGTERM)
        received = read_all(client.server)
        client.server.close()
        client.ended(0)
        os.set_blocking(reader, False)
        with suppress(BlockingIOError):
            received += os.read(reader, 100)
        os.close(reader)
        os.close(writer)
        return received.decode()

    assert [attempt(wait.uniform(0, 0.00025)) for _ in range(30)] == ["hello\n"] * 30


def test_a_signal_just_before_a_read_that_would_wait_ends_it(launch: Launch) -> None:
    before = (
        "real, stolen = os.get_blocking, []\n"
        "def get_blocking(descriptor):\n"
        "    if descriptor == 0 and not stolen:\n"
        "        stolen.append(os.read(0, 99)); os.kill(os.getpid(), 15)\n"
        "    return real(descriptor)\n"
        "os.get_blocking = get_blocking\n"
    )
    client = launch(stdin=PIPE, before=before)
    client.type(b"stolen\n")
    client.answer(b"")
    assert client.line(0) == "sent 0 bytes; received 0 pings"


def test_a_signal_after_a_failed_read_keeps_its_reason(launch: Launch) -> None:
    before = (
        "real, read, once = client.reason, os.read, []\n"
        "def reason(error):\n"
        "    if not once: once.append(1); os.kill(os.getpid(), 15)\n"
        "    return real(error)\n"
        "def failing_read(descriptor, size):\n"
        "    if descriptor == 0: raise OSError(5, 'Input/output error')\n"
        "    return read(descriptor, size)\n"
        "client.reason, os.read = reason, failing_read\n"
    )
    client = launch(stdin=PIPE, before=before)
    client.type(b"x")
    client.answer(b"")
    expected = "standard input cannot be read: Input/output error; sent 0 bytes; received 0 pings"
    assert client.line(1) == expected


@pytest.mark.parametrize("broken", [False, True])
def test_the_rest_of_a_cut_ping_is_written_before_the_summary(launch: Launch, broken: bool) -> None:
    reader, writer = os.pipe()
    client = launch(stdout=writer)
    os.close(writer)
    data = b"x" * 65535 + b"\npi"  # all but the cut ping fills the pipe
    client.answer(data)
    client.settled()
    with os.fdopen(reader, "rb") as pipe:
        assert broken or pipe.read() == data
    if broken:
        assert client.line(1).startswith(
            "standard output can no longer be written: Broken pipe; sent 0 bytes"
        )
    else:
        assert client.line(0) == "sent 0 bytes; received 0 pings, 65,538 other bytes"


@pytest.mark.parametrize("typed", [b"\4", b"abc\4"])
def test_the_notice_of_silence_has_a_row_of_its_own(launch: Launch, typed: bytes) -> None:
    client = launch(stdin=TTY, stdout=TTY, stderr=TTY)
    client.screen.wait_for("^> $")
    client.type(typed)
    client.screen.wait_for(f"^> {'abc' if len(typed) > 1 else ''}\n{NOTICE}")


@pytest.mark.parametrize("when", ["while it stalls", "in show()"])
def test_a_prompt_after_sigcont_is_not_behind_data(launch: Launch, when: str) -> None:
    before = (
        "write, once = client.Output.write, []\n"
        "def stopped_write(self, data=b''):\n"
        "    if bytes(data) == b'\\nabc' and not once: once.append(1); os.kill(os.getpid(), 18)\n"
        "    return write(self, data)\n"
        "client.Output.write = stopped_write\n"
    )
    client = launch(stdin=TTY, stdout=TTY, stderr=TTY, before=before if when == "in show()" else "")
    client.screen.wait_for("^> $")
    if when == "in show()":
        client.server.sendall(b"abc")
    else:
        client.screen.going.clear()
        client.server.sendall(b"x" * 200_000 + b"abc")  # more than the terminal holds
        client.settled(0.3)
        client.process.send_signal(signal.SIGCONT)
        client.settled()
        client.screen.going.set()
    client.screen.wait_for("abc$")
    client.settled(0.3)
    client.server.sendall(b"\nend\n")
    client.screen.wait_for("^end\n> $")
    assert not re.search("[xc]>", client.screen.text)


def test_sigcont_during_the_exit_is_no_traceback(launch: Launch) -> None:
    before = (
        "real = client.main\n"
        "def main():\n"
        "    status = real(); os.kill(os.getpid(), 18); return status\n"
        "client.main = main\n"
    )
    client = launch(stdin=TTY, stdout=TTY, stderr=TTY, before=before)
    client.screen.wait_for("^> $")
    client.server.close()
    assert "Exception" not in client.ended(1)
