"""Tests of the server without options: the lecture's server."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Generator

import pytest
from conftest import DEADLINE, SERVER, Server, eventually, is_pings, read_all, read_exactly
from failing import Failing

import non_block_io_server

Start = Callable[..., Server]


def reset(client: socket.socket) -> None:
    """Close with a reset, not with an end of file."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.fixture
def failing(tmp_path: Path) -> Failing:
    return Failing(tmp_path)


def run(*options: str, **popen: Any) -> subprocess.CompletedProcess[str]:
    """Run a server that ends on its own."""
    command = [sys.executable, SERVER, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, **popen)


# ---------------------------------------------------------------- the start of serving, and the streams


def test_serving_starts_with_the_second_client(start: Start) -> None:
    server = start()
    first = server.seat()
    first.sendall(b"early")
    server.settled()
    first.setblocking(False)
    with pytest.raises(BlockingIOError):
        first.recv(4)
    assert server.out and server.out.data == b""
    second = server.seat()
    assert second.recv(4) == b"ping"
    first.settimeout(DEADLINE)
    assert first.recv(4) == b"ping"
    server.messages(r"^early$")


def test_a_message_of_a_client_that_left_while_it_waited_is_printed(start: Start) -> None:
    server = start()
    first = server.seat()
    first.sendall(b"farewell")
    first.close()
    server.settled()
    second = server.seat()
    server.messages(r"^farewell$")
    assert read_exactly(second, 4) == b"ping"
    server.err.wait_for(r"^client 1 left: 8 bytes received, ")


def test_a_message_has_a_header_and_its_text(start: Start) -> None:
    server = start()
    first, second = server.seat(), server.seat()
    first.sendall(b"Some message...")
    port = first.getsockname()[1]
    server.messages(rf"\Adata received\.\.\. \(client 1, 127\.0\.0\.1:{port}\)\nSome message\.\.\.\n\Z")
    second.sendall(b"And another\n")
    port = second.getsockname()[1]
    server.messages(rf"\.\.\.\ndata received\.\.\. \(client 2, 127\.0\.0\.1:{port}\)\nAnd another\n\Z")


