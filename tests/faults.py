"""The faults of the lecture's script, shown on it and then on this server.

    python3 tests/faults.py                                      lists the faults
    python3 tests/faults.py NAME                                 shows one, or `all`
    python3 tests/faults.py all --server "python3 mine.py"       checks your own server
    python3 tests/faults.py all --server "./mine --port {port}"  ... on a free port

Each fault is a function.  It does what the clients do, with plain sockets, and returns its observation.
Your server sends pings to two clients or more, prints their messages, and ends on a signal.  With
--server, the exit status is 0 if it has none of the faults, 1 if it has one, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Callable, Iterable, Iterator, Tuple

HERE = Path(__file__).resolve().parent
DEADLINE = 15.0  # seconds to wait for something that should happen immediately
QUIET = 1.0  # seconds without data after which a client counts as not served
NEW = 4096  # bytes that a client must receive after a fault
PINGS, NOTHING, END = "pings", f"nothing for {QUIET:.0f} s", "the end"  # what a client receives
BUSY = 0.2  # of a core: a server that only waits uses less

# The lecture's script with another port.  One more line reports the port, for the benchmark.
REPORT = 'import sys; print("listening on 127.0.0.1:%d" % sock.getsockname()[1], file=sys.stderr, flush=True)'
SCRIPT = (HERE / "lecture.py").read_text(encoding="utf-8").replace("10001", "{port}")
SCRIPT = SCRIPT.replace("sock.listen()\n", f"sock.listen()\n{REPORT}\n")
SERVERS = {  # {port} is replaced by the port; 0 is a free one
    "the lecture's script": [sys.executable, "-c", f"exec({SCRIPT!a})"],
    "this server": [sys.executable, str(HERE.parent / "non_block_io_server.py"), "--port", "{port}"],
}


def need_epoll(tool: str) -> None:
    """Exit with one line on a system without epoll."""
    if not hasattr(select, "epoll"):
        sys.exit(f"{tool}: epoll is needed, which only Linux has; this is {platform.system()}")


def command(name: str, port: int = 0) -> list[str]:
    """Return the command that starts one of SERVERS on the port."""
    return [word.replace("{port}", str(port)) for word in SERVERS[name]]


class Server:
    """A server process.  The stack ends it and its clients."""

    def __init__(self, stack: ExitStack, command: list[str], port: int = 0, piped: bool = False) -> None:
        self.stack = stack
        self.out, self.err = os.memfd_create("out"), os.memfd_create("err")  # its output, in memory
        stack.callback(os.close, self.out)
        stack.callback(os.close, self.err)
        stdout = subprocess.PIPE if piped else self.out
        command = [word.replace("{port}", str(port)) for word in command]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        self.process = stack.enter_context(
            subprocess.Popen(command, stdout=stdout, stderr=self.err, env=environment)
        )
        stack.callback(self.process.kill)
        with suppress(ProcessLookupError):
            resource.prlimit(self.process.pid, resource.RLIMIT_CPU, (10, 10))  # seconds: it may spin
        self.until(lambda: listening_port(self.process.pid) > 0)
        self.port = listening_port(self.process.pid)

    def clients(self, number: int = 2, small: bool = False) -> list[socket.socket]:
        """Return connections; a small one holds few unread bytes."""
        assert self.port, f"it does not listen: {self.last_words()}"
        clients = [self.stack.enter_context(socket.socket()) for _ in range(number)]
        for client in clients:
            client.settimeout(DEADLINE)
            if small:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", self.port))
        return clients

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition is true or the server has ended."""
        end = time.monotonic() + DEADLINE
        while self.process.poll() is None and not condition():
            printed = f"{text(self.out)[-200:]!r}, {text(self.err)[-200:]!r}"
            assert time.monotonic() < end, f"no reaction in {DEADLINE:.0f} s; it printed {printed}"
            time.sleep(0.005)

    def last_words(self) -> str:
        """Return its last line on standard error."""
        return (text(self.err).strip().splitlines() or [f"status {self.process.poll()}"])[-1]

    def watched(self, seconds: float) -> tuple[float, int, str]:
        """Return how much of a core it uses, how often it goes to sleep, and its state after that."""
        waits, ticks, proc = [], [], Path(f"/proc/{self.process.pid}")  # proc(5)
        for pause in (seconds, 0):
            state, *fields = (proc / "stat").read_text().rpartition(")")[2].split()
            ticks.append(int(fields[10]) + int(fields[11]))
            waits.append(int((proc / "status").read_text().split("\nvoluntary_ctxt_switches:")[1].split()[0]))
            time.sleep(pause)
        return (ticks[1] - ticks[0]) / os.sysconf("SC_CLK_TCK") / seconds, waits[1] - waits[0], state

    def rests(self) -> bool:
        """Return whether it sleeps, and nothing wakes it."""
        return self.watched(0.1) == (0, 0, "S")

    def outcome(self, other: socket.socket) -> tuple[bool, str]:
        """Return whether the server fails its other client, and a description."""
        end = time.monotonic() + QUIET
        self.until(lambda: self.rests() or time.monotonic() > end)  # it has noticed what happened
        got = self.receives(other)
        if got == END:
            self.process.wait(DEADLINE)
            return True, f"crashes: {self.last_words()}"
        return got != PINGS, f"{'continues' if got == PINGS else 'stalls'}: the other client gets {got}"

    def receives(self, client: socket.socket) -> str:
        """Return what a client receives, in addition to data in the kernel: PINGS, NOTHING or END."""
        port = client.getsockname()[1]
        unsent = queues(self.port, port)[0]  # first, because bytes move from here to the client's end
        size = unsent + queues(port, self.port)[1] + NEW
        client.settimeout(QUIET)
        try:
            while size > 0:
                data = client.recv(size)
                if not data:
                    return END
                size -= len(data)
            return PINGS
        except socket.timeout:
            return NOTHING
        except ConnectionError:
            return END


