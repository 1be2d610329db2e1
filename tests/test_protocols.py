"""Tests of a protocol of one's own (`main(protocol=...)`), and of the module on a system without epoll."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import pytest
from conftest import (
    DEADLINE,
    ROOT,
    SERVER,
    Server,
    Start,
    arrive,
    at_once,
    ending,
    port_of,
    read_all,
    read_exactly,
    reset,
    run,
)
from failing import Failing

import non_block_io_server as module

HEAD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import asyncio, gc, os, signal, socket, threading, time
from contextlib import suppress
import non_block_io_server as server
from non_block_io_server import EPOLLIN, EPOLLOUT, main, ready
"""

# One program has many protocols: the first bytes of a client are the name of its protocol.
CHOOSE = """
async def choose(client):
    name = (await client.read()).decode()
    await globals()[name](client)

async def echo(client):
    while data := await client.read():
        await client.write(data)

main(protocol=choose)
"""


def write_program(path: Path, code: str) -> str:
    """Write a program; `code` defines protocols and calls main(), or is followed by CHOOSE."""
    path.write_text(HEAD + code, encoding="utf-8")
    return str(path)


def as_protocols(bodies: dict[str, str]) -> str:
    """Return `async def` functions with these names and bodies."""
    code = ""
    for name, body in bodies.items():
        code += f"async def {name}(client):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n\n"
    return code


class Peer:
    """A client of a program with many protocols, and its lines of the log."""

    def __init__(self, server: Server, protocol: str, **options: Any) -> None:
        self.server, self.sock = server, server.seat(**options)
        port = self.sock.getsockname()[1]
        self.name = server.err.wait_for(rf"^(client \d+) connected from \S+:{port}, ")[1]
        self.sock.sendall(protocol.encode())
        server.messages(rf"^data received... \({self.name}, .*\n{protocol}$")  # it has been read

    def end(self) -> str:
        """Wait for the end of the connection; return how it has ended, for the log."""
        return self.server.err.wait_for(rf"^{self.name} (.+): [0-9,]+ bytes? received, .* taken$")[1]


@contextmanager
def served(path: Path, code: str, *options: str) -> Iterator[Server]:
    """Run a program with many protocols."""
    program = write_program(path, code + CHOOSE)
    server = Server("--connections", "200", "--wait-for", "1", *options, program=program)
    try:
        server.listens()
        yield server
    finally:
        server.close()


def assert_serves(server: Server) -> None:
    """Check that another client is served, and that nothing spins."""
    with Peer(server, "echo").sock as other:
        other.sendall(b"hello")
        assert read_exactly(other, 5) == b"hello"
    server.settled()


# ---------------------------------------------------------------- what a protocol sees

