"""Tests of a stop: signals, the exit status, and what each client still gets."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    DEADLINE,
    IS_PYPY,
    MODES,
    SERVER,
    Start,
    arrive,
    ending,
    eventually,
    fill,
    is_pings,
    read_all,
    read_exactly,
)
from failing import Failing

# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("clients", [0, 1, 2])
def test_a_signal_stops_the_server_with_a_summary(start: Start, number: int, clients: int) -> None:
    server = start()
    for _ in range(clients):
        server.seat()
    last = server.stop(number).splitlines()[-1]
    assert re.match(rf"stopped: {clients if clients == 2 else 0} clients served, 0 bytes received, ", last)


def test_a_client_that_waits_for_others_is_served_and_counted_at_a_stop(start: Start) -> None:
    server = start("--echo", "--wait-for", "3", "--connections", "3")
    _, client = server.seat(), server.seat()
    client.sendall(b"hello")
    server.settled()
    assert server.stop().endswith("\nstopped: 1 client served, 5 bytes received, 5 bytes sent\n")
    assert read_exactly(client, 5) == b"hello"


@pytest.mark.skipif(IS_PYPY, reason="its signal.getsignal() does not report an inherited SIG_IGN")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(start: Start, number: int) -> None:
    server = start("--echo", "--wait-for", "1", shell=f"trap '' {int(number)}")
    client = server.seat()
    for _ in range(3):
        server.process.send_signal(number)
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"
    server.settled()
    assert server.process.poll() is None
    assert server.stop().splitlines()[-1].startswith("stopped: 1 client served, 15 bytes received")


def send_until_it_ends(process: subprocess.Popen[Any], *numbers: int) -> None:
    """Send the signals again and again until the process has ended; do not reap it."""
    stat = Path(f"/proc/{process.pid}/stat")
    end = time.monotonic() + DEADLINE
    while ") Z " not in stat.read_text():
        assert time.monotonic() < end, "it does not end"
        for number in numbers:
            os.kill(process.pid, number)


@pytest.mark.parametrize("status", [0, 1])
def test_more_signals_during_the_exit_change_nothing(start: Start, status: int) -> None:
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    for _ in range(2):
        reader, writer = os.pipe()
        server = start("--wait-for", "1", stdout=writer)
        os.close(writer)
        client = server.seat()
        if status:
            os.close(reader)
            client.sendall(b"hello")
            server.err.wait_for("^standard output can no longer be written")
        send_until_it_ends(server.process, *numbers)
        assert server.ended(status)
        if not status:
            os.close(reader)


@pytest.mark.parametrize("broken_first", [True, False])
def test_a_broken_pipe_is_no_failure_when_a_signal_stops_the_server(
    start: Start, failing: Failing, broken_first: bool
) -> None:
    program = failing.program("server.SIGNAL_TIMEOUT = 1000.0")  # longer than any test
    reader, writer = os.pipe()
    server = start("--wait-for", "1", program=program, stdout=writer)
    os.close(writer)
    client = server.seat()
    read_exactly(client, 4)
    if broken_first:  # the server waits for a signal before it reports a failure
        os.close(reader)
        client.sendall(b"hello")
        server.settled()
        assert server.process.poll() is None
        text = server.stop()
    else:
        server.process.send_signal(signal.SIGSTOP)
        client.sendall(b"hello")
        server.process.send_signal(signal.SIGTERM)
        os.close(reader)
        server.process.send_signal(signal.SIGCONT)
        text = server.ended(0)
    last = text.splitlines()
    assert last[-2].startswith("stopped: 1 client served, 5 bytes received, ")
    assert re.match(
        r"standard output can no longer be written: Broken pipe: \d+ bytes not written$", last[-1]
    )


def test_ctrl_c_in_a_pipeline_is_no_failure(tmp_path: Path) -> None:
    """Ctrl-C signals all programs of a pipeline."""
    for number in range(8):
        log = tmp_path / f"log{number}"
        pipeline = 'trap : INT; "$0" "$@" 2>&1 | tee "$LOG"; exit ${PIPESTATUS[0]}'
        command = ["bash", "-c", pipeline, sys.executable, SERVER, "--port", "0", "--wait-for", "1"]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "LOG": str(log)}
        ) as process:
            try:
                port = eventually(lambda: read_port(log), "it listens")  # noqa: B023
                with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
                    for _ in range(number):
                        client.sendall(b"hello")  # so that the server writes at about the same time
                    os.killpg(process.pid, signal.SIGINT)
                    assert process.wait(DEADLINE) == 0
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert "Traceback" not in log.read_text()


def read_port(log: Path) -> int:
    """Return the port in the server's first line; 0 if there is no line yet."""
    found = re.search(r":(\d+), ", log.read_text()) if log.exists() else None
    return int(found[1]) if found else 0


