"""Tests of a custom protocol (`main(protocol=...)`), and of the module on a system without epoll."""

from __future__ import annotations

import re
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Callable

import pytest
from conftest import DEADLINE, ROOT, SERVER, Server, arrive, ending, is_pings, is_reset, read_exactly

Start = Callable[..., Server]

UPPER = """
from non_block_io_server import EPOLLIN, EPOLLOUT, main

def upper(client):
    while not client.at_eof:
        yield client.reading
        data = client.receive().decode("ascii").upper().encode()
        if data == b"FAULT":
            raise KeyError("fault")
        if data == b"STOP":
            return
        while data:
            data = data[client.send(data):]
            if data:
                yield EPOLLOUT

main(protocol=upper)
"""


LINES = """
from non_block_io_server import EPOLLIN, EPOLLOUT, main

def read_lines(client):
    data = b""
    while not client.at_eof and not data.endswith(b"\\n"):
        yield client.reading
        data += client.receive()
    return data.splitlines()

def send_line(client, line):
    if line == b"fault":
        raise KeyError("fault")
    data = line.upper() + b"\\n"
    while data:
        data = data[client.send(data):]
        if data:
            yield EPOLLOUT

def lines(client):
    while not client.at_eof:
        for line in (yield read_lines(client)):
            try:
                yield send_line(client, line)
            except KeyError:
                yield send_line(client, b"caught")

main(protocol=lines)
"""


def write_program(path: Path, code: str) -> str:
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    return str(path)


@pytest.fixture
def program(tmp_path: Path) -> str:
    return write_program(tmp_path / "upper.py", UPPER)


def test_a_protocol_runs_with_the_same_options(start: Start, program: str) -> None:
    server = start("--connections", "3", "--wait-for", "2", "--trace", program=program)
    assert "waiting for 2 clients\n" in server.err.text
    first = server.seat()
    first.sendall(b"one")
    server.settled()
    assert server.out is not None
    assert server.out.data == b""
    second = server.seat()
    second.sendall(b"two")
    assert (read_exactly(first, 3), read_exactly(second, 3)) == (b"ONE", b"TWO")
    server.messages("^two$")
    large = b"x" * 3_000_000
    second.setblocking(False)
    sent, received = 0, b""
    while len(received) < len(large):
        with suppress(BlockingIOError):
            sent += second.send(large[sent : sent + 65536])
        with suppress(BlockingIOError):
            received += second.recv(1 << 20)
    assert received == large.upper()
    first.shutdown(socket.SHUT_WR)
    assert first.recv(1) == b""
    server.err.wait_for(r"^client 1 left: 3 bytes received, 3 bytes sent, 1 of 3 seats taken$")
    text = server.stop()
    assert text.endswith("stopped: 2 clients served, 3,000,006 bytes received, 3,000,006 bytes sent\n")


def test_a_protocol_may_end_a_connection(start: Start, program: str) -> None:
    server = start("--wait-for", "1", program=program)
    client = server.seat()
    client.sendall(b"stop")
    assert client.recv(1) == b"", "an end of file, not a reset"
    server.err.wait_for("^client 1 left: 4 bytes received, 0 bytes sent, 0 of 2 seats taken$")


def test_a_protocol_that_fails_ends_that_connection_only(start: Start, program: str) -> None:
    server = start(program=program)
    clients = [server.seat(), server.seat()]
    for number, (data, reason) in enumerate(
        [
            (b"fault", ".*KeyError.*"),
            (b"\xff", ".*UnicodeDecodeError.*"),
        ]
    ):
        victim = clients.pop(0)
        victim.sendall(data)
        with pytest.raises(ConnectionResetError):
            victim.recv(1)
        server.err.wait_for(rf"^client {number + 1} was lost \({reason}\): .* 1 of 2 seats taken$")
        clients[0].sendall(b"hello")
        assert read_exactly(clients[0], 5) == b"HELLO"
        clients.append(server.seat())
    server.stop()


def test_a_task_calls_tasks_and_gets_their_values_and_exceptions(start: Start, tmp_path: Path) -> None:
    server = start("--wait-for", "1", program=write_program(tmp_path / "lines.py", LINES))
    client = server.seat()
    client.sendall(b"one\nfault\ntwo\n")
    assert read_exactly(client, 15) == b"ONE\nCAUGHT\nTWO\n"
    client.sendall(b"x\n" * 5000)  # in one turn, more calls than Python's limit of recursion
    assert read_exactly(client, 10_000) == b"X\n" * 5000
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    server.err.wait_for("^client 1 was reset: ")
    server.stop()