SEEN = {
    "read_timeout": "await client.read(timeout=0.05)",
    "read_timeout_caught": """
        try:
            await client.read(timeout=0.05)
        except TimeoutError as error:
            await client.write(str(error).encode())
    """,
    "read_after_end": """
        assert await client.read() == b""
        try:
            await client.read()
        except EOFError as error:
            await client.write(str(error).encode())
    """,
    "write_timeout": "await client.write(bytes(30_000_000), timeout=0.05)",
    "write_timeout_caught": """
        try:
            await client.write(b"x" * 1_000_000, timeout=0.0)
        except TimeoutError:
            await client.write(b"end")
    """,
    "sleeps": "await client.sleep(0.05)\nawait client.write(b'late')",
    "returns": "client.queue(b'queued')",
    "returns_without_reading": """
        while not client.unread():
            await client.sleep(0.001)
        client.queue(b"queued")
    """,
    "queues_much": "client.queue(b'x' * 10_000_000)",
    "reason": "raise OSError('a reason')",
    "reason_of_two_lines": "raise OSError('two\\nlines \\x1b[31m')",
    "no_reason": "raise OSError",
    "system_reason": "open('/no such folder/file')",
    "waits": "await client.read()",
    "resets_me": "while await client.read():\n    pass",
    "reads_itself": """
        await ready(EPOLLIN)
        client.send(client.sock.recv(100).upper())
    """,
    "ground_floor": """
        while not client.at_eof:
            await ready(client.interest)
            data = client.receive().upper()
            client.queue(data)
    """,
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a program with the protocols of SEEN."""
    with served(tmp_path_factory.mktemp("seen") / "seen.py", as_protocols(SEEN)) as server:
        yield server


class Expected(NamedTuple):
    """What a client does, gets and reads in the log."""

    protocol: str
    data: bytes
    was_reset: bool
    log: str
    act: Callable[[socket.socket], None] = lambda sock: None


def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def say_hello(sock: socket.socket) -> None:
    sock.sendall(b"hello")


def say_hello_and_half_close(sock: socket.socket) -> None:
    say_hello(sock)
    half_close(sock)


@pytest.mark.parametrize(
    "case",
    [
        Expected("read_timeout", b"", True, "was lost (no data for 0.05 s)"),
        Expected("read_timeout_caught", b"no data for 0.05 s", False, "was closed by its protocol"),
        Expected("read_after_end", b"read() after the end of file", False, "left", half_close),
        Expected("sleeps", b"late", False, "was closed by its protocol"),
        Expected("returns", b"queued", False, "was closed by its protocol"),
        Expected("returns_without_reading", b"queued", False, "was closed by its protocol", say_hello),
        Expected("queues_much", b"x" * 10_000_000, False, "was closed by its protocol"),
        Expected("write_timeout_caught", b"x" * 1_000_000 + b"end", False, "was closed by its protocol"),
        Expected("reason", b"", True, "was lost (a reason)"),
        Expected("reason_of_two_lines", b"", True, "was lost (two\n  lines \\x1b[31m)"),
        Expected("no_reason", b"", True, "was lost (OSError)"),
        Expected("system_reason", b"", True, "was lost (No such file or directory)"),
        Expected("waits", b"", False, "left", half_close),
        Expected("reads_itself", b"HELLO", False, "was closed by its protocol", say_hello),
        Expected("ground_floor", b"HELLO", False, "left", say_hello_and_half_close),
    ],
    ids=lambda case: case.protocol,
)
def test_the_client_and_the_log_see_what_a_protocol_does(seen: Server, case: Expected) -> None:
    peer = Peer(seen, case.protocol)
    case.act(peer.sock)
    data, was_reset = ending(peer.sock)
    peer.sock.close()
    assert (data, was_reset) == (case.data, case.was_reset)
    seen.err.wait_for(rf"^{peer.name} {re.escape(case.log)}: ")
    assert "Traceback" not in seen.err.text


def test_a_reset_of_the_client_is_logged_as_a_reset(seen: Server) -> None:
    for protocol in ("resets_me", "echo", "ground_floor"):
        peer = Peer(seen, protocol)
        reset(peer.sock)
        assert peer.end() == "was reset"


def test_a_write_that_takes_too_long_ends_the_connection(seen: Server) -> None:
    peer = Peer(seen, "write_timeout", small=True)
    assert peer.end() == "was lost (unsent data after 0.05 s)"
    assert ending(peer.sock)[1]


COUNTED = """
copied = calls = 0

class Counted(bytearray):
    def __iadd__(self, data):
        global copied
        copied += len(data)
        super().__iadd__(data)
        return self
    def __getitem__(self, key):
        global copied
        value = super().__getitem__(key)
        copied += len(value) if isinstance(key, slice) else 1
        return value

def write(descriptor, data, write=server.write):
    global calls
    calls += descriptor > 2
    assert not isinstance(data, bytes) or len(data) < 10_000  # the rest is copied only into a Counted
    return write(descriptor, data)

server.bytearray, server.write = Counted, write

async def large(client):
    global copied, calls
    await client.write(memoryview(bytes(100_000_000)))
    await client.write(f"{copied} {calls}".encode())
"""


def test_a_large_write_copies_each_byte_once_and_waits_for_the_client(tmp_path: Path) -> None:
    with served(tmp_path / "large.py", COUNTED) as server:
        peer = Peer(server, "large")
        server.settled()  # backpressure: the client does not read yet
        assert server.err.text.count("\n") == 3
        received, size, buffer = 0, 100_000_000, bytearray(1 << 20)
        while received < size:
            received += peer.sock.recv_into(buffer, min(len(buffer), size - received))
        copied, calls = map(int, read_all(peer.sock).split())
        assert size <= copied <= size + 1000
        assert calls <= size // 4096
        assert peer.end() == "was closed by its protocol"


CHAT = """
server.QUEUE_LIMIT = 1_000_000

async def chat(client):
    while data := await client.read():
        if data == b"quit":
            client.queue(b"goodbye")
            return
        for other in client.server.clients.values():
            if other is not client:
                other.queue(data)

async def sleeper(client):
    await client.sleep(3600)

async def computes(client):
    while True:
        await ready(EPOLLIN)
        client.receive()

async def flooder(client):
    while data := await client.read():
        for other in client.server.clients.values():
            if other is not client:
                other.queue(b"x" * 300_000)
        await client.write(b"done")

async def own_write(client):
    await client.write(b"x" * 3_000_000)

"""


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Server]:
    with served(tmp_path / "chat.py", CHAT) as server:
        yield server


def test_queued_data_reaches_every_other_client_in_order(chat: Server) -> None:
    peers = [Peer(chat, "chat") for _ in range(5)]
    for number, peer in enumerate(peers):
        peer.sock.sendall(b"%d" % number)
        for other in peers:
            if other is not peer:
                assert read_exactly(other.sock, 1) == b"%d" % number
    peers[0].sock.sendall(b"quit")
    assert read_exactly(peers[0].sock, 7) == b"goodbye"
    assert peers[0].sock.recv(1) == b""
    # It has not closed its side yet.  A message of another client must not break the end of its stream.
    peers[1].sock.sendall(b"late")
    assert read_exactly(peers[2].sock, 4) == b"late"
    peers[0].sock.close()
    assert peers[0].end() == "was closed by its protocol"


@pytest.mark.parametrize("protocol", ["chat", "sleeper", "computes", "own_write"])
def test_a_client_whose_queue_is_too_long_is_disconnected_alone(chat: Server, protocol: str) -> None:
    slow = Peer(chat, protocol, small=True)
    fast, sender = Peer(chat, "echo"), Peer(chat, "flooder")
    for _ in range(30):
        sender.sock.sendall(b"send")
        assert read_exactly(sender.sock, 4) == b"done"
        assert read_exactly(fast.sock, 300_000) == b"x" * 300_000
    assert slow.end() == "was lost (too slow: more than 1,000,000 bytes are queued)"
    assert ending(slow.sock)[1]
    fast.sock.sendall(b"hello")
    assert read_exactly(fast.sock, 5) == b"hello"
    assert "Traceback" not in chat.err.text


def test_the_limit_of_a_queue_does_not_count_the_own_write_of_a_client(chat: Server) -> None:
    peer, sender = Peer(chat, "own_write", small=True), Peer(chat, "flooder")
    for _ in range(3):
        sender.sock.sendall(b"send")
        assert read_exactly(sender.sock, 4) == b"done"
    assert read_all(peer.sock) == b"x" * 3_900_000
    peer.sock.close()
    assert peer.end() == "was closed by its protocol"


# ---------------------------------------------------------------- mistakes in a protocol

MISTAKES = {  # a body, and what the log shows in the traceback and at the end of the connection
    "key_error": ("{}['a key']", "KeyError"),
    "bytes_of_a_client": ("raise ValueError('\\x1b[31m\\nclient 9 left: \\u202e')", "ValueError"),
    "yields_text": ("await ready('events')", "TypeError"),
    "yields_none": ("await ready(None)", "TypeError"),
    "yields_a_socket": ("await ready(client.sock)", "TypeError"),
    "yields_a_negative": ("await ready(-1)", "TypeError"),
    "yields_a_large_number": ("await ready(1 << 40)", "TypeError"),
    "yields_nan": ("await ready(float('nan'))", "TypeError"),
    "yields_what_cannot_be_compared": (
        "class Odd:\n    def __eq__(self, other):\n        raise ValueError\nawait ready(Odd())",
        "TypeError",
    ),
    "sleeps_with_asyncio": ("await asyncio.sleep(1)", "RuntimeError"),
    "yields_to_asyncio": ("await asyncio.sleep(0)", "TypeError"),
    "awaits_a_future": ("await asyncio.Future(loop=asyncio.new_event_loop())", "TypeError"),
    "awaits_a_number": ("await 5", "TypeError"),
    "is_cancelled": ("raise asyncio.CancelledError", "CancelledError"),
    "exits_as_a_generator": ("raise GeneratorExit", "GeneratorExit"),
    "stops_an_iteration": ("raise StopIteration", "RuntimeError"),
    "raises_a_base_exception": ("raise BaseException('base')", "BaseException"),
    "recurses": ("def f():\n    f()\nf()", "RecursionError"),
    "reads_after_the_end": ("while True:\n    await client.read()", "EOFError"),
    "writes_text": ("await client.write('text')", "TypeError"),
    "queues_a_number": ("client.queue(5)", "TypeError"),
    "writes_to_another": (
        "await next(c for c in client.server.clients.values() if c is not client).write(b'hello')",
        "RuntimeError",
    ),
    "sleeps_for_another": (
        "await next(c for c in client.server.clients.values() if c is not client).sleep(1)",
        "RuntimeError",
    ),
    "sleeps_nan": ("await client.sleep(float('nan'))", "ValueError"),
    "sleeps_text": ("await client.sleep('1')", "TypeError"),
    "reads_with_nan": ("await client.read(timeout=float('nan'))", "ValueError"),
    "writes_with_text": ("await client.write(b'x', timeout='1')", "TypeError"),
    "wakes_a_number": ("client.loop.wake(5)", "TypeError"),
    "wakes_text": ("client.loop.wake('client 1')", "TypeError"),
    "wakes_a_client": ("client.loop.wake([client])", "TypeError"),
    "wakes_at_nan": ("client.loop.wake_at(float('nan'), client.descriptor)", "ValueError"),
    "wakes_at_a_huge_time": ("client.loop.wake_at(10**400, client.descriptor)", "OverflowError"),
    "wakes_at_a_decimal": (
        "import decimal\nclient.loop.wake_at(decimal.Decimal(10**12), client.descriptor)",
        "TypeError",
    ),
    "wakes_at_text": ("client.loop.wake_at('12:00', client.descriptor)", "TypeError"),
    "wakes_a_client_at": ("client.loop.wake_at(time.monotonic(), client)", "TypeError"),
    "starts_a_function": ("client.loop.start('x', 99, echo)", "TypeError"),
    "starts_a_generator": ("client.loop.start('x', 99, (x for x in ()))", "TypeError"),
    "starts_on_its_own_descriptor": (
        "client.loop.start('x', client.descriptor, echo(client))",
        "ValueError",
    ),
    "starts_on_the_listener": (
        "client.loop.start('x', client.server.listener.fileno(), echo(client))",
        "ValueError",
    ),
    "starts_on_text": ("client.loop.start('x', 'client 1', echo(client))", "TypeError"),
    "starts_on_a_client": ("client.loop.start('x', client, echo(client))", "TypeError"),
}
QUIET_MISTAKES = {  # these raise an OSError: a reason, but no traceback
    "closes_its_socket": ("client.sock.close()", "its protocol has closed the socket"),
    "closes_its_socket_and_reads": ("client.sock.close()\nawait client.read()", ".*"),
    "closes_its_socket_and_writes": ("client.sock.close()\nawait client.write(b'x')", ".*"),
    "closes_its_descriptor": ("os.close(client.descriptor)", "Bad file descriptor"),
    "receives_nothing": ("client.sock.recv(1)", "Resource temporarily unavailable"),
    "names_bytes_as_reason": ("raise OSError(71, b'\\xff')", ".*"),
    "names_a_number_as_reason": ("raise OSError(71, 42)", ".*42.*"),
    "has_no_text": (
        "class Bad(OSError):\n    def __str__(self):\n        raise ValueError\nraise Bad",
        ".*Bad.*",
    ),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Server]]:
    """Yield a function that returns a server with the protocols below; one that has ended is replaced."""
    bodies = {name: body for name, (body, _) in [*MISTAKES.items(), *QUIET_MISTAKES.items()]}
    program = write_program(
        tmp_path_factory.mktemp("mistakes") / "mistakes.py", as_protocols(bodies) + CHOOSE
    )
    servers: list[Server] = []

    def running() -> Server:
        if not servers or servers[-1].process.poll() is not None:
            servers.append(Server("--connections", "200", "--wait-for", "1", program=program))
            servers[-1].listens()
            Peer(servers[-1], "echo")  # another client that stays
        return servers[-1]

    yield running
    for server in servers:
        server.close()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_logs_its_traceback_and_ends_that_connection_only(
    mistakes: Callable[[], Server], name: str
) -> None:
    server, error = mistakes(), MISTAKES[name][1]
    peer = Peer(server, name)
    if name == "reads_after_the_end":
        half_close(peer.sock)
    assert ending(peer.sock)[1], "a reset: the client can see that the stream is incomplete"
    assert peer.end() == f"was lost ({error} in its protocol)"
    before = server.err.text.split(f"\n{peer.name} was lost")[0]
    lines = before[before.rindex("\nTraceback") :].splitlines()[1:]
    assert all(line.startswith("  ") for line in lines[1:]), "its lines cannot be mistaken for others"
    assert any("mistakes.py" in line and f", in {name}" in line for line in lines), "it names file and line"
    assert re.search(rf"^  (.*\.)?{error}(:|$)", "\n".join(lines), re.MULTILINE)
    assert "\x1b" not in before
    assert "\u202e" not in before
    assert_serves(server)


@pytest.mark.parametrize("name", QUIET_MISTAKES)
def test_an_error_of_a_call_gives_its_reason_and_ends_that_connection_only(
    mistakes: Callable[[], Server], name: str
) -> None:
    server, reason = mistakes(), QUIET_MISTAKES[name][1]
    peer = Peer(server, name)
    assert re.fullmatch(rf"was lost \({reason}\)", peer.end())
    ending(peer.sock)
    assert_serves(server)


NOT_COROUTINES = {
    "plain": "def wrong(client):\n    client.send(b'hello')",
    "generator": "def wrong(client):\n    yield EPOLLIN",
    "asynchronous generator": "async def wrong(client):\n    yield EPOLLIN",
    "class": "class wrong:\n    def __init__(self, client):\n        pass",
    "text": "wrong = 'echo'",
    "no argument": "async def wrong():\n    pass",
}


def test_a_protocol_that_is_no_coroutine_function_ends_its_connections_only(
    start: Start, tmp_path: Path
) -> None:
    def check(name: str) -> None:
        code = f"{NOT_COROUTINES[name]}\nmain(protocol=wrong)\n"
        program = write_program(tmp_path / f"{name.replace(' ', '_')}.py", code)
        server = start("--wait-for", "1", program=program)
        for number in (1, 2):
            with suppress(ConnectionResetError):  # it may reset the connection before connect() returns
                ending(server.connect())
            server.err.wait_for(
                rf"^client {number} was lost \(TypeError in its protocol\): 0 bytes received, "
            )
        server.settled()
        server.process.terminate()
        text = server.err.rest()
        assert server.process.wait() == 0
        assert text.count("\nTraceback") == 2
        assert "\n  TypeError: " in text
        assert text.splitlines()[-1].startswith("stopped: 2 clients served, ")

    at_once(check, NOT_COROUTINES)


# Each of these ignores every exception, also the one that should end it.
SWALLOWS = {
    "reads": "while True:\n    try:\n        await client.read()\n    except:\n        pass",
    "writes": "while True:\n    try:\n        await client.write(b'x' * 1000)\n    except:\n        pass",
    "writes_text": "while True:\n    try:\n        await client.write('x')\n    except:\n        pass",
    "writes_nothing": "while True:\n    try:\n        await client.write(b'')\n    except:\n        pass",
    "sleeps": "while True:\n    try:\n        await client.sleep(0)\n    except:\n        pass",
    "sleeps_text": "while True:\n    try:\n        await client.sleep('x')\n    except:\n        pass",
    "reads_at_once": "while True:\n    try:\n        await client.read(timeout=0)\n    except:\n        pass",
    "yields_text": "while True:\n    try:\n        await ready('x')\n    except:\n        pass",
    "waits": "while True:\n    try:\n        await ready(0)\n    except BaseException:\n        pass",
    "wakes_itself": """
        while True:
            client.loop.wake([client.descriptor])
            try:
                await ready(0)
            except BaseException:
                pass
    """,
    "continues_finally": "while True:\n    try:\n        await client.read()\n    finally:\n        continue",
    "raises_another": """
        try:
            await client.sleep(3600)
        except BaseException:
            raise asyncio.CancelledError from None
    """,
    "raises_a_mistake": """
        try:
            await client.sleep(3600)
        except BaseException:
            raise KeyError('mistake') from None
    """,
    "never_reads": "await client.sleep(3600)",
    "sends_without_end": "while True:\n    await client.write(b'x' * 100_000)",
    "sends_on_the_ground_floor": "while True:\n    await ready(EPOLLOUT)\n    client.send(b'x' * 1000)",
    "two_wake_each_other": """
        while True:
            client.loop.wake(client.server.clients)
            await ready(0)
    """,
    "wakes_every_descriptor": """
        while True:
            client.loop.wake(range(1000))
            for descriptor in range(1000):
                client.loop.wake_at(time.monotonic(), descriptor)
            await client.sleep(0.01)
    """,
}


@pytest.mark.parametrize("leave", [None, half_close, reset], ids=["stays", "half-closes", "resets"])
def test_no_protocol_stops_the_other_clients_or_the_stop_signal(
    tmp_path: Path, leave: Callable[[socket.socket], None] | None
) -> None:
    with served(tmp_path / "swallow.py", as_protocols(SWALLOWS)) as server:
        wrong = [Peer(server, name) for name in SWALLOWS for _ in range(2)]
        other = Peer(server, "echo").sock
        for peer in wrong:
            if leave:
                with suppress(OSError):  # the server has ended it
                    leave(peer.sock)
            other.sendall(b"hello")
            assert read_exactly(other, 5) == b"hello"
        server.process.terminate()
        text = server.err.rest()
        assert server.process.wait(DEADLINE) == 0, text
        assert text.splitlines()[-1].startswith(f"stopped: {len(wrong) + 1} clients served, "), text
        assert "  KeyError: 'mistake'\n" in text
        assert "\nException ignored in" not in text, "Python itself writes nothing"


# ---------------------------------------------------------------- dangers of the loop

DANGERS = {
    "queue_to_last": """
        await client.read()
        last = list(client.server.clients.values())[-1]
        for _ in range(3):  # the first fails without an error if the reset has not arrived
            last.queue(b"data")
        await client.write(b"done")
    """,
    "queue_much_to_last": """
        await client.read()
        list(client.server.clients.values())[-1].queue(bytes(8_000_000))
        await client.write(b"done")
    """,
    "words": """
        words = b""
        try:
            while data := await client.read():
                words += data
        except OSError as error:
            print(f"got {words.decode()}, then {type(error).__name__}", file=sys.stderr, flush=True)
            raise
    """,
    "is_reset_while_it_sends": """
        flush = client.flush
        def late_flush():
            print("it sends", file=sys.stderr, flush=True)
            server.is_ready(client.descriptor, 0, 60)  # waits for the reset
            flush()
        client.queue(bytes(8_000_000))
        client.flush = late_flush
        await words(client)
    """,
    "is_woken": """
        for _ in range(3):
            data = await client.read()
            await client.write(data or b"nothing")
    """,
    "wakes_others": """
        while await client.read():
            client.loop.wake(client.server.clients)
            await client.write(b"done")
    """,
    "starts_a_mistake": """
        ours, theirs = socket.socketpair()
        async def helper():
            await ready(EPOLLIN)
            raise KeyError("helper")
        client.loop.start("helper", ours.fileno(), helper())
        theirs.send(b"x")
        await client.write(b"started")
        await client.read()
        del ours, theirs
    """,
    "starts_on_a_closed_descriptor": """
        ours, theirs = socket.socketpair()
        async def helper():
            await ready(EPOLLIN)
        await client.read()
        client.loop.start("helper", ours.fileno(), helper())
        ours.close()
        theirs.close()
        await client.read()
    """,
    "forgets_await": """
        client.write(b"hello")
        gc.collect()  # PyPy frees the coroutine, and warns, only now
        await client.write(b"done")
    """,
    "closes_its_descriptor": """
        await client.read()
        os.close(client.descriptor)
        try:
            await client.sleep(3600)
        finally:
            await ready(0)
    """,
    "closes_its_descriptor_and_waits": """
        await client.read()
        os.close(client.descriptor)
        await ready(EPOLLIN)
    """,
    "closes_its_socket": """
        await client.read()
        client.sock.close()
        await ready(EPOLLIN)
    """,
    "keeps_a_copy": """
        copy = client.sock.dup()
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
        globals().setdefault("copies", []).append(copy)
        while await client.read():
            pass
    """,
    "forks": """
        reader, writer = os.pipe()
        if not os.fork():
            os.close(writer)
            os.read(reader, 1)  # until the server has ended
            os._exit(0)
        os.close(reader)
        globals().setdefault("copies", []).append(writer)
        while await client.read():
            pass
    """,
    "watches_other_events": """
        await ready(0x2)  # EPOLLPRI: there is no urgent data, because SO_OOBINLINE is set
        await client.write(b"never")
    """,
    "kicks_the_last": """
        await client.read()
        list(client.server.clients.values())[-1].sock.shutdown(socket.SHUT_RDWR)
        await client.write(b"done")
    """,
    "queues_much": """
        client.queue(bytes(8_000_000))
    """,
    "queues_much_and_waits_for_the_end": """
        client.queue(bytes(8_000_000))
        while await client.read():
            pass
    """,
    "queues_a_message_to_first": """
        await client.read()
        next(iter(client.server.clients.values())).queue(b"<" + b"m" * 3_000_000 + b">")
        await client.write(b"done")
    """,
    "queues_too_much_to_last": """
        await client.read()
        last = list(client.server.clients.values())[-1]
        for _ in range(5):
            last.queue(bytes(4_000_000))
            await client.sleep(0.05)
        await client.write(b"done")
    """,
    "writes_with_a_timeout": """
        while True:
            with suppress(TimeoutError):
                await client.write(b"tick", timeout=0.01)
    """,
    "sleeps_long": """
        await client.sleep(60)
    """,
    "is_reset_after_a_timeout": """
        try:
            await client.read(timeout=0.01)
        except TimeoutError:
            print("no data", file=sys.stderr, flush=True)
            server.is_ready(client.descriptor, 0, 60)  # waits for the reset
        try:
            await client.write(b"are you there?")
        except OSError as error:
            print(f"got {type(error).__name__} from write()", file=sys.stderr, flush=True)
            raise
    """,
    "ends_at_its_deadline": """
        receive = client.receive
        def late_receive():
            data = receive()
            if not data:
                print("it is late", file=sys.stderr, flush=True)
                server.is_ready(client.descriptor, EPOLLIN, 60)  # waits for the end of file
            return data
        client.receive = late_receive
        while await client.read(timeout=0.01):
            pass
    """,
    "forgets_itself": """
        client.server.forget(client, complete=True)
        await ready(EPOLLIN)
    """,
    "has_no_descriptor_left": """
        import resource
        copies = []
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        next_one = os.dup(2)
        os.close(next_one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, limits[1]))
        raise KeyError("no descriptor")
    """,
}


@pytest.fixture
def dangers(tmp_path: Path) -> Iterator[Server]:
    with served(tmp_path / "dangers.py", as_protocols(DANGERS)) as server:
        yield server


def test_data_that_arrived_before_a_reset_is_read_after_a_failed_send(dangers: Server) -> None:
    sender, peer = Peer(dangers, "queue_to_last"), Peer(dangers, "words")
    dangers.process.send_signal(signal.SIGSTOP)
    arrive(dangers, sender.sock, b"go")  # its event comes first, and its queue() uses up the error
    arrive(dangers, peer.sock, b"last words")
    reset(peer.sock)
    dangers.process.send_signal(signal.SIGCONT)
    assert read_exactly(sender.sock, 4) == b"done"
    dangers.err.wait_for("^got last words, then (ConnectionReset|BrokenPipe)Error$")
    assert peer.end() == "was reset"
    dangers.messages("^last words$")


def test_data_that_arrived_before_a_reset_is_read_although_queued_data_cannot_be_sent(
    dangers: Server,
) -> None:
    sender, peer = Peer(dangers, "queue_much_to_last"), Peer(dangers, "words", small=True)
    sender.sock.sendall(b"go")
    assert read_exactly(sender.sock, 4) == b"done"
    dangers.process.send_signal(signal.SIGSTOP)
    arrive(dangers, peer.sock, b"last words")
    reset(peer.sock)
    dangers.process.send_signal(signal.SIGCONT)
    dangers.err.wait_for("^got last words, then (ConnectionReset|BrokenPipe)Error$")
    assert peer.end() == "was reset"


def test_data_that_arrived_before_a_reset_is_read_although_a_send_fails_first(dangers: Server) -> None:
    peer = Peer(dangers, "is_reset_while_it_sends", small=True)
    dangers.err.wait_for("^it sends$")
    arrive(dangers, peer.sock, b"last words")
    reset(peer.sock)
    dangers.err.wait_for("^got last words, then (ConnectionReset|BrokenPipe)Error$")
    assert peer.end() == "was reset"


def test_data_that_arrived_before_a_reset_is_printed_after_two_errors_without_a_wait(dangers: Server) -> None:
    peer = Peer(dangers, "is_reset_after_a_timeout")
    dangers.err.wait_for("^no data$")
    arrive(dangers, peer.sock, b"last words")
    reset(peer.sock)
    dangers.err.wait_for(r"^got (ConnectionReset|BrokenPipe)Error from write\(\)$")
    assert peer.end() == "was reset"
    dangers.messages("^last words$")


def test_an_end_of_file_at_the_deadline_is_no_timeout(dangers: Server) -> None:
    peer = Peer(dangers, "ends_at_its_deadline")
    dangers.err.wait_for("^it is late$")
    half_close(peer.sock)
    assert peer.end() == "left"


def test_data_for_a_client_whose_task_has_not_started_does_not_block(dangers: Server) -> None:
    sender = Peer(dangers, "queue_much_to_last")
    dangers.process.send_signal(signal.SIGSTOP)
    dangers.connect(small=True)  # its event is in the same batch, before the sender's
    arrive(dangers, sender.sock, b"go")
    dangers.process.send_signal(signal.SIGCONT)
    assert read_exactly(sender.sock, 4) == b"done"
    assert_serves(dangers)


@pytest.mark.parametrize(
    "protocol, end",
    [("queues_much", "was closed by its protocol"), ("queues_much_and_waits_for_the_end", "left")],
)
def test_a_message_queued_after_the_protocol_s_end_is_not_cut(
    dangers: Server, protocol: str, end: str
) -> None:
    peer = Peer(dangers, protocol, small=True)
    if end == "left":
        half_close(peer.sock)
    sender = Peer(dangers, "queues_a_message_to_first")
    sender.sock.sendall(b"go")
    assert read_exactly(sender.sock, 4) == b"done"
    assert read_all(peer.sock).lstrip(b"\0") == b""
    peer.sock.close()
    assert peer.end() == end


def test_queued_data_is_sent_while_the_protocol_sleeps(dangers: Server) -> None:
    sender, peer = Peer(dangers, "queue_much_to_last"), Peer(dangers, "sleeps_long", small=True)
    sender.sock.sendall(b"go")
    assert len(read_exactly(peer.sock, 8_000_000)) == 8_000_000


def test_the_limit_of_a_queue_holds_beside_writes_with_a_timeout(dangers: Server) -> None:
    sender, peer = (
        Peer(dangers, "queues_too_much_to_last"),
        Peer(dangers, "writes_with_a_timeout", small=True),
    )
    sender.sock.sendall(b"go")
    assert peer.end() == "was lost (too slow: more than 16,777,216 bytes are queued)"


def test_a_client_that_its_own_protocol_has_forgotten_harms_no_other(dangers: Server) -> None:
    Peer(dangers, "forgets_itself")
    assert_serves(dangers)


@pytest.mark.parametrize("error", ["KeyError", "OSError", "asyncio.CancelledError", "BaseException"])
def test_data_that_arrived_before_a_mistake_is_printed(tmp_path: Path, error: str) -> None:
    body = f"while not client.unread():\n    await client.sleep(0.001)\nraise {error}"
    with served(tmp_path / "unread.py", as_protocols({"unread": body})) as server:
        peer = Peer(server, "unread")
        peer.sock.sendall(b"the last words")
        server.err.wait_for("^client 1 was lost .*: 20 bytes received, ")
        server.messages("^the last words$")


def test_a_failed_send_of_queued_data_ends_a_client_that_only_reads(start: Start, failing: Failing) -> None:
    """Its connection is not broken, so epoll reports nothing."""
    program = failing.program(
        "async def chat(client):\n"
        "    while data := await client.read():\n"
        "        for other in client.server.clients.values():\n"
        "            other.queue(data)\n"
        "serve = server.main\n"
        "server.main = lambda: serve(protocol=chat)"
    )
    server = start("--wait-for", "1", program=program)
    talker, listener = server.seat(), server.seat()
    failing.fail("write", errno.ENOBUFS, f"client {port_of(listener)}")
    talker.sendall(b"hello")
    assert ending(listener) == (b"", True)
    server.err.wait_for(r"^client 2 was lost \(No buffer space available\): 0 bytes received, ")
    assert read_exactly(talker, 5) == b"hello"


def test_a_client_gets_the_end_of_file_before_its_own(tmp_path: Path) -> None:
    code = "server.LINGER_TIMEOUT = 1000.0  # longer than any test\n"
    body = "await client.write(b'bye')"
    with served(tmp_path / "bye.py", code + as_protocols({"leaves": body})) as server:
        peer = Peer(server, "leaves")
        assert read_all(peer.sock) == b"bye"
        server.settled()
        assert "client 1 was" not in server.err.text
        peer.sock.close()
        assert peer.end() == "was closed by its protocol"


def test_a_probe_does_not_start_the_protocol(dangers: Server) -> None:
    """The first read() of a protocol that starts at the end of file would raise EOFError."""
    dangers.process.send_signal(signal.SIGSTOP)
    dangers.connect().close()
    dangers.process.send_signal(signal.SIGCONT)
    dangers.err.wait_for(r"^client \d+ left: 0 bytes received, 0 bytes sent, ")


def test_a_wake_does_not_look_like_the_end_of_file(dangers: Server) -> None:
    peer, waker = Peer(dangers, "is_woken"), Peer(dangers, "wakes_others")
    for word in (b"one", b"two", b"three"):
        for _ in range(5):
            waker.sock.sendall(b"wake")
            assert read_exactly(waker.sock, 4) == b"done"
        peer.sock.sendall(word)
        assert read_exactly(peer.sock, len(word)) == word
    assert peer.sock.recv(1) == b""


def test_a_full_standard_output_does_not_look_like_the_end_of_file(tmp_path: Path) -> None:
    bodies = "server.OUTPUT_LIMIT = 1000\n" + as_protocols({"is_woken": DANGERS["is_woken"]})
    with served(tmp_path / "full.py", bodies) as server:
        peer, filler = Peer(server, "is_woken"), Peer(server, "echo")
        server.out.going.clear()
        filler.sock.settimeout(0.2)
        with suppress(socket.timeout):
            while True:
                filler.sock.sendall(b"x" * 65536)
                read_exactly(filler.sock, 65536)
        peer.sock.sendall(b"hello")
        server.settled()
        server.out.going.set()
        assert read_exactly(peer.sock, 5) == b"hello"


def test_a_mistake_in_a_task_that_a_protocol_started_is_logged(dangers: Server) -> None:
    peer = Peer(dangers, "starts_a_mistake")
    assert read_exactly(peer.sock, 7) == b"started"
    dangers.err.wait_for(r"^  KeyError: 'helper'$")
    assert re.search(r'^    File ".*dangers\.py", line \d+, in helper$', dangers.err.text, re.MULTILINE)
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.end() == "left", "the connection is not the helper's"
    assert_serves(dangers)


@pytest.mark.parametrize(
    "name",
    [
        "starts_on_a_closed_descriptor",
        "closes_its_descriptor",
        "closes_its_descriptor_and_waits",
        "closes_its_socket",
    ],
)
def test_a_new_client_gets_the_number_of_a_descriptor_that_a_protocol_closed(
    dangers: Server, name: str
) -> None:
    peer = Peer(dangers, name)
    dangers.process.send_signal(signal.SIGSTOP)
    arrive(dangers, peer.sock, b"close")
    others = [dangers.connect() for _ in range(3)]  # they are accepted in the same batch
    dangers.process.send_signal(signal.SIGCONT)
    for other in others:
        other.sendall(b"echo")
        dangers.messages(rf"^data received... \(client \d+, \S+:{other.getsockname()[1]}\)\necho$")
        other.sendall(b"hello")
        assert read_exactly(other, 5) == b"hello"
    if name != "starts_on_a_closed_descriptor":
        assert re.fullmatch(
            r"was lost \((its protocol has closed the socket|Bad file descriptor)\)", peer.end()
        )
    for other in others:
        other.close()
    dangers.err.wait_for("^client 4 left: ")
    assert_serves(dangers)
    dangers.process.terminate()
    assert dangers.err.rest().splitlines()[-1].startswith("stopped: 5 clients served, ")


def test_a_forgotten_await_is_a_warning_in_the_log(dangers: Server) -> None:
    peer = Peer(dangers, "forgets_await")
    assert read_exactly(peer.sock, 10) == b"done"
    dangers.err.wait_for(
        r"^.*dangers\.py:\d+: RuntimeWarning: coroutine '.*write' was never awaited$(\n  .*)*\n"
    )


@pytest.mark.parametrize("name", ["keeps_a_copy", "forks"])
@pytest.mark.parametrize("leave", [half_close, reset])
def test_a_copy_of_a_connection_does_not_make_the_loop_spin(
    dangers: Server, name: str, leave: Callable[[socket.socket], None]
) -> None:
    peer = Peer(dangers, name)
    leave(peer.sock)
    assert peer.end() == ("left" if leave is half_close else "was reset")
    dangers.settled()
    assert_serves(dangers)


def test_a_protocol_can_disconnect_another_client(dangers: Server) -> None:
    kicker, peer = Peer(dangers, "kicks_the_last"), Peer(dangers, "echo")
    kicker.sock.sendall(b"kick")
    assert read_exactly(kicker.sock, 4) == b"done"
    assert peer.sock.recv(1) == b""
    assert peer.end() == "left"


def test_a_mistake_is_logged_when_no_descriptor_is_free(dangers: Server) -> None:
    other = Peer(dangers, "echo")
    peer = Peer(dangers, "has_no_descriptor_left")
    assert peer.end() == "was lost (KeyError in its protocol)"
    full = r"\.py\", line \d+, in (?s:.+)\n  KeyError: 'no descriptor'$"
    short = r"^KeyError: 'no descriptor' \(.+\.py, line \d+\)$"  # Python 3.15 needs a descriptor for more
    assert re.search(f"{full}|{short}", dangers.err.text, re.MULTILINE)
    other.sock.sendall(b"hello")
    assert read_exactly(other.sock, 5) == b"hello"


def test_a_protocol_that_closes_its_socket_frees_its_only_seat(start: Start, tmp_path: Path) -> None:
    code = "async def one(client):\n    client.sock.close()\n    await client.read()\n\nmain(protocol=one)\n"
    server = start("--connections", "1", program=write_program(tmp_path / "one.py", code))
    for number in (1, 2):
        server.connect()
        server.err.wait_for(
            rf"^client {number} was lost \(its protocol has closed the socket\): .* 0 of 1 seat "
        )


LIMITED = """
class Limited:
    def __init__(self, epoll=server.epoll):
        self.real = epoll()
        for name in ("register", "modify", "unregister", "close"):
            setattr(self, name, getattr(self.real, name))
    def poll(self, timeout, maxevents=5):  # epoll's own default is FD_SETSIZE - 1
        return self.real.poll(timeout, maxevents)

