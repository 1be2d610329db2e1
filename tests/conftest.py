"""Helpers of all tests.  They run the real scripts as processes and wait for events, never for time."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import platform
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Callable, Iterable, Iterator

import pytest
from failing import Failing

ROOT = Path(__file__).resolve().parent.parent
SERVER = str(ROOT / "non_block_io_server.py")
CLIENT = str(ROOT / "client.py")
sys.path.insert(0, str(ROOT))
os.environ["PATH"] += ":/usr/sbin:/sbin"  # not in every user's PATH; HAProxy and ss may be there
IS_PYPY = platform.python_implementation() == "PyPy"
COMPILED = 30_000 if IS_PYPY else 0  # kB: PyPy compiles to machine code while it runs
DEADLINE = 15.0  # seconds to wait for something that should happen immediately
TEST_LIMIT = 300.0  # seconds for a test, and for its fixtures; no single wait is longer
REPEAT = 10.0  # seconds until a test that still hangs, for example in a `finally`, is interrupted again
STREAM_LIMIT = 64 << 20  # bytes of one stream; no test needs as many
MODES = [[], ["--echo"], ["--every", "0.02"]]  # options: the three protocols
LINES = (b"x" * 63 + b"\n") * (1 << 18)

# The programs run with the same settings in every environment: without warnings, and with UTF-8.
for name in [name for name in os.environ if name.startswith("PYTHON")]:
    if name not in ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"):
        del os.environ[name]
os.environ["PYTHONUTF8"] = "1"

# Each of these signals interrupts pytest, so that the tests end their processes.  If one is ignored, by
# nohup(1) or in a background job, it still does nothing here, but the programs do not inherit that.
for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
    ignored = signal.getsignal(number) == signal.SIG_IGN
    signal.signal(number, (lambda *_: None) if ignored else signal.default_int_handler)


# ---------------------------------------------------------------- the time limit of each test


terminal = 2  # a descriptor for the stacks of a process that hangs


def out_of_time(*_: Any) -> None:
    """Fail the test that runs.  Show what each thread is waiting for."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [
        f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    pytest.fail("\n".join([f"it has not ended after {TEST_LIMIT:.0f} s; its other threads:", *stacks]))


def end_if_it_hangs() -> None:
    """Let this process end, with the stacks of its threads, if Python code does not get control again."""
    faulthandler.dump_traceback_later(2 * TEST_LIMIT, exit=True, file=terminal)


def pytest_configure(config: pytest.Config) -> None:
    """Keep the standard error that pytest has before it captures the output of the tests."""
    global terminal
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        terminal = os.dup(2)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Limit the time of a test.  The signal also interrupts system calls and waits for threads."""
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, TEST_LIMIT, REPEAT)
    end_if_it_hangs()
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()


pytest_runtest_setup = pytest_runtest_teardown = pytest_runtest_call  # the fixtures have the same limit


def pytest_unconfigure() -> None:
    """Limit the time of Python's own exit, which waits for threads."""
    end_if_it_hangs()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip each test on a system without epoll."""
    if not hasattr(select, "epoll"):
        for item in items:
            reason = f"epoll is needed, which only Linux has; this is {platform.system()}"
            item.add_marker(pytest.mark.skip(reason=reason))


# ---------------------------------------------------------------- processes and their streams


def at_once(check: Callable[[Any], Any], cases: Iterable[Any]) -> list[Any]:
    """Check all cases at the same time, because most of them wait; return the results."""
    cases = list(cases)
    with ThreadPoolExecutor(len(cases)) as pool:
        return list(pool.map(check, cases))


def eventually(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Return the condition's value as soon as it is true; fail if it is false for so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"did not happen: {what}")


class Stream:
    """A pipe that a thread reads, so that its writer does not stall.  None is an empty stream."""

    def __init__(self, pipe: IO[bytes] | None, paused: bool = False) -> None:
        self.pipe = pipe or open(os.devnull, "rb")  # noqa: SIM115
        self.data, self.ended = b"", False
        self.going = threading.Event()
        self.changed = threading.Condition()
        if not paused:
            self.going.set()
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        while self.going.wait() and len(self.data) < STREAM_LIMIT:
            chunk = os.read(self.pipe.fileno(), 65536)
            with self.changed:
                self.data += chunk
                self.ended = not chunk
                self.changed.notify_all()
            if not chunk:
                return

    @property
    def text(self) -> str:
        return self.data.decode()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the data matches a pattern (re.MULTILINE); return the match."""
        end = time.monotonic() + DEADLINE
        with self.changed:
            while True:
                found = re.search(pattern, self.data.decode(errors="replace"), re.MULTILINE)
                if found:
                    return found
                left = end - time.monotonic()
                assert left > 0 and not self.ended, (
                    f"{pattern!r} did not arrive; this did:\n{self.text[-3000:]}"
                )
                self.changed.wait(left)

    def rest(self) -> str:
        """Return all data, up to the end of file."""
        self.going.set()
        self.thread.join(DEADLINE)
        assert self.ended, f"the stream does not end:\n{self.text[-3000:]}"
        return self.text

    def close(self) -> None:
        """Close the pipe after its writer has ended."""
        self.going.set()
        self.thread.join(DEADLINE)
        self.pipe.close()