def tcp_sockets() -> list[list[str]]:
    """Return the fields of all TCP sockets: proc(5)."""
    texts = [path.read_text() for path in map(Path, ("/proc/net/tcp", "/proc/net/tcp6")) if path.exists()]
    return [line.split() for text in texts for line in text.splitlines()[1:]]


def listening_port(pid: int) -> int:
    """Return the port on which a process listens, or 0."""
    try:
        files = [os.readlink(file.path) for file in os.scandir(f"/proc/{pid}/fd")]
    except OSError:  # it has ended, or a file was closed meanwhile
        return 0
    for fields in tcp_sockets():
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in files:
            return int(fields[1].rpartition(":")[2], 16)
    return 0


def queues(port: int, peer: int) -> tuple[int, int]:
    """Return how many bytes one end of a connection has sent and not received an ACK for, and not read."""
    for fields in tcp_sockets():
        if (fields[1][-4:], fields[2][-4:]) == (f"{port:04X}", f"{peer:04X}"):
            sent, received = fields[4].split(":")
            return int(sent, 16), int(received, 16)
    return 0, 0


def text(file: int) -> str:
    """Return the content of the file; the server's position in it stays."""
    return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")


Start = Callable[..., Server]  # start(port=0, piped=False) starts the server to observe
Seen = Tuple[bool, str]  # whether the fault happened, and a description


def reset(start: Start) -> Seen:
    """a client sends a message, never reads, and leaves"""
    server = start()
    first, other = server.clients()
    first.recv(1, socket.MSG_PEEK)  # pings have arrived, and stay unread
    first.sendall(b"Some message...")
    first.close()  # the kernel sends a reset
    return server.outcome(other)


def leave(start: Start) -> Seen:
    """a client half-closes its connection"""
    server = start()
    first, _ = server.clients(small=True)
    server.until(server.rests)  # the connections are full
    first.shutdown(socket.SHUT_WR)  # its end of file: recv returns b"" from now on
    load, _, _ = server.watched(0.5)
    times = text(server.out).count("data received...")
    return times > 0 or load > BUSY, f"prints 'data received...' {times:,} times, uses {load:.0%} of a core"


def split(start: Start) -> Seen:
    """a character of two bytes is split over two packets"""
    server = start()
    first, other = server.clients()
    first.sendall(b"Br\xc3")
    server.until(lambda: "Br" in text(server.out))
    if server.process.poll() is None:
        first.sendall(b"\xbccke")
        server.until(lambda: "cke" in text(server.out))
    (ends, words), whole = server.outcome(other), "\u00fccke" in text(server.out)
    return ends or not whole, words + ("" if ends else f", the character is {'whole' if whole else 'broken'}")


def bytes_(start: Start) -> Seen:
    """a client sends a byte that is not UTF-8"""
    server = start()
    first, other = server.clients()
    first.sendall(b"caf\xe9!")
    server.until(lambda: "caf" in text(server.out))
    return server.outcome(other)


def starve(start: Start) -> Seen:
    """a client sends endlessly and reads everything that it receives"""
    first, _ = start().clients()
    first.setblocking(False)
    least = 1 << 30  # on a busy machine, the client may pause; then even the lecture's script sends pings
    for _ in range(10):
        sent = got = 0
        while sent < 8 << 20:
            readable, writable, _ = select.select([first], [first], [])
            if writable:
                sent += first.send(b"Some message...\n" * 4096)
            if readable:
                size = len(first.recv(1 << 20))
                got += size if sent > 4 << 20 else 0  # earlier pings have been read by then
        least = min(least, got)
        if least < NEW:
            break
    return least < NEW, f"gives it {least:,} bytes of pings for its 4 MiB"


