"""The client: against the real server, and against servers that the tests play themselves."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from conftest import CLIENT, DEADLINE, ROOT, Server, Stream, eventually, read_all, read_exactly

PIPE, NULL = subprocess.PIPE, subprocess.DEVNULL
TTY = object()  # as a standard stream: a terminal of the client's own
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
IMPATIENT = "assert client.MOMENT; client.MOMENT = 0.01"  # seconds
WAITING = "nothing from the server yet.*another client.*\n"


class Screen(Stream):
    """Reads what is shown on a terminal; that the last program has left it is its end of file."""

    def read(self) -> None:
        try:
            super().read()
        except OSError:  # EIO
            with self.changed:
                self.ended = True
                self.changed.notify_all()

    def rows(self) -> list[str]:
        """What a person sees: after a carriage return the row is overwritten.  Without bare prompts."""
        text = re.sub(".*\r", "", re.sub(WAITING, "", self.text))
        return [row for row in text.splitlines() if row not in ("", "> ")]


class Client(Server):
    """The client in a process of its own, after Python code and the shell's redirections, if any."""

    server: socket.socket  # the other end of its connection, where the test plays the server

    def __init__(self, *arguments: str | bytes, before: str = "", redirect: str = "", **streams: Any) -> None:
        streams = {"stdin": NULL, "stdout": PIPE, "stderr": PIPE, **streams}
        script = ["-c", f"import os, sys, client; {before}; sys.exit(client.main())"] if before else [CLIENT]
        shell = ["sh", "-c", f'exec "$@" {redirect}', "sh"] if redirect else []
        self.keyboard, end = os.openpty()
        attributes = termios.tcgetattr(end)
        attributes[1] &= ~termios.OPOST  # what is shown are the very bytes that were written
        termios.tcsetattr(end, termios.TCSANOW, attributes)
        streams = {name: end if stream is TTY else stream for name, stream in streams.items()}
        self.process = subprocess.Popen([*shell, sys.executable, *script, *arguments], cwd=ROOT, **streams)
        os.close(end)
        self.screen = Screen(os.fdopen(self.keyboard, "rb", 0))
        self.out = Stream(self.process.stdout) if self.process.stdout else self.screen
        self.err = Stream(self.process.stderr) if self.process.stderr else self.screen
        self.clients: list[socket.socket] = []

    def type(self, data: bytes, last: bool = False) -> None:
        """Write to its standard input; close it after the last."""
        pipe = self.process.stdin
        while data:
            data = data[os.write(pipe.fileno() if pipe else self.keyboard, data) :]
        if last and pipe:
            pipe.close()

    def answer(self, data: bytes) -> bytes:
        """Be a polite server: read to the end of file, send, close; return what was read."""
        received = read_all(self.server)
        self.server.sendall(data)
        self.server.close()
        return received

    def shown(self) -> bytes:
        """All that it has written on standard output."""
        eventually(lambda: self.out and self.out.ended, "the end of standard output")
        return self.out.data if self.out else b""

    def ended(self, status: int) -> str:
        """Its standard error, when it has ended with the status; that it waits needs no saying."""
        return re.sub(WAITING, "", super().ended(status))

    def line(self, status: int = 1) -> str:
        """The one line on standard error, when it has ended with the status."""
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
    """Starts clients, of the server at a port or of the test itself; sees to it that none stays."""
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


# ---------------------------------------------------------------- sending, and leaving


def test_messages_arrive_though_pings_flood_in(start: Start, launch: Launch) -> None:
    server = start("--connections", "1")
    for number in range(1, 6):
        line = launch("first", f"second {number}", port=server.port, stdin=PIPE).line(0)
        server.messages(rf"^data received\.\.\. \(client {number}, .*\)\nfirst\n  second {number}$")
        # Not a ping is missing, and the end was no reset.
        left = server.err.wait_for(rf"^client {number} left: 15 bytes received, ([\d,]+ pings?) sent, 0 of")
        assert line == f"sent 2 messages, 15 bytes; received {left[1]}"