class Server:
    """The server as a process, on a free port."""

    def __init__(
        self,
        *options: str,
        program: str = SERVER,
        shell: str = "",
        python: str = "",
        paused: bool = False,
        **popen: Any,
    ) -> None:
        """`shell` holds commands that a shell runs first, such as a limit or a redirection.

        `python` holds statements that its process runs first.  If `paused`, the test reads standard output
        only after `out.going.set()`.
        """
        command = [sys.executable, program, *options]
        if "--port" not in options:
            command += ["--port", "0"]
        if python:
            replace = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
            command[1:1] = ["-c", f"{python}\n{replace}"]
        if shell:
            command = ["sh", "-c", f'{shell} && exec "$@"', "sh", *command]
        popen = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
        self.process = subprocess.Popen(command, **popen)
        self.out = Stream(self.process.stdout, paused)
        self.err = Stream(self.process.stderr) if self.process.stderr else self.out
        self.clients: list[socket.socket] = []
        self.host, self.port = "", 0

    def listens(self) -> None:
        """Wait for its first line, which shows its address."""
        host, port = self.err.wait_for(r"^listening on (.+):(\d+), waiting for").groups()
        self.host, self.port = host.strip("[]"), int(port)

    def connect(self, **options: Any) -> socket.socket:
        """Return a blocking connection; `small=True` gives it a small receive buffer."""
        client = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        client.settimeout(DEADLINE)
        if options.get("small"):  # the stream arrives in small chunks
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1001)
        self.clients.append(client)
        client.connect((self.host.replace("0.0.0.0", "127.0.0.1"), self.port))
        return client

    def seat(self, **options: Any) -> socket.socket:
        """Return a connection that the server has logged."""
        client = self.connect(**options)
        self.err.wait_for(rf"connected from \S+:{client.getsockname()[1]}, ")
        return client

    def messages(self, pattern: str) -> re.Match[str]:
        """Wait until standard output matches a pattern; return the match."""
        return self.out.wait_for(pattern)

    def status(self, field: str) -> int:
        """Return a number of /proc/PID/status: VmRSS in kB, voluntary_ctxt_switches."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"^{field}:\s+(\d+)", text, re.MULTILINE).group(1))  # type: ignore[union-attr]

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def activity(self) -> list[str]:
        """Return the state of the process and how often it went to sleep."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return re.findall(r"^(?:State|voluntary_ctxt_switches):\s+(\w+)", text, re.MULTILINE)

    def settled(self, seconds: float = 0.02) -> None:
        """Wait until the server sleeps and nothing has woken it for some time.

        A server that spins, or wakes again and again, never settles.
        """
        end, before, unchanged = time.monotonic() + DEADLINE, self.activity(), 0
        while unchanged < 10:
            time.sleep(seconds / 10)
            now = self.activity()
            assert now[0] != "Z", f"it has ended:\n{self.err.text[-3000:]}"
            assert time.monotonic() < end, "it never sleeps"
            unchanged = unchanged + 1 if now == before and now[0] == "S" else 0
            before = now

    def stop(self, number: int = signal.SIGTERM, status: int = 0) -> str:
        """Stop it and return its standard error; fail if it ends with another status or a traceback."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended(status)

    def ended(self, status: int) -> str:
        text = self.err.rest()  # before wait(), which notices the end of a process later
        assert self.process.wait(DEADLINE) == status, text
        assert "Traceback" not in text, text
        return text

    def close(self) -> None:
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.out, self.err):
            stream.close()


def run(*command: str | bytes, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a Python program that ends on its own: `run(SERVER, "--help")`."""
    options = {"stdin": subprocess.DEVNULL, "timeout": DEADLINE, **options}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, encoding="utf-8", errors="replace", **options
    )


