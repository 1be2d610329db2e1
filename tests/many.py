#!/usr/bin/env python3
"""Many simultaneous connections: copies of the server behind one port, two echoes over each connection.

    python3 tests/many.py
    python3 tests/many.py --connections 500000 --copies 40

The clients are plain sockets in a few processes.  They connect from many loopback addresses, so that
ports do not run out.  Each client sends its own bytes when it has connected, and again when all
clients are connected.  Every byte of the echoes is checked.  Descriptors and memory are read before,
at the peak, and after all clients have disconnected.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import multiprocessing
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Callable, Iterable, Iterator, NamedTuple

from soak import LISTENING, SERVER, STOPPED, Loss, at_least, counted, numbers, script

SIZE = 64  # bytes of one echo
WINDOW = 128  # echoes in flight in each process of clients: more could overflow a backlog
PORTS = range(20_000, 30_000)  # of each client address; the kernel gives other programs higher ones
SPARE_FILES = 64  # descriptors of a process besides its connections
MEMORY = 8192  # bytes of the machine's memory that a connection needs, at both of its ends
DEADLINE = 60.0  # seconds without an answer that count as a failure
CAUSES = {
    errno.EMFILE: "the limit on the open files of a process (ulimit -n)",
    errno.ENFILE: "the limit on open files (fs.file-max)",
    errno.EADDRINUSE: "the ports of the loopback addresses: another program uses one",
    errno.ENOBUFS: "the machine's memory",
    errno.ENOMEM: "the machine's memory",
    errno.EAGAIN: "the backlog (net.core.somaxconn), or too few copies",  # no echo for DEADLINE seconds
}


class State(NamedTuple):
    """The resources that the copies and the machine use."""

    files: int  # descriptors of the copies
    resident: int  # bytes of the copies
    available: int  # bytes of the machine
    sockets: int  # TCP sockets of the machine


def number_in(path: str, word: str) -> int:
    """Return the number after a word in a file of /proc."""
    fields = Path(path).read_text().replace(":", " ").split()
    return int(fields[fields.index(word) + 1])


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise Loss(f"did not happen: {what}")
        time.sleep(0.005)


class Copy:
    """One copy of the server.  A thread reads its log and keeps the unusual lines."""

    def __init__(self, script: str, port: int, seats: int) -> None:
        options = ["--echo", "--quiet", "--reuse-port", "--port", str(port)]
        options += ["--connections", str(seats), "--wait-for", "1"]
        command = [sys.executable, script, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, args=(self.process.stderr,), daemon=True)
        self.reader.start()
        eventually(lambda: self.lines or self.process.poll() is not None, "a copy listens")
        found = LISTENING.search(self.text)
        if not found:
            raise Loss(f"a copy does not listen: {self.text}")
        self.port = int(found[1])

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def read(self, log: IO[str]) -> None:
        self.lines.extend(line.rstrip() for line in log if not line.startswith("client "))

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident(self) -> int:
        return number_in(f"/proc/{self.process.pid}/status", "VmRSS") * 1024

    def stop(self) -> list[int]:
        """Stop it; return how many clients it has served, bytes received and bytes sent."""
        self.process.terminate()
        status = self.process.wait(DEADLINE)
        self.reader.join(DEADLINE)
        found = STOPPED.search(self.text)
        if status or not found:
            raise Loss(f"a copy has ended with status {status}: {self.text}")
        return numbers(*found.groups()[:3])


def message(process: int, descriptor: int, turn: int) -> bytes:
    """Return the bytes that only this connection sends, only in this turn."""
    return (b"%d.%d.%d " % (process, descriptor, turn) * SIZE)[:SIZE]


def connections(process: int, port: int, count: int, poll: select.epoll) -> Iterator[int]:
    """Connect one after the other, from addresses that only this process uses."""
    for number in range(count):
        address = f"127.{1 + process // 250}.{1 + process % 250}.{1 + number // len(PORTS)}"
        sock = socket.socket()
        sock.settimeout(DEADLINE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, PORTS[number % len(PORTS)]))
        sock.connect(("127.0.0.1", port))
        sock.setblocking(False)
        descriptor = sock.detach()
        poll.register(descriptor, select.EPOLLIN)
        yield descriptor


def echo(process: int, turn: int, descriptors: Iterable[int], poll: select.epoll) -> list[int]:
    """Send a message over each connection and check its echo; return the descriptors."""
    done: list[int] = []
    waiting: dict[int, bytes] = {}
    source = iter(descriptors)
    while True:
        for descriptor in source:
            waiting[descriptor] = message(process, descriptor, turn)
            os.write(descriptor, waiting[descriptor])
            if len(waiting) >= WINDOW:
                break
        if not waiting:
            return done
        ready = poll.poll(DEADLINE)
        if not ready:
            raise OSError(errno.EAGAIN, f"{len(waiting)} echoes have not arrived")
        for descriptor, _ in ready:
            data, due = os.read(descriptor, 4096), waiting.get(descriptor, b"")
            if not data or not due.startswith(data):
                raise Loss(f"an echo of {due!r} is {data!r}")
            waiting[descriptor] = due[len(data) :]
            if not waiting[descriptor]:
                del waiting[descriptor]
                done.append(descriptor)


def clients(process: int, count: int, orders: Connection) -> None:
    """Connect and echo; echo again; disconnect.  Each step waits for an order (the port) and replies."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends it
    held: list[int] = []
    poll = select.epoll()
    for turn in range(2):
        port = orders.recv()
        try:
            held = echo(process, turn, held or connections(process, port, count, poll), poll)
            orders.send("")
        except Loss as wrong:
            orders.send(str(wrong))
        except OSError as error:
            number = errno.EAGAIN if isinstance(error, socket.timeout) else error.errno or 0
            orders.send(f"{error}: the limit is {CAUSES.get(number, 'unknown')}")
    orders.recv()
    for descriptor in held:
        os.close(descriptor)
    orders.send("")


