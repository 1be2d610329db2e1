"""Tests of standard output and standard error: stalled, broken, closed, or of another kind."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    COMPILED,
    DEADLINE,
    LINES,
    SERVER,
    Start,
    eventually,
    fill,
    is_pings,
    read_all,
    read_exactly,
    reset,
)
from failing import Failing

import non_block_io_server

NUMBERS = b"".join(b"%063d\n" % number for number in range(1 << 18))
F_SETPIPE_SZ = 1031  # from linux/fcntl.h; Python has it since 3.10


def without_newlines(size: int) -> int:
    """Return how many bytes of so many bytes of lines are no newlines; each line has 64 bytes."""
    return size - size // 64


def digits(shown: bytes) -> bytes:
    """Return the text of messages without headers, newlines and indents."""
    return re.sub(rb"data received.*|\s", b"", shown)


# ---------------------------------------------------------------- a stalled output stalls no client


def test_a_stalled_standard_output_loses_nothing_and_stalls_no_other_client(start: Start) -> None:
    server = start(paused=True)
    writer, reader = server.seat(), server.seat()
    memory = server.status("VmRSS")
    read_exactly(writer, 100_000)
    arrived = without_newlines(fill(server, writer, NUMBERS))  # after this, it neither spins nor reads
    assert arrived > 1_000_000
    assert server.status("VmRSS") - memory < 20_000 + COMPILED, "kB"
    assert is_pings(read_exactly(reader, 5_000_000)), "pings continue"
    reset(writer)  # while it is paused: the server does not spin, and keeps the data
    server.settled()
    assert "client 1 was reset" not in server.err.text
    server.out.going.set()
    server.err.wait_for("^client 1 was reset")
    eventually(lambda: len(digits(server.out.data)) >= arrived, "all data that had arrived is shown")
    assert digits(NUMBERS).startswith(digits(server.out.data))
    assert read_exactly(reader, 4)
    server.stop()


@pytest.mark.parametrize("options", [[], ["--trace"]])
def test_a_stalled_standard_error_stalls_no_client_and_drops_lines(
    start: Start, failing: Failing, options: Any
) -> None:
    program = failing.program("server.OUTPUT_LIMIT = 10_000")
    server = start("--connections", "50", "--wait-for", "1", *options, program=program)
    client = server.seat()
    fcntl.fcntl(server.err.pipe, F_SETPIPE_SZ, 4096)
    memory = server.status("VmRSS")
    for times in (1, 2):
        server.err.going.clear()
        for _ in range(300):  # more lines than the pipe and the server's queue hold
            server.connect().close()
        assert is_pings(read_exactly(client, 5_000_000)), "pings continue"
        server.settled()
        assert server.status("VmRSS") - memory < 2_000 + COMPILED, "kB"
        server.err.going.set()
        server.err.wait_for(rf"(log lines dropped: standard error was full$[^$]*){{{times}}}")
    text = server.stop()
    pattern = "^([0-9,]+) log lines dropped: standard error was full$"
    reported = sum(int(number.replace(",", "")) for number in re.findall(pattern, text, re.M))
    (dropped,) = re.findall(r"^stopped: 601 clients served, .*, ([0-9,]+) log lines dropped$", text, re.M)
    assert reported == int(dropped.replace(",", ""))
    logged = len(re.findall("^client [0-9]+ (?:connected|left|was reset|was lost)", text, re.M))
    assert logged + reported > 1201 if options else logged + reported == 1201
    known = r"listening on|serving|stopped:|[\d,]+ log lines dropped|client \d+ (connected|left:|was reset:) "
    assert all(re.match(rf"({known})|  *\d+\.\d\d\d  ", line) for line in text.splitlines()), "no line is cut"


@pytest.mark.parametrize("kind", ["terminal", "socket"])
def test_a_stalled_terminal_or_socket_stalls_no_client(start: Start, kind: str) -> None:
    if kind == "terminal":
        ours, theirs = os.openpty()
    else:
        pair = socket.socketpair()
        ours, theirs = (os.dup(end.fileno()) for end in pair)
        for end in pair:
            end.close()
    server = start(stdout=theirs, start_new_session=True)
    state = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(") ")[2].split()
    assert state[4] == "0", "it has no terminal from which signals come: tty_nr, proc(5)"
    writer, reader = server.seat(), server.seat()
    arrived = without_newlines(fill(server, writer))
    assert is_pings(read_exactly(reader, 5_000_000)), "pings continue"
    assert os.get_blocking(theirs), "it stays blocking for other programs"
    os.close(theirs)
    shown = 0
    while shown < arrived:
        shown += os.read(ours, 65536).count(b"x")
    os.close(ours)
    server.process.kill()


def test_one_stalled_pipe_for_both_outputs_loses_no_message_and_forges_no_header(
    start: Start, failing: Failing
) -> None:
    program = failing.program("server.OUTPUT_LIMIT = 50_000")
    server = start("--connections", "300", "--wait-for", "1", program=program, stderr=subprocess.STDOUT)
    fcntl.fcntl(server.out.pipe, F_SETPIPE_SZ, 4096)
    server.out.going.clear()
    data = b"data received... (client 9, 10.0.0.1:9)\nZZZZZZ\n" * 20_000  # no other line has a Z
    sent = 0
    forger = server.connect()
    assert read_exactly(forger, 4) == b"ping"
    forger.setblocking(False)
    for _ in range(200):
        with suppress(BlockingIOError):
            sent += forger.send(data[sent : sent + 10_000])
        with server.connect() as other:
            read_exactly(other, 4)
    shown = server.stop().splitlines()
    header = r"data received\.\.\. \(client 1, 127\.0\.0\.1:\d+\)"
    known = r"client \d+ (connected from|left:|was reset:) .* seats taken|(listening|serving) .*1 client"
    known += r"|[\d,]+ log lines dropped: standard output was full|stopped: .* log lines dropped"
    after_header = False
    for text in shown:
        assert after_header or text.startswith("  ") or re.fullmatch(f"{header}|{known}", text), text
        after_header = bool(re.fullmatch(header, text))
    received = int(re.findall(r"served, ([\d,]+) bytes", shown[-1])[0].replace(",", ""))
    assert 50_000 < received <= sent
    assert "".join(shown).count("Z") == data[:received].count(b"Z"), "every message is complete"


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_an_output_that_cannot_be_reopened_stalls_no_client(start: Start, kind: str, tmp_path: Path) -> None:
    program = tmp_path / "server.py"  # as after su, when the terminal belongs to another user
    program.write_text(
        "import os, runpy, sys\n"
        "def refuse(path, *rest, open=os.open):\n"
        "    if str(path).startswith('/proc'): raise PermissionError\n"
        "    return open(path, *rest)\n"
        "os.open = refuse\n"
        f"runpy.run_path({SERVER!r}, run_name='__main__')\n"
    )
    ours, theirs = os.openpty() if kind == "terminal" else os.pipe()
    server = start(program=str(program), stdout=theirs)
    os.close(theirs)
    writer, reader = server.seat(), server.seat()
    writer.sendall(b"x" * 500_000 + b"\n" * 1000)
    for _ in range(5):
        assert is_pings(read_exactly(reader, 5_000_000)), "pings continue"
    server.settled()
    os.close(ours)


@pytest.mark.parametrize("options", [[], ["--echo"]])
def test_a_full_output_reads_no_client_that_was_idle_before(
    start: Start, failing: Failing, options: list[str]
) -> None:
    program = failing.program("server.OUTPUT_LIMIT = 10_000")
    server = start("--connections", "101", "--wait-for", "101", *options, program=program, paused=True)
    idle = [server.seat() for _ in range(100)]
    fill(server, server.seat())
    memory = server.status("VmRSS")
    for client in idle:
        client.sendall(bytes(60_000))  # a byte needs four when it is printed
    server.settled()
    assert server.status("VmRSS") - memory < 4_000 + COMPILED, "kB"
    server.out.going.set()
    server.stop()
    assert server.out.rest().count("\\x00") == 6_000_000


def test_an_output_with_small_writes_gives_the_clients_their_turn() -> None:
    loop, (reader, writer) = non_block_io_server.Loop(), os.pipe()
    with open(writer, "w") as stream, ExitStack() as stack:
        output = non_block_io_server.Output(loop, "standard output", stream, stack)
        output.write_limit = 1  # as for a terminal that cannot be opened again
        output.write("x" * 1000)
        output.flush()
        assert os.read(reader, 1001) == b"x" * non_block_io_server.WRITES
        output.flush()
        assert os.read(reader, 1001) == b"x" * non_block_io_server.WRITES
    os.close(reader)
    loop.close()


def test_a_standard_output_that_epoll_cannot_watch_is_tried_again(start: Start, failing: Failing) -> None:
    program = failing.program("server.RETRY_DELAY = 0.01")
    server = start("--wait-for", "1", "--every", "3600", program=program, paused=True)
    client = server.seat()
    failing.fail("register", errno.ENOSPC, os.readlink(f"/proc/{server.process.pid}/fd/1"), times=3)
    client.sendall(b"x" * 200_000)  # more than a pipe holds
    eventually(lambda: failing.count() == 3, "it cannot be watched")
    server.out.going.set()
    eventually(lambda: server.out.data.count(b"x") == 200_000, "all of it is shown")
    server.stop()


def test_a_standard_output_that_epoll_does_not_forget_is_still_written(
    start: Start, failing: Failing
) -> None:
    program = failing.program("server.RETRY_DELAY = 0.01")
    server = start("--wait-for", "1", "--every", "3600", program=program, paused=True)
    client = server.seat()
    client.sendall(b"x" * 200_000)  # more than a pipe holds
    server.settled()
    failing.fail("unregister", errno.ENOMEM, os.readlink(f"/proc/{server.process.pid}/fd/1"))
    server.out.going.set()
    eventually(lambda: failing.count() == 1, "everything is written")
    client.sendall(b"hello")
    server.messages("^hello$")
    server.stop()


def test_a_standard_error_that_epoll_cannot_watch_is_tried_again(start: Start, failing: Failing) -> None:
    program = failing.program("server.RETRY_DELAY = 0.01")
    server = start("--wait-for", "1", program=program)
    server.err.going.clear()
    failing.fail("register", errno.ENOSPC, os.readlink(f"/proc/{server.process.pid}/fd/2"), times=3)
    for _ in range(700):  # more lines than a pipe holds
        server.connect().close()
    eventually(lambda: failing.count() == 3, "it cannot be watched")
    server.err.going.set()
    server.err.wait_for("^client 700 ")
    server.stop()


# ---------------------------------------------------------------- a broken output ends the server


def test_a_broken_standard_output_ends_the_server_with_one_line(start: Start) -> None:
    reader, writer = os.pipe()
    server = start("--wait-for", "1", stdout=writer)
    os.close(writer)
    os.close(reader)
    server.seat().sendall(b"hello")
    assert server.ended(1).endswith("\nstandard output can no longer be written: Broken pipe\n")


def test_a_full_device_ends_the_server_with_one_line(start: Start) -> None:
    with open("/dev/full", "w") as full:
        server = start("--wait-for", "1", stdout=full)
        server.seat().sendall(b"hello")
        assert server.ended(1).endswith(
            "\nstandard output can no longer be written: No space left on device\n"
        )


def test_a_broken_output_is_reported_with_many_open_files(start: Start, failing: Failing) -> None:
    """select(2) accepts no descriptor above 1023."""
    program = failing.program(
        "server.resource.setrlimit(server.resource.RLIMIT_NOFILE, (2000, 2000))\n"
        "files = [open('/dev/null') for _ in range(1100)]"
    )
    reader, writer = os.pipe()
    server = start("--wait-for", "1", program=program, stdout=writer)
    os.close(writer)
    os.close(reader)
    server.seat().sendall(b"hello")
    assert server.ended(1).endswith("\nstandard output can no longer be written: Broken pipe\n")


def test_a_failure_does_not_wait_for_a_stalled_standard_error(start: Start, failing: Failing) -> None:
    reader, writer = os.pipe()
    program = failing.program(SHORT_FLUSH)
    server = start("--wait-for", "1", "--echo", "--trace", program=program, stdout=writer)
    os.close(writer)
    client = server.seat()
    server.err.going.clear()
    for _ in range(1000):  # fills standard error with the trace
        client.sendall(b"x")
        read_exactly(client, 1)
    os.close(reader)
    client.sendall(b"hello")
    assert server.process.wait(DEADLINE) == 1


# ---------------------------------------------------------------- an output of another kind


@pytest.mark.parametrize("options", [[], ["--echo"], ["--every", "0.05"]])
def test_a_standard_output_that_is_not_open_is_reported(start: Start, options: Any) -> None:
    server = start("--wait-for", "1", *options, shell="exec >&-")
    client = server.seat()
    client.sendall(b"hello")
    client.shutdown(socket.SHUT_WR)
    assert b"hello" not in read_all(client) or options == ["--echo"]
    server.err.wait_for("^client 1 left: 5 bytes")
    assert "standard output is not open" in server.stop()


def test_a_standard_error_that_is_not_open_does_no_harm() -> None:
    with socket.socket() as reserved:  # it does not listen, it only keeps the port for the server
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        address = reserved.getsockname()
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, SERVER, "--port", str(address[1])]
        command += ["--reuse-port", "--wait-for", "1", "--echo"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:

            def connect() -> Any:
                with suppress(ConnectionRefusedError):
                    return socket.create_connection(address, DEADLINE)

            try:
                with eventually(connect, "it listens") as client:
                    client.sendall(b"hello")
                    assert read_exactly(client, 5) == b"hello"
                process.terminate()
                shown = process.communicate(timeout=DEADLINE)[0]
            finally:
                process.kill()
    assert process.returncode == 0
    assert re.fullmatch(rb"data received.*\nhello\n", shown)


def test_a_standard_error_that_is_closed_later_does_no_harm() -> None:
    command = [sys.executable, SERVER, "--port", "0", "--wait-for", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            first = process.stderr.readline().decode()
            process.stderr.close()
            port = int(re.findall(r":(\d+),", first)[0])
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
                    assert read_exactly(client, 4) == b"ping"
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()


def test_standard_output_can_be_a_file(start: Start, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        file.write(b"before\n")
        file.flush()
        server = start("--wait-for", "1", stdout=file)
        server.seat().sendall(b"hello")
        eventually(
            lambda: (tmp_path / "out").read_bytes().endswith(b")\nhello\n"), "the message is in the file"
        )
    assert (tmp_path / "out").read_bytes().startswith(b"before\ndata received... ")


def test_an_encoding_that_lacks_a_character_escapes_it(start: Start) -> None:
    server = start("--wait-for", "1", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    server.seat().sendall("да\n".encode())
    server.messages(r"^\\u0434\\u0430$")


# ---------------------------------------------------------------- the end, with an output that is slow


SHORT_FLUSH = "server.FLUSH_TIMEOUT = 0.1"


def test_everything_is_written_before_the_end(start: Start) -> None:
    server = start(paused=True)
    writer, _ = server.seat(), server.seat()
    fill(server, writer)
    server.process.send_signal(signal.SIGTERM)
    server.out.going.set()
    text = server.stop()
    assert "stalled" not in text
    assert text.splitlines()[-1].startswith("stopped: ")
    received = int(re.findall(r"served, ([\d,]+) bytes", text)[0].replace(",", ""))
    assert server.out.rest().count("x") == received - received // 64 > 1_000_000


def test_bytes_that_cannot_be_written_at_the_end_are_counted(start: Start, failing: Failing) -> None:
    server = start(program=failing.program(SHORT_FLUSH), paused=True)
    writer, _ = server.seat(), server.seat()
    fill(server, writer, b"x" * len(LINES))
    server.process.send_signal(signal.SIGTERM)
    text = server.ended(0)
    figures = re.search(r"served, ([\d,]+) bytes .*\n.* stalled: ([\d,]+) bytes not written\n", text)
    assert figures is not None, text
    received, lost = (int(figure.replace(",", "")) for figure in figures.groups())
    server.out.going.set()
    shown = server.out.rest()
    header = shown[: shown.index("\n") + 1]
    assert 0 < lost < received
    assert (len(shown) + lost - received) % len(header + "\n") == 0, "only headers and newlines are added"


def test_a_slow_reader_does_not_delay_the_end_for_long(start: Start, failing: Failing) -> None:
    server = start(program=failing.program("server.DRAIN_TIMEOUT = 0.1"), paused=True)
    writer, _ = server.seat(), server.seat()
    fill(server, writer)
    server.process.send_signal(signal.SIGTERM)
    while server.process.poll() is None:  # the reader reads slowly, but does not stop
        os.read(server.out.pipe.fileno(), 4096)
        time.sleep(0.02)
    assert re.search(" is too slow: [0-9,]+ bytes not written\n", server.ended(0))


def test_a_slow_reader_delays_the_end_once_not_for_each_client(start: Start, failing: Failing) -> None:
    constants = "server.DRAIN_TIMEOUT, server.OUTPUT_LIMIT = 0.5, 50_000"
    server = start("--connections", "41", program=failing.program(constants), paused=True)
    for _ in range(40):
        server.seat().sendall(LINES[:100_000])
    server.settled()  # they wait for one more client
    server.process.send_signal(signal.SIGTERM)
    while server.process.poll() is None:  # the reader needs a second and more for everything
        os.read(server.out.pipe.fileno(), 16384)
        time.sleep(0.005)
    assert re.search(" is too slow: [0-9,]+ bytes not written\n", server.ended(0))


def test_a_server_that_needs_long_does_not_blame_the_reader_of_its_output(
    start: Start, failing: Failing
) -> None:
    """Each message takes ten seconds, by the clock that the server sees."""
    program = failing.program(
        "from time import monotonic as real\n"
        "from types import SimpleNamespace\n"
        "passed, form = [], server.MessageFormatter.format\n"
        "server.MessageFormatter.format = lambda *of: passed.append(10) or form(*of)\n"
        "server.time = SimpleNamespace(monotonic=lambda: real() + sum(passed))\n"
        "server.OUTPUT_LIMIT = 50_000"
    )
    server = start("--connections", "9", program=program)
    fcntl.fcntl(server.out.pipe, F_SETPIPE_SZ, 4096)
    for _ in range(8):
        server.seat().sendall(LINES[:60_000])
    server.settled()  # they wait for one more client
    assert "not written" not in server.stop()
    assert server.out.rest().count("x") == 8 * LINES[:60_000].count(b"x")


def test_messages_for_a_failed_output_are_only_counted(start: Start, failing: Failing) -> None:
    constants = "server.FLUSH_TIMEOUT, server.OUTPUT_LIMIT = 0.01, 10_000"
    server = start("--connections", "11", program=failing.program(constants), paused=True)
    for _ in range(10):
        server.seat().sendall(bytes(60_000))  # a byte needs four when it is printed
    server.settled()  # they wait for one more client
    text = server.stop()
    lost = int(re.search(r" has stalled: ([0-9,]+) bytes not written\n", text)[1].replace(",", ""))  # type: ignore[index]
    assert 9 * 60_000 < lost < 15 * 60_000
