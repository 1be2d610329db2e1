"""Tests of signals, the exit status, and the first and the last line."""

from __future__ import annotations

import functools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import DEADLINE, SERVER, Server, eventually, read_exactly
from failing import Failing

Start = Callable[..., Server]


@pytest.fixture
def failing(tmp_path: Path) -> Failing:
    return Failing(tmp_path)


def ignoring(number: int) -> Callable[[], Any]:
    return lambda: signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(start: Start, number: int) -> None:
    server = start("--echo", "--wait-for", "1", preexec_fn=ignoring(number))
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
    program = failing.program("server.SIGNAL_TIMEOUT = 10.0")
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
    """Run `server 2>&1 | tee log`; Ctrl-C signals both programs."""

    command = [sys.executable, SERVER, "--port", "0", "--wait-for", "1"]
    for number in range(8):
        log = tmp_path / f"log{number}"
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        ) as server, subprocess.Popen(
            ["tee", str(log)],
            stdin=server.stdout,
            stdout=subprocess.DEVNULL,
            preexec_fn=functools.partial(os.setpgid, 0, server.pid),
        ) as tee:
            assert server.stdout is not None
            server.stdout.close()
            port = eventually(lambda: read_port(log), "it listens")  # noqa: B023
            with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
                for _ in range(number):
                    client.sendall(b"hello")  # so that the server writes at about the same time
                os.killpg(server.pid, signal.SIGINT)
                assert server.wait(DEADLINE) == 0
            tee.wait(DEADLINE)
        assert "Traceback" not in log.read_text()


def read_port(log: Path) -> int:
    """Return the port in the server's first line; 0 if there is no line yet."""
    found = re.search(r":(\d+), ", log.read_text()) if log.exists() else None
    return int(found[1]) if found else 0


def test_a_broken_standard_output_leaves_no_traceback(start: Start) -> None:
    reader, writer = os.pipe()
    server = start("--wait-for", "1", stdout=writer)
    os.close(writer)
    client = server.seat()
    os.close(reader)
    client.sendall(b"hello")
    text = server.ended(1)
    assert text.splitlines()[-1] == "standard output can no longer be written: Broken pipe"
    assert "stopped: " not in text


# ---------------------------------------------------------------- the first line


@pytest.mark.parametrize(
    "options, popen",
    [
        (["--trace"], {}),
        (["--trace", "--echo", "--quiet"], {}),
        (
            ["--connections", "9999"],
            {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))},
        ),
        ([], {"preexec_fn": lambda: os.close(1), "stdout": None}),
        (["--every", "1"], {"preexec_fn": lambda: os.close(0)}),
    ],
)
def test_the_first_line_shows_the_address(start: Start, options: Any, popen: Any) -> None:
    server = start(*options, **popen)
    count = "9,999" if "9999" in options else "2"
    assert server.err.text.startswith(f"listening on 127.0.0.1:{server.port}, waiting for {count} clients\n")


def test_a_standard_error_that_is_not_open_does_no_harm() -> None:
    with socket.socket() as reserved:  # it does not listen, it only keeps the port for the server
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        address = reserved.getsockname()
        command = [
            sys.executable,
            SERVER,
            "--port",
            str(address[1]),
            "--reuse-port",
            "--wait-for",
            "1",
            "--echo",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2)) as process:

            def connect() -> Any:
                with suppress(ConnectionRefusedError):
                    return socket.create_connection(address, DEADLINE)

            try:
                with eventually(connect, "it listens") as client:
                    client.sendall(b"hello")
                    assert read_exactly(client, 5) == b"hello"
            finally:
                process.terminate()
            shown = process.communicate(timeout=DEADLINE)[0]
    assert process.returncode == 0
    assert re.fullmatch(rb"data received.*\nhello\n", shown)