server.epoll = Limited
server.READ_SIZE = 4  # so that the answer needs several polls

async def busy(client):
    while True:
        await ready(EPOLLIN | EPOLLOUT)
"""


def test_a_stop_serves_a_client_beside_more_clients_than_a_poll_reports(tmp_path: Path) -> None:
    with served(tmp_path / "busy.py", LIMITED) as server:
        peer = Peer(server, "echo")
        for _ in range(60):
            Peer(server, "busy")
        server.process.send_signal(signal.SIGSTOP)
        arrive(server, peer.sock, b"x" * 40)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        assert ending(peer.sock) == (b"x" * 40, False)
        server.ended(0)


def test_unsent_data_of_a_write_is_sent_during_a_stop_or_ends_with_a_reset(
    seen: Server, tmp_path: Path
) -> None:
    code = as_protocols({"answers": "await client.read()\nawait client.write(b'x' * 6_000_000)"})
    with served(tmp_path / "stop.py", code) as server:
        reads, silent = Peer(server, "answers"), Peer(server, "answers", small=True)
        server.process.send_signal(signal.SIGSTOP)
        for peer in (reads, silent):
            arrive(server, peer.sock, b"go")
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        data, was_reset = ending(reads.sock)
        assert was_reset or len(data) == 6_000_000
        server.ended(0)
        assert ending(silent.sock)[1]


def test_a_protocol_that_waits_for_space_ends_with_a_reset_when_the_server_stops(tmp_path: Path) -> None:
    """Its unsent data is its own: only its interest shows that the answer is incomplete."""
    body = """
        data = memoryview(bytes(8_000_000))
        while data:
            await ready(EPOLLOUT)
            data = data[client.send(data):]
    """
    with served(tmp_path / "space.py", as_protocols({"sends": body})) as server:
        peer = Peer(server, "sends", small=True)
        assert read_exactly(peer.sock, 1) == b"\0"
        server.settled()
        server.stop()
        assert ending(peer.sock)[1]


@pytest.mark.parametrize("options", [["--echo"], ["--every", "0.05"], []])
def test_the_last_of_many_senders_is_served_beside_a_slow_standard_output(
    start: Start, failing: Any, options: list[str]
) -> None:
    program = failing.program("server.OUTPUT_LIMIT = 20_000\nserver.READ_SIZE = 2000")
    server = start("--connections", "41", "--wait-for", "1", *options, program=program, paused=True)
    done = threading.Event()

    def send(client: socket.socket) -> None:
        client.setblocking(False)
        while not done.is_set():
            with suppress(BlockingIOError):
                client.send(b"some text\n" * 100)
            with suppress(BlockingIOError):
                client.recv(1 << 20)
            done.wait(0.001)

    senders = [threading.Thread(target=send, args=(server.seat(),)) for _ in range(40)]
    for thread in senders:
        thread.start()
    try:
        last = server.seat()
        last.sendall(b"the last one")
        pipe = server.out.pipe.fileno()
        shown = b""
        while b"the last one" not in shown:  # a fair turn of 41 clients prints 82,000 bytes
            assert len(shown) < 2_000_000, "the last client is never read"
            shown += os.read(pipe, 4096)
    finally:
        done.set()
        for thread in senders:
            thread.join()


class CountedTimers(dict):  # type: ignore[type-arg]
    """Timers that count how often all of them are looked at."""

    scans = 0

    def scan(self) -> Any:
        self.scans += 1
        return super()

    def items(self) -> Any:
        return self.scan().items()

    def values(self) -> Any:
        return self.scan().values()

    def __iter__(self) -> Any:
        return self.scan().__iter__()


def test_a_turn_in_which_no_timer_is_due_looks_at_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    loop = module.Loop()
    timers = loop.timers = CountedTimers()
    for descriptor in range(5000):
        loop.wake_at(1010.0 + descriptor, descriptor)
    for _ in range(1000):
        loop.wake_at(2000.0, 4999)  # an active client sets its timeout again
        loop.timeout()
        assert list(loop.due()) == []
    assert timers.scans == 0
    now = 1012.0
    assert [descriptor for descriptor, _ in loop.due()] == [0, 1, 2]
    assert timers.scans == 2
    assert loop.timeout() == 1.0
    loop.close()


def test_timers_of_many_turns_are_scanned_once_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    loop = module.Loop()
    timers = loop.timers = CountedTimers()
    for descriptor in range(1000):
        loop.wake_at(1000.0 + descriptor * 1e-5, descriptor)  # one is due every 10 us
    woken = 0
    while woken < 1000:
        now += 1e-5
        woken += len(list(loop.due()))
    assert timers.scans <= 2 * 12
    loop.close()


# ---------------------------------------------------------------- the end of the server


def test_a_protocol_that_ends_the_server_takes_no_new_client_with_it(start: Start, tmp_path: Path) -> None:
    code = """