def test_the_log_shows_two_clients(start: Start) -> None:
    server = start()
    clients = [server.seat(), server.seat()]
    ports = [client.getsockname()[1] for client in clients]
    clients[0].sendall(b"12345")
    server.messages("^12345$")
    assert is_pings(read_exactly(clients[0], 4000))
    clients[0].shutdown(socket.SHUT_WR)
    pings = len(b"ping" * 1000 + read_all(clients[0])) // 4
    server.err.wait_for("^client 1 left")
    reset(clients[1])
    server.err.wait_for("^client 2 was reset")
    lines = server.stop().splitlines()
    assert lines[0] == f"listening on 127.0.0.1:{server.port}, waiting for 2 clients"
    assert lines[1] == f"client 1 connected from 127.0.0.1:{ports[0]}, 1 of 2 seats taken"
    assert lines[2] == f"client 2 connected from 127.0.0.1:{ports[1]}, 2 of 2 seats taken"
    assert lines[3] == "serving 2 clients"
    assert lines[4] == f"client 1 left: 5 bytes received, {pings:,} pings sent, 1 of 2 seats taken"
    assert re.match(r"client 2 was reset: 0 bytes received, [\d,]+ pings sent, 0 of 2 seats taken$", lines[5])
    sent = pings + int(re.findall(r"([\d,]+) pings", lines[5])[0].replace(",", ""))
    assert lines[6:] == [f"stopped: 2 clients served, 5 bytes received, {sent:,} pings sent"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("clients", [0, 1, 2])
def test_a_signal_stops_the_server_with_a_summary(start: Start, number: int, clients: int) -> None:
    server = start()
    for _ in range(clients):
        server.seat()
    last = server.stop(number).splitlines()[-1]
    assert re.match(rf"stopped: {clients if clients == 2 else 0} clients served, 0 bytes received, ", last)


def test_the_stream_is_whole_pings_for_every_size_of_read(start: Start) -> None:
    server = start()
    small, other = server.seat(small=True), server.seat()
    other.sendall(b"x")
    data = b""
    for size in (1, 2, 3, 5, 7, 4093, 65537):
        data += read_exactly(small, size)
    data += read_exactly(small, 2_000_000)
    small.shutdown(socket.SHUT_WR)
    assert is_pings(data + read_all(small))  # the last ping is whole
    assert is_pings(read_exactly(other, 4_000_000))


@pytest.mark.parametrize("read", [1, 6, 1001, 12_345])
def test_no_ping_is_cut_when_the_server_stops(start: Start, read: int) -> None:
    server = start()
    small, _ = server.seat(small=True), server.seat()
    data = read_exactly(small, read)
    server.settled()
    server.process.send_signal(signal.SIGTERM)
    assert is_pings(data + read_all(small))
    server.stop()  # a second signal does no harm


@pytest.mark.parametrize("size", [1001, 1002, 1003])
def test_the_rest_of_a_cut_ping_is_sent(start: Start, failing: Failing, size: int) -> None:
    program = failing.program(
        "sendfile = server.os.sendfile\n"
        f"server.os.sendfile = lambda out, file, at, size: sendfile(out, file, at, min(size, {size}))"
    )
    server = start("--wait-for", "1", program=program)
    client = server.seat(small=True)
    data = read_exactly(client, 100_001)
    client.shutdown(socket.SHUT_WR)
    assert is_pings(data + read_all(client))


@pytest.mark.parametrize("size", [3, 1001, 1002])
def test_the_rest_of_a_cut_ping_is_sent_without_a_file_in_memory(
    start: Start, failing: Failing, size: int
) -> None:
    program = failing.program(
        "del server.os.memfd_create\n"
        "write = server.write\n"
        f"server.write = lambda file, data: write(file, data[:{size}])"
    )
    server = start("--wait-for", "1", program=program)
    client = server.seat(small=True)
    data = read_exactly(client, 10_001)
    client.shutdown(socket.SHUT_WR)
    assert is_pings(data + read_all(client))


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


def test_a_heartbeat_and_an_echo_survive_sends_of_one_byte(start: Start, failing: Failing) -> None:
    program = failing.program("write = server.write; server.write = lambda file, data: write(file, data[:1])")
    client = start("--every", "0.01", "--wait-for", "1", program=program).seat()
    assert read_exactly(client, 20) == b"ping" * 5
    client.shutdown(socket.SHUT_WR)
    assert len(read_all(client)) % 4 == 0
    client = start("--echo", "--wait-for", "1", "--quiet", program=program).seat()
    client.sendall(b"hello world")
    client.shutdown(socket.SHUT_WR)
    assert read_all(client) == b"hello world"


def test_a_client_that_sends_endlessly_gets_pings_and_delays_no_other(start: Start) -> None:
    server = start("--quiet")
    busy, other = server.seat(), server.seat()
    busy.setblocking(False)
    received = b""
    while len(received) < 1_000_000:
        with suppress(BlockingIOError):
            busy.send(b"x" * 65536)
        with suppress(BlockingIOError):
            received += busy.recv(65536)
    assert is_pings(received[:1_000_000])
    assert is_pings(read_exactly(other, 1_000_000))


def test_a_third_client_waits_for_a_free_seat(start: Start) -> None:
    server = start()
    first, second = server.seat(), server.seat()
    third = server.connect()
    third.sendall(b"waiting")
    server.settled()
    assert "client 3" not in server.err.text
    first.close()
    assert read_exactly(third, 8) == b"pingping"
    server.messages("^waiting$")
    server.err.wait_for(r"^client 3 connected from .*, 2 of 2 seats taken$")
    assert read_exactly(second, 4) == b"ping"


# ---------------------------------------------------------------- probes: clients that send nothing


def probe(server: Server, leave: Callable[[socket.socket], None]) -> None:
    """Connect and leave before the server can accept the connection."""
    server.process.send_signal(signal.SIGSTOP)
    leave(server.connect())
    server.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("leave", [lambda client: client.close(), reset])
@pytest.mark.parametrize("wait_for", [1, 2, 3])
def test_a_probe_before_serving_does_not_count(start: Start, wait_for: int, leave: Any) -> None:
    server = start("--connections", "3", "--wait-for", str(wait_for))
    clients: list[socket.socket] = []
    while len(clients) < wait_for:
        assert "serving" not in server.err.text
        probe(server, leave)
        server.err.wait_for(
            rf"^client {2 * len(clients) + 1} (left|was reset): 0 bytes received, 0 pings sent, "
            f"not counted as a client, {len(clients)} of 3 seats taken$"
        )
        clients.append(server.seat())
    server.err.wait_for(f"^serving {wait_for} clients?$")
    assert all(read_exactly(client, 4) == b"ping" for client in clients)
    assert re.search(rf"\nstopped: {wait_for} clients? served, 0 bytes received, ", server.stop())


def test_a_probe_while_serving_counts(start: Start) -> None:
    server = start("--wait-for", "1", "--every", "3600")
    server.seat()
    server.seat().close()
    server.err.wait_for("^client 2 left: 0 bytes received, 0 pings sent, 1 of 2 seats taken$")
    assert "\nstopped: 2 clients served" in server.stop()


@pytest.mark.parametrize("leave", [lambda client: client.close(), reset])
def test_serving_starts_when_enough_clients_are_connected_at_the_same_time(start: Start, leave: Any) -> None:
    server = start("--connections", "3", "--wait-for", "2", "--echo")
    first = server.seat()
    server.settled()
    server.process.send_signal(signal.SIGSTOP)  # it then finds the close and the connect in one batch
    second = server.connect()
    leave(first)
    server.process.send_signal(signal.SIGCONT)
    server.err.wait_for("^client 1 (left|was reset): .*, not counted as a client, ")
    server.settled()
    assert "serving" not in server.err.text
    server.seat()
    server.err.wait_for("^serving 2 clients$")
    second.sendall(b"hello")
    assert read_exactly(second, 5) == b"hello"


def test_a_client_that_sent_a_message_and_left_counts_but_a_probe_does_not(start: Start) -> None:
    server = start("--connections", "3", "--wait-for", "2")
    first = server.seat()
    first.sendall(b"farewell")
    first.close()
    probe(server, reset)
    server.err.wait_for("^client 2 was reset: .*, not counted as a client, 1 of 3 seats taken$")
    assert is_pings(read_exactly(server.seat(), 8))
    server.messages("^farewell$")
    server.err.wait_for("^serving 2 clients$")
    assert "\nstopped: 2 clients served, 8 bytes received, " in server.stop()


# ---------------------------------------------------------------- an idle server sleeps


def test_an_idle_server_sleeps(start: Start) -> None:
    server = start()
    server.settled(0.1)  # no client
    server.seat()
    server.settled(0.1)  # one client waits
    server.seat()
    server.settled(0.1)  # two clients do not read
    server.connect()
    server.settled(0.1)  # a third one waits in the backlog


@pytest.mark.parametrize("leave", [lambda client: client.close(), reset])
def test_a_server_without_clients_sleeps(start: Start, leave: Callable[[socket.socket], None]) -> None:
    server = start()
    for client in (server.seat(), server.seat()):
        leave(client)
    server.err.wait_for("0 of 2 seats taken")
    server.settled(0.1)


def test_an_event_of_a_task_that_the_same_batch_has_ended_does_no_harm() -> None:
    loop, resumed = non_block_io_server.Loop(), []
    pairs = [socket.socketpair() for _ in range(2)]

    def task(other: int) -> Generator[int, int, None]:
        events = yield select.EPOLLIN
        resumed.append(events)
        if events:  # the other one is also ready
            loop.resume([(other, 0)])
            loop.running = False

    (ours, _), (theirs, _) = pairs
    for descriptor, other in (ours.fileno(), theirs.fileno()), (theirs.fileno(), ours.fileno()):
        loop.start("task", descriptor, task(other))
    for _, end in pairs:
        end.send(b"ping")
    thread = threading.Thread(target=loop.run, daemon=True)  # a failed test does not wait for it
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert resumed == [select.EPOLLIN, 0]


def test_a_client_that_does_not_read_gets_few_bytes(start: Start) -> None:
    server = start()
    server.seat(), server.seat()
    server.settled()
    sent = re.findall(r"([\d,]+) pings sent$", server.stop())[-1]
    assert 0 < 4 * int(sent.replace(",", "")) < 2 * 400_000  # megabytes without TCP_NOTSENT_LOWAT


# ---------------------------------------------------------------- messages


def test_a_large_message_does_not_delay_another_client(start: Start) -> None:
    server = start()
    bulk, quiet = server.seat(), server.seat()
    server.settled()
    server.process.send_signal(signal.SIGSTOP)  # so that both arrive before it reads
    bulk.setblocking(False)
    size = 0
    with suppress(BlockingIOError):
        while size < 10_000_000:
            size += bulk.send(b"x" * 65536)
    quiet.sendall(b"quick\n")
    server.process.send_signal(signal.SIGCONT)
    server.messages("^quick$")
    eventually(lambda: server.out.data.count(b"x") == size, "everything is shown")  # type: ignore[union-attr]
    assert size > 1_000_000
    assert server.out.data.index(b"quick") < 300_000  # type: ignore[union-attr]


# ---------------------------------------------------------------- every way to disconnect


def leave_unread(client: socket.socket) -> None:
    client.sendall(b"last message")
    client.close()  # unread pings make this a reset


def leave_with_a_reset(client: socket.socket) -> None:
    client.sendall(b"last message")
    reset(client)


def leave_with_a_half_close(client: socket.socket) -> None:
    client.sendall(b"last message")
    client.shutdown(socket.SHUT_WR)
    assert is_pings(b"ping" + read_all(client))


WAYS = [leave_unread, leave_with_a_reset, leave_with_a_half_close]


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("options", [[], ["--every", "0.01"]])
def test_a_client_disconnects_and_its_last_message_is_printed(start: Start, options: Any, leave: Any) -> None:
    server = start(*options)
    first, second = server.seat(), server.seat()
    read_exactly(first, 4)
    leave(first)
    server.messages("^last message$")
    how = "left" if leave is leave_with_a_half_close else "was reset" if leave is leave_with_a_reset else ".*"
    server.err.wait_for(f"^client 1 {how}: 12 bytes received, .* 1 of 2 seats taken$")
    assert is_pings(read_exactly(second, 8))
    third = server.seat()
    assert is_pings(read_exactly(third, 8))
    server.stop()


@pytest.mark.parametrize("leave", WAYS[:2])
def test_a_waiting_client_that_sent_a_message_and_left_counts(start: Start, leave: Any) -> None:
    server = start()
    leave(server.seat())
    second = server.seat()
    server.messages("^last message$")
    assert is_pings(read_exactly(second, 8))


@pytest.mark.parametrize("leave", WAYS[:2])
def test_a_client_that_left_the_backlog_is_read(start: Start, leave: Any) -> None:
    server = start()
    first, _ = server.seat(), server.seat()
    leave(server.connect())
    first.close()
    server.messages("^last message$")
    server.err.wait_for("^client 3 (left|was reset): 12 bytes received, ")


def test_a_port_scan_does_no_harm(start: Start) -> None:
    server = start()
    for _ in range(50):
        reset(server.connect())
    server.err.wait_for("^client 50 was reset: 0 bytes")
    server.settled()
    first, second = server.seat(), server.seat()
    assert is_pings(read_exactly(first, 8) + read_exactly(second, 8))
    server.stop()


def test_an_urgent_byte_is_printed(start: Start) -> None:
    server = start("--wait-for", "1")
    client = server.seat()
    client.sendall(b"before ")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b" after\n")
    eventually(lambda: len(re.findall("before|!|after", server.out.text)) == 3, "all of it is shown")  # type: ignore[union-attr]
    server.settled()


