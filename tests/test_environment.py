"""Tests of what a server inherits or meets: signals, standard streams, limits, options, addresses."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import (
    DEADLINE,
    SERVER,
    Server,
    Start,
    arrive,
    ending,
    eventually,
    open_terminal,
    read_exactly,
    run,
)
from failing import Failing

import non_block_io_server

ECHO = "--echo", "--wait-for", "1", "--connections", "50"
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def echoes(client: socket.socket, data: bytes = b"hello\n") -> None:
    """Send data and wait for its echo."""
    client.sendall(data)
    assert read_exactly(client, len(data)) == data


def read_until(descriptor: int, pattern: bytes) -> re.Match[bytes]:
    """Read a terminal or a pipe until its data matches a pattern (re.MULTILINE); return the match."""
    data = b""
    while True:
        found = re.search(pattern, data, re.MULTILINE)
        if found:
            return found
        assert select.select([descriptor], [], [], DEADLINE)[0], f"{pattern!r} is not in {data!r}"
        data += os.read(descriptor, 65536)


# ---------------------------------------------------------------- signals


def test_a_signal_with_a_handler_of_the_program_does_not_stop_the_server(
    start: Start, failing: Failing
) -> None:
    program = failing.program(
        "import os, signal\n"
        "def handler(number, frame): os.write(2, b'got %d\\n' % number)\n"
        "for name in 'SIGALRM', 'SIGUSR1', 'SIGWINCH', 'SIGCHLD':\n"
        "    signal.signal(getattr(signal, name), handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001)"
    )
    server = start(*ECHO, program=program)
    client = server.seat()
    server.err.wait_for(f"^got {int(signal.SIGALRM)}$")
    for number in signal.SIGUSR1, signal.SIGWINCH, signal.SIGCHLD:
        echoes(client)
        server.process.send_signal(number)
        server.err.wait_for(f"^got {int(number)}$")
        server.settled()
    echoes(client)
    assert "stopped: 1 client served, 24 bytes received" in server.stop()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_ends_a_forked_child_does_not_stop_the_server(
    start: Start, failing: Failing, number: int
) -> None:
    program = failing.program(
        "import os, signal, time\n"
        "def fork(*_):\n"
        "    if os.fork(): return\n"
        f"    signal.alarm({int(DEADLINE)})\n"
        "    os.write(2, b'child %d\\n' % os.getpid())\n"
        "    while True: time.sleep(0.01)\n"
        "signal.signal(signal.SIGUSR1, fork)"
    )
    server = start(*ECHO, program=program)
    client = server.seat()
    server.process.send_signal(signal.SIGUSR1)
    child = int(server.err.wait_for(r"^child (\d+)$")[1])
    try:
        os.kill(child, number)
        state = Path(f"/proc/{child}/stat")
        eventually(lambda: ") Z " in state.read_text(), "the child ends")
        server.settled()
        echoes(client)
    finally:
        os.kill(child, signal.SIGKILL)
    assert "stopped: 1 client served, 6 bytes received" in server.stop()


def test_a_stop_signal_needs_no_wakeup_descriptor(start: Start, failing: Failing) -> None:
    """asyncio, in the same process, sets it to -1 when it closes a loop."""
    program = failing.program(
        "import os, signal\n"
        "def take(*_):\n"
        "    signal.set_wakeup_fd(-1)\n"
        "    os.write(2, b'taken\\n')\n"
        "signal.signal(signal.SIGUSR1, take)"
    )
    server = start(*ECHO, program=program)
    client = server.seat()
    server.process.send_signal(signal.SIGUSR1)
    server.err.wait_for("^taken$")
    echoes(client)
    server.settled()
    assert "stopped: 1 client served, 6 bytes received" in server.stop()


def test_a_stop_signal_is_not_lost_in_a_full_signal_pipe(start: Start, failing: Failing) -> None:
    program = failing.program(
        "import os, signal\n"
        "def storm(*_):\n"
        "    for _ in range(70_000): os.kill(os.getpid(), signal.SIGUSR2)\n"  # the pipe holds 65,536 bytes
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "signal.signal(signal.SIGUSR2, lambda *_: None)\n"
        "signal.signal(signal.SIGUSR1, storm)"
    )
    server = start(*ECHO, program=program)
    client = server.seat()
    echoes(client)
    assert "stopped: 1 client served, 6 bytes received" in server.stop(signal.SIGUSR1)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_blocked_stop_signal_is_unblocked(start: Start, number: int) -> None:
    block = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))"
    server = start(*ECHO, python=block)
    echoes(server.seat())
    assert "stopped: 1 client served, 6 bytes received" in server.stop(number)


def test_main_restores_the_signals_and_the_limits(start: Start, failing: Failing) -> None:
    program = failing.program(
        "import atexit, os, resource, signal\n"
        "numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP\n"
        "signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGHUP])\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "def state():\n"
        "    return ([signal.getsignal(number) for number in numbers], signal.pthread_sigmask(0, []),\n"
        "            signal.set_wakeup_fd(-1), resource.getrlimit(resource.RLIMIT_NOFILE),\n"
        "            sorted(os.listdir('/proc/self/fd')), sys.stdout.fileno(), server.sys.stderr.fileno())\n"
        "def compare(): os.write(2, b'restored' if state() == before else repr((before, state())).encode())\n"
        "atexit.register(compare)\n"
        "before = state()"
    )
    server = start("--wait-for", "1", "--connections", "300", program=program, shell="ulimit -Sn 100")
    read_exactly(server.seat(), 4)
    text = server.stop()
    assert re.search(r"^stopped: 1 client served, .*\nrestored\Z", text, re.MULTILINE)


def test_main_in_a_thread_ends_with_one_line(failing: Failing) -> None:
    code = "import threading\nthread = threading.Thread(target=server.main)\n"
    result = run(failing.program(f"{code}thread.start()\nthread.join()\nsys.exit()"), "--port", "0")
    assert re.fullmatch(r"cannot catch signals: .*main thread.*\n", result.stderr)


# ---------------------------------------------------------------- options of sockets that a system lacks


def without_options(failing: Failing, number: int, condition: str) -> str:
    """Write a program in which setsockopt fails for the pairs `level, option` that meet a condition."""
    return failing.program(
        "from socket import *\n"
        "import os, socket\n"
        "class Socket(socket.socket):\n"
        "    def accept(self):\n"
        "        sock, address = super().accept()\n"
        "        return Socket(sock.family, sock.type, sock.proto, sock.detach()), address\n"
        "    def setsockopt(self, level, option, value):\n"
        f"        if {condition}: raise OSError({number}, os.strerror({number}))\n"
        "        super().setsockopt(level, option, value)\n"
        "server.socket.socket = Socket"
    )


NEEDED = "(SOL_SOCKET, SO_REUSEADDR), (SOL_SOCKET, SO_REUSEPORT), (IPPROTO_IPV6, IPV6_V6ONLY)"
LACKS = errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM  # TCP, MPTCP, WSL 1, a sandbox


@pytest.mark.parametrize("number", LACKS)
def test_a_system_without_tuning_options_is_no_failure(start: Start, failing: Failing, number: int) -> None:
    program = without_options(failing, number, f"(level, option) not in ({NEEDED})")
    server = start(*ECHO, "--reuse-port", program=program)
    echoes(server.seat())
    assert server.stop().count("\n") == 4, "no line about an option"


@pytest.mark.parametrize("number", LACKS)
@pytest.mark.parametrize("option", ["SO_REUSEADDR", "SO_REUSEPORT", "IPV6_V6ONLY"])
def test_an_option_without_which_the_server_would_be_wrong_is_needed(
    failing: Failing, option: str, number: int
) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    level = "IPPROTO_IPV6" if option == "IPV6_V6ONLY" else "SOL_SOCKET"
    program = without_options(failing, number, f"(level, option) == ({level}, {option})")
    result = run(program, "--port", "0", "--host", "::1", "--reuse-port")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"cannot listen on [::1]:0: {os.strerror(number)}\n"


def test_multipath_tcp_serves(start: Start, failing: Failing) -> None:
    try:
        socket.socket(proto=262).close()  # IPPROTO_MPTCP
    except OSError as error:
        pytest.skip(f"this kernel has no multipath TCP: {error.strerror}")
    program = failing.program(
        "class Multipath(server.socket.socket.__mro__[1]):\n"
        "    def __init__(self, family=-1, type=-1, proto=-1, fileno=None):\n"
        "        super().__init__(family, type, proto if fileno else 262, fileno)\n"
        "server.socket.socket = Multipath"
    )
    server = start(*ECHO, program=program)
    echoes(server.seat())
    assert "stopped: 1 client served, 6 bytes received, 6 bytes sent" in server.stop()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_cut_ping_is_completed_without_a_limit_of_unsent_bytes(
    start: Start, failing: Failing, cut: int
) -> None:
    program = Path(without_options(failing, errno.ENOPROTOOPT, "option == TCP_NOTSENT_LOWAT"))
    setup, main = program.read_text().rsplit("\n", 2)[:2]
    program.write_text(
        f"{setup}\n"
        f"sizes = [{4000 + cut}]\n"
        "sendfile = server.os.sendfile\n"
        "def once(out, file, at, size):\n"
        "    if not sizes: raise BlockingIOError\n"
        "    return sendfile(out, file, at, sizes.pop())\n"
        f"server.os.sendfile = once\n{main}\n"
    )
    server = start("--wait-for", "1", program=str(program))
    client = server.seat()
    data = read_exactly(client, 4000 + cut)
    server.stop()
    assert ending(client) == ((b"ping" * 1001)[len(data) :], False)


# ---------------------------------------------------------------- open files


def test_inherited_open_files_need_no_seat(start: Start) -> None:
    inherit = (
        "import os, resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "for number in range(3, 160): os.dup2(0, number, inheritable=True)"
    )
    server = start("--echo", "--connections", "100", python=inherit)
    clients = [server.seat() for _ in range(100)]
    echoes(clients[-1])
    assert "not accepting" not in server.stop()


# ---------------------------------------------------------------- a log that cannot be written for now


def logging_to(log: int, text: Callable[[], str], *options: str, **how: Any) -> Server:
    """Return a server whose standard error is a descriptor, and not a pipe that a thread reads."""
    server = Server(*options, stderr=log, **how)
    os.close(log)
    found = eventually(lambda: re.search(r"^listening on (.+):(\d+), ", text(), re.M), "it listens")
    server.host, server.port = found[1], int(found[2])
    return server


def leave(server: Server, number: int) -> bool:
    """Let so many clients connect and leave, one after the other."""
    for _ in range(number):
        with server.connect() as client:
            echoes(client)
    return True


DROPPED = r"^([\d,]+) log lines? dropped: standard error was full \(it can no longer be written: (.+)\)$"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_log_on_a_full_disk_goes_on_later(start: Start, failing: Failing, number: int) -> None:
    server = start(*ECHO, program=failing.program("server.RETRY_DELAY = 0.02"))
    failing.fail("write", number, on=os.readlink(f"/proc/{server.process.pid}/fd/2"), times=1_000_000)
    for _ in range(3):
        leave(server, 5)
        server.settled()  # nothing wakes it while no line is dropped
    failing.stop()
    found = None
    while not found:
        leave(server, 1)
        found = re.search(DROPPED, server.err.text, re.M)
    assert found[2] == os.strerror(number)
    text = server.stop()
    dropped = sum(int(lines) for lines, _ in re.findall(DROPPED, text, re.M))
    (served, total) = re.findall(r"^stopped: (\d+) clients served, .*, (\d+) log lines dropped$", text, re.M)[
        0
    ]
    assert dropped == int(total)
    logged = len(re.findall("^(?:serving|client) .*$", text, re.M))
    assert logged + dropped == 1 + 2 * int(served)
    assert all(re.match(r"(listening|serving|client|stopped:|\d+ log) ", line) for line in text.splitlines())


def test_a_log_that_has_reached_its_limit_goes_on_after_it_is_truncated(
    failing: Failing, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    writer = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    limit = 4096
    how = {"python": f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"}
    program = failing.program("server.RETRY_DELAY = 0.02")
    with closing(logging_to(writer, log.read_text, *ECHO, "--quiet", program=program, **how)) as server:
        while log.stat().st_size < limit:
            leave(server, 5)
        leave(server, 5)
        before = log.read_text()
        assert not before.endswith("\n"), "its last line is cut"
        os.truncate(log, 0)
        eventually(lambda: leave(server, 1) and re.search(DROPPED, log.read_text(), re.M), "the log goes on")
        server.process.terminate()
        assert server.process.wait(DEADLINE) == 0
        after = log.read_text()
    assert re.match("\n?[0-9]+ log lines dropped", after), "it goes on with a new line"
    assert set(re.findall(DROPPED, after, re.M)) == {
        (re.findall(DROPPED, after, re.M)[0][0], "File too large")
    }
    assert re.search(r"^stopped: .*, \d+ log lines dropped\n\Z", after, re.M)


def test_a_log_whose_reader_returns_goes_on(failing: Failing, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "log", os.O_WRONLY)
    log = b""

    def text() -> str:
        nonlocal log
        with suppress(BlockingIOError):
            log += os.read(reader, 65536)
        return log.decode()

    program = failing.program("server.RETRY_DELAY = 0.02")
    with closing(logging_to(writer, text, *ECHO, "--quiet", program=program)) as server:
        leave(server, 1)
        eventually(lambda: "client 1 left" in text(), "its line arrives")
        os.close(reader)
        leave(server, 5)
        server.settled()  # an idle server does not try again
        reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
        log = b""
        eventually(lambda: leave(server, 1) and re.search(DROPPED, text(), re.M), "the log goes on")
        assert re.findall(DROPPED, text(), re.M)[0][1] == "Broken pipe"
        server.process.terminate()
        assert server.process.wait(DEADLINE) == 0
        assert re.search(r"^stopped: .*, \d+ log lines dropped\n\Z", text(), re.M)
    os.close(reader)


# ---------------------------------------------------------------- standard output is something unusual


def raw_terminal() -> tuple[int, int]:
    """Return both ends of a new terminal that echoes nothing."""
    ours, theirs = os.openpty()
    mode = termios.tcgetattr(theirs)
    mode[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(theirs, termios.TCSANOW, mode)
    return ours, theirs


def test_standard_output_can_be_the_master_of_a_terminal(start: Start) -> None:
    master, slave = raw_terminal()
    server = start(*ECHO, stdout=master)
    echoes(server.seat())
    read_until(slave, rb"^data received.*\nhello\n")
    server.stop()
    os.close(master)
    os.close(slave)


OTHER_TERMINAL = """
import fcntl, os, subprocess, sys, termios
out = os.open("/dev/tty", os.O_WRONLY)
ours, theirs = os.openpty()
attach = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
server = subprocess.Popen(sys.argv[1:], stdin=theirs, stdout=out, start_new_session=True, preexec_fn=attach)
sys.exit(server.wait())
"""


def test_standard_output_can_be_the_dev_tty_of_another_session() -> None:
    """In a shell: `exec 3>/dev/tty; script -c 'python3 non_block_io_server.py >&3'`."""
    command = [sys.executable, "-c", OTHER_TERMINAL, sys.executable, SERVER, "--port", "0", *ECHO]
    process, terminal = open_terminal(*command)
    try:
        port = int(read_until(terminal, rb"^listening on .*:(\d+), ")[1])
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
            echoes(client)
            read_until(terminal, rb"^data received.*\r\nhello\r\n")
    finally:
        os.close(terminal)  # SIGHUP ends both
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["pipe", "terminal", "file"])
def test_standard_output_that_is_open_for_reading_is_not_opened_for_writing(start: Start, kind: str) -> None:
    if kind == "pipe":
        reader, other = os.pipe()
    elif kind == "terminal":
        other, slave = raw_terminal()
        reader = os.open(os.ttyname(slave), os.O_RDONLY | os.O_NOCTTY)
        os.close(slave)
    else:
        other, reader = os.open(os.devnull, os.O_WRONLY), os.open(SERVER, os.O_RDONLY)
    try:
        server = start("--wait-for", "1", stdout=reader)
        server.seat().sendall(b"hello\n")
        text = server.ended(1)
        assert text.endswith("\nstandard output can no longer be written: Bad file descriptor\n")
        if kind == "pipe":
            os.close(other)
            assert os.read(reader, 100) == b""
        elif kind == "terminal":
            assert not select.select([other], [], [], 0)[0]
    finally:
        os.close(reader)


def test_standard_output_can_be_a_block_device(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    losetup = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True)
    if losetup.returncode:
        pytest.skip(f"no block device can be made: {losetup.stderr.strip()}")
    device = losetup.stdout.strip()
    try:
        with open(device, "r+b", buffering=0) as out:
            out.write(b"HEADER\n")
            server = start(*ECHO, stdout=out)
            echoes(server.seat())
            server.stop()
            os.fsync(out)
            out.seek(0)
            assert re.match(rb"HEADER\ndata received.*\nhello\n\0", out.read(4096))
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


ENCODINGS = ["utf-16", "utf-32", "utf-8-sig", "utf-7", "latin-1", "cp037", "utf-16-le"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_encoding_writes_at_most_one_byte_order_mark(
    start: Start, failing: Failing, encoding: str, tmp_path: Path
) -> None:
    program = failing.program(f"sys.stdout.reconfigure(encoding={encoding!r})")
    with (tmp_path / "out").open("ab") as out:
        server = start(*ECHO, program=program, stdout=out)
        client = server.seat()
        for message in b"one\n", b"two\n", b"three\n":
            echoes(client, message)
        server.stop()
    header = rf"data received\.\.\. \(client 1, 127\.0\.0\.1:{client.getsockname()[1]}\)\n"
    text = (tmp_path / "out").read_bytes().decode(encoding)
    assert re.fullmatch(f"{header}one\n{header}two\n{header}three\n", text)


def test_text_that_is_appended_to_a_file_has_no_byte_order_mark(
    start: Start, failing: Failing, tmp_path: Path
) -> None:
    program = failing.program("sys.stdout.reconfigure(encoding='utf-16')")
    out = tmp_path / "out"
    for _ in range(2):
        with out.open("ab") as file:
            server = start(*ECHO, program=program, stdout=file)
        echoes(server.seat())
        server.stop()
    assert out.read_bytes().decode("utf-16").count("\nhello\n") == 2
    assert "\ufeff" not in out.read_bytes().decode("utf-16")


@pytest.mark.parametrize(
    "stream",
    [
        "codecs.getwriter('utf-8')(sys.stdout.buffer)",
        "codecs.getwriter('latin-1')(sys.stdout.buffer)",
        "sys.stdout.buffer",
        "io.TextIOWrapper(sys.stdout.buffer, None)",
        "type('Output', (), {'write': len, 'flush': int, 'fileno': sys.stdout.fileno})",
    ],
)
def test_a_replaced_standard_output_with_a_descriptor_is_served(
    start: Start, failing: Failing, stream: str
) -> None:
    server = start(*ECHO, program=failing.program(f"import codecs, io\nsys.stdout = {stream}"))
    echoes(server.seat())
    server.messages(r"^data received.*\nhello$")
    assert "stopped: 1 client served, 6 bytes received" in server.stop()


@pytest.mark.parametrize("name, shown", [("stdout", "standard output"), ("stderr", "standard error")])
@pytest.mark.parametrize(
    "stream, reason",
    [
        ("type('Output', (), {'write': len, 'flush': int})", "it has no descriptor"),
        ("io.StringIO()", "it has no descriptor"),
        ("io.TextIOWrapper(io.BytesIO())", "it has no descriptor"),
        ("closed()", "I/O operation on closed file"),
    ],
)
def test_a_replaced_stream_without_a_descriptor_is_reported_in_one_line(
    failing: Failing, name: str, shown: str, stream: str, reason: str
) -> None:
    code = "import io\ndef closed():\n    file = open(0, closefd=False)\n    file.close()\n    return file\n"
    result = run(failing.program(f"{code}sys.{name} = {stream}"), "--port", "0")
    assert (result.returncode, result.stdout) == (1, "")
    used = f"use {shown}" if name == "stderr" else f"(use {shown}|read the options)"  # argparse 3.14 uses it
    assert re.fullmatch(rf"cannot {used}: {reason}\.?\n", result.stderr)


# ---------------------------------------------------------------- addresses


has_interfaces = pytest.mark.skipif(not hasattr(socket, "if_indextoname"), reason="PyPy does not have it")


@has_interfaces
def test_a_link_local_address_has_its_interface() -> None:
    index = socket.if_nametoindex("lo")
    assert non_block_io_server.name_of(("fe80::1", 10001, 0, index)) == "[fe80::1%lo]:10001"
    assert non_block_io_server.name_of(("fe80::1", 10001, 0, 1 << 30)) == "[fe80::1]:10001", "it has vanished"
    assert non_block_io_server.name_of(("::1", 10001, 0, 0)) == "[::1]:10001"
    assert non_block_io_server.name_of(("127.0.0.1", 10001)) == "127.0.0.1:10001"


@has_interfaces
def test_a_client_can_use_the_link_local_address_of_the_first_line(start: Start) -> None:
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            address, _, _, scope, _, name = line.split()
            if scope == "20":  # link-local: from linux/include/net/ipv6.h
                break
        else:
            pytest.skip("no interface has a link-local address")
    host = f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))}%{name}"
    server = start(*ECHO, "--host", host)
    assert server.err.text.startswith(f"listening on [{host}]:{server.port}, ")
    with socket.create_connection((server.host, server.port), DEADLINE) as client:
        echoes(client)
        server.err.wait_for(rf"^client 1 connected from \[{re.escape(host)}\]:{client.getsockname()[1]}, ")


@pytest.mark.parametrize(
    "host", [b"a\xff", b"\xff", b"a..b\xc3\xa9", b"\xc3\xa9" * 70, b"a" * 64 + b"\xc3\xa9"]
)
def test_a_host_that_is_no_name_is_reported_in_plain_words(host: bytes) -> None:
    command = [os.fsencode(word) for word in (sys.executable, SERVER, "--port", "0", "--host", host)]
    result = subprocess.run(command, capture_output=True, timeout=DEADLINE)
    assert result.returncode == 1
    assert result.stderr.startswith(b"cannot listen on ")
    assert result.stderr.endswith(b":0: this is no name of a host\n")
    assert result.stderr.count(b"\n") == 1


# ---------------------------------------------------------------- the order, the cost and the time of things


@pytest.mark.parametrize("options", [["--echo"], ["--every", "3600"], []])
def test_the_client_that_has_waited_longest_is_read_first(
    start: Start, failing: Failing, options: list[str]
) -> None:
    """Three messages make standard output full."""
    program = failing.program("server.READ_SIZE = 1000\nserver.OUTPUT_LIMIT = 3000")
    server = start("--connections", "10", *options, program=program)
    clients = [server.seat() for _ in range(8)]
    for client in clients:
        arrive(server, client, b"some text\n" * 2_000)
    arrive(server, server.seat(), b"hi\n")
    server.seat()  # now they are served
    server.messages("^hi$")
    order = re.findall(r"^data received\.\.\. \(client (\d+),", server.out.text.partition("\nhi\n")[0], re.M)
    assert order[-1] == "9"
    assert len(order) <= 3 * 9, f"the ninth client is read after {len(order)} messages"
    assert max(order.count(number) for number in order) <= 4


class Clock:
    """The time and the calls of an epoll instance, for Loop.wait."""

    def __init__(self, yields: list[float]) -> None:
        self.now, self.yields = 100.0, yields  # seconds that each yield of the processor takes
        self.polls: list[float] = []  # their timeouts

    def monotonic(self) -> float:
        return self.now

    def sched_yield(self) -> None:
        self.now += self.yields.pop(0) if self.yields else 0.0

    def poll(self, timeout: float) -> list[Any]:
        self.polls.append(timeout)
        return []


@pytest.mark.parametrize(
    "yields, polls",
    [
        ([], [0] * 16 + [pytest.approx(0.25)]),
        ([0.05], [0, pytest.approx(0.2)]),
        ([0.0, 0.0, 0.1], [0, 0, 0, pytest.approx(0.15)]),
        ([0.3], [0, 0.0]),
        ([0.0003] * 16, [0] * 16 + [pytest.approx(0.25 - 16 * 0.0003)]),
    ],
)
def test_busy_polls_do_not_delay_a_timer(
    monkeypatch: pytest.MonkeyPatch, yields: list[float], polls: list[float]
) -> None:
    loop, clock = non_block_io_server.Loop(), Clock(yields)
    loop.epoll.close()
    monkeypatch.setattr(loop, "epoll", clock)
    monkeypatch.setattr("non_block_io_server.time.monotonic", clock.monotonic)
    monkeypatch.setattr("non_block_io_server.os.sched_yield", clock.sched_yield)
    loop.wake_at(clock.now + 0.25, 7)
    assert loop.wait() == []
    assert clock.polls == polls


def test_the_trace_of_a_stop_shows_only_what_epoll_has_reported(start: Start) -> None:
    server = start(*ECHO, "--trace")
    client = server.seat()
    echoes(client)
    server.settled()
    server.process.send_signal(signal.SIGSTOP)
    before = len(server.err.text)
    server.process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGCONT)
    text = server.ended(0)[before:]
    assert "client 1: EPOLL" not in text
