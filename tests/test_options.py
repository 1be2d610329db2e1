"""Tests of the options (seats, echo, heartbeat, trace) and of the command line."""

from __future__ import annotations

import re
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    COMPILED,
    DEADLINE,
    SERVER,
    Server,
    Start,
    eventually,
    is_pings,
    read_all,
    read_exactly,
    reset,
    run,
)
from failing import Failing

import non_block_io_server


def limited(soft: int, hard: int) -> str:
    """Return shell commands that set these limits on open files."""
    return f"ulimit -Sn {soft} && ulimit -Hn {hard}"


# ---------------------------------------------------------------- seats


def test_serving_starts_when_enough_clients_are_connected(start: Start) -> None:
    server = start("--connections", "5", "--wait-for", "3")
    assert server.err.text.startswith(f"listening on 127.0.0.1:{server.port}, waiting for 3 clients\n")
    clients = [server.seat(), server.seat()]
    server.settled()
    assert "serving" not in server.err.text
    clients.append(server.seat())
    server.err.wait_for("^serving 3 clients$")
    clients += [server.seat(), server.seat()]
    assert all(read_exactly(client, 4) == b"ping" for client in clients)
    sixth = server.connect()
    server.settled()
    assert "client 6" not in server.err.text
    clients[3].close()
    assert read_exactly(sixth, 4) == b"ping"


def test_serving_starts_with_one_client(start: Start) -> None:
    server = start("--wait-for", "1")
    assert "waiting for 1 client\n" in server.err.text
    assert read_exactly(server.seat(), 4) == b"ping"
    server.err.wait_for("^serving 1 client$")


def test_the_soft_limit_on_open_files_is_raised(start: Start) -> None:
    server = start("--connections", "300", "--wait-for", "1", shell=limited(64, 1024))
    clients = [server.seat() for _ in range(200)]
    assert read_exactly(clients[-1], 4) == b"ping"
    assert "limit" not in server.err.text
    text = Path(f"/proc/{server.process.pid}/limits").read_text()
    assert re.search(r"^Max open files +3\d\d +1024 ", text, re.M), "as far as the seats need it"


@pytest.mark.parametrize("limits", [(1000, 4000), (4000, 4000)])
def test_a_soft_limit_that_is_high_enough_is_kept(start: Start, limits: tuple[int, int]) -> None:
    server = start(shell=limited(*limits))
    text = Path(f"/proc/{server.process.pid}/limits").read_text()
    assert re.search(rf"^Max open files +{limits[0]} +{limits[1]} ", text, re.M)


def test_a_hard_limit_that_is_too_low_is_reported_and_does_not_spin(start: Start) -> None:
    server = start("--connections", "300", "--wait-for", "1", "--echo", shell=limited(20, 64))
    server.err.wait_for(r"^the seats need 316 open files, but the hard limit is 64 \(ulimit -Hn\)$")
    clients = [server.connect() for _ in range(70)]
    server.err.wait_for("^not accepting for now: Too many open files$")
    server.settled()
    seated = server.err.text.count(" connected from ")
    assert seated > 48, "the soft limit is raised to the hard limit"
    for number, client in enumerate(clients[:seated]):
        client.sendall(b"still here %d" % number)
        assert read_exactly(client, 11) == b"still here "
    clients[0].close()
    server.err.wait_for(f"^client {seated + 1} connected")  # a seat is free again
    server.settled()
    assert server.err.text.count("not accepting") < 5


@pytest.mark.parametrize("wait_for", ["1", "9"])
def test_connections_are_accepted_again_after_a_shortage(
    start: Start, failing: Failing, wait_for: str
) -> None:
    program = failing.program("server.RETRY_DELAY = 0.02")
    server = start("--connections", "9", "--wait-for", wait_for, program=program)
    clients = [server.seat()]
    pid = str(server.process.pid)
    subprocess.run(["prlimit", f"--nofile={server.descriptors()}:1000", "--pid", pid], check=True)
    clients += [server.connect() for _ in range(8)]
    server.err.wait_for("^not accepting for now: Too many open files$")
    subprocess.run(["prlimit", "--nofile=1000:1000", "--pid", pid], check=True)
    assert all(read_exactly(client, 4) == b"ping" for client in clients)