def test_a_suspended_server_continues(start: Start) -> None:
    server = start("--wait-for", "1")
    client = server.seat()
    server.process.send_signal(signal.SIGSTOP)
    client.sendall(b"are you there?")
    server.process.send_signal(signal.SIGCONT)
    server.messages("^are you there")
    server.settled()


# ---------------------------------------------------------------- a stalled output stalls no client


NUMBERS = b"".join(b"%063d\n" % number for number in range(1 << 18))
F_SETPIPE_SZ = 1031  # from linux/fcntl.h; Python has it since 3.10
LINES = (b"x" * 63 + b"\n") * (1 << 18)


def fill(server: Server, client: socket.socket, data: bytes = LINES) -> int:
    """Send until the server reads no more; return a lower bound of the arrived bytes, without newlines."""
    client.setblocking(False)
    sent, before = 0, -1
    while sent > before:
        before = sent
        with suppress(BlockingIOError):
            while sent < len(data):
                sent += client.send(data[sent : sent + 65536])
        assert sent < len(data), "the server reads endlessly"
        server.settled()
    client.settimeout(DEADLINE)
    (unacknowledged,) = struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, b"1234"))
    arrived = sent - int(unacknowledged)
    return arrived - arrived // 64


def digits(shown: bytes) -> bytes:
    """Return the text of messages without headers, newlines and indents."""
    return re.sub(rb"data received.*|\s", b"", shown)