@pytest.mark.parametrize("env", [ASCII, None], ids=["ascii", ""])
@pytest.mark.parametrize(
    ("messages", "typed", "pings", "other", "summary"),
    [
        (["a"], b"", 0, b"", "sent 1 message, 2 bytes; received 0 pings"),
        (["b", ""], b"", 1, b"", "sent 2 messages, 3 bytes; received 1 ping"),
        ([b"caf\xe9", "\xe9"], b"", 1, b"x", "sent 2 messages, 8 bytes; received 1 ping, 1 other byte"),
        (["M" * 15, "N" * 14], b"", 1204113, b"", "sent 2 messages, 31 bytes; received 1,204,113 pings"),
        ([], b"", 1, b"hello\n", "sent 0 messages, 0 bytes; received 1 ping, 6 other bytes"),
        ([], b"\n", 0, b"", "sent 1 message, 1 byte; received 0 pings"),
        ([], b"one\ntwo", 0, b"", "sent 2 messages, 7 bytes; received 0 pings"),
        ([], b"one\ntwo\n", 0, b"", "sent 2 messages, 8 bytes; received 0 pings"),
    ],
)
def test_sums_up(
    launch: Launch, messages: Any, typed: bytes, pings: int, other: bytes, summary: str, env: Any
) -> None:
    client = launch(*messages, stdin=PIPE, env=env)
    for piece in re.findall(rb"(?s).{1,3}", typed):
        client.type(piece)
        assert read_exactly(client.server, len(piece)) == piece
    client.type(b"", last=True)
    lines = [os.fsencode(message) + b"\n" for message in messages]
    assert client.answer(b"ping" * pings + other) == b"".join(lines)
    assert client.ended(0) == f"{summary}\n"
    assert client.shown() == other


@pytest.mark.parametrize("kind", ["pipe", "file", "null", "closed"])
def test_standard_input_comes_back(start: Start, launch: Launch, tmp_path: Path, kind: str) -> None:
    port, redirect = start("--echo", "--connections", "1", "--quiet").port, "<&-" if kind == "closed" else ""
    data = os.urandom(5_000_000) if kind in ("pipe", "file") else b""
    (tmp_path / "input").write_bytes(data)
    with (tmp_path / "input").open("rb") as file, (tmp_path / "output").open("wb") as output:
        source = {"pipe": PIPE, "null": NULL}.get(kind, file)
        client = launch("--raw", port=port, stdin=source, stdout=output, redirect=redirect)
    client.type(data if kind == "pipe" else b"", last=True)
    size = f"{len(data):,} bytes"
    assert re.match(rf"sent [\d,]+ messages, {size}; received {size}$", client.line(0))
    assert (tmp_path / "output").read_bytes() == data


def test_reads_while_it_sends_and_memory_stays_flat(launch: Launch, tmp_path: Path) -> None:
    """More than the sockets hold, to and from a server that does not read while it is not read."""
    (tmp_path / "input").touch()
    os.truncate(tmp_path / "input", 60_000_000)  # zeros, which take no room
    with (tmp_path / "input").open("rb") as file:
        client = launch("--raw", stdin=file, stdout=NULL)
    client.settled()  # the sockets are full
    client.server.sendall(bytes(30_000_000))
    for data in iter(lambda: client.server.recv(1 << 20), b""):
        client.server.sendall(data)
    assert client.status("VmHWM") < 40_000, "kB at most"
    client.server.close()
    assert client.line(0) == "sent 1 message, 60,000,000 bytes; received 90,000,000 bytes"


# ---------------------------------------------------------------- what arrives, and where it is shown


@pytest.mark.parametrize("size", [1, 3, 5, 7, 262144])
def test_counts_pings_and_shows_the_rest_however_it_is_cut(launch: Launch, size: int) -> None:
    client = launch(before=f"assert client.SIZE; client.SIZE = {size}")
    client.answer(b"ping" * 100 + b"hello\npingpingshopping\nhoping\npinpin\n" + b"ping" * 9 + b"pin")
    assert client.line(0) == "sent 0 messages, 0 bytes; received 111 pings, 32 other bytes"
    assert client.shown() == b"hello\nshopping\nhoping\npinpin\npin"


def test_short_lines_cost_no_more_than_long_ones(launch: Launch) -> None:
    client = launch()
    client.answer(b"\n" * 4_000_000)
    client.ended(0)
    assert client.shown() == b"\n" * 4_000_000


