"""The options: seats, an echo, a heartbeat, load, and the trace."""

from __future__ import annotations

import re
import resource
import signal
import socket
import struct
import subprocess
import time
from contextlib import suppress
from typing import Any, Callable

import pytest
from conftest import DEADLINE, Server, eventually, is_pings, read_all, read_exactly

Start = Callable[..., Server]


def limited(soft: int, hard: int) -> Callable[[], None]:
    """What a process is to do before it starts, to have these limits on open files."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------- seats


def test_begins_when_as_many_are_there_as_it_waits_for(start: Start) -> None:
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


def test_waits_for_one(start: Start) -> None:
    server = start("--wait-for", "1")
    assert "waiting for 1 client\n" in server.err.text
    assert read_exactly(server.seat(), 4) == b"ping"
    server.err.wait_for("^serving 1 client$")


def test_raises_the_soft_limit_on_open_files(start: Start) -> None:
    server = start("--connections", "300", "--wait-for", "1", preexec_fn=limited(64, 1024))
    clients = [server.seat() for _ in range(200)]
    assert read_exactly(clients[-1], 4) == b"ping"
    assert "limit" not in server.err.text


def test_says_that_the_hard_limit_is_too_low_and_does_not_spin(start: Start) -> None:
    server = start("--connections", "300", "--wait-for", "1", "--echo", preexec_fn=limited(64, 64))
    server.err.wait_for(r"^the seats need 316 open files, but the hard limit is 64\b")
    clients = [server.connect() for _ in range(70)]
    server.err.wait_for("^not accepting for now: Too many open files$")
    server.settled()
    seated = server.err.text.count(" connected from ")
    for number, client in enumerate(clients[:seated]):
        client.sendall(b"still here %d" % number)
        assert read_exactly(client, 11) == b"still here "
    clients[0].close()
    server.err.wait_for(f"^client {seated + 1} connected")  # a seat was given back
    server.settled()
    assert server.err.text.count("not accepting") < 5


def test_tries_again_where_no_seat_will_be_given_back(start: Start) -> None:
    server = start("--connections", "9", "--wait-for", "9")
    enough = server.descriptors()
    for limit in (enough, 1000):
        subprocess.run(["prlimit", f"--nofile={limit}:1000", "--pid", str(server.process.pid)], check=True)
        if limit == enough:
            clients = [server.connect() for _ in range(9)]
            server.err.wait_for("^not accepting for now: Too many open files$")
            server.settled()
    assert all(read_exactly(client, 4) == b"ping" for client in clients)


def test_accepts_again_when_the_shortage_is_over(start: Start) -> None:
    server = start("--connections", "9", "--wait-for", "1")
    first = server.seat()
    pid = str(server.process.pid)
    subprocess.run(["prlimit", f"--nofile={server.descriptors()}:1000", "--pid", pid], check=True)
    second = server.connect()
    server.err.wait_for("^not accepting for now: Too many open files$")
    subprocess.run(["prlimit", "--nofile=1000:1000", "--pid", pid], check=True)
    assert read_exactly(second, 4) == b"ping"
    assert read_exactly(first, 4) == b"ping"


def test_many_clients_cost_little(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    many = min(10_000, hard - 200)
    server = start("--connections", "10000", "--wait-for", "1", "--echo")
    try:
        first = server.seat()
        first.sendall(b"warm")
        read_exactly(first, 4)
        memory = server.status("VmRSS")
        clients = [server.connect() for _ in range(many - 1)]
        server.err.wait_for(f"^client {many} connected")
        server.settled()
        assert server.status("VmRSS") - memory < 15_000 * many / 10_000, "kB"
        for client in clients[::1000]:
            client.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"
    finally:
        server.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_burst_of_arrivals_does_not_starve_the_connected(start: Start) -> None:
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
    assert text[: text.index("received 6, sent 6")].count(" connected from ") < 100


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

    eventually(lambda: sum(seated()) == 60, "each is told of once")
    assert min(seated()) > 0, "the kernel spreads the clients"


# ---------------------------------------------------------------- an echo


def talk(client: socket.socket, data: bytes) -> bytes:
    """Send the data, half-close, and read to the end, both at once."""
    client.setblocking(False)
    left, back, said_all, ended = memoryview(data), [], False, False
    end = time.monotonic() + DEADLINE
    while not ended and time.monotonic() < end:
        with suppress(BlockingIOError):
            while left:
                left = left[client.send(left[:1_000_000]) :]
            if not said_all:
                client.shutdown(socket.SHUT_WR)
                said_all = True
        with suppress(BlockingIOError):
            piece = client.recv(1 << 20)
            back.append(piece)
            ended = not piece
    return b"".join(back)


DATA = bytes(range(256)) * 40_000


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, len(DATA)])
@pytest.mark.parametrize("quiet", [["--quiet"], []])
def test_echoes_to_the_last_byte(start: Start, size: int, quiet: Any) -> None:
    server = start("--wait-for", "1", "--echo", *quiet, stdout=subprocess.DEVNULL)
    assert talk(server.seat(), DATA[:size]) == DATA[:size]
    server.err.wait_for(rf"^client 1 left: {size:,} bytes? received, {size:,} bytes? sent, ")
    text = server.stop()
    assert re.search(
        rf"^stopped: 1 client served, {size:,} bytes? received, {size:,} bytes? sent$", text, re.M
    )


def test_echoes_and_shows(start: Start) -> None:
    server = start("--wait-for", "1", "--echo")
    assert talk(server.seat(), b"hello\n") == b"hello\n"
    server.messages(r"\Adata received.*\nhello\n\Z")


def test_shows_nothing_but_counts_when_quiet(start: Start) -> None:
    server = start("--wait-for", "1", "--quiet")
    client = server.seat()
    client.sendall(b"psst")
    client.shutdown(socket.SHUT_WR)
    read_all(client)
    server.err.wait_for("^client 1 left: 4 bytes")
    server.stop()
    assert server.out is not None
    assert server.out.rest() == ""


def test_who_does_not_read_its_echo_is_not_read_and_costs_nothing(start: Start) -> None:
    server = start("--echo", "--quiet")
    lazy, other = server.seat(), server.seat()
    memory = server.status("VmRSS")
    lazy.setblocking(False)
    data, sent = DATA * 5, 0
    for _ in range(3):  # send all that is taken
        with suppress(BlockingIOError):
            while sent < len(data):
                sent += lazy.send(data[sent : sent + 1_000_000])
        server.settled()  # it does not spin
    assert sent < len(data), "it stops reading"
    assert server.status("VmRSS") - memory < 2_000, "kB"
    other.sendall(b"nobody else notices")
    assert read_exactly(other, 19) == b"nobody else notices"
    lazy.settimeout(DEADLINE)
    assert read_exactly(lazy, sent) == data[:sent]
    assert talk(lazy, b"and on it goes") == b"and on it goes"


def test_an_echo_that_is_reset_with_bytes_unsent_neither_spins_nor_stays(start: Start) -> None:
    server = start("--echo", "--quiet")
    lazy, _ = server.seat(), server.seat()
    lazy.setblocking(False)
    for _ in range(3):
        with suppress(BlockingIOError):
            while True:
                lazy.send(DATA[:1_000_000])
        server.settled()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    lazy.close()
    server.err.wait_for("^client 1 was reset: ")
    server.settled()


def test_asks_for_writing_only_while_something_is_left(start: Start) -> None:
    server = start("--echo", "--trace", "--wait-for", "1", "--quiet")
    client = server.seat()
    for _ in range(10):
        client.sendall(b"hello")
        read_exactly(client, 5)
    server.settled()
    assert len(re.findall("epoll_ctl: client 1 waits", server.err.text)) == 1
    assert "EPOLLOUT" not in server.err.text


def test_a_bulk_echo_does_not_hold_up_a_quiet_one(start: Start) -> None:
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
    server.err.wait_for("received 5, sent 5")
    before = server.err.text[: server.err.text.index("received 5, sent 5")]
    assert before.count("client 1: EPOLL") < 5


# ---------------------------------------------------------------- a heartbeat


def test_beats(start: Start) -> None:
    server = start("--every", "0.05", "--connections", "3", "--wait-for", "2")
    one, two = server.seat(), server.seat()
    times = []
    for _ in range(30):
        assert one.recv(100) == b"ping", "one ping a beat, and each by itself"
        times.append(time.monotonic())
    assert is_pings(read_exactly(two, 4 * 30))
    beats = (times[29] - times[0]) / 0.05
    assert 28.5 < beats < 29.5 or beats > 29.5, "never early"
    late = server.seat()
    assert read_exactly(late, 8) == b"pingping"
    assert server.err.text.count("pings sent") == 0


def test_does_not_make_up_for_lost_time(start: Start) -> None:
    server = start("--every", "0.02", "--wait-for", "1", "--trace", "--quiet")
    client = server.seat()
    read_exactly(client, 40)
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(0.25)  # a dozen beats
    server.process.send_signal(signal.SIGCONT)
    read_exactly(client, 4 * 20)
    server.process.send_signal(signal.SIGTERM)
    server.err.wait_for("^stopped")
    times = [float(time) for time in re.findall(r"^ *([\d.]+) +beat: ", server.err.text, re.M)]
    pauses = [after - before for before, after in zip(times, times[1:])]
    gap = pauses.index(max(pauses))
    assert max(pauses) > 0.2
    assert sum(pauses[gap + 1 : gap + 4]) > 0.04, "no burst follows"
    off = [(time - times[0] + 0.01) % 0.02 - 0.01 for time in times[gap + 2 :]]
    assert any(abs(seconds) < 0.004 for seconds in off), "the beats keep to the first one's time"


def test_a_heartbeat_that_is_not_read_stays_bounded(start: Start) -> None:
    server = start(
        "--every", "0.001", "--connections", "300", "--wait-for", "300", preexec_fn=limited(1024, 1024)
    )
    lazy = [server.connect(small=True) for _ in range(300)]
    server.err.wait_for("^serving")
    memory = server.status("VmRSS")
    data = b""
    while len(data) < 4 * 50:
        data += lazy[0].recv(4096)
    assert is_pings(data[: 4 * 50])
    assert server.status("VmRSS") - memory < 5_000, "kB"


# ---------------------------------------------------------------- the trace


def test_traces_what_the_loop_does(start: Start) -> None:
    server = start("--trace")
    first = server.seat()
    first.sendall(b"hello")
    second = server.seat()
    server.settled()
    text = server.err.text
    assert "EPOLLIN EPOLLOUT" in text
    assert second