def test_a_stalled_standard_output_loses_nothing_and_stalls_no_other_client(start: Start) -> None:
    server = start(paused=True)
    writer, reader = server.seat(), server.seat()
    memory = server.status("VmRSS")
    read_exactly(writer, 100_000)
    arrived = fill(server, writer, NUMBERS)  # after this, it neither spins nor reads
    assert arrived > 1_000_000
    assert server.status("VmRSS") - memory < 20_000, "kB"
    assert is_pings(read_exactly(reader, 5_000_000)), "pings continue"
    reset(writer)  # while it is paused: the server does not spin, and keeps the data
    server.settled()
    assert "client 1 was reset" not in server.err.text
    assert server.out is not None
    server.out.going.set()
    server.err.wait_for("^client 1 was reset")
    eventually(lambda: len(digits(server.out.data)) >= arrived, "all data that had arrived is shown")  # type: ignore[union-attr]
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
        assert server.status("VmRSS") - memory < 2_000, "kB"
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


@pytest.mark.parametrize("options", [[], ["--echo"], ["--every", "0.05"]])
def test_a_standard_output_that_is_not_open_is_reported(start: Start, options: Any) -> None:
    server = start("--wait-for", "1", *options, stdout=None, preexec_fn=lambda: os.close(1))
    client = server.seat()
    client.sendall(b"hello")
    client.shutdown(socket.SHUT_WR)
    assert b"hello" not in read_all(client) or options == ["--echo"]
    server.err.wait_for("^client 1 left: 5 bytes")
    assert "standard output is not open" in server.stop()


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