@pytest.mark.parametrize("size", [1, 262144])
@pytest.mark.parametrize("stdout", [TTY, PIPE], ids=["terminal", "pipe"])
def test_controls_are_harmless_on_a_terminal(launch: Launch, stdout: Any, size: int) -> None:
    client = launch(stdout=stdout, before=f"assert client.SIZE; client.SIZE = {size}")
    wild = b"\x1b[31mred\x07\0\x7f\r\xc2\x9b\ttab \xe2\x98\x83 \xff\nend\xe2\x98"
    client.answer(wild)
    client.ended(0)
    tame = "\\x1b[31mred\\x07\\x00\\x7f\\x0d\\x9b\ttab \u2603 \ufffd\nend\ufffd"
    assert client.shown() == (tame.encode() if stdout is TTY else wild)


@pytest.mark.parametrize(("stdin", "stdout"), [(TTY, TTY), (NULL, TTY), (NULL, PIPE)])
def test_raw_is_untouched_and_counts_nothing(launch: Launch, stdin: Any, stdout: Any) -> None:
    client = launch("--raw", stdin=stdin, stdout=stdout)
    client.type(b"\4")  # Ctrl-D
    data = b"ping" * 1000 + bytes(range(256)) + b"ping" * 1000 + b"pi"
    client.answer(data)
    assert "ping" not in client.line(0)
    assert client.shown() == data


def test_a_closed_output_is_no_failure(launch: Launch) -> None:
    client = launch("x", redirect=">&-")
    assert client.answer(b"pinghello") == b"x\n"
    assert client.line(0) == "sent 1 message, 2 bytes; received 1 ping, 5 other bytes"


def test_a_reader_that_leaves_is_said(start: Start, launch: Launch) -> None:
    server, (reader, writer) = start("--connections", "1"), os.pipe()
    client = launch("--raw", "message", port=server.port, stdout=writer)
    os.close(writer)
    assert os.read(reader, 4) == b"ping"
    os.close(reader)
    assert "output" in client.line()
    server.messages("^message$")


def test_a_full_output_is_said(launch: Launch) -> None:
    with open("/dev/full", "wb") as output:
        client = launch("x", stdout=output)
    client.answer(b"hello")
    assert "output" in client.line()


def test_an_output_that_does_not_block_is_waited_for(launch: Launch) -> None:
    """Whoever shares a pipe or a terminal may have made it so."""
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


# ---------------------------------------------------------------- a person at a terminal; signals


def test_a_dialogue(launch: Launch) -> None:
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
    summary = "sent 2 messages, 12 bytes; received 3 pings, 10 other bytes"
    assert client.screen.rows() == [*first, *second, summary]


@pytest.mark.parametrize("redirect", ["", "2>&-"])
def test_the_prompt_goes_to_standard_error_or_nowhere(launch: Launch, redirect: str) -> None:
    """Not to a redirected output; nor to the server, whose socket may have a closed one's number."""
    client = launch(stdin=TTY, redirect=redirect)
    client.type(b"hello\n\4")
    assert client.answer(b"pingshown\n") == b"hello\n"
    assert ("> " in client.ended(0)) is not bool(redirect)
    assert client.shown() == b"shown\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_midst_of_pings_loses_none(start: Start, launch: Launch, number: int) -> None:
    server = start("--connections", "1", "--quiet")
    for seat in range(1, 6):
        client = launch(port=server.port, stdin=TTY, stdout=TTY)
        client.type(b"x\n")
        client.messages("so far$")
        client.process.send_signal(number)
        line = client.line(0)
        left = server.err.wait_for(rf"^client {seat} left: 2 bytes received, ([\d,]+ pings?) sent, 0 of")
        assert line == f"sent 1 message, 2 bytes; received {left[1]}"


def test_ctrl_c_at_a_terminal(launch: Launch) -> None:
    takes = "os.open(os.ttyname(0), os.O_RDWR)"  # makes it the controlling terminal: tty_ioctl(4)
    client = launch(stdin=TTY, stdout=TTY, before=takes, start_new_session=True)
    client.type(b"hello\n")
    client.messages("0 pings so far$")
    client.type(b"\3")
    assert client.answer(b"ping") == b"hello\n"
    assert client.line(0) == "sent 1 message, 6 bytes; received 1 ping"