async def first_exits(client):
    if client.name == "client 2":
        sys.exit(0)
    await client.read()

main(protocol=first_exits)
"""
    server = start(
        "--wait-for", "1", "--connections", "5", program=write_program(tmp_path / "exits.py", code)
    )
    server.seat()
    server.process.send_signal(signal.SIGSTOP)
    server.connect()
    arrive(server, server.connect(), b"request")  # both get a seat in one batch
    server.process.send_signal(signal.SIGCONT)
    assert server.ended(0).endswith("\nstopped: 3 clients served, 7 bytes received, 0 bytes sent\n")
    server.messages("^request$")


def test_a_stream_that_an_exit_of_the_server_cuts_ends_with_a_reset(start: Start, tmp_path: Path) -> None:
    code = """
async def exits_at_its_end(client):
    try:
        await client.write(bytes(20_000_000))
    finally:
        sys.exit(3)

main(protocol=exits_at_its_end)
"""
    server = start("--wait-for", "1", program=write_program(tmp_path / "exits.py", code))
    client = server.seat(small=True)
    read_exactly(client, 1000)
    server.stop(status=3)
    assert ending(client)[1], "a reset"


def test_two_waits_in_a_finally_at_a_stop_are_no_mistake(start: Start, tmp_path: Path) -> None:
    code = """