def limit(count: int, copies: int, files: int) -> str:
    """Return a limit of the machine that is too low for so many connections, or ""."""
    share = count / copies
    seats = math.ceil(share + 6 * math.sqrt(share))  # the kernel spreads connections by a hash
    if seats + SPARE_FILES > files:
        who = "the copy" if copies == 1 else f"each of {copies} copies"
        needs = f"{who} needs {seats + SPARE_FILES:,} open files"
        return f"{needs}, and the hard limit is {files:,} (ulimit -Hn): use more copies"
    used, _, most = (int(field) for field in Path("/proc/sys/fs/file-nr").read_text().split())
    if used + 2 * count > most:
        return f"{count:,} connections need {2 * count:,} open files, and fs.file-max is {most:,}"
    available = number_in("/proc/meminfo", "MemAvailable") >> 10
    if count * MEMORY >> 20 > available:
        needs = f"{count:,} connections need about {count * MEMORY >> 20:,} MiB of memory"
        return f"{needs}, and {available:,} MiB are available"
    return ""


def state_of(copies: list[Copy]) -> State:
    available = number_in("/proc/meminfo", "MemAvailable") * 1024
    sockets = number_in("/proc/net/sockstat", "alloc")
    return State(sum(c.files() for c in copies), sum(c.resident() for c in copies), available, sockets)


