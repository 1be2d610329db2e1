"""The processes of the benchmark: servers on one core, everything else on another."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from re import Match
    from typing import IO, Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PYTHON = sys.executable
SERVER = [PYTHON, os.path.join(ROOT, "non_block_io_server.py"), "--port", "0"]
LECTURE = "the lecture's script"

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]  # PyPy has none
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]
TIMEOUT = 60  # seconds to wait for a process
MESSAGE = b"Some message... " * 4

starting = False  # a process may have started, but running() cannot end it yet
interrupted = False


class Failure(Exception):
    """A wrong byte, or a server that has ended."""


def use_core(core: int) -> None:
    """Run on this core, if there is more than one to choose from."""
    if len(CORES) > 1:
        os.sched_setaffinity(0, {core})


def progress(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def stop(*_: object) -> None:
    """Interrupt the benchmark once, because it must still end its processes."""
    global interrupted
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda *_: None)  # not SIG_IGN: a process that starts now would inherit that
    interrupted = True
    if not starting:
        raise KeyboardInterrupt


@contextlib.contextmanager
def running(command: list[str], core: int, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process on a core, with its other streams on /dev/null; end it at the end of the block."""
    streams = {**dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL), **streams}
    use_core(core)  # the child inherits the core, so it uses it from the first instruction
    global starting
    starting = True
    process = subprocess.Popen(command, **streams)
    try:
        starting = False
        if interrupted:
            raise KeyboardInterrupt
        use_core(LOAD_CORE)
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Server:
    """A server process that listens, and its log: standard error, in a file."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        """Wait until it listens."""
        self.name, self.process, self.log = name, process, log
        found = self.wait_for(r"listening on 127\.0\.0\.1:(\d+).*\n", process)
        if not found:
            raise self.failure("it does not listen")
        self.port = int(found.group(1))

    def wait_for(self, pattern: str, process: subprocess.Popen[bytes]) -> Match[str] | None:
        """Return the pattern's match as soon as the log has one, or None if the process ends first."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and process.poll() is None:
            match = re.search(pattern, self.text())
            if match:
                return match
            time.sleep(0.0002)
        return None

    def text(self) -> str:
        """Return its log."""
        return os.pread(self.log.fileno(), 10**7, 0).decode()

    def failure(self, reason: str) -> Failure:
        """Return an exception to raise, with the end of the log."""
        return Failure(f"{self.name}: {reason}; its log ends with\n{self.text()[-1000:]}")

    def connect(self) -> socket.socket:
        """Return a client's connection."""
        return socket.create_connection(("127.0.0.1", self.port), TIMEOUT)

    def connect_and_echo(self) -> socket.socket:
        """Return a client's connection, after one echo."""
        with contextlib.ExitStack() as stack:
            try:
                sock = stack.enter_context(self.connect())
                sock.sendall(MESSAGE)
                reply = sock.recv(len(MESSAGE), socket.MSG_WAITALL)
            except OSError as error:
                raise self.failure(f"an echo failed: {error}") from error
            if reply != MESSAGE:
                raise self.failure("a reply has wrong bytes")
            stack.pop_all()  # the connection stays open
        return sock


@contextlib.contextmanager
def serving(name: str, command: list[str], stdout: int | IO[bytes] = subprocess.DEVNULL) -> Iterator[Server]:
    """Start a server.  Raise Failure if it ends on its own."""
    with tempfile.TemporaryFile() as log:
        with running(command, SERVER_CORE, stdout=stdout, stderr=log) as process:
            server = Server(name, process, log)
            yield server
            if process.poll() is not None and name != LECTURE:  # that script ends with its first client
                raise server.failure(f"it ended on its own, with status {process.returncode}")
        if command[:2] == SERVER[:2] and process.returncode:
            raise server.failure(f"after SIGTERM it ended with status {process.returncode}")


def output(*command: str) -> str:
    """Return what a program prints, or an empty string if it is missing or fails."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10 * TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()


def read(path: str) -> str:
    """Return the content of a file of /proc, or an empty string if it is missing."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