def test_many_clients_need_little_memory(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    many = min(10_000, hard - 200)
    server = start("--connections", "10000", "--wait-for", "1", "--echo")
    try:
        first = server.seat()
        first.sendall(b"warm")
        read_exactly(first, 4)
        memory = server.status("VmRSS")
        with suppress(OSError):  # other programs may use the ports
            while len(server.clients) < many:
                server.connect()
        many = len(server.clients)
        assert many > 1000
        server.err.wait_for(f"^client {many} connected")
        server.settled()
        limit = 15_000 if sys.version_info >= (3, 11) else 28_000  # a coroutine has become smaller
        assert server.status("VmRSS") - memory < limit * many / 10_000 + COMPILED, "kB"
        for client in server.clients[:many:1000]:
            client.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"
    finally:
        server.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_burst_of_new_clients_does_not_starve_connected_ones(start: Start) -> None:
    server = start("--connections", "500", "--wait-for", "1", "--echo", "--trace")
    client = server.seat()
    server.settled()
    server.process.send_signal(signal.SIGSTOP)
    for _ in range(300):
        server.connect()
    client.sendall(b"me too")
    server.process.send_signal(signal.SIGCONT)
    assert read_exactly(client, 6) == b"me too"
    server.err.wait_for("^client 301 connected")
    text = server.err.text
    assert text[: text.index("client 1: received 6")].count(" connected from ") < 100


def test_copies_share_a_port(start: Start) -> None:
    options = ("--reuse-port", "--connections", "100", "--wait-for", "1")
    one = start(*options)
    other = start(*options, "--port", str(one.port))
    with pytest.raises(AssertionError, match="in use"):
        start("--port", str(one.port))
    clients = [one.connect() for _ in range(60)]
    assert all(read_exactly(client, 4) == b"ping" for client in clients)

    def seated() -> list[int]:
        return [server.err.text.count(" connected from ") for server in (one, other)]

    eventually(lambda: sum(seated()) == 60, "each one is logged once")
    assert min(seated()) > 0, "the kernel spreads the clients"


# ---------------------------------------------------------------- an echo


def exchange(client: socket.socket, data: bytes) -> bytes:
    """Send the data and half-close; at the same time, read to the end of file."""
    client.setblocking(False)
    left, back, half_closed, ended = memoryview(data), [], False, False
    end = time.monotonic() + DEADLINE
    while not ended and time.monotonic() < end:
        with suppress(BlockingIOError):
            while left:
                left = left[client.send(left[:1_000_000]) :]
            if not half_closed:
                client.shutdown(socket.SHUT_WR)
                half_closed = True
        with suppress(BlockingIOError):
            chunk = client.recv(1 << 20)
            back.append(chunk)
            ended = not chunk
    return b"".join(back)


DATA = bytes(range(256)) * 16_000


@pytest.mark.parametrize("quiet", [["--quiet"], []])
def test_an_echo_is_complete(start: Start, quiet: Any) -> None:
    server = start("--wait-for", "1", "--echo", *quiet, stdout=subprocess.DEVNULL)
    sizes = [0, 1, 65_535, 65_536, 65_537, len(DATA) if quiet else 400_000]
    for number, size in enumerate(sizes, 1):
        client = server.seat()
        if size == 0:
            server.err.wait_for("^serving")  # else it is a port probe
        assert exchange(client, DATA[:size]) == DATA[:size]
        server.err.wait_for(
            rf"^client {number} left: {size:,} bytes? received, {size:,} bytes? sent, 0 of 2 seats taken$"
        )
    total = f"{sum(sizes):,} bytes"
    assert server.stop().endswith(f"\nstopped: 6 clients served, {total} received, {total} sent\n")


def test_an_echo_is_also_printed(start: Start) -> None:
    server = start("--wait-for", "1", "--echo")
    assert exchange(server.seat(), b"hello\n") == b"hello\n"
    server.messages(r"\Adata received.*\nhello\n\Z")


def test_quiet_prints_no_message_but_counts(start: Start) -> None:
    server = start("--wait-for", "1", "--quiet")
    client = server.seat()
    client.sendall(b"psst")
    client.shutdown(socket.SHUT_WR)
    read_all(client)
    server.err.wait_for("^client 1 left: 4 bytes")
    server.stop()
    assert server.out.rest() == ""


def test_an_unread_echo_stops_reading_and_needs_no_memory(start: Start) -> None:
    server = start("--echo", "--quiet")
    lazy, other = server.seat(), server.seat()
    memory = server.status("VmRSS")
    lazy.setblocking(False)
    data, sent = DATA * 5, 0
    for _ in range(3):  # send as much as the kernel accepts
        with suppress(BlockingIOError):
            while sent < len(data):
                sent += lazy.send(data[sent : sent + 1_000_000])
        server.settled()  # it does not spin
    assert sent < len(data), "it stops reading"
    assert server.status("VmRSS") - memory < 2_000 + COMPILED, "kB"
    other.sendall(b"hello")
    assert read_exactly(other, 5) == b"hello"
    lazy.settimeout(DEADLINE)
    assert read_exactly(lazy, sent) == data[:sent]
    assert exchange(lazy, b"hello") == b"hello"


def test_a_reset_ends_an_echo_with_unsent_bytes(start: Start) -> None:
    server = start("--echo", "--quiet")
    lazy, _ = server.seat(), server.seat()
    lazy.setblocking(False)
    for _ in range(3):
        with suppress(BlockingIOError):
            while True:
                lazy.send(DATA[:1_000_000])
        server.settled()
    reset(lazy)
    server.err.wait_for("^client 1 was reset: ")
    server.settled()


def test_an_echo_waits_for_writing_only_with_unsent_data(start: Start) -> None:
    server = start("--echo", "--trace", "--wait-for", "1", "--quiet")
    client = server.seat()
    for _ in range(10):
        client.sendall(b"hello")
        read_exactly(client, 5)
    server.settled()
    assert len(re.findall("epoll_ctl: client 1 waits", server.err.text)) == 1
    assert "EPOLLOUT" not in server.err.text


def test_a_large_echo_does_not_delay_a_small_one(start: Start) -> None:
    server = start("--echo", "--quiet", "--trace")
    bulk, quiet = server.seat(), server.seat()
    server.settled()
    server.process.send_signal(signal.SIGSTOP)
    bulk.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            bulk.send(DATA[:65536])
    quiet.sendall(b"hello")
    server.process.send_signal(signal.SIGCONT)
    assert read_exactly(quiet, 5) == b"hello"
    server.err.wait_for("client 2: sent 5$")
    before = server.err.text[: server.err.text.index("client 2: sent 5")]
    assert before.count("client 1: EPOLL") < 5


# ---------------------------------------------------------------- a heartbeat


@pytest.mark.parametrize("wait_for", ["1", "2"])
def test_the_first_beat_is_sent_when_serving_starts(start: Start, wait_for: str) -> None:
    server = start("--every", "3600", "--wait-for", wait_for, "--connections", "3")
    clients = [server.seat() for _ in range(int(wait_for))]
    assert all(client.recv(100) == b"ping" for client in clients)
    server.seat()  # this client waits for the next beat
    server.settled()
    assert re.search(rf"\nstopped: .*, {wait_for} pings? sent\n", server.stop())


def test_a_beat_after_more_than_24_days_is_too_late_for_epoll_but_not_for_the_server(start: Start) -> None:
    server = start("--every", "1e9", "--wait-for", "1")
    assert read_exactly(server.seat(), 4) == b"ping"
    server.settled()
    assert server.stop().endswith(" 1 ping sent\n")


def test_each_beat_sends_one_ping_to_each_client(start: Start) -> None:
    server = start("--every", "0.05", "--connections", "3", "--wait-for", "2")
    one, two = server.seat(), server.seat()
    for client in (one, two):
        assert is_pings(read_exactly(client, 4 * 5))
    late = server.seat()
    assert read_exactly(late, 8) == b"pingping"
    one.shutdown(socket.SHUT_WR)
    received = 4 * 5 + len(read_all(one))
    server.err.wait_for(f"^client 1 left: 0 bytes received, {received // 4} pings sent, ")


# A clock that passes when the server waits: it then shows the exact time of each ping.
CLOCK = """
from types import SimpleNamespace
now, times, write = 0.0, [], server.write
server.time = SimpleNamespace(monotonic=lambda: now)

class Epoll(server.epoll.real):
    def __init__(self):
        super().__init__()
        self.wait, self.poll = self.poll, self.pass_time

    def pass_time(self, timeout=-1, *more):
        global now
        ready = self.wait(0.01 if timeout else 0, *more)
        if not ready and timeout > 0:
            now += timeout
        return ready

def record(file, data):
    global now
    if bytes(data) == b"ping" and len(times) < 12:
        times.append(now)
        if len(times) == 4:
            now += 5.5 * 0.25  # as if the server had been suspended
        if len(times) == 12:
            print(*times, flush=True)
    return write(file, data)

server.epoll, server.write = Epoll, record
"""


def test_missed_beats_are_skipped_and_the_schedule_is_kept(start: Start, failing: Failing) -> None:
    server = start("--every", "0.25", "--wait-for", "1", program=failing.program(CLOCK))
    server.seat()
    times = [float(time) / 0.25 for time in server.messages(r"^(0.0 .*)\n")[1].split()]
    assert times == [0, 1, 2, 3, 8.5, 9, 10, 11, 12, 13, 14, 15]


def test_a_drained_output_does_not_cause_a_beat(start: Start, failing: Failing) -> None:
    program = failing.program("server.OUTPUT_LIMIT = 10_000")
    server = start("--every", "3600", "--wait-for", "1", program=program, paused=True)
    client = server.seat()
    client.sendall(b"x" * 200_000)  # more than a pipe and the queue hold
    server.settled()
    server.out.going.set()
    eventually(lambda: server.out.data.count(b"x") == 200_000, "everything is shown")
    assert server.stop().endswith(" 200,000 bytes received, 1 ping sent\n")


def test_a_client_at_its_end_of_file_gets_no_more_beats(start: Start) -> None:
    server = start("--every", "0.01", "--wait-for", "1")
    client = server.seat()
    client.shutdown(socket.SHUT_WR)
    assert len(read_all(client)) in (0, 4)
    server.err.wait_for("^client 1 left: 0 bytes received, ")


def test_an_idle_client_keeps_no_chunk_in_memory(start: Start) -> None:
    server = start("--echo", "--quiet", "--connections", "200", "--wait-for", "1")
    clients = [server.seat() for _ in range(200)]
    memory = server.status("VmRSS")
    for client in clients:
        client.sendall(DATA[:50_000])
        assert read_exactly(client, 50_000) == DATA[:50_000]
    assert server.status("VmRSS") - memory < 2_000 + COMPILED, "kB"


def test_an_unread_heartbeat_stays_bounded(start: Start) -> None:
    server = start("--every", "0.001", "--connections", "300", "--wait-for", "300", shell=limited(1024, 1024))
    lazy = [server.connect(small=True) for _ in range(300)]
    server.err.wait_for("^serving")
    memory = server.status("VmRSS")
    data = b""
    while len(data) < 4 * 50:
        data += lazy[0].recv(4096)
    assert is_pings(data[: 4 * 50])
    assert server.status("VmRSS") - memory < 5_000 + COMPILED, "kB"


# ---------------------------------------------------------------- the trace


def traced(server: Server) -> str:
    """Return the log without the times, ports and figures that differ from run to run."""
    text = re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", server.stop())
    text = re.sub(r"after \d+\.\d\d\d s", "after TIME", text)
    return re.sub(r"^ *\d+\.\d\d\d  ", "  ", text, flags=re.M)


def test_the_trace_shows_an_echo(start: Start) -> None:
    server = start("--echo", "--trace", "--wait-for", "1")
    first = server.seat()
    server.settled()
    second = server.seat()
    server.settled()
    first.sendall(b"hello")
    assert read_exactly(first, 5) == b"hello"
    server.settled()
    first.sendall(b"bye")
    assert read_exactly(first, 3) == b"bye"
    server.settled()
    reset(first)
    server.err.wait_for("^client 1 was reset")
    server.settled()
    second.shutdown(socket.SHUT_WR)
    server.err.wait_for("^client 2 left")
    server.settled()
    text = traced(server)
    expected = """
  epoll_wait: 1 ready after TIME
    listener: EPOLLIN
client 1 connected from ADDRESS, 1 of 2 seats taken
      epoll_ctl: listener waits for a wake
    client 1: woken
      epoll_ctl: client 1 waits for EPOLLIN
    listener: woken
serving 1 client
      epoll_ctl: listener waits for EPOLLIN
    client 1: woken
  epoll_wait: 1 ready after TIME
    listener: EPOLLIN
client 2 connected from ADDRESS, 2 of 2 seats taken
      epoll_ctl: listener waits for a wake
    client 2: woken
      epoll_ctl: client 2 waits for EPOLLIN
  epoll_wait: 1 ready after TIME
    client 1: EPOLLIN
      client 1: received 5
      client 1: sent 5
  epoll_wait: 1 ready after TIME
    client 1: EPOLLIN
      client 1: received 3
      client 1: sent 3
  epoll_wait: 1 ready after TIME
    client 1: EPOLLIN EPOLLERR EPOLLHUP
client 1 was reset: 8 bytes received, 8 bytes sent, 1 of 2 seats taken
    listener: woken
      epoll_ctl: listener waits for EPOLLIN
  epoll_wait: 1 ready after TIME
    client 2: EPOLLIN
      client 2: end of file
client 2 left: 0 bytes received, 0 bytes sent, 0 of 2 seats taken
    listener: woken
  epoll_wait: 1 ready after TIME
    signals: EPOLLIN
stopped: 2 clients served, 8 bytes received, 8 bytes sent
"""
    assert text.endswith(expected), f"{text}\nends not with:{expected}"
    assert text.index("listening on") == 0
    assert "standard" not in text, "the outputs are not traced"


def test_the_trace_shows_each_beat_and_its_clients(start: Start) -> None:
    server = start("--every", "0.2", "--trace", "--wait-for", "2")
    clients = [server.seat(), server.seat()]
    assert all(read_exactly(client, 8) == b"pingping" for client in clients)
    server.settled()
    text = traced(server)
    for client in "client 1", "client 2":
        assert len(re.findall(f"\n    {client}: woken\n      {client}: sent 4\n", text)) >= 2, text


def test_the_trace_shows_pings(start: Start) -> None:
    server = start("--trace")
    clients = [server.seat(), server.seat()]
    assert is_pings(read_exactly(clients[0], 8))
    server.settled()
    text = traced(server)
    assert "    client 1: EPOLLOUT\n      client 1: sent " in text
    assert "      epoll_ctl: client 2 waits for EPOLLIN EPOLLOUT\n" in text
    figures = sum(int(figure.replace(",", "")) for figure in re.findall(r": sent ([\d,]+)$", text, re.M))
    assert f"stopped: 2 clients served, 0 bytes received, {figures // 4:,} pings sent\n" in text


def test_without_trace_nothing_is_traced(start: Start) -> None:
    server = start("--wait-for", "1")
    read_exactly(server.seat(), 4)
    assert "epoll" not in server.stop()


# ---------------------------------------------------------------- the command line


def parsed(monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["non_block_io_server.py", *options])
    return vars(non_block_io_server.arguments())


def test_each_option_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch) == {
        "host": "127.0.0.1",
        "port": 10001,
        "connections": 2,
        "wait_for": 2,
        "echo": False,
        "every": None,
        "quiet": False,
        "reuse_port": False,
        "trace": False,
    }
    assert parsed(monkeypatch, "--connections", "7")["wait_for"] == 7