def many(options: argparse.Namespace, stack: contextlib.ExitStack) -> str:
    """Hold all connections open at the same time and check them; return the summary."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = 1 << 20 if files == resource.RLIM_INFINITY else files
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    total = options.connections
    too_low = limit(total, options.copies, files)
    if too_low:
        raise Loss(too_low)

    number = max(os.cpu_count() or 1, math.ceil(total / (files - SPARE_FILES)))
    context = multiprocessing.get_context("fork")
    loads: list[Connection] = []
    for process in range(number):  # before there are threads
        share = total * (process + 1) // number - total * process // number
        ours, theirs = context.Pipe()
        load = context.Process(target=clients, args=(process, share, theirs), daemon=True)
        load.start()
        stack.callback(load.kill)
        loads.append(ours)
    copies: list[Copy] = []
    for _ in range(options.copies):
        port = copies[0].port if copies else 0
        copies.append(Copy(options.server, port, min(total, files - SPARE_FILES)))
        stack.callback(copies[-1].process.kill)

    def step() -> float:
        """Let all clients do their next step; return how many seconds it took."""
        start = time.monotonic()
        for load in loads:
            load.send(copies[0].port)
        for load in loads:
            wrong = load.recv()
            if wrong:
                dead = [copy.text for copy in copies if copy.process.poll() is not None]
                held = state_of([copy for copy in copies if copy.process.poll() is None]).files - before.files
                raise Loss(f"with {held:,} connections: {wrong}" + "; a copy has ended: ".join(["", *dead]))
        return time.monotonic() - start

    before = state_of(copies)
    connecting = step()
    peak = state_of(copies)
    time.sleep(options.hold)
    echoing = step()
    step()
    eventually(lambda: sum(copy.files() for copy in copies) <= before.files, "every seat is free")
    after = state_of(copies)
    served, received, sent = map(sum, zip(*(copy.stop() for copy in copies)))
    if peak.files - before.files != total:
        raise Loss(f"the copies held {peak.files - before.files:,} connections at the peak")
    if (served, received, sent) != (total, 2 * SIZE * total, 2 * SIZE * total):
        raise Loss(f"the copies served {served:,} clients, received {received:,} and sent {sent:,} bytes")
    states = before, peak, after
    return "\n".join(
        [
            f"{counted(total, 'simultaneous connection')} over {counted(options.copies, 'copy', 'copies')}:"
            f" {counted(2 * total, 'echo', 'echoes')} of {SIZE} bytes checked, 0 wrong",
            f"{'':36}{'before':>12}{'at the peak':>12}{'after':>12}",
            row("descriptors of the copies", [state.files for state in states]),
            row("memory of the copies, MiB", [state.resident >> 20 for state in states]),
            row("sockets of the machine", [state.sockets for state in states]),
            row("free memory of the machine, MiB", [state.available >> 20 for state in states]),
            f"a connection needs {per_connection(peak.resident - before.resident, total)} in its copy,"
            f" {per_connection(before.available - peak.available, total)} of the machine (both ends)",
            f"{connecting:.1f} s to connect and echo, {echoing:.1f} s to echo again",
        ]
    )


def row(name: str, figures: list[int]) -> str:
    """Return a line of the table."""
    return f"{name:<36}" + "".join(f"{figure:>12,}" for figure in figures)


def per_connection(size: int, total: int) -> str:
    """Return the bytes of a connection.  Other programs change the memory of the machine, too."""
    return f"{size / total:,.0f} bytes" if size > 0 else "no measurable memory"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Hold many connections open at the same time and check two echoes over each."
    )
    add = parser.add_argument
    add(
        "--connections",
        type=at_least(1),
        default=2000,
        metavar="N",
        help="default: %(default)s",
    )
    add(
        "--copies",
        type=at_least(1),
        default=2,
        metavar="N",
        help="of the server, on one port (default: %(default)s)",
    )
    add(
        "--hold",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="idle time before the second echo (default: 0)",
    )
    add("--server", type=script, default=SERVER, metavar="PATH", help="server to test (default: this one)")
    options = parser.parse_args()
    if not 0 <= options.hold < float("inf"):
        parser.error("argument --hold: must be a number of seconds")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no copy is left behind
    with contextlib.ExitStack() as stack:
        try:
            print(f"many: {many(options, stack)}")
        except (Loss, OSError) as error:
            print(f"many: failed: {error}")
            return 1
        except KeyboardInterrupt:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