def restart(start: Start) -> Seen:
    """it is stopped while clients are connected, and started again immediately"""
    server = start()
    for client in server.clients():
        client.recv(1)
    server.process.terminate()
    server.process.wait(DEADLINE)
    again = start(port=server.port)
    return not again.port, "listens again" if again.port else f"crashes: {again.last_words()}"


def print_(start: Start) -> Seen:
    """its output is a pipe that no program reads"""
    server = start(piped=True)
    first, other = server.clients()
    first.sendall(b"Some message...\n" * 8192)  # 128 KiB; a pipe holds 64
    return server.outcome(other)


def escape(start: Start) -> Seen:
    """a message holds an ESC sequence"""
    server = start()
    server.clients()[0].sendall(b"\x1b[31mred")
    server.until(lambda: "red" in text(server.out))
    lines = [line for line in text(server.out).splitlines() if "red" in line]
    if not lines:
        return True, f"crashes: {server.last_words()}"
    raw = "\x1b" in lines[0]
    return raw, "prints the raw ESC byte: the terminal obeys" if raw else f"prints {lines[0]}"


def stop(start: Start) -> Seen:
    """it is stopped with Ctrl-C or SIGTERM"""
    ends = []
    for number in (signal.SIGINT, signal.SIGTERM):
        server = start()
        server.process.send_signal(number)
        ends.append((server.process.wait(DEADLINE), "Traceback" in text(server.err)))
    words = [f"status {status}" + (" and a traceback" if traceback else "") for status, traceback in ends]
    return ends != [(0, False)] * 2, f"Ctrl-C: {words[0]}; SIGTERM: {words[1]}"


def idle(start: Start) -> Seen:
    """no client sends or reads"""
    server = start()
    server.clients(small=True)
    server.until(server.rests)  # the connections are full
    times = 1
    for _ in range(3):  # the kernel may wake it once, when it has joined small segments
        if times:
            _, times, _ = server.watched(1.2)
    return times > 0, f"wakes {times} times in 1.2 s"


def third(start: Start) -> Seen:
    """a third client connects, then the first one disconnects"""
    server = start()
    first, _, third_client = server.clients(3)
    first.shutdown(socket.SHUT_WR)
    got = server.receives(third_client)
    return got != PINGS, f"the third client gets {got}"


ALL = reset, leave, split, bytes_, starve, restart, print_, escape, stop, idle, third
FAULTS = {fault.__name__.rstrip("_"): fault for fault in ALL}


def observe(name: str, commands: Iterable[list[str]]) -> list[Seen]:
    """Return what each server does in this situation."""

    def run(command: list[str]) -> Seen:
        with ExitStack() as stack:
            try:
                return FAULTS[name](lambda **options: Server(stack, command, **options))
            except subprocess.TimeoutExpired:
                return True, f"does not end in {DEADLINE:.0f} s"
            except (AssertionError, OSError) as error:
                return True, f"does not serve: {error}"

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, commands))


def observe_all(names: Iterable[str], commands: Iterable[list[str]]) -> Iterator[list[Seen]]:
    """Yield the observations of these faults; some run at the same time, because they mostly wait."""
    commands = list(commands)
    with ThreadPoolExecutor(6) as pool:
        yield from pool.map(lambda name: observe(name, commands), names)


def main() -> int:
    parser = argparse.ArgumentParser(description="Show the faults of the lecture's script.")
    add = parser.add_argument
    add("name", nargs="?", choices=(*FAULTS, "all"), help="a fault (default: list all faults)")
    add("--server", metavar="COMMAND", help="check this server instead; {port} in it is a free port")
    options = parser.parse_args()
    servers = SERVERS
    if options.server is not None:
        try:
            command = shlex.split(options.server)
        except ValueError as error:
            parser.error(f"argument --server: {error}")
        if not command or not shutil.which(command[0]):
            parser.error(f"argument --server: no such program: {command[0] if command else ''!r}")
        servers = {"your server": command}
    if not options.name:
        for name, fault in FAULTS.items():
            print(f"{name:<8}  {fault.__doc__}")
        return 0
    need_epoll("faults")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a background job; the servers inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    found = []
    names = list(FAULTS) if options.name == "all" else [options.name]
    for name, observations in zip(names, observe_all(names, servers.values())):
        print(FAULTS[name].__doc__)
        for server, (fails, words) in zip(servers, observations):
            mark = f"{'FAULT' if fails else 'right'}  " if options.server is not None else ""
            print(f"  {server:<21}  {mark}{words}", flush=True)
            found += [name] * fails
    if options.server is None:
        return 0
    print(f"faults: {len(found)} of {len(names)}{': ' if found else ''}{', '.join(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