def test_a_standard_error_that_is_closed_later_does_no_harm() -> None:
    command = [sys.executable, SERVER, "--port", "0", "--wait-for", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    first = process.stderr.readline().decode()
    process.stderr.close()
    port = int(re.findall(r":(\d+),", first)[0])
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
            assert read_exactly(client, 4) == b"ping"
    process.terminate()
    assert process.wait(DEADLINE) == 0
    process.communicate()


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


@pytest.mark.parametrize("kind", ["terminal", "socket"])
def test_a_stalled_terminal_or_socket_stalls_no_client(start: Start, kind: str) -> None:
    if kind == "terminal":
        ours, theirs = os.openpty()
    else:
        pair = socket.socketpair()
        ours, theirs = (os.dup(end.fileno()) for end in pair)
        for end in pair:
            end.close()
    server = start(stdout=theirs)
    writer, reader = server.seat(), server.seat()
    arrived = fill(server, writer)
    assert is_pings(read_exactly(reader, 5_000_000)), "pings continue"
    assert os.get_blocking(theirs), "it stays blocking for other programs"
    os.close(theirs)
    shown = 0
    while shown < arrived:
        shown += os.read(ours, 65536).count(b"x")
    os.close(ours)
    server.process.kill()


def test_one_stalled_pipe_for_both_outputs_loses_no_message_and_forges_no_header(
    failing: Failing,
) -> None:
    program = failing.program("server.OUTPUT_LIMIT = 50_000")
    command = [sys.executable, program, "--port", "0", "--connections", "300", "--wait-for", "1"]
    line = b"data received... (client 9, 10.0.0.1:9)\nZZZZZZ\n"  # no other line has a Z
    sent = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        port = int(re.findall(rb":(\d+),", process.stdout.readline())[0])
        fcntl.fcntl(process.stdout, F_SETPIPE_SZ, 4096)
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as forger:
            assert read_exactly(forger, 4) == b"ping"
            forger.setblocking(False)
            data = line * 20_000
            for _ in range(200):
                with suppress(BlockingIOError):
                    sent += forger.send(data[sent : sent + 10_000])
                with socket.create_connection(("127.0.0.1", port), DEADLINE) as other:
                    read_exactly(other, 4)
            process.terminate()
            shown = process.stdout.read().decode().splitlines()
    assert process.returncode == 0
    header = r"data received\.\.\. \(client 1, 127\.0\.0\.1:\d+\)"
    known = r"client \d+ (connected from|left:|was reset:) .* seats taken|serving 1 client"
    known += r"|[\d,]+ log lines dropped: standard output was full|stopped: .* log lines dropped"
    after_header = False
    for text in shown:
        assert after_header or text.startswith("  ") or re.fullmatch(f"{header}|{known}", text), text
        after_header = bool(re.fullmatch(header, text))
    received = int(re.findall(r"served, ([\d,]+) bytes", shown[-1])[0].replace(",", ""))
    assert 50_000 < received <= sent
    assert "".join(shown).count("Z") == data[:received].count(b"Z"), "every message is complete"


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


def test_a_start_without_descriptors_ends_with_one_line() -> None:
    limits = 6, 6
    result = run("--port", "0", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
    assert result.returncode == 1
    assert re.fullmatch(r".*Too many open files\n", result.stderr)


SHORT_FLUSH = "assert server.FLUSH_TIMEOUT; server.FLUSH_TIMEOUT = 0.1"


def test_bytes_that_cannot_be_written_at_the_end_are_counted(start: Start, failing: Failing) -> None:
    server = start(program=failing.program(SHORT_FLUSH), paused=True)
    writer, _ = server.seat(), server.seat()
    fill(server, writer, b"x" * len(LINES))
    server.process.send_signal(signal.SIGTERM)
    text = server.ended(0)
    figures = re.search(r"served, ([\d,]+) bytes .*\n.* stalled: ([\d,]+) bytes not written\n", text)
    assert figures is not None, text
    received, lost = (int(figure.replace(",", "")) for figure in figures.groups())
    assert server.out is not None
    server.out.going.set()
    shown = server.out.rest()
    header = shown[: shown.index("\n") + 1]
    assert 0 < lost < received
    assert (len(shown) + lost - received) % len(header + "\n") == 0, "only headers and newlines are added"


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


def test_a_slow_reader_does_not_delay_the_end_for_long(start: Start, failing: Failing) -> None:
    server = start(
        program=failing.program("assert server.DRAIN_TIMEOUT; server.DRAIN_TIMEOUT = 0.1"), paused=True
    )
    writer, _ = server.seat(), server.seat()
    fill(server, writer)
    server.process.send_signal(signal.SIGTERM)
    assert server.out is not None
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
    assert server.out is not None
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
    assert server.out is not None
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
    assert server.status("VmRSS") - memory < 4_000, "kB"
    assert server.out is not None
    server.out.going.set()
    server.stop()
    assert server.out.rest().count("\\x00") == 6_000_000


def test_everything_is_written_before_the_end(start: Start) -> None:
    server = start(paused=True)
    writer, _ = server.seat(), server.seat()
    fill(server, writer)
    server.process.send_signal(signal.SIGTERM)
    assert server.out is not None
    server.out.going.set()
    text = server.stop()
    assert "stalled" not in text
    assert text.splitlines()[-1].startswith("stopped: ")
    received = int(re.findall(r"served, ([\d,]+) bytes", text)[0].replace(",", ""))
    assert server.out.rest().count("x") == received - received // 64 > 1_000_000


# ---------------------------------------------------------------- a server that cannot start


def test_a_port_in_use_is_reported(start: Start) -> None:
    server = start()
    result = run("--port", str(server.port))
    assert result.returncode == 1
    assert re.match(
        rf"cannot listen on 127\.0\.0\.1:{server.port}: address already in use \(.*--port\)\n\Z",
        result.stderr,
    )


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "2001:db8::1", "nowhere.invalid", "x" * 70, "a..b", "999.1.1.1"]
)
def test_an_address_that_cannot_be_used_is_reported(host: str) -> None:
    result = run("--port", "0", "--host", host)
    assert result.returncode == 1
    assert re.match(
        rf"cannot listen on {re.escape(f'[{host}]' if ':' in host else host)}:0: .+\n\Z", result.stderr
    )