async def says_goodbye(client):
    try:
        try:
            await client.read()
        finally:
            await client.write(b"one")
    finally:
        await client.write(b"two")

main(protocol=says_goodbye)
"""
    server = start("--wait-for", "1", program=write_program(tmp_path / "goodbye.py", code))
    server.seat()
    server.err.wait_for("^serving")
    server.stop()


def test_after_a_second_signal_during_the_stop_the_caller_s_mask_is_as_before(
    start: Start, tmp_path: Path
) -> None:
    code = """
async def signals_again(client):
    try:
        await client.read()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)

main(protocol=signals_again)
print("blocked:", [*signal.pthread_sigmask(signal.SIG_BLOCK, [])], file=sys.stderr)
"""
    server = start("--wait-for", "1", program=write_program(tmp_path / "again.py", code))
    server.seat()
    server.err.wait_for("^serving")
    assert server.stop().endswith("\nblocked: []\n")


# ---------------------------------------------------------------- the process stays its owner's

OWNER = """
import fcntl, resource, struct, termios
signal.signal(signal.SIGTERM, lambda *_: print("my own handler"))
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR2, signal.SIGTERM])
ours, theirs = socket.socketpair()
theirs.setblocking(False)
signal.set_wakeup_fd(theirs.fileno())
resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

