"""Tests of the server without options: the lecture's server."""

from __future__ import annotations

import errno
import itertools
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any, Callable

import pytest
from conftest import (
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

# ---------------------------------------------------------------- the start of serving, and the streams


def test_serving_starts_with_the_second_client(start: Start) -> None:
    server = start()
    first = server.seat()
    first.sendall(b"early")
    server.settled()
    first.setblocking(False)
    with pytest.raises(BlockingIOError):
        first.recv(4)
    assert server.out.data == b""
    second = server.seat()
    assert second.recv(4) == b"ping"
    first.settimeout(DEADLINE)
    assert first.recv(4) == b"ping"
    server.messages(r"^early$")


@pytest.mark.parametrize(
    "options, popen",
    [
        (["--trace"], {}),
        (["--trace", "--echo", "--quiet"], {}),
        (
            ["--connections", "9999"],
            {"shell": "ulimit -n 64"},
        ),
        ([], {"shell": "exec >&-"}),
        (["--every", "1"], {"shell": "exec <&-"}),
    ],
)
def test_the_first_line_shows_the_address(start: Start, options: Any, popen: Any) -> None:
    server = start(*options, **popen)
    count = "9,999" if "9999" in options else "2"
    assert server.err.text.startswith(f"listening on 127.0.0.1:{server.port}, waiting for {count} clients\n")


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


def test_a_burst_is_accepted_in_parts_and_only_while_a_seat_is_free(start: Start) -> None:
    server = start("--connections", "30", "--trace")
    server.process.send_signal(signal.SIGSTOP)
    for _ in range(40):
        server.connect()
    server.process.send_signal(signal.SIGCONT)
    server.err.wait_for("^serving 30 clients$")
    server.settled()
    parts = server.stop().split("  listener: EPOLLIN\n")[1:]
    assert [part.count(" connected from ") for part in parts] == [16, 14]


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


def test_a_probe_beside_a_client_that_leaves_does_not_start_serving(start: Start) -> None:
    server = start("--echo", "--wait-for", "2", "--connections", "5")
    first = server.seat()
    server.process.send_signal(signal.SIGSTOP)
    first.close()  # this event wakes the listener first
    probe = server.connect()
    server.connect()
    probe.close()
    server.process.send_signal(signal.SIGCONT)
    server.err.wait_for("^client 2 left: 0 bytes received, 0 bytes sent, not counted as a client, ")
    server.connect()
    server.err.wait_for("^serving 2 clients")


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
    loop, resumed, ended = non_block_io_server.Loop(), [], []
    loop.on_end = lambda descriptor, error: ended.append((descriptor, error))
    pairs = [socket.socketpair() for _ in range(2)]

    async def task(other: int) -> None:
        resumed.append(await non_block_io_server.ready(select.EPOLLIN))
        loop.end(other)  # it is also ready: its event comes later in this batch
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
    descriptors = {ours.fileno(), theirs.fileno()}
    for end in itertools.chain(*pairs):
        end.close()
    loop.close()
    assert resumed == [select.EPOLLIN]
    assert {descriptor for descriptor, _ in ended} == descriptors
    assert [error for _, error in ended] == [None, None]


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
    eventually(lambda: server.out.data.count(b"x") == size, "everything is shown")
    assert size > 1_000_000
    assert server.out.data.index(b"quick") < 300_000


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
    eventually(lambda: len(re.findall("before|!|after", server.out.text)) == 3, "all of it is shown")
    server.settled()


def test_a_suspended_server_continues(start: Start) -> None:
    server = start("--wait-for", "1")
    client = server.seat()
    server.process.send_signal(signal.SIGSTOP)
    client.sendall(b"are you there?")
    server.process.send_signal(signal.SIGCONT)
    server.messages("^are you there")
    server.settled()


# ---------------------------------------------------------------- a server that cannot start

GETADDRINFO = """
real = server.socket
class Module:
    def __getattr__(self, name):
        return getaddrinfo if name == "getaddrinfo" else getattr(real, name)
server.socket = Module()
"""
ADDRESSES = """
addresses = {addresses}
def getaddrinfo(host, port, *arguments, **options):
    assert host in (b"example.test", "example.test")
    families = [server.socket.AF_INET, server.socket.AF_INET6]
    return [(families[":" in address], 1, 6, "", (address, port)) for address in addresses]
"""


def test_a_start_without_descriptors_ends_with_one_line() -> None:
    command = ["sh", "-c", 'ulimit -n 6; exec "$@"', "sh", sys.executable, SERVER, "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert result.returncode == 1
    assert re.fullmatch(r".*Too many open files\n", result.stderr)


def test_a_port_in_use_is_reported(start: Start) -> None:
    server = start()
    result = run(SERVER, "--port", str(server.port))
    assert result.returncode == 1
    assert re.match(
        rf"cannot listen on 127\.0\.0\.1:{server.port}: address already in use \(.*--port\)\n\Z",
        result.stderr,
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "\xe9" * 70, "\xe9..b"])
def test_an_address_that_cannot_be_used_is_reported(host: str) -> None:
    result = run(SERVER, "--port", "0", "--host", host.encode())
    assert result.returncode == 1
    shown = f"[{host}]" if ":" in host else host
    assert re.match(rf"cannot listen on {re.escape(shown)}:0: .+\n\Z", result.stderr)


def test_a_host_that_does_not_exist_is_reported(failing: Failing) -> None:
    """The real name service would ask a server in the network."""
    code = "def getaddrinfo(*_): raise server.socket.gaierror(-2, 'Name or service not known')\n"
    result = run(failing.program(f"{code}{GETADDRINFO}"), "--port", "0", "--host", "nowhere.invalid")
    assert result.returncode == 1
    assert result.stderr == "cannot listen on nowhere.invalid:0: Name or service not known\n"


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


@pytest.mark.parametrize("host", ["[::1]", "[127.0.0.1]"])
def test_an_address_may_have_brackets(start: Start, host: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = start("--host", host)
    shown = host if ":" in host else "127.0.0.1"
    assert server.err.text.startswith(f"listening on {shown}:{server.port}, ")


def test_each_address_of_a_host_is_tried(start: Start, failing: Failing) -> None:
    failing.fail("bind", errno.EADDRNOTAVAIL)
    program = failing.program(ADDRESSES.format(addresses=["127.0.0.2", "127.0.0.3"]) + GETADDRINFO)
    server = start("--host", "example.test", program=program)
    assert server.err.text.startswith("listening on 127.0.0.3:")
    first, second = server.seat(), server.seat()
    assert is_pings(read_exactly(first, 4) + read_exactly(second, 4))
    assert failing.count() == 1


def test_the_ipv4_address_of_a_host_is_tried_first(start: Start, failing: Failing) -> None:
    program = failing.program(ADDRESSES.format(addresses=["::1", "127.0.0.3"]) + GETADDRINFO)
    server = start("--host", "example.test", program=program)
    assert server.err.text.startswith("listening on 127.0.0.3:")


def test_a_host_without_usable_address_reports_the_first_reason(failing: Failing) -> None:
    failing.fail("bind", errno.EACCES)
    program = failing.program(ADDRESSES.format(addresses=["127.0.0.3", "192.0.2.1"]) + GETADDRINFO)
    env = {**os.environ, "PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}  # an open socket is reported
    result = run(program, "--port", "0", "--host", "example.test", env=env)
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