# ---------------------------------------------------------------- the address to listen on


def name_of(address: Any, host: str) -> str:
    mapped = "::ffff:" if host == "::" and "." in address[0] else ""
    return f"[{mapped}{address[0]}]:{address[1]}" if ":" in host else f"{address[0]}:{address[1]}"


@pytest.mark.parametrize(
    "host, name, reached",
    [
        ("127.0.0.1", "127.0.0.1", ["127.0.0.1"]),
        ("localhost", "127.0.0.1", ["127.0.0.1"]),
        ("0.0.0.0", "0.0.0.0", ["127.0.0.1", "127.0.0.2"]),
        ("", "0.0.0.0", ["127.0.0.1", "127.0.0.2"]),
        ("::1", "[::1]", ["::1"]),
        ("::", "[::]", ["::1", "127.0.0.1"]),
    ],
)
def test_it_listens_on_the_address_of_a_host(start: Start, host: str, name: str, reached: Any) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = start("--host", host, "--wait-for", "1")
    assert server.err.text.startswith(f"listening on {name}:{server.port}, ")
    for address in reached:
        with socket.create_connection((address, server.port), DEADLINE) as client:
            assert read_exactly(client, 4) == b"ping"
            server.err.wait_for(rf"connected from {re.escape(name_of(client.getsockname(), host))}, ")