# ---------------------------------------------------------------- a stop loses nothing


@pytest.mark.parametrize(
    "options, wait_for, number",
    [
        (MODES[0], "1", signal.SIGTERM),
        (MODES[0], "3", signal.SIGINT),
        (MODES[1], "1", signal.SIGHUP),
        (MODES[1], "3", signal.SIGTERM),
        (MODES[2], "1", signal.SIGINT),
        (MODES[2], "3", signal.SIGHUP),
    ],
)
def test_a_stop_loses_no_data_that_has_arrived(
    start: Start, failing: Failing, options: Any, wait_for: str, number: int
) -> None:
    program = failing.program("server.READ_SIZE, server.OUTPUT_LIMIT = 1000, 500")
    server = start(*options, "--connections", "3", "--wait-for", wait_for, program=program)
    clients = [server.seat(), server.seat()]
    server.process.send_signal(signal.SIGSTOP)
    data = (b"x" * 99 + b"\n") * 300
    for client in clients:
        arrive(server, client, data)
    clients[1].shutdown(socket.SHUT_WR)
    server.process.send_signal(number)
    server.process.send_signal(signal.SIGCONT)
    for client in clients:
        received, was_reset = ending(client)
        assert not was_reset
        if options == ["--echo"]:
            assert received == data
        else:
            assert received == b"ping" * (len(received) // 4)
    text = server.ended(0)
    assert server.out.rest().count("x") == 2 * 29_700
    sent = "60,000 bytes sent" if options == ["--echo"] else r"[\d,]+ pings? sent"
    assert re.search(rf"\nstopped: \d clients served, 60,000 bytes received, {sent}\n\Z", text), text[-300:]


@pytest.mark.parametrize("options", MODES)
def test_bytes_that_arrive_during_a_stop_are_read(start: Start, failing: Failing, options: Any) -> None:
    program = failing.program(  # as if all of them arrive later
        "server.Client.unread, server.READ_SIZE = lambda client: 0, 1000"
    )
    server = start(*options, "--wait-for", "1", program=program)
    client = server.seat()
    server.err.wait_for("^serving")
    server.process.send_signal(signal.SIGSTOP)
    arrive(server, client, b"x" * 30_000)
    server.process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGCONT)
    assert ending(client)[1] is False, "an end of file"
    assert re.search("\nstopped: 1 client served, 30,000 bytes received, ", server.ended(0))


def test_data_that_an_echo_has_not_read_is_printed_when_the_server_stops(
    start: Start, failing: Failing
) -> None:
    """The client does not read its echo, so its data stays in the kernel."""
    program = failing.program("server.READ_SIZE, server.OUTPUT_LIMIT = 1000, 1000")
    server = start("--echo", "--wait-for", "1", program=program)
    client = server.seat(small=True)
    arrived = fill(server, client)
    printed = re.search(r"([\d,]+) bytes received, ", server.stop().splitlines()[-1])
    assert printed
    assert int(printed[1].replace(",", "")) >= arrived
    assert server.out.rest().count("x") >= arrived - arrived // 64  # the rest are newlines