def state():
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    files = sorted((name, os.readlink(f"/proc/self/fd/{name}")) for name in os.listdir("/proc/self/fd")
                   if os.path.exists(f"/proc/self/fd/{name}"))
    import warnings
    return (wakeup, handlers, signal.pthread_sigmask(signal.SIG_BLOCK, []), files,
            resource.getrlimit(resource.RLIMIT_NOFILE), warnings.showwarning, sys.unraisablehook,
            sys.excepthook, threading.excepthook, [os.get_blocking(n) for n in (0, 1, 2)])

async def echo(client):
    while data := await client.read():
        await client.write(data)

before = state()
for number in range(3):
    main(protocol=echo)
    assert state() == before, (before, state())
    print(f"main has returned {number + 1} times", file=sys.stderr, flush=True)
signal.set_wakeup_fd(-1)
ours.close()
theirs.close()
"""


@contextmanager
def reserved_port() -> Iterator[str]:
    """Keep a free port for a program that is started with --reuse-port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        yield str(sock.getsockname()[1])


@pytest.mark.parametrize("strict", [False, True])
def test_main_can_be_called_three_times_and_leaves_the_process_as_it_was(
    start: Start, tmp_path: Path, strict: bool
) -> None:
    program = write_program(tmp_path / "owner.py", OWNER)
    environment = {**os.environ, "PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"} if strict else None
    with reserved_port() as port:
        options = ["--port", port, "--reuse-port", "--wait-for", "1", "--connections", "300"]
        server = start(*options, program=program, env=environment)
        for number in range(1, 4):
            server.err.wait_for("(?s)" + r".*^listening on .*$" * number)
            peers = [server.connect() for _ in range(3)]  # some are still connected at the end
            for peer in peers:
                peer.sendall(b"hello")
                assert read_exactly(peer, 5) == b"hello"
            peers[0].close()
            server.process.terminate()
            server.err.wait_for(f"^main has returned {number} times$")
    text = server.ended(0)
    assert "Warning" not in text
    assert "my own handler" not in server.out.rest()