@pytest.mark.parametrize("signals", [1, 2])
def test_signals_end_it_though_the_server_does_not(launch: Launch, signals: int) -> None:
    """At the first one it leaves politely, where that takes no more than a moment; at the second at once."""
    client = launch(stdin=PIPE, before=IMPATIENT if signals == 1 else "client.MOMENT = 1000")
    client.type(b"x")
    assert client.server.recv(1) == b"x"
    for _ in range(signals):
        client.process.send_signal(signal.SIGINT)
        assert client.server.recv(1) == b""
    assert (client.process.wait(DEADLINE) == 0) is (signals == 1)
    assert re.match(r"(?!Traceback).*\n?\Z", re.sub(WAITING, "", client.err.rest()))


def test_signals_end_it_though_nobody_takes_its_output(start: Start, launch: Launch) -> None:
    reader, writer = os.pipe()
    client = launch("--raw", port=start("--connections", "1").port, stdin=PIPE, stdout=writer)
    os.close(writer)
    assert os.read(reader, 4) == b"ping"
    for _ in range(2):
        eventually(lambda: client.process.poll() is not None or client.sleeps(), "the client stalls, or ends")
        if client.process.poll() is None:
            client.process.send_signal(signal.SIGINT)
    client.process.wait(DEADLINE)
    os.close(reader)
    assert re.match(r"(?!Traceback).*\n?\Z", client.err.rest())


# ---------------------------------------------------------------- no server, or none any more, or none yet


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid", "x" * 64])
def test_no_server(launch: Launch, host: str) -> None:
    with socket.socket() as bound:  # but does not listen
        bound.bind(("127.0.0.1", 0))
        assert host in launch("--host", host, port=bound.getsockname()[1]).line()


@pytest.mark.parametrize("usage", ["--port=0", "--port=65536", "--port=http", "--what"])
def test_wrong_usage(launch: Launch, usage: str) -> None:
    assert launch(usage, port=1).ended(2).startswith("usage: ")


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost"])
def test_another_host(launch: Launch, host: str) -> None:
    client = launch("--host", host, "hello", host=host)
    assert client.answer(b"") == b"hello\n"
    client.ended(0)


@pytest.mark.parametrize("die", [reset, half_close])
@pytest.mark.parametrize("source", ["idle", "/dev/zero"])
def test_a_server_that_dies(launch: Launch, source: str, die: Callable[[socket.socket], None]) -> None:
    with open("/dev/zero", "rb") as endless:
        client = launch(stdin=PIPE if source == "idle" else endless)
    client.server.sendall(b"pingshown\n")
    client.messages("^shown$")
    die(client.server)
    assert re.search("connection|conversation", client.line())


def test_a_server_that_dies_when_all_is_said(launch: Launch) -> None:
    client = launch("hello")
    assert read_all(client.server) == b"hello\n"
    reset(client.server)
    assert "connection" in client.line()


def test_says_once_that_it_waits(start: Start, launch: Launch) -> None:
    server = start()
    first = launch("early", port=server.port, before=IMPATIENT)
    first.err.wait_for(WAITING)
    first.settled()
    launch("second", port=server.port).ended(0)
    first.ended(0)
    assert re.match(rf"{WAITING}sent.*\n\Z", first.err.text)
    server.messages("^early$")


def test_says_nothing_where_the_server_begins_at_once(launch: Launch) -> None:
    begun = "select.select([sock := connect(*where)], [], []) and sock"
    before = f"import select; connect = client.connect; client.connect = lambda *where: {begun}; {IMPATIENT}"
    client = launch(stdin=PIPE, before=before)
    client.server.sendall(b"ping")
    client.settled()
    assert client.err.text == ""


# ---------------------------------------------------------------- in the interpreter, and without epoll


def python(*statements: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "; ".join(statements)]
    return subprocess.run(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True, timeout=DEADLINE)


@pytest.mark.parametrize("system", ["pass", "import select; del select.epoll"])
def test_connect_gives_a_plain_socket(system: str) -> None:
    look = "print(type(sock), sock.gettimeout(), client.connect.__defaults__); sock.sendall(b'hi')"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = python(system, "import client", f"sock = client.connect('127.0.0.1', port={port})", look)
        assert done.stdout == "<class 'socket.socket'> None ('127.0.0.1', 10001)\n", done.stderr
        connection, _ = listener.accept()
        with connection:
            assert read_all(connection) == b"hi"


def test_without_epoll_it_says_so() -> None:
    run = "sys.argv = ['client.py', 'x']; runpy.run_path('client.py', run_name='__main__')"
    done = python("import select, runpy, sys; del select.epoll", run)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r".*no epoll.*\n\Z", done.stderr)