@pytest.mark.parametrize(
    ("fault", "options"),
    [("yield", []), ("yield", ["--trace"]), ("yield 'events'", []), ("yield client.sock", [])],
)
def test_a_protocol_that_yields_no_interest_ends_that_connection_only(
    start: Start, tmp_path: Path, fault: str, options: list[str]
) -> None:
    code = f"from non_block_io_server import main\ndef wrong(client):\n    while True:\n        {fault}\n"
    program = write_program(tmp_path / "wrong.py", f"{code}main(protocol=wrong)\n")
    server = start("--wait-for", "1", *options, program=program)
    for number in (1, 2):
        assert is_reset(server)
        server.err.wait_for(rf"^client {number} was lost \(.*(Type|Attribute)Error.*\): 0 bytes received, ")
    server.stop()


def test_a_protocol_that_sends_endlessly_does_not_delay_the_end(start: Start, tmp_path: Path) -> None:
    code = "from non_block_io_server import EPOLLOUT, main\ndef endless(client):\n    while True:\n"
    code += "        yield EPOLLOUT\n        client.send(b'data')\nmain(protocol=endless)\n"
    server = start("--wait-for", "1", program=write_program(tmp_path / "endless.py", code))
    client = server.seat()
    client.sendall(b"hello")
    server.process.send_signal(signal.SIGTERM)
    with suppress(ConnectionResetError):
        while client.recv(1 << 20):
            pass
    assert re.search("^stopped: 1 client served, 5 bytes received, [0-9,]+ bytes sent$", server.stop(), re.M)


ANSWERS = {
    "reads the socket itself": """
        yield EPOLLIN
        client.send(client.sock.recv(4096))
""",
    "queues its answer": """
        events = yield client.reading | (EPOLLOUT if client.unsent else 0)
        if events & EPOLLIN:
            client.unsent += client.receive()
        client.flush()
""",
    "waits before it reads": """
        yield EPOLLIN
        client.server.loop.wake([client.descriptor])
        yield 0
        client.unsent = client.receive()
        while client.unsent:
            yield EPOLLOUT
            client.flush()
""",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_a_stop_cuts_off_ends_with_a_reset(start: Start, tmp_path: Path, answer: str) -> None:
    code = "import non_block_io_server\nnon_block_io_server.READ_SIZE = 1000\n"  # many chunks
    code += "from non_block_io_server import EPOLLIN, EPOLLOUT, main\ndef answer(client):\n"
    code += f"    while not client.at_eof:{ANSWERS[answer]}main(protocol=answer)\n"
    server = start("--wait-for", "1", "--quiet", program=write_program(tmp_path / "answer.py", code))
    client = server.seat(small=answer == "queues its answer")  # else its kernel accepts the whole answer
    server.process.send_signal(signal.SIGSTOP)
    arrive(server, client, bytes(100_000))
    server.process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGCONT)
    server.ended(0)
    assert ending(client)[1]


def test_a_protocol_that_is_no_generator_function_ends_that_connection_only(
    start: Start, tmp_path: Path
) -> None:
    code = "from non_block_io_server import main\ndef plain(client):\n    client.send(b'hello')\n"
    server = start(
        "--wait-for", "1", program=write_program(tmp_path / "plain.py", f"{code}main(protocol=plain)")
    )
    with suppress(ConnectionResetError):  # the server may reset it before connect() returns
        server.connect()
    server.err.wait_for(r"^client 1 was lost \(TypeError.*\): 0 bytes received, 5 bytes sent, ")
    server.stop()


def test_echo_and_every_replace_the_protocol(start: Start, program: str) -> None:
    client = start("--wait-for", "1", "--echo", program=program).seat()
    client.sendall(b"as it is")
    assert read_exactly(client, 8) == b"as it is"
    assert is_pings(read_exactly(start("--wait-for", "1", "--every", "0.01", program=program).seat(), 8))


# ---------------------------------------------------------------- without epoll

WITHOUT = {
    "epoll": "import select; del select.epoll",
    "modules": "import sys; sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'termios')))",
    "signals": "import signal; del signal.SIGHUP",
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


@pytest.mark.parametrize("what", WITHOUT)
def test_the_module_can_be_imported_on_any_system(what: str) -> None:
    result = run(
        f"{WITHOUT[what]}\nimport non_block_io_server as server\n"
        "print(server.MessageFormatter('header\\n').format(b'hello'), end='')"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "header\nhello\n", "")


@pytest.mark.parametrize("what", ["epoll", "modules"])
def test_a_system_without_epoll_gets_one_line_of_advice(what: str) -> None:
    script = f"{WITHOUT[what]}\nimport runpy; runpy.run_path({SERVER!r}, run_name='__main__')"
    result = run(script)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.match(r"this system has no epoll: .*container.*virtual machine.*WSL\n\Z", result.stderr)
    assert run(f"sys.argv.append('--help')\n{script}").stdout.startswith("usage: ")
    assert run(f"sys.argv.append('--port=x')\n{script}").returncode == 2