EXITS = {
    "exits": ("sys.exit()", 0, r"stopped: 2 clients served, 12 bytes received, 5 bytes sent\n"),
    "exits_with_a_number": ("sys.exit(7)", 7, r"stopped: .*\n"),
    "exits_with_text": ("sys.exit('a reason')", 1, r"a reason\n"),
    "is_interrupted": ("raise KeyboardInterrupt", -2, r"stopped: .*\n(?s:.*)"),
    "helper_exits": (
        "ours, theirs = socket.socketpair()\n"
        "async def helper():\n    sys.exit(8)\n"
        "client.loop.start('helper', ours.fileno(), helper())\nawait client.read()",
        8,
        r"stopped: .*\n",
    ),
    "exits_at_the_end": (
        "os.kill(os.getpid(), signal.SIGTERM)\ntry:\n    await client.sleep(3600)\nfinally:\n    sys.exit(9)",
        9,
        r"stopped: .*\n",
    ),
}


def test_a_protocol_can_end_the_server(start: Start, tmp_path: Path) -> None:
    def check(name: str) -> None:
        body, status, last = EXITS[name]
        code = as_protocols({"ends": "await client.read()\n" + body}) + CHOOSE
        server = start("--wait-for", "1", program=write_program(tmp_path / f"{name}.py", code))
        other, peer = Peer(server, "echo"), Peer(server, "ends")
        other.sock.sendall(b"hello")
        assert read_exactly(other.sock, 5) == b"hello"
        peer.sock.sendall(b"go")
        text = server.err.rest()
        assert server.process.wait(DEADLINE) in (status, 130 if status == -2 else status)
        lines = text.split("2 of 2 seats taken\n", 1)[1]
        assert re.fullmatch(last.replace("12 bytes", "15 bytes"), lines), lines
        assert server.out.rest().endswith("go\n")

    at_once(check, EXITS)