@pytest.mark.parametrize("options", MODES)
def test_python_has_nothing_to_warn_of(start: Start, options: Any) -> None:
    """In development mode, Python reports each socket, file or coroutine that is left open."""
    env = {**os.environ, "PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
    server = start(*options, "--wait-for", "1", env=env)
    client, other = server.seat(), server.seat()
    client.sendall(b"hello")
    assert read_exactly(client, 4) in (b"ping", b"hell")
    other.shutdown(socket.SHUT_WR)
    server.err.wait_for("^client 2 left")
    lines = server.stop().splitlines()
    assert [re.split("[ :]", line)[0] for line in lines] == [
        "listening",
        "client",
        "serving",
        "client",
        "client",
        "stopped",
    ]


# ---------------------------------------------------------------- a stop cuts no ping and hides no gap


@pytest.mark.parametrize("read", [1, 6, 1001, 12_345])
def test_no_ping_is_cut_when_the_server_stops(start: Start, read: int) -> None:
    server = start()
    small, _ = server.seat(small=True), server.seat()
    data = read_exactly(small, read)
    server.settled()
    server.process.send_signal(signal.SIGTERM)
    assert is_pings(data + read_all(small))
    server.stop()  # a second signal does no harm


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_cut_ping_is_completed_at_shutdown(start: Start, failing: Failing, cut: int) -> None:
    program = failing.program(
        f"rests = [{4000 + cut}]\n"
        "sendfile = server.os.sendfile\n"
        "def once(out, file, at, size):\n"
        "    if not rests: raise BlockingIOError\n"
        "    return sendfile(out, file, at, rests.pop())\n"
        "server.os.sendfile = once"
    )
    server = start("--wait-for", "1", program=program)
    client = server.seat()
    data = read_exactly(client, 4000 + cut)
    text = server.stop()
    assert data + read_all(client) == b"ping" * 1001
    assert text.endswith("\nstopped: 1 client served, 0 bytes received, 1,001 pings sent\n")


def test_no_ping_is_cut_when_standard_output_breaks(start: Start) -> None:
    reader, writer = os.pipe()
    server = start(stdout=writer)
    os.close(writer)
    small, other = server.seat(small=True), server.seat()
    data = read_exactly(small, 1001)
    server.settled()
    os.close(reader)
    other.sendall(b"hello")
    rest, was_reset = ending(small)
    assert is_pings(data + rest)
    assert not was_reset
    server.ended(1)


@pytest.mark.parametrize("size", [300_000, 10_000_000])
def test_an_incomplete_echo_ends_with_a_reset(start: Start, size: int) -> None:
    """An end of file would mean that the echo is complete."""
    server = start("--echo", "--quiet", "--wait-for", "1")
    lazy = server.seat(small=True)
    lazy.setblocking(False)
    sent = 0
    for _ in range(3):
        with suppress(BlockingIOError):
            while sent < size:
                sent += lazy.send(bytes(size - sent))
        server.settled()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(DEADLINE)
    lazy.settimeout(DEADLINE)
    received, was_reset = ending(lazy)
    assert was_reset
    assert len(received) < sent


# ---------------------------------------------------------------- nothing delays a stop


@pytest.mark.parametrize("options", MODES)
def test_bytes_that_arrive_endlessly_do_not_delay_a_stop(
    start: Start, failing: Failing, options: Any
) -> None:
    program = failing.program(
        "finish = server.Server.finish\n"
        "def endless(self):\n"
        "    server.read = lambda descriptor, size: b'x' * 1000\n"
        "    finish(self)\n"
        "server.Server.finish = endless"
    )
    server = start(*options, "--wait-for", "1", "--quiet", program=program)
    server.seat(), server.seat()
    server.err.wait_for("^client 2 connected")
    server.stop()


@pytest.mark.parametrize("options", MODES)
def test_clients_that_send_nothing_do_not_delay_a_stop(start: Start, failing: Failing, options: Any) -> None:
    program = failing.program("server.FINISH_TIMEOUT = 60.0")
    server = start(*options, "--wait-for", "1", program=program)
    server.seat()
    server.seat().sendall(b"hello")
    server.messages("^hello$")
    server.stop()


@pytest.mark.parametrize("options", MODES)
def test_a_client_that_sends_endlessly_does_not_delay_a_stop(start: Start, options: Any) -> None:
    server = start(*options, "--wait-for", "1", "--quiet")
    going = True

    def send(client: socket.socket) -> None:
        with suppress(OSError):
            while going:
                client.sendall(b"x" * 1_000_000)

    def receive(client: socket.socket) -> None:
        with suppress(OSError):
            while client.recv(1 << 20):
                pass

    clients = [server.seat(), server.seat()]
    threads = [
        threading.Thread(target=what, args=(client,)) for client in clients for what in (send, receive)
    ]
    for thread in threads:
        thread.start()
    try:
        server.stop()
    finally:
        going = False
        server.close()
        for thread in threads:
            thread.join(DEADLINE)
