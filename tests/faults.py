"""The faults of the lecture's script, shown on it and then on this server.

    python3 tests/faults.py                                       lists the faults
    python3 tests/faults.py NAME                                  shows one, or `all`
    python3 tests/faults.py NAME --server "python3 mine.py"       judges a server that sends pings

Each fault is a function.  It does what the clients do, with plain sockets, and returns its observation.
A server of your own listens on port 10001, or on the port that replaces {port} in its command.
"""

from __future__ import annotations

import argparse
import os
import platform
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Callable, Iterator, Tuple

HERE = Path(__file__).resolve().parent
DEADLINE = 15.0  # seconds to wait for something that should happen immediately
QUIET = 1.0  # seconds without data after which a client counts as not served
KEPT = 1 << 19  # bytes: more than the kernel holds for a small client after its server ended
CPU_TIME = 10  # seconds of processor time after which the kernel ends a server
PINGS, NOTHING, END = "pings", f"nothing for {QUIET:.0f} s", "the end"  # what a client receives

# The lecture's script: {port} replaces its port, and one more line reports the port.
REPORT = 'import sys; print("listening on 127.0.0.1:%d" % sock.getsockname()[1], file=sys.stderr)'
SCRIPT = (HERE / "lecture.py").read_text(encoding="utf-8").replace("10001", "{port}")
SCRIPT = SCRIPT.replace("sock.listen()\n", f"sock.listen()\n{REPORT}\n")
LECTURE, OURS, YOURS = "the lecture's script", "this server", "your server"
SERVERS = {  # the command of each; a port replaces {port}, 0 is any free one
    LECTURE: [sys.executable, "-X", "utf8", "-c", SCRIPT],
    OURS: [sys.executable, str(HERE.parent / "non_block_io_server.py"), "--port", "{port}"],
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

    def __init__(self, stack: ExitStack, name: str, port: int = 0, piped: bool = False) -> None:
        self.stack = stack
        self.out, self.err = os.memfd_create("out"), os.memfd_create("err")  # its output, in memory
        stack.callback(os.close, self.out)
        stack.callback(os.close, self.err)
        self.process = stack.enter_context(
            subprocess.Popen(
                ["sh", "-c", f'ulimit -t {CPU_TIME}; exec "$@"', "sh", *command(name, port)],
                stdout=subprocess.PIPE if piped else self.out,
                stderr=self.err,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},  # what it prints appears immediately
            )
        )
        stack.callback(self.process.kill)
        self.port = 0  # it has ended
        self.until(self.listens)

    def listens(self) -> bool:
        """Find out on which port it listens.  A connection would count as a client."""
        files = f"/proc/{self.process.pid}/fd"
        with suppress(OSError):  # the process has ended, or has closed a file in the meantime
            mine = {os.readlink(f"{files}/{file}") for file in os.listdir(files)}
            for port, inode in listeners():
                if f"socket:[{inode}]" in mine:
                    self.port = port
        return self.port > 0

    def clients(self, number: int = 2, small: bool = True) -> list[socket.socket]:
        """Return connections; if `small`, the kernel holds few bytes for each (buffers and segments)."""
        if not self.port:
            raise ConnectionError(f"it ends: {self.last_words()}")
        clients = [self.stack.enter_context(socket.socket()) for _ in range(number)]
        for client in clients:
            client.settimeout(DEADLINE)
            if small:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            client.connect(("127.0.0.1", self.port))
        return clients

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition is true or the server has ended."""
        end = time.monotonic() + DEADLINE
        while not condition() and self.process.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"it printed {text(self.out)[-500:]!r}, {text(self.err)[-500:]!r}")
            time.sleep(0.005)

    def watched(self, seconds: float) -> tuple[float, int, str]:
        """Return how much of a core it uses, how often it goes to sleep, and its state after that."""
        waits, ticks, proc = [], [], Path(f"/proc/{self.process.pid}")  # proc(5)
        for pause in (seconds, 0):
            state, *fields = (proc / "stat").read_text().rpartition(")")[2].split()
            ticks.append(int(fields[10]) + int(fields[11]))
            waits.append(int((proc / "status").read_text().split("\nvoluntary_ctxt_switches:")[1].split()[0]))
            time.sleep(pause)
        return (ticks[1] - ticks[0]) / os.sysconf("SC_CLK_TCK") / seconds, waits[1] - waits[0], state

    def last_words(self) -> str:
        """Return the last line of its standard error, for example that of a traceback."""
        return (text(self.err).splitlines() or [f"status {self.process.returncode}"])[-1]

    def outcome(self, other: socket.socket) -> tuple[bool, str]:
        """Return whether the server fails its other client, and a description."""
        got = receives(other)
        if got == END:
            self.process.wait(DEADLINE)
            return True, f"ends: {self.last_words()}"
        return got != PINGS, f"{'continues' if got == PINGS else 'stalls'}: the other client gets {got}"


def text(file: int) -> str:
    """Return the content of the file; the server's position in it stays."""
    return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")