SIGNALS = {
    "alarms": """
        import atexit
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    """,
    "forked": """
        reader, writer = os.pipe()
        parent, child = os.getpid(), os.fork()
        if not child:
            os.write(writer, b"x")
            while os.getppid() == parent:  # short sleeps: a signal just before one does not interrupt it
                time.sleep(0.01)
            os._exit(1)
        os.read(reader, 1)  # CPython forgets a signal that arrives before its fork is complete
        os.close(reader)
        os.close(writer)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
    """,
    "many": """
        signal.signal(signal.SIGUSR1, lambda *_: None)
        for _ in range(70_000):
            os.kill(os.getpid(), signal.SIGUSR1)
    """,
}


def test_only_a_stop_signal_stops_the_server(tmp_path: Path) -> None:
    code = as_protocols(
        {name: textwrap.dedent(body) + "await client.write(b'done')" for name, body in SIGNALS.items()}
    )
    with served(tmp_path / "signals.py", code) as server:
        for name in SIGNALS:
            assert read_exactly(Peer(server, name).sock, 4) == b"done"
            with Peer(server, "echo").sock as other:
                other.sendall(b"hello")
                assert read_exactly(other, 5) == b"hello"
        text = server.stop()
        assert text.splitlines()[-1].startswith("stopped: 6 clients served")


def test_main_in_another_thread_gives_one_line(tmp_path: Path) -> None:
    code = "thread = threading.Thread(target=main)\nthread.start()\nthread.join()\n"
    code += "print(len(os.listdir('/proc/self/fd')))\n"
    result = run(
        write_program(tmp_path / "thread.py", "print(len(os.listdir('/proc/self/fd')))\n" + code),
        "--port",
        "0",
    )
    assert re.fullmatch(r"cannot catch signals: .*main thread.*\n", result.stderr)
    assert result.returncode == 0
    before, after = result.stdout.split()
    assert before == after


# ---------------------------------------------------------------- the command line and the trace


def test_help_describes_the_protocol_and_the_built_in_ones_are_not_offered(tmp_path: Path) -> None:
    code = 'async def shout(client):\n    """Send it back in capitals.\n\n    Nothing else.\n    """\n\n'
    program = write_program(tmp_path / "shout.py", code + "main(protocol=shout)\n")
    without = write_program(tmp_path / "without.py", "async def it(client):\n    pass\n\nmain(protocol=it)\n")

    def check(options: list[str]) -> Any:
        return run(*options)

    shown, plain, *refused = at_once(
        check,
        [[program, "--help"], [without, "--help"], [program, "--echo"], [program, "--every", "1"]],
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "\nSend it back in capitals.\n\nNothing else.\n" in shown.stdout
    for text in (shown.stdout, plain.stdout):
        assert "--connections" in text
        assert "--echo" not in text
        assert "--every" not in text
        assert "ping" not in text
    for result in refused:
        assert result.returncode == 2
        assert "unrecognized arguments: --e" in result.stderr


TRACED = """
class Watched:
    def __init__(self):
        self.real = server.select_epoll()
        for name in ("register", "modify", "unregister", "close"):
            setattr(self, name, getattr(self.real, name))
    def poll(self, *arguments):
        events = self.real.poll(*arguments)
        for descriptor, bits in events:
            client = clients.get(descriptor)
            if client:
                client.trace(f"reported {bits}")
        return events

clients = {}
server.select_epoll, server.epoll = server.epoll, Watched

async def traced(client):
    clients[client.descriptor] = client
    while data := await client.read():
        await client.write(data)
    del clients[client.descriptor]

async def other_events(client):
    clients[client.descriptor] = client
    await ready(0x2000)  # EPOLLRDHUP: the client has half-closed its side
    await client.write(b"seen")
    await client.sleep(0.01)
    del clients[client.descriptor]
"""
BITS = {1: "EPOLLIN", 4: "EPOLLOUT", 8: "EPOLLERR", 16: "EPOLLHUP"}


def test_the_trace_shows_the_events_that_epoll_reported_and_what_was_done_in_order(tmp_path: Path) -> None:
    with served(tmp_path / "traced.py", TRACED, "--trace") as server:
        peer, other = Peer(server, "traced"), Peer(server, "other_events")
        for _ in range(3):
            peer.sock.sendall(b"hello")
            assert read_exactly(peer.sock, 5) == b"hello"
        other.sock.shutdown(socket.SHUT_WR)
        assert read_all(other.sock) == b"seen"
        server.err.wait_for("^client 2 left: ")
        server.process.send_signal(signal.SIGSTOP)
        arrive(server, peer.sock, b"hello")
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        assert ending(peer.sock) == (b"hello", False)
        text = server.ended(0)
    lines = [re.sub(r"^ *\d+\.\d{3}  ", "", line) for line in text.splitlines()]
    for name in (peer.name, other.name):
        resumed, reported = [], []
        for line in lines:
            if line.startswith(f"  {name}: ") and "woken" not in line:
                resumed.append(line.split(": ")[1])
            elif line.startswith(f"    {name}: reported "):
                bits = int(line.split()[-1])
                reported.append(" ".join(text for bit, text in BITS.items() if bits & bit))
        assert len(reported) >= (3 if name == peer.name else 1)
        if name == peer.name:
            assert resumed[-len(reported) :] == reported, "no event that epoll did not report"
        else:
            assert len(resumed) >= 1 + len(reported), "an event without a name of its own is not a wake"
    start = max(number for number, line in enumerate(lines) if line == f"  {peer.name}: EPOLLIN")
    assert lines[start : start + 3] == [
        f"  {peer.name}: EPOLLIN",
        f"    {peer.name}: received 5",
        f"    {peer.name}: sent 5",
    ]


# ---------------------------------------------------------------- without epoll

WITHOUT = {
    "epoll": "import select; del select.epoll",
    "modules": "import sys; sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'termios')))",
    "signals": "import signal; del signal.SIGHUP",
}


def run_code(code: str) -> Any:
    return run("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")


@pytest.mark.parametrize("what", WITHOUT)
def test_the_module_can_be_imported_on_any_system(what: str) -> None:
    result = run_code(
        f"{WITHOUT[what]}\nimport non_block_io_server as server\n"
        "print(server.MessageFormatter('header\\n').format(b'hello'), end='')"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "header\nhello\n", "")


@pytest.mark.parametrize("what", ["epoll", "modules"])
def test_a_system_without_epoll_gets_one_line_of_advice(what: str) -> None:
    script = f"{WITHOUT[what]}\nimport runpy; runpy.run_path({SERVER!r}, run_name='__main__')"
    result = run_code(script)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.match(r"this system has no epoll: .*container.*virtual machine.*WSL\n\Z", result.stderr)
    assert run_code(f"sys.argv.append('--help')\n{script}").stdout.startswith("usage: ")
    assert run_code(f"sys.argv.append('--port=x')\n{script}").returncode == 2