def open_terminal(*command: str, **popen: Any) -> tuple[subprocess.Popen[bytes], int]:
    """Start a program in a terminal of its own; return it and the descriptor of the terminal's other end."""
    ours, theirs = os.openpty()
    attach = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    attach += "os.execvp(sys.argv[1], sys.argv[1:])"
    popen.update(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    try:
        return subprocess.Popen([sys.executable, "-c", attach, *command], **popen), ours
    finally:
        os.close(theirs)


# ---------------------------------------------------------------- connections


def port_of(client: socket.socket) -> int:
    """Return the client's own port, which the server's log shows."""
    return int(client.getsockname()[1])


def reset(client: socket.socket) -> None:
    """Close with a reset, not with an end of file."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def arrive(server: Server, client: socket.socket, data: bytes) -> None:
    """Send data to a suspended server, and wait until its kernel has received everything."""
    client.sendall(data)
    eventually(lambda: not any(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4))), "the data has arrived")


def fill(server: Server, client: socket.socket, data: bytes = LINES) -> int:
    """Send until the server reads no more; return a lower bound of the bytes that have arrived."""
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
    return sent - int(unacknowledged)


def ending(client: socket.socket) -> tuple[bytes, bool]:
    """Read to the end of the stream; return the data, and whether it ended with a reset."""
    data = bytearray()
    while True:
        try:
            chunk = client.recv(1 << 20)
        except ConnectionResetError:
            return bytes(data), True
        if not chunk:
            return bytes(data), False
        data += chunk
        assert len(data) < STREAM_LIMIT, "the stream does not end"


def is_reset(server: Server) -> bool:
    """Connect; return whether the server resets the connection.  It may do so before connect() returns."""
    try:
        return ending(server.connect()) == (b"", True)
    except ConnectionResetError:
        return True


def read_exactly(client: socket.socket, size: int) -> bytes:
    """Read `size` bytes, or fewer if the stream ends."""
    assert size < STREAM_LIMIT
    data = bytearray()
    while len(data) < size:
        chunk = client.recv(min(size - len(data), 1 << 20))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def read_all(client: socket.socket) -> bytes:
    """Read to the end of file; fail if there is a reset."""
    data, was_reset = ending(client)
    assert not was_reset, f"a reset after {len(data):,} bytes"
    return data


def is_pings(data: bytes) -> bool:
    """Return whether the data is one whole ping or more."""
    return bool(data) and data == b"ping" * (len(data) // 4)


# ---------------------------------------------------------------- fixtures

Start = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[Start]:
    """Yield a function that starts servers; end them after the test."""
    servers: list[Server] = []

    def start(*options: str, **how: Any) -> Server:
        server = Server(*options, **how)
        servers.append(server)  # before the first line, which may not arrive
        server.listens()
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def failing(tmp_path: Path) -> Failing:
    """Return the means to let a server's system calls fail, or to change its constants."""
    return Failing(tmp_path)


@contextmanager
def turn() -> Iterator[None]:
    """Hold the right to use port 10001, among all test suites on this machine."""
    with socket.socket(socket.AF_UNIX) as mark:

        def has_turn() -> bool:
            with suppress(OSError):
                mark.bind("\0port 10001")  # an abstract name disappears with its socket, unix(7)
                return True
            return False

        eventually(has_turn, "another test suite releases port 10001", 10 * DEADLINE)
        yield


def port_is_free() -> bool:
    """Return whether a server could listen on port 10001."""
    with suppress(OSError), socket.create_server(("", 10001)):
        return True
    return False


@pytest.fixture(scope="session")
def port_10001_is_free() -> None:
    """Skip the tests that need port 10001 if another program uses it."""
    with turn():
        try:
            eventually(port_is_free, "port 10001 is free", 1)
        except AssertionError:
            pytest.skip("another program uses port 10001: stop it (ss -ltnp 'sport = :10001' shows it)")


@pytest.fixture
def port_10001(port_10001_is_free: None) -> Iterator[int]:
    """Yield the lecture's port, which no other suite uses during the test."""
    with turn():
        eventually(port_is_free, "port 10001 is free again")
        yield 10001