def listeners() -> Iterator[tuple[int, str]]:
    """Yield the port and the inode of each listener on this machine: proc(5)."""
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError), open(f"/proc/net/{table}") as lines:
            next(lines)
            for line in lines:
                _, local, _, state, _, _, _, _, _, inode = line.split()[:10]
                if state != "0A":  # the listeners are at the beginning
                    break
                yield int(local.rpartition(":")[2], 16), inode


def receives(client: socket.socket) -> str:
    """Return what a client receives, in addition to data in the kernel: PINGS, NOTHING or END."""
    client.settimeout(QUIET)
    try:
        with client.makefile("rb") as stream:
            return PINGS if len(stream.read(KEPT)) == KEPT else END
    except socket.timeout:
        return NOTHING
    except ConnectionError:
        return END


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
    server.clients()[0].shutdown(socket.SHUT_WR)  # its end of file: recv returns b"" from now on
    load, _, _ = server.watched(0.5)
    times = text(server.out).count("data received...")
    return times > 0, f"prints 'data received...' {times:,} times, uses {load:.0%} of a core"


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
    sent = got = 0
    while sent < 8 << 20:
        readable, writable, _ = select.select([first], [first], [])
        if writable:
            sent += first.send(b"Some message...\n" * 4096)
        if readable:
            size = len(first.recv(1 << 20))
            got += size if sent > 4 << 20 else 0  # earlier pings have been read by then
    return got < 1 << 10, f"gives it {got:,} bytes of pings for its 4 MiB"


def restart(start: Start) -> Seen:
    """it is stopped while clients are connected, and started again immediately"""
    server = start()
    for client in server.clients():
        client.recv(1)
    server.process.terminate()
    server.process.wait(DEADLINE)
    again = start(port=server.port)
    return not again.port, "listens again" if again.port else f"ends: {again.last_words()}"


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
    server.until(lambda: "red\n" in text(server.out))
    raw, shown = "\x1b" in text(server.out), text(server.out).splitlines()[1]
    return raw, "prints the raw ESC byte: the terminal obeys" if raw else f"prints {shown}"


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
    for client in server.clients(small=False):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    server.until(lambda: server.watched(0.1) == (0, 0, "S"))  # the connections are full
    _, times, _ = server.watched(1.2)
    return times > 0, f"wakes {times} time{'s' * (times != 1)} in 1.2 s"


def third(start: Start) -> Seen:
    """a third client connects, then the first one disconnects"""
    first, _, third_client = start().clients(3)
    first.shutdown(socket.SHUT_WR)
    got = receives(third_client)
    return got != PINGS, f"the third client gets {got}"


ALL = reset, leave, split, bytes_, starve, restart, print_, escape, stop, idle, third
FAULTS = {fault.__name__.rstrip("_"): fault for fault in ALL}


def observe(name: str, server: str) -> Seen:
    """Return what one of SERVERS does in this situation."""
    try:
        with ExitStack() as stack:
            return FAULTS[name](lambda **options: Server(stack, server, **options))
    except OSError as error:  # for example, it sends no pings
        return True, f"cannot be judged: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the faults of the lecture's script.")
    parser.add_argument(
        "name", nargs="?", choices=(*FAULTS, "all"), help="a fault (default: list all faults)"
    )
    parser.add_argument("--server", metavar="COMMAND", help="judge this server; {port} becomes its port")
    options = parser.parse_args()
    if options.name:
        need_epoll("faults")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # servers would inherit that it is ignored
    names = [LECTURE, OURS]
    if options.server:
        names, SERVERS[YOURS] = [YOURS], shlex.split(options.server)
    failed = False
    for name, fault in FAULTS.items():
        if not options.name:
            print(f"{name:<8}  {fault.__doc__}")
        elif options.name in (name, "all"):
            print(fault.__doc__, flush=True)
            with ThreadPoolExecutor() as pool:
                for server, (fails, words) in zip(names, pool.map(observe, [name] * len(names), names)):
                    verdict = {YOURS: "has this fault" if fails else "has not"}.get(server, server)
                    print(f"  {verdict:<21}  {words}", flush=True)
                    failed = failed or (fails and server != LECTURE)
    sys.exit(failed)


if __name__ == "__main__":
    main()
