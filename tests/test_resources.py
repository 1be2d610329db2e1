"""Tests of failed system calls and of a lack of resources: memory, descriptors, epoll's watches."""

from __future__ import annotations

import errno
import os
import platform
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import (
    DEADLINE,
    IS_PYPY,
    MODES,
    ROOT,
    SERVER,
    Start,
    arrive,
    at_once,
    ending,
    eventually,
    is_pings,
    is_reset,
    port_of,
    read_exactly,
    reset,
    run,
)
from failing import OUT_OF_MEMORY, Failing

import non_block_io_server

# ---------------------------------------------------------------- a failed send


@pytest.mark.parametrize("options", MODES)
def test_a_failed_send_ends_that_connection_with_a_reset(
    start: Start, failing: Failing, options: Any
) -> None:
    program = failing.program("server.READ_SIZE = 1000")
    server = start(*options, program=program)
    failing_client, other = server.seat(), server.seat()
    data = (b"x" * 99 + b"\n") * 100
    send = "write" if options else "sendfile"
    seats = 2
    for number in (errno.ENOBUFS, errno.ENOMEM, errno.EIO, errno.EACCES):
        if not options:
            assert is_pings(read_exactly(failing_client, 4_000_000))
        failing.stop()
        server.process.send_signal(signal.SIGSTOP)
        failing_client.settimeout(0.05)
        read = 0  # bytes
        with suppress(socket.timeout):  # now there is space for the next send
            while True:
                read += len(failing_client.recv(1 << 20))
        failing_client.settimeout(DEADLINE)
        arrive(server, failing_client, data)
        failing.fail(send, number, f"client {port_of(failing_client)}")
        server.process.send_signal(signal.SIGCONT)
        received, was_reset = ending(failing_client)
        assert was_reset, "the client can see that the stream is incomplete"
        if options:
            assert received in (b"", b"ping")
        else:  # a reset may end it within a ping
            assert received == (b"ping" * (len(received) // 4 + 2))[read % 4 :][: len(received)]
        server.err.wait_for(
            rf"^client \d+ was lost \({os.strerror(number)}\): 10,000 bytes received, .* 1 of 2 seats taken$"
        )
        seats += 1
        failing_client = server.seat()
        server.err.wait_for(f"^client {seats} connected from .* 2 of 2 seats taken$")
        if options == ["--echo"]:
            other.sendall(b"hello")
            assert read_exactly(other, 5) == b"hello"
        else:
            assert read_exactly(other, 8) == b"pingping"
    assert failing.count() == 4
    server.stop()
    assert server.out.rest().count("x") == 4 * 9_900, "all data that had arrived is shown"


def exchange(client: socket.socket, data: bytes) -> tuple[bytes, bool]:
    """Send data and read to the end at the same time; return the data, and whether there was a reset."""

    def send() -> bool:
        try:
            client.sendall(data)
        except ConnectionError:
            return True
        return False

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send)
        received, was_reset = ending(client)
        return received, sending.result() or was_reset


def test_an_echo_never_has_a_gap(start: Start, failing: Failing) -> None:
    server = start("--echo", "--wait-for", "1", "--quiet", program=failing.program())
    client = server.seat(small=True)
    data = b"".join(b"%07d\n" % number for number in range(100_000))
    client.sendall(data[:1000])
    assert read_exactly(client, 1000) == data[:1000]
    failing.fail("write", errno.ENOMEM, f"client {port_of(client)}")
    received, was_reset = exchange(client, data)
    assert was_reset
    assert data.startswith(received)


def test_a_failed_read_ends_that_connection_only(start: Start, failing: Failing) -> None:
    server = start("--echo", program=failing.program())
    failing_client, other = server.seat(), server.seat()
    failing.fail("read", errno.EIO, f"client {port_of(failing_client)}")
    failing_client.sendall(b"hello")
    assert ending(failing_client) == (b"", True)
    server.err.wait_for(r"^client 1 was lost \(Input/output error\): 5 bytes received, ")
    server.messages("^hello$")
    other.sendall(b"hello")
    assert read_exactly(other, 5) == b"hello"


@pytest.mark.parametrize("options", [[], ["--echo"], ["--every", "3600"]])
def test_bytes_that_arrived_before_a_reset_wait_for_standard_output(
    start: Start, failing: Failing, options: Any
) -> None:
    program = failing.program("server.READ_SIZE, server.OUTPUT_LIMIT = 1000, 10_000")
    server = start(*options, program=program, paused=True)
    writer, _ = server.seat(), server.seat()
    writer.setblocking(False)
    sent, before = 0, -1
    while sent > before:
        before = sent
        with suppress(BlockingIOError):
            while True:
                sent += writer.send(b"x" * 65536)
        with suppress(BlockingIOError):
            while options and writer.recv(1 << 20):
                pass
        server.settled()
    reset(writer)
    server.settled()
    assert "client 1 was reset" not in server.err.text
    server.out.going.set()
    (count,) = server.err.wait_for(r"^client 1 was reset: ([\d,]+) bytes received, ").groups()
    received = int(count.replace(",", ""))
    assert received > 100_000
    eventually(lambda: server.out.data.count(b"x") == received, "all of it is shown")


# ---------------------------------------------------------------- accept fails


def test_a_failed_accept_is_reported_once_and_tried_again(start: Start, failing: Failing) -> None:
    server = start(
        "--wait-for", "1", "--connections", "20", program=failing.program("server.RETRY_DELAY = 0.01")
    )
    numbers = errno.EPERM, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL
    for number in numbers:
        before = failing.count()
        failing.fail("accept", number, times=1000)
        client = server.connect()
        eventually(lambda: failing.count() >= before + 5, "it tries again")  # noqa: B023
        failing.stop()
        assert read_exactly(client, 4) == b"ping"
        line = f"not accepting for now: {os.strerror(number)}"
        server.err.wait_for(f"^{line}$")
        assert server.err.text.count(f"\n{line}\n") == 1, "the same reason is not repeated"
    failing.fail("accept", errno.EINVAL)
    assert read_exactly(server.connect(), 4) == b"ping"
    text = server.stop()
    assert text.count("not accepting") == len(numbers) + 1, "a new cause is reported again"
    assert len(re.findall(r"^client \d+ connected", text, re.M)) == len(numbers) + 1


def test_a_failed_accept_does_not_spin(start: Start, failing: Failing) -> None:
    server = start("--wait-for", "1", program=failing.program())
    failing.fail("accept", errno.EPERM, times=1000)
    server.connect()
    server.err.wait_for("^not accepting for now: Operation not permitted$")
    server.settled()
    assert failing.count() == 1
    server.stop()


def test_a_network_error_of_accept_causes_no_pause(start: Start, failing: Failing) -> None:
    server = start("--wait-for", "1", "--connections", "20", program=failing.program())
    names = (
        "EAGAIN ECONNABORTED EPROTO ENETDOWN ENOPROTOOPT EHOSTDOWN ENONET EHOSTUNREACH EOPNOTSUPP ENETUNREACH"
    )
    for name in names.split():
        failing.fail("accept", getattr(errno, name))
        assert read_exactly(server.connect(), 4) == b"ping", name
    assert failing.count() == 10
    assert "not accepting" not in server.stop()


# The kernel answers accept(2) with EPERM in this process: seccomp(2).
FORBID_ACCEPT = """
import ctypes, errno, platform, struct
one, other = {"x86_64": (43, 288), "aarch64": (202, 242)}[platform.machine()]  # accept and accept4
instructions = struct.pack(
    "=" + "HBBI" * 5,
    *(0x20, 0, 0, 0),  # load the number of the system call
    *(0x15, 1, 0, one),
    *(0x15, 0, 1, other),
    *(0x06, 0, 0, 0x00050000 | errno.EPERM),  # SECCOMP_RET_ERRNO
    *(0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
)
code = ctypes.create_string_buffer(instructions)
filters = ctypes.create_string_buffer(struct.pack("HP", 5, ctypes.addressof(code)))
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filters, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
    raise SystemExit("no seccomp filters")
"""


def test_a_seccomp_filter_that_forbids_accept_is_reported_once(start: Start, failing: Failing) -> None:
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the numbers of this machine's system calls are not known")
    try:
        server = start(program=failing.program(FORBID_ACCEPT))
    except AssertionError as error:
        if "no seccomp filters" in str(error):
            pytest.skip("this system has no seccomp filters")
        raise
    server.connect()
    server.err.wait_for("^not accepting for now: Operation not permitted$")
    server.settled()
    assert server.stop().count("not accepting") == 1


def test_a_limit_that_is_too_low_for_any_client_is_reported(start: Start) -> None:
    server = start()
    subprocess.run(
        ["prlimit", f"--nofile={server.descriptors()}:", "--pid", str(server.process.pid)], check=True
    )
    server.connect()
    server.err.wait_for(
        r"^not accepting for now: Too many open files\n"
        r"no client can connect: raise the limit \(ulimit -n\)$"
    )
    server.settled()


def test_a_shortage_with_connected_clients_does_not_report_the_limit(start: Start) -> None:
    server = start()
    server.seat()
    subprocess.run(
        ["prlimit", f"--nofile={server.descriptors()}:", "--pid", str(server.process.pid)], check=True
    )
    server.connect()
    server.err.wait_for("^not accepting for now: Too many open files$")
    server.settled()
    assert "no client can connect" not in server.stop()


# ---------------------------------------------------------------- epoll is full


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_a_client_that_epoll_cannot_watch_is_disconnected_alone(
    start: Start, failing: Failing, number: int
) -> None:
    server = start("--echo", "--wait-for", "1", program=failing.program())
    first = server.seat()
    failing.fail("register", number, "client")
    assert is_reset(server)
    server.err.wait_for(rf"^client 2 was lost \({os.strerror(number)}\): 0 bytes .* 1 of 2 seats taken$")
    for client in (first, server.seat()):
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"
    assert failing.count() == 1


def test_a_waiting_client_that_epoll_cannot_watch_is_not_counted(start: Start, failing: Failing) -> None:
    server = start(program=failing.program())
    failing.fail("register", errno.ENOSPC, "client")
    assert is_reset(server)
    server.err.wait_for(r"^client 1 was lost \(No space left on device\): .* 0 of 2 seats taken$")
    first, second = server.seat(), server.seat()
    assert is_pings(read_exactly(first, 4) + read_exactly(second, 4))


def test_an_echo_that_epoll_cannot_watch_for_writing_ends_with_a_reset(
    start: Start, failing: Failing
) -> None:
    server = start("--echo", "--quiet", program=failing.program())
    lazy, other = server.seat(small=True), server.seat()
    failing.fail("modify", errno.ENOMEM, f"client {port_of(lazy)}")
    data = b"".join(b"%07d\n" % number for number in range(1_000_000))
    received, was_reset = exchange(lazy, data)
    assert was_reset
    assert failing.count() == 1
    assert data.startswith(received)
    server.err.wait_for(r"^client 1 was lost \(Cannot allocate memory\): .* 1 of 2 seats taken$")
    other.sendall(b"hello")
    assert read_exactly(other, 5) == b"hello"


def test_a_listener_that_epoll_cannot_watch_tries_again(start: Start, failing: Failing) -> None:
    failing.fail("register", errno.ENOSPC, "listener", times=3)
    server = start("--connections", "1", program=failing.program("server.RETRY_DELAY = 0.01"))
    first = server.seat()
    assert read_exactly(first, 4) == b"ping"
    failing.fail("register", errno.ENOMEM, "listener", times=3)  # it is not watched while no seat is free
    first.close()
    eventually(lambda: failing.count() == 6, "the listener cannot be watched")
    assert read_exactly(server.seat(), 4) == b"ping"
    text = server.stop()
    assert text.count("not accepting for now: No space left on device\n") == 1
    assert text.count("not accepting for now: Cannot allocate memory\n") == 1


def test_serving_starts_although_the_listener_cannot_be_unregistered(start: Start, failing: Failing) -> None:
    server = start("--connections", "2", program=failing.program("server.RETRY_DELAY = 0.01"))
    first = server.seat()
    failing.fail("unregister", errno.EPERM, "listener")
    second = server.seat()
    assert read_exactly(first, 4) == read_exactly(second, 4) == b"ping"
    assert failing.count() == 1
    server.stop()


# ---------------------------------------------------------------- calls that need not succeed


def test_serves_without_sched_yield_and_memfd_create(start: Start, failing: Failing) -> None:
    program = failing.program(
        "def no(*_): raise PermissionError\nserver.os.sched_yield = server.os.memfd_create = no"
    )
    server = start("--wait-for", "1", program=program)
    client = server.seat(small=True)
    assert is_pings(read_exactly(client, 2_000_000))
    server.stop()


@pytest.mark.parametrize("call", ["close", "setblocking"])
def test_a_failed_call_ends_that_connection_only(start: Start, failing: Failing, call: str) -> None:
    server = start("--echo", "--wait-for", "1", "--connections", "3", program=failing.program())
    first = server.seat()
    failing.fail(call, errno.EIO)
    if call == "close":
        second = server.seat()
        second.close()
        server.err.wait_for("^client 2 left: .* 1 of 3 seats taken$")
    else:
        assert is_reset(server)
        server.err.wait_for(r"^client 2 was lost \(Input/output error\): .* 1 of 3 seats taken$")
    assert failing.count() == 1
    for client in (first, server.seat()):
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"


# ---------------------------------------------------------------- the start fails

STARTS = [
    ("pipe2", errno.EMFILE, "cannot catch signals: Too many open files"),
    ("set_wakeup_fd", errno.EINVAL, "cannot catch signals: Invalid argument"),
    ("epoll_create1", errno.EMFILE, "cannot create an epoll instance: Too many open files"),
    ("fstat", errno.EIO, "cannot use standard output: Input/output error"),
    ("bind", errno.EACCES, "cannot listen on 127.0.0.1:0: Permission denied"),
    ("listen", errno.EADDRINUSE, r"cannot listen on 127.0.0.1:0: address already in use \(.*\)"),
    ("setsockopt", errno.ENOMEM, "cannot listen on 127.0.0.1:0: Cannot allocate memory"),
    ("getsockname", errno.ENOBUFS, "cannot read the listener's address: No buffer space available"),
    ("register", errno.ENOSPC, "cannot watch for signals: No space left on device"),
    ("poll", errno.EINVAL, "cannot wait for events: Invalid argument"),
]


def test_a_failed_start_is_reported_in_one_line(tmp_path: Path) -> None:
    def check(case: tuple[str, int, str]) -> None:
        call, number, expected = case
        folder = tmp_path / call
        folder.mkdir()
        failing = Failing(folder)
        failing.fail(call, number)
        result = run(failing.program(), "--port", "0")
        assert failing.count() == 1, call
        assert result.returncode == 1, (call, result.stderr)
        assert result.stdout == ""
        *first, last = result.stderr.splitlines()
        assert re.fullmatch(expected, last), result.stderr
        assert [line for line in first if not line.startswith("listening on ")] == []

    at_once(check, STARTS)


@pytest.mark.parametrize("error", ["OSError(1, 'Operation not permitted')", "ValueError('not allowed')"])
@pytest.mark.parametrize("call", ["setrlimit", "getrlimit"])
def test_a_limit_that_cannot_be_raised_is_a_warning(
    start: Start, failing: Failing, error: str, call: str
) -> None:
    program = failing.program(f"def no(*_): raise {error}\nserver.resource.{call} = no")
    server = start(
        "--connections",
        "2000",
        "--wait-for",
        "1",
        program=program,
        shell="ulimit -Sn 500 && ulimit -Hn 4000",
    )
    lines = server.err.wait_for(r"^listening.*\n(.*)\n").groups()
    assert re.match("cannot raise the limit on open files to 2,016: .*(not permitted|not allowed)$", lines[0])
    assert read_exactly(server.seat(), 4) == b"ping"
    server.stop()


# ---------------------------------------------------------------- memory

NO_MEMORY = "out of memory: the server cannot continue"
is_cpython = pytest.mark.skipif(IS_PYPY, reason="PyPy aborts when it has no memory")


@pytest.mark.parametrize(
    "call, on",
    [
        ("poll", ""),
        ("accept", ""),
        ("setblocking", ""),
        ("register", "client"),
        ("recv", "client"),
        ("read", "client"),
        ("sendfile", "client"),
    ],
)
def test_a_lack_of_memory_ends_the_server_with_one_line_and_status_1(
    start: Start, failing: Failing, call: str, on: str
) -> None:
    server = start(program=failing.program())
    first = server.seat()
    server.settled()
    failing.fail(call, OUT_OF_MEMORY, on)
    first.sendall(b"hello")
    with suppress(OSError):
        server.connect().sendall(b"hello")
    assert server.ended(1).endswith(f"\n{NO_MEMORY}\n")
    assert server.err.text.count(NO_MEMORY) == 1
    assert failing.count() == 1


def test_a_message_that_was_read_is_printed_despite_a_lack_of_memory(start: Start, failing: Failing) -> None:
    server = start("--echo", "--wait-for", "1", program=failing.program())
    client = server.seat()
    failing.fail("write", OUT_OF_MEMORY, "client")
    client.sendall(b"hello")
    assert server.ended(1).endswith(f"\n{NO_MEMORY}\n")
    assert server.out.rest().endswith("\nhello\n")


def test_a_lack_of_memory_ends_the_start_with_one_line_and_status_1(tmp_path: Path) -> None:
    def check(call: str) -> None:
        folder = tmp_path / call
        folder.mkdir()
        failing = Failing(folder)
        failing.fail(call, OUT_OF_MEMORY)
        result = run(failing.program(), "--port", "0")
        assert failing.count() == 1, call
        assert (result.returncode, result.stderr.splitlines()[-1]) == (1, NO_MEMORY), (call, result.stderr)
        assert "Traceback" not in result.stderr

    at_once(check, ["pipe2", "epoll_create1", "fstat", "setsockopt", "bind", "getrlimit", "register", "poll"])


def kilobytes(field: str) -> str:
    return f"int(open('/proc/self/status').read().split('{field}:')[1].split()[0])"


@is_cpython
@pytest.mark.parametrize("limit, field", [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_a_start_with_too_little_memory_ends_with_one_line(tmp_path: Path, limit: str, field: str) -> None:
    """The limit is the memory of the process after the import of the module, plus some kB."""

    def start_with(more: int) -> tuple[int, str]:
        folder = tmp_path / str(more)
        folder.mkdir()
        program = Failing(folder).program(
            f"import resource; size = ({kilobytes(field)} + {more}) * 1024\n"
            f"resource.setrlimit(resource.{limit}, (size, size))"
        )
        with subprocess.Popen(
            [sys.executable, program, "--port", "0"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stderr is not None
            first = process.stderr.readline()
            if first.startswith("listening on "):
                process.send_signal(signal.SIGTERM)
            try:
                rest = process.communicate(timeout=DEADLINE)[1]
            finally:
                process.kill()
        return process.returncode, first + rest

    amounts = [0, 50, 100, 200, 300, 400, 600, 800, 1200, 1600, 2400, 9600]
    results = at_once(start_with, amounts)
    for status, text in results:
        assert "Traceback" not in text
        if status:
            assert (status, text.splitlines()[-1]) == (1, NO_MEMORY), text
        else:
            assert text.splitlines()[-1].startswith("stopped: "), text
    assert results[-1][0] == 0, results[-1]


@is_cpython
@pytest.mark.parametrize("kind", ["-v", "-d"])
def test_no_limit_on_memory_causes_a_traceback(kind: str) -> None:
    """If Python itself can start, the server starts or ends with one line."""

    def limited(megabytes: int, *command: str) -> subprocess.CompletedProcess[str]:
        shell = ["bash", "-c", f'ulimit {kind} {megabytes * 1024}; exec "$0" "$@"', sys.executable, *command]
        return subprocess.run(shell, capture_output=True, text=True, timeout=DEADLINE)

    def serve(megabytes: int) -> str:
        result = limited(megabytes, SERVER, "--port", "0", "--host", "192.0.2.1")  # it ends on its own
        assert result.returncode == 1, (megabytes, result)
        return result.stderr

    least = next(size for size in range(4, 100) if limited(size, SERVER, "--help").returncode == 0)
    for text in at_once(serve, range(least + 1, least + 8)):
        assert re.fullmatch(f"{NO_MEMORY}\n|cannot listen on .*\n", text), text


def test_memory_that_runs_out_after_an_exit_ends_the_server(start: Start, tmp_path: Path) -> None:
    program = tmp_path / "exits.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import non_block_io_server as server\n"
        "def finish(self): raise MemoryError\n"
        "server.Server.finish = finish\n"
        "async def exits(client): sys.exit()\n"
        "server.main(protocol=exits)\n"
    )
    server = start("--wait-for", "1", program=str(program))
    server.connect()
    assert server.ended(1).endswith(f"\n{NO_MEMORY}\n")


@is_cpython
@pytest.mark.parametrize("limit, field", [("--as", "VmSize"), ("--data", "VmData")])
def test_memory_that_runs_out_ends_the_server_with_one_line(start: Start, limit: str, field: str) -> None:
    server = start(
        "--connections",
        "2000",
        "--wait-for",
        "1",
        "--echo",
        paused=True,
    )
    client = server.seat()
    client.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    size = server.status(field) * 1024
    subprocess.run(["prlimit", f"{limit}={size}:", "--pid", str(server.process.pid)], check=True)
    with suppress(OSError):
        for _ in range(1500):
            other = socket.socket()
            other.settimeout(DEADLINE)
            server.clients.append(other)
            other.connect((server.host, server.port))
            other.send(b"\xc3\x28" * 30_000)
    server.out.going.set()
    assert server.ended(1).endswith(f"\n{NO_MEMORY}\n")


# ---------------------------------------------------------------- vanished peers, socket options


def test_accepted_sockets_have_the_socket_options() -> None:
    options = SimpleNamespace(host="127.0.0.1", port=0, reuse_port=False, connections=2)
    with non_block_io_server.listen(options) as listener:
        assert not listener.getblocking()
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        with socket.create_connection(listener.getsockname(), DEADLINE):
            listener.setblocking(True)
            sock, _ = listener.accept()
            with sock:

                def tcp(option: int) -> int:
                    return sock.getsockopt(socket.IPPROTO_TCP, option)

                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE) == 1
                assert tcp(socket.TCP_NODELAY) == 1
                assert tcp(socket.TCP_NOTSENT_LOWAT) == 16384
                assert [tcp(n) for n in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)] == [
                    60,
                    10,
                    6,
                ]
                assert tcp(socket.TCP_USER_TIMEOUT) == 0, "it would end a live client that does not read"
                with suppress(OSError):  # kernels before 6.15 do not know it
                    assert tcp(44) == 10_000


@pytest.mark.parametrize("host, only", [("::1", True), ("::", False)])
def test_only_the_wildcard_address_also_accepts_ipv4(host: str, only: bool) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    options = SimpleNamespace(host=host, port=0, reuse_port=False, connections=2)
    with non_block_io_server.listen(options) as listener:
        assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == only


def timer_of(client: socket.socket) -> tuple[int, float]:
    """Return the kernel's timer for the server's end of the connection, and when it expires: proc(5)."""
    ends = rf" \w+:{client.getpeername()[1]:04X} \w+:{client.getsockname()[1]:04X} "
    found = re.search(rf"{ends}\w+ \w+:\w+ (\w+):(\w+) ", Path("/proc/net/tcp").read_text())
    assert found, "no such connection"
    return int(found[1], 16), int(found[2], 16) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("options", [[], ["--echo", "--wait-for", "1"]])
def test_an_idle_client_is_probed_after_a_minute(start: Start, options: Any) -> None:
    server = start(*options)
    kind, seconds = timer_of(server.seat())
    assert kind == 2, "the keepalive timer"
    assert 50 < seconds <= 61


@pytest.mark.parametrize("options", MODES)
def test_a_peer_that_vanished_frees_its_seat(start: Start, failing: Failing, options: Any) -> None:
    server = start(*options, program=failing.program())
    waiting = server.seat()
    failing.fail("recv", errno.ETIMEDOUT, "client")  # the kernel reports this after its last probe
    waiting.sendall(b"x")
    server.err.wait_for(
        r"^client 1 was lost \(Connection timed out\): .*, not counted as a client, 0 of 2 seats taken$"
    )
    served, other = server.seat(), server.seat()
    server.err.wait_for("^serving 2 clients$")
    failing.fail("read", errno.ETIMEDOUT, f"client {port_of(served)}")
    served.sendall(b"x")
    server.err.wait_for(r"^client 2 was lost \(Connection timed out\): .*, 1 of 2 seats taken$")
    other.sendall(b"ping")
    assert read_exactly(other, 4) == b"ping"