@pytest.mark.parametrize(
    "options",
    [
        "--port 0",
        "--port 65535",
        "--connections 1",
        "--connections 10000000",
        "--connections 5 --wait-for 1",
        "--connections 5 --wait-for 5",
        "--every 0.001",
        "--every 1e9",
    ],
)
def test_each_bound_is_allowed(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    values = parsed(monkeypatch, *options.split())
    for option, value in zip(options.split()[::2], options.split()[1::2]):
        assert values[option.strip("-").replace("-", "_")] == float(value)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--port -1", "argument --port: must be from 0 to 65535"),
        ("--port 65536", "argument --port: must be from 0 to 65535"),
        ("--port http", "argument --port: invalid int value: 'http'"),
        ("--connections 0", "argument --connections: must be from 1 to 10000000"),
        ("--connections 10000001", "argument --connections: must be from 1 to 10000000"),
        ("--connections 2.5", "argument --connections: invalid int value: '2.5'"),
        ("--wait-for 0", "argument --wait-for: must be from 1 to 2, the number of --connections"),
        ("--wait-for 3", "argument --wait-for: must be from 1 to 2, the number of --connections"),
        (
            "--connections 5 --wait-for 6",
            "argument --wait-for: must be from 1 to 5, the number of --connections",
        ),
        *(
            (f"--every {wrong}", "argument --every: must be a finite number of seconds, at least 1e-9")
            for wrong in ("0", "-1", "nan", "inf", "1e999", "1e-320")
        ),
        ("--every soon", "argument --every: invalid float value: 'soon'"),
        ("--echo --every 1", "argument --every: not allowed with argument --echo"),
        *(
            (f"--host={host}", "argument --host: for every address use 0.0.0.0 (IPv4) or :: (also IPv6)")
            for host in ("*", "", "[]")
        ),
        ("--unknown", "unrecognized arguments: --unknown"),
        ("extra", "unrecognized arguments: extra"),
    ],
)
def test_wrong_usage_ends_with_one_error_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        parsed(monkeypatch, *options.split())
    assert exit.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: non_block_io_server.py ")
    assert shown.err.endswith(f"\nnon_block_io_server.py: error: {message}\n")


def test_wrong_usage_has_status_2_and_help_status_0() -> None:
    result = run(SERVER, "--port", "x")
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    result = run(SERVER, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    for part in (
        "Serve TCP clients in one thread: send them pings, and print what they send.",
        "address to listen on (default: 127.0.0.1)",
        "port; 0 is any free one (default: 10001)",
        "number of seats (default: 2)",
        "clients are connected (default: N)",
        "python3 non_block_io_server.py python3 client.py",
        "python3 non_block_io_server.py --echo --port 0 --connections 100 --wait-for 1",
        "python3 non_block_io_server.py --every 1 --wait-for 1",
        "With --host 0.0.0.0 (every IPv4 address) or :: (also IPv6), anyone who can reach this machine",
        "exit status: 0 stopped by SIGINT, SIGTERM or SIGHUP 1 the server cannot continue",
        "2 wrong usage",
    ):
        assert part in text, part