def test_empty_brackets_are_no_address(start: Start) -> None:
    assert run("--port", "0", "--host", "[]").stderr == "cannot listen on :0: Name or service not known\n"


@pytest.mark.parametrize("host", ["[::1]", "[127.0.0.1]"])
def test_an_address_may_have_brackets(start: Start, host: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = start("--host", host)
    shown = host if ":" in host else "127.0.0.1"
    assert server.err.text.startswith(f"listening on {shown}:{server.port}, ")


ADDRESSES = """
addresses = {addresses}
def getaddrinfo(host, port, *arguments, **options):
    assert host in (b"example.test", "example.test")
    return [(server.socket.AF_INET, 1, 6, "", (address, port)) for address in addresses]
real = server.socket
class Module:
    def __getattr__(self, name):
        return getaddrinfo if name == "getaddrinfo" else getattr(real, name)
server.socket = Module()
"""


def test_each_address_of_a_host_is_tried(start: Start, failing: Failing) -> None:
    failing.fail("bind", errno.EADDRNOTAVAIL)
    program = failing.program(ADDRESSES.format(addresses=["127.0.0.2", "127.0.0.3"]))
    server = start("--host", "example.test", program=program)
    assert server.err.text.startswith("listening on 127.0.0.3:")
    first, second = server.seat(), server.seat()
    assert is_pings(read_exactly(first, 4) + read_exactly(second, 4))
    assert failing.count() == 1


def test_a_host_without_usable_address_reports_the_first_reason(failing: Failing) -> None:
    failing.fail("bind", errno.EACCES)
    program = failing.program(ADDRESSES.format(addresses=["127.0.0.3", "192.0.2.1"]))
    command = [sys.executable, program, "--port", "0", "--host", "example.test"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "cannot listen on example.test:0: Permission denied\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_works_while_old_connections_exist(start: Start, number: int) -> None:
    server = start()
    clients = [server.seat(), server.seat()]
    read_exactly(clients[0], 4)
    server.process.send_signal(number)
    server.process.wait(DEADLINE)
    again = start("--port", str(server.port))  # while the old connections exist
    first, second = again.seat(), again.seat()
    assert is_pings(read_exactly(first, 4) + read_exactly(second, 4))
