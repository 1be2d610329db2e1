#!/usr/bin/env python3
"""A soak test: random clients use the server in every mode and in every way, for any time.

    python3 tests/soak.py --seconds 600

Each mode (pings, --echo, --every; few seats or many; --quiet or not; one copy, or three with
--reuse-port) has its own server, and these turns:

    probe      before serving starts, clients connect and leave without a byte
    crowd      many clients at the same time: each one sends, reads and leaves in a random way;
               sometimes the server is suspended, or one of its outputs is not read
    stall      standard output is not read until the server can only send pings
    stall_log  standard error is not read until the server drops lines (in some modes)
    stop       a signal arrives while the server is suspended and bytes are unread

After each turn all clients have left, and everything is checked: each byte that a client read, each
message, each figure of the log, the number of descriptors, the memory and the processor time.

No check depends on the duration of an action, except one: STALL seconds without progress are a loss.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
import platform
import random
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
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, AnyStr, Callable, Dict

SERVER = str(Path(__file__).parents[1] / "non_block_io_server.py")
STALL = 60.0  # seconds
TURN = 2.0  # seconds in which new clients of a crowd connect
CROWD = 20  # clients at the same time
COPIES = 3  # servers on one port, with --reuse-port
BACKLOG = 64  # clients that wait for a seat, at most: the kernel loses some when its backlog is full
PROBES = 9000  # connections whose log lines fill standard error
PROBE_NETWORK = "127.255."  # no client has such an address
MEMORY = 24 << 20  # bytes by which a server may grow after its start
if platform.python_implementation() == "PyPy":
    MEMORY += 40 << 20  # it compiles to machine code while it runs
GROWTH = 4 << 20  # bytes by which it may grow after its warm-up, because an allocator keeps some

PINGS = b"ping" * (1 << 17)
ROWS = "".join(f"{row:07d} Grüße, 世界{' ' if row % 20 else chr(10)}" for row in range(150000)).encode()
NOISE = random.Random(0).getrandbits(8 << 20).to_bytes(1 << 20, "big")
PHRASES = (
    b"Some message...\n",
    b"data received... (client 1, 127.0.0.1:1)\n",
    "Grüße, 世界 🙂 👩‍👧\r\n".encode(),
    "\r世\r\r\n\u2028\u202e\u200b\U000e0041\ue000\u0378".encode(),
    b"\x1b[31mred\x07\r\n\n\n  and\tmore\x00\xc2\x9b",
    b"no text: \xff\xfe\xe4\xb8 \xf0\x9f\x99",
)

JOINERS = "\u200c\u200d"
SELECTOR = "\ufe0f"  # escaped or not, as the character before it requires; both count as correct
INVISIBLE = {*(0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x3164, 0xFFA0)}
INVISIBLE.update(range(0xFE00, 0xFE0F), range(0xE0100, 0xE01F0))  # fillers and selectors
TITLE = "data received..."
HEADER = re.compile(r"data received\.\.\. \(client (\d+), (\S+)\)")
LISTENING = re.compile(r"listening on \S+:(\d+), waiting for \d+ clients?")
CONNECTED = re.compile(r"client (\d+) connected from (\S+), .*")
ENDED = re.compile(
    r"client (\d+) (.+?): ([\d,]+) bytes? received, ([\d,]+) \w+ sent(, not counted as a client)?, .*"
)
DROPPED = re.compile(r"([\d,]+) log lines? dropped: standard error was full")
STOPPED = re.compile(
    r"stopped: ([\d,]+) clients? served, ([\d,]+) bytes? received, ([\d,]+) \w+ sent"
    r"(?:, ([\d,]+) log lines? dropped)?"
)


class Loss(Exception):
    """A failure of the server."""


def script(path: str) -> str:
    """Return the path of a server that a tool is to test, for argparse."""
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"no such file: {path}")
    return path


def at_least(least: int) -> Callable[[str], int]:
    """Return a function that reads a number from the command line, for argparse."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    number.__name__ = "int"  # argparse prints it: invalid int value
    return number


def seconds(text: str) -> float:
    """Return a time from the command line, for argparse."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError("must be a positive number of seconds")
    return float(text)


seconds.__name__ = "float"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun in the right form."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


class Escapes(Dict[int, str]):
    """How the server prints each character, for str.translate()."""

    def __missing__(self, code: int) -> str:
        character, kind = chr(code), unicodedata.category(chr(code))
        if code not in INVISIBLE and (kind[0] not in "CZ" or kind == "Zs" or character in JOINERS + "\t"):
            self[code] = character
        else:
            self[code] = character.encode("unicode_escape").decode().replace("\\r", "\\x0d")
        return self[code]


ESCAPES = Escapes()


def printed(data: bytes) -> str:
    """Return how the server prints these bytes, without newlines and spaces.

    The ends of chunks are unknown.  A line is indented if it is not the first one of a chunk, or if it looks
    like a header.
    """
    text = data.decode("utf-8", "replace").replace("\r\n", "").replace("\n", "")
    return text.translate(ESCAPES).replace(" ", "")


def compare(what: str, real: AnyStr, expected: AnyStr) -> None:
    """Raise Loss, with the first difference, unless both are equal."""
    if real != expected:
        pairs = enumerate(zip(real, expected))
        at = next((at for at, (a, b) in pairs if a != b), min(len(real), len(expected)))
        raise Loss(f"{what}: {real[at : at + 20]!r} instead of {expected[at : at + 20]!r}, at {at}")


class Timeout:
    """A limit on the seconds without a change.  A pause of the whole machine counts as one second."""

    def __init__(self, seconds: float = STALL) -> None:
        self.seconds, self.idle, self.last = seconds, 0.0, time.monotonic()
        self.state: tuple[int, ...] = ()

    def expired(self, *state: int) -> bool:
        now = time.monotonic()
        self.idle = self.idle + min(now - self.last, 1.0) if state == self.state else 0.0
        self.last, self.state = now, state
        return self.idle >= self.seconds


def numbers(*texts: str | None) -> list[int]:
    return [int((text or "0").replace(",", "")) for text in texts]


class Client:
    """One connection, and everything that is known about it."""

    def __init__(self, service: Service, rng: random.Random, data: bytes) -> None:
        self.service, self.rng, self.data = service, rng, data
        self.urgent = -1  # index of the byte that is sent out of band
        self.send_size = self.recv_size = 1 << 18  # bytes per call, at most
        self.sent = self.received = self.faults = 0
        self.at_eof = False
        self.graceful = False  # nothing may be lost, in either direction
        self.arrived = False  # everything that it sent has arrived
        self.number = 0  # in the headers of its messages
        self.lines: list[str] = []  # of its messages
        self.size = 0  # characters in them
        self.expected = ""  # the correct text
        self.logged: tuple[int, str, int, int] | None = None  # number, reason, received, sent
        service.wait(lambda: service.waiting() < BACKLOG, "clients are accepted")
        self.sock = socket.socket()
        self.sock.settimeout(STALL)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if rng.random() < 0.3:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        if rng.random() < 0.3:  # odd segments, so that the server's sends also cut pings
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, rng.randrange(501, 1461, 2))
        turn = next(service.turns)  # each client has its own address
        self.sock.bind((f"127.{1 + turn // 62500 % 250}.{turn // 250 % 250}.{1 + turn % 250}", 0))
        self.address = "{}:{}".format(*self.sock.getsockname())
        service.clients[self.address] = self
        self.start = time.monotonic()
        self.sock.connect(("127.0.0.1", service.port))
        self.sock.setblocking(False)

    def move(self, size: int = 0, reading: bool = True, seconds: float = STALL) -> bool:
        """Send all data, and read until `size` bytes are received; False after `seconds` without progress."""
        timeout = Timeout(seconds)
        while self.sent < len(self.data) or (self.received < size and not self.at_eof):
            readers, writers = [self.sock] * reading, [self.sock] * (self.sent < len(self.data))
            readable, writable, _ = select.select(readers, writers, [], min(seconds, 1.0))
            with contextlib.suppress(BlockingIOError):  # readiness is not a promise
                if writable:
                    self.send()
                if readable:
                    self.read()
            # Pings are no progress while data is unsent: they arrive endlessly.
            if timeout.expired(self.sent, 0 if writers and not self.service.echo else self.received):
                if seconds < STALL:
                    return False
                raise Loss(
                    f"stalled: {self.sent} of {len(self.data)} sent, {self.received} of {size} received"
                )
        return True

    def send(self) -> None:
        if self.sent == self.urgent:
            self.sent += self.sock.send(self.data[self.sent : self.sent + 1], socket.MSG_OOB)
        else:
            end = min(self.sent + self.send_size, self.urgent if self.sent < self.urgent else len(self.data))
            self.sent += self.sock.send(memoryview(self.data)[self.sent : end])

    def read(self) -> None:
        data = self.sock.recv(self.recv_size)
        if self.service.echo:
            expected = self.data[self.received : min(self.received + len(data), self.sent)]
        else:
            expected = PINGS[self.received % 4 : self.received % 4 + len(data)]
        compare(f"after {self.received} bytes", data, expected)
        self.received += len(data)
        self.at_eof = not data
        if self.at_eof and not self.graceful:
            raise Loss("the server has closed it")
        every = self.service.every
        if every and self.received > 4 * ((time.monotonic() - self.start) / every + 3):
            raise Loss(f"received {self.received} bytes, more than one ping per beat")

    def arrive(self, seconds: float = STALL) -> None:
        """Wait until everything that was sent is acknowledged, so that the server's kernel has it."""
        timeout = Timeout(seconds)
        while not self.arrived and not timeout.expired():
            self.arrived = not struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))[0]
            time.sleep(0.001)

    def leave(self) -> None:
        """Half-close, and read to the end of file."""
        self.move()
        self.graceful = self.arrived = True
        self.sock.shutdown(socket.SHUT_WR)
        timeout = Timeout()
        while not self.at_eof:
            self.move(self.received + 1)
            if timeout.expired():  # pings may arrive endlessly
                raise Loss("its end of file is not answered")
        self.sock.close()

    def reset(self) -> None:
        self.faults += 1
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def run(self) -> None:
        """Send, read and leave, each in a random way."""
        rng, service, size = self.rng, self.service, len(self.data)
        self.send_size = rng.choice((1 if size < 1000 else 4096, 1 << 16, 1 << 18))
        if size and rng.random() < 0.3:
            self.urgent = rng.randrange(size)
        way = rng.choice(("probe", "idle", "unread", "slow", "full"))
        self.faults += (way in ("probe", "unread")) + (self.urgent >= 0) + (size > 1 << 16)
        if way == "unread":
            self.move(reading=False, seconds=0.02)
        elif way == "slow":
            self.recv_size = rng.randint(1, 7) if size < 1000 else 20000
            for _ in range(3 if service.every else 100):
                if not self.move(self.received + 1, seconds=0.05):
                    break
            self.recv_size = 1 << 18
        elif way == "full":
            self.move(size if service.echo else 0 if service.every else int(2 ** rng.uniform(2, 20)))
        if way == "idle" or rng.random() < 0.2:
            time.sleep(rng.uniform(0, 0.04))
        ending = rng.choice(("leave", "leave", "close", "half", "reset"))
        if ending == "leave":
            return self.leave()
        if ending == "half":
            self.sock.shutdown(socket.SHUT_WR)
        if rng.random() < 0.5:
            self.arrive(0.1)
        if ending == "reset":
            return self.reset()
        if service.echo and self.received == size:  # nothing is unread, so close() sends no reset
            self.graceful = self.arrived = True
        self.faults += not self.graceful
        self.sock.close()

    def check(self) -> None:
        """Raise Loss if the log or the messages are wrong."""
        number, reason, received, sent = self.logged or (0, "", 0, 0)
        echo = self.service.echo
        size = sent if echo else 4 * sent
        if received > self.sent or (self.arrived and received < self.sent):
            raise Loss(f"sent {self.sent} bytes, but {received} are logged")
        if self.graceful and (reason, self.received) != ("left", self.sent if echo else size):
            raise Loss(f"got {self.received} bytes of {self.sent} sent; in the log, it {reason}, {size} sent")
        if self.received > size + (0 if echo else 3):
            raise Loss(f"received {self.received} bytes, but {size} are logged")
        if not self.service.quiet:
            compare("its messages", "".join(self.lines), self.expected)
            if self.lines and self.number != number:
                raise Loss(f"is client {number} in the log, but client {self.number} in its messages")


class Copy:
    """One process of the server, and its output."""

    def __init__(self, service: Service, command: list[str]) -> None:
        self.service = service
        self.seated: dict[int, Client | None] = {}  # by number; None is a probe of stall_log
        self.port = self.lines = self.accepted = self.ended = self.uncounted = self.dropped = 0
        self.received = self.sent = self.base_files = self.base_memory = 0
        self.serving = False
        self.summary = [0, 0, 0, 0]  # clients served, bytes received, pings or bytes sent, lines dropped
        self.sender: Client | None = None
        self.after_header = False
        self.memories: list[int] = []
        pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment)
        assert self.process.stdout and self.process.stderr
        service.pool.submit(self.read_lines, self.process.stdout, service.flowing[0], self.message)
        service.pool.submit(self.read_lines, self.process.stderr, service.flowing[1], self.log)

    def read_lines(self, stream: IO[bytes], flowing: threading.Event, handle: Callable[[str], None]) -> None:
        for line in stream:
            flowing.wait()
            self.lines += 1
            handle(line[:-1].decode("utf-8", "surrogateescape"))

    def message(self, line: str) -> None:
        """Check a line of standard output: every line that looks like a header must be one."""
        header = HEADER.fullmatch(line)
        if header and header[2] in self.service.clients and not self.after_header:
            self.sender = self.service.clients[header[2]]
            self.sender.number = int(header[1])
            self.after_header = True
        elif self.sender and not line.startswith(TITLE) and (self.after_header or line.startswith("  ")):
            line = line.replace(SELECTOR.encode("unicode_escape").decode(), SELECTOR).replace(" ", "")
            self.sender.lines.append(line)
            self.sender.size += len(line)
            self.after_header = False
        else:
            self.service.losses.append(f"on standard output: {line[:100]!r}")

    def log(self, line: str) -> None:
        """Check a line of standard error."""
        listening, connected, ended = (form.fullmatch(line) for form in (LISTENING, CONNECTED, ENDED))
        dropped, stopped = DROPPED.fullmatch(line), STOPPED.fullmatch(line)
        clients = self.service.clients
        if listening and not self.port:
            self.port = int(listening[1])
        elif connected and (connected[2] in clients or connected[2].startswith(PROBE_NETWORK)):
            self.seated[int(connected[1])] = clients.get(connected[2])
            self.accepted += 1
        elif ended and self.serving == (not ended[5]):
            self.end(ended[2], *numbers(ended[1], ended[3], ended[4]))
            self.uncounted += not self.serving
        elif line.startswith("serving ") and not self.serving:
            self.serving = True
        elif dropped:
            self.dropped += numbers(dropped[1])[0]
        elif stopped:
            self.summary = numbers(*stopped.groups())
        else:
            self.service.losses.append(f"on standard error: {line}")

    def end(self, reason: str, number: int, received: int, sent: int) -> None:
        """Note the figures of the log for a client that has left."""
        client = self.seated.pop(number, None)
        if client:
            client.logged = number, reason, received, sent
            self.received, self.sent = self.received + received, self.sent + sent
        elif received or reason != "left" or not self.service.probes:
            self.service.losses.append(f"client {number} is logged with {received} bytes: {reason}")
        self.ended += 1

    def end_seated(self, unit: int) -> None:
        """Note the figures of the summary for the clients that were still connected."""
        seated = [(number, client) for number, client in self.seated.items() if client]
        for number, client in sorted(seated, key=lambda item: not item[1].graceful):
            if client.graceful:
                self.end("left", number, client.sent, client.received // unit)
            else:  # it was reset: the rest belongs to it
                rest = self.summary[1] - self.received, self.summary[2] - self.sent
                self.end("was reset", number, *rest)

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> int:
        """Return by how many resident, unshared bytes it has grown since its start."""
        _, resident, shared, *_ = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        more = (int(resident) - int(shared)) * resource.getpagesize() - self.base_memory
        if more > MEMORY:
            raise Loss(f"uses {more:,} bytes of memory more than at its start")
        return more

    def rest(self) -> None:
        """Wait until it uses no processor time for 50 ms: a loop that spins never does."""
        clock = ~self.process.pid << 3 | 2  # the process's processor time: clock_getcpuclockid(3)
        for _ in range(100):
            before = time.clock_gettime(clock)
            time.sleep(0.05)
            if time.clock_gettime(clock) - before <= (0.001 if self.service.every else 0):
                return
        raise Loss("never sleeps, although nothing happens")

    def settle(self) -> None:
        """Check that it has released everything."""
        self.rest()
        self.base_files = self.base_files or self.files()  # the first client opens the file of pings
        if self.files() != self.base_files:
            raise Loss(f"has {self.files()} descriptors, and had {self.base_files} before")
        self.memories.append(self.memory())

    def check_growth(self) -> None:
        third = len(self.memories) // 3
        growth = min(self.memories[-third:]) - max(self.memories[:third]) if third > 3 else 0
        if growth > GROWTH:
            raise Loss(f"uses {growth:,} bytes of memory more than when it was warm")


class Service:
    """The copies of the server that share a port, and their clients."""

    def __init__(self, options: list[str]) -> None:
        self.options = options
        self.echo, self.quiet = "--echo" in options, "--quiet" in options
        self.every = float(options[options.index("--every") + 1]) if "--every" in options else 0.0
        self.clients: dict[str, Client] = {}  # by address, until they are checked
        self.turns = itertools.count()
        self.settled = self.probes = self.probed = self.checked = self.faults = 0
        self.unlogged = 0  # connections whose first line was dropped
        self.losses: list[str] = []
        self.flowing = threading.Event(), threading.Event()  # standard output, standard error
        for flowing in self.flowing:
            flowing.set()
        self.number = COPIES if "--reuse-port" in options else 1
        self.pool = ThreadPoolExecutor(CROWD + 2 * self.number)
        self.copies: list[Copy] = []
        self.port = 0

    def start(self, script: str) -> None:
        """Start the copies.  Raises Loss if one does not listen."""
        for _ in range(self.number):
            command = [sys.executable, script, "--port", str(self.port), *self.options]
            self.copies.append(Copy(self, command))
            self.wait(lambda: self.copies[-1].port > 0, "it listens")
            self.port = self.copies[-1].port
            self.copies[-1].base_memory = self.copies[-1].memory()

    def total(self, name: str) -> int:
        """Return the sum of an attribute of the copies."""
        return sum(getattr(copy, name) for copy in self.copies)

    def made(self) -> int:
        """Return how many connections were made."""
        return self.settled + len(self.clients)

    def waiting(self) -> int:
        """Return how many connections are not yet accepted."""
        return self.made() - self.unlogged - self.total("accepted")

    def all_logged(self, present: int = 0) -> bool:
        """Return whether all clients but those present are logged or dropped, with both of their lines."""
        lines = self.total("accepted") + self.total("ended") + self.total("dropped")
        return lines == 2 * self.made() - present

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until the condition is true; raise Loss if there is no progress."""
        timeout = Timeout()
        while not condition():
            ended = any(copy.process.poll() is not None for copy in self.copies)
            if self.losses or ended or timeout.expired(self.total("lines")):
                raise Loss(f"did not happen: {what}")
            time.sleep(0.002)

    def signal(self, *signals: int) -> None:
        for copy, number in itertools.product(self.copies, signals):
            copy.process.send_signal(number)

    def suspend(self, seconds: float) -> None:
        self.signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.signal(signal.SIGCONT)

    def probe(self, rng: random.Random) -> None:
        """Probe the port before serving begins: connect, and leave without a byte."""
        for _ in range(5):  # one after the other: two at the same time are enough clients
            client = Client(self, rng, b"")
            rng.choice((client.leave, client.reset))()
            self.faults += 1
            self.wait(self.all_logged, "a probe is logged")

    def crowd(self, rng: random.Random, end: float) -> None:
        """Run many clients at the same time, while the server is suspended and its outputs stall."""
        seeds = [rng.getrandbits(64) for _ in range(CROWD)]
        runs = [self.pool.submit(self.run_clients, random.Random(seed), end) for seed in seeds]
        while time.monotonic() < end and not any(run.done() for run in runs):
            time.sleep(rng.uniform(0, 0.05))
            for copy in self.copies:
                copy.memory()
            fault, seconds = rng.randrange(3), rng.uniform(0, 0.05)
            self.faults += 1
            if fault == 2:
                self.suspend(seconds)
            else:
                self.flowing[fault].clear()
                time.sleep(seconds)
                self.flowing[fault].set()
        while not all(run.done() and not run.result() for run in runs):
            time.sleep(0.002)

    def run_clients(self, rng: random.Random, end: float) -> None:
        """Run one client after the other until `end`."""
        while True:
            data = b"".join(rng.choices(PHRASES, k=rng.randrange(5)))
            if rng.random() < 0.1:
                bulk = rng.choice((ROWS, ROWS, NOISE))
                start = rng.randrange(len(bulk) // 2)
                data = bulk[start : start + int(2 ** rng.uniform(12, 21.5))]
            client = Client(self, rng, data)
            try:
                client.run()
            except (Loss, OSError) as error:
                raise Loss(f"{client.address}: {error}") from error
            finally:
                client.sock.close()
            if time.monotonic() > end:
                return

    def seat(self, rng: random.Random, count: int) -> list[Client]:
        """Return clients that are served."""
        clients = [Client(self, rng, PHRASES[0]) for _ in range(count)]
        for client in clients:
            client.move(len(client.data) if self.echo else 4)
        return clients

    def stall(self, rng: random.Random) -> None:
        """Do not read standard output until the server can only send pings; then read it."""
        reader, writer = self.seat(rng, 2)
        if self.every:  # missed beats are skipped
            self.suspend(0.2)
            reader.start += 0.2
            reader.move(reader.received + 4)
        try:
            self.fill(writer)
            if not self.echo:
                reader.move(reader.received + (4 if self.every else 1 << 20))
            reader.data += PHRASES[1]
            reader.move()
            reader.arrive()
            reader.reset()
            for copy in self.copies:
                copy.memory()
                copy.rest()
        finally:
            self.flowing[0].set()
        rng.choice((writer.leave, writer.reset))()

    def fill(self, writer: Client) -> None:
        """Do not read standard output, and send until the server reads no more, or everything is sent."""
        self.faults += not self.quiet
        self.flowing[0].clear()
        writer.data += ROWS * (1 if self.quiet else 6)
        everything = writer.move(len(writer.data) if self.echo else 0, reading=self.echo, seconds=0.05)
        if everything and not self.quiet:
            raise Loss("reads endlessly, although standard output is not read")
        writer.data = writer.data[: writer.sent]

    def stall_log(self, rng: random.Random) -> None:
        """Do not read standard error until lines are dropped: the server continues and counts them."""
        (client,) = self.seat(rng, 1)
        self.wait(lambda: self.all_logged(1), "the client is logged")
        self.flowing[1].clear()
        try:
            for _ in range(PROBES // BACKLOG):
                self.probe_gracefully(BACKLOG)
            client.data += PHRASES[1]
            client.move(len(client.data) if self.echo else client.received + 4)
        finally:
            self.flowing[1].set()
        self.faults += 1
        self.wait(lambda: self.all_logged(1), "each probe is logged or dropped")
        if not self.total("dropped"):
            raise Loss("has dropped no line")
        self.unlogged = self.made() - self.total("accepted")
        client.leave()

    def probe_gracefully(self, count: int) -> None:
        """Connect, half-close and read to the end of file, with several clients at the same time."""
        self.probes, self.settled = self.probes + count, self.settled + count
        address = f"{PROBE_NETWORK}{random.randrange(256)}.{random.randrange(1, 255)}"  # its ports are free
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(count)]
            for probe in probes:
                probe.settimeout(STALL)
                probe.bind((address, 0))
                probe.connect(("127.0.0.1", self.port))
                probe.shutdown(socket.SHUT_WR)
            for probe in probes:
                data = probe.recv(1 << 18)
                while data:
                    self.probed += len(data)
                    data = probe.recv(1 << 18)

    def settle(self) -> None:
        """Check everything, when all clients have left."""
        self.wait(self.all_logged, "all clients have left")
        self.check_clients()
        for copy in self.copies:
            copy.settle()

    def check_clients(self) -> None:
        """Raise Loss if a byte or a message is missing, or one is too many."""
        clients, losses = list(self.clients.values()), []
        for client in [] if self.quiet else clients:
            client.expected = printed(client.data[: client.logged[2]]) if client.logged else ""
        try:
            self.wait(lambda: all(client.size >= len(client.expected) for client in clients), "it prints all")
        except Loss as loss:
            losses.append(str(loss))
        for client in clients:
            try:
                client.check()
            except Loss as loss:
                losses.append(f"{client.address} {loss}")
            self.checked += client.received + client.size
            self.faults += client.faults
        self.losses += losses
        self.settled += len(clients)
        self.clients.clear()
        if self.losses:
            raise Loss("the mode ends early")

    def stop(self, rng: random.Random) -> None:
        """Stop it while bytes are unread: it prints and counts them, then sends an end of file."""
        clients = reader, writer = self.seat(rng, 2)
        self.wait(lambda: self.all_logged(2), "the last clients are logged")
        if rng.random() < 0.5:
            self.fill(writer)
        self.signal(signal.SIGSTOP)
        for client in clients if self.flowing[0].is_set() else [reader]:
            client.data += ROWS[: rng.randrange(8000)]
            client.move(reading=False)
            client.arrive()
            client.graceful = True
        if not writer.graceful:
            writer.reset()
        self.flowing[0].set()
        names = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # one that is ignored here is ignored there
        self.signal(rng.choice([name for name in names if signal.getsignal(name) != signal.SIG_IGN]))
        self.signal(signal.SIGCONT)
        for client in clients:
            if client.graceful:
                client.move(1 << 60)
                client.sock.close()
        statuses = [copy.process.wait(STALL) for copy in self.copies]
        self.pool.shutdown()  # all lines are read
        unit = 1 if self.echo else 4
        for copy in self.copies:
            copy.end_seated(unit)
        if any(statuses):
            raise Loss(f"ended with status {statuses}")
        served, sent = self.made() - self.total("uncounted"), self.total("sent") + self.probed // unit
        expected = [served, self.total("received"), sent, self.total("dropped")]
        summary = [sum(figures) for figures in zip(*(copy.summary for copy in self.copies))]
        if summary != expected:
            raise Loss(f"its summary is {summary}, not {expected}")
        self.check_clients()
        for copy in self.copies:
            copy.check_growth()

    def kill(self) -> None:
        for copy in self.copies:
            copy.process.kill()
            copy.process.wait()
        for flowing in self.flowing:
            flowing.set()
        self.pool.shutdown()


def soak(script: str, options: list[str], rng: random.Random, end: float) -> Service:
    """Run one mode until `end`; `losses` describes the failures."""
    turn = min(TURN, (end - time.monotonic()) / 4)
    service = Service(options)
    try:
        service.start(script)
        service.probe(rng)
        while not service.checked or time.monotonic() < end:
            service.crowd(rng, time.monotonic() + turn)
            service.settle()
            service.stall(rng)
            service.settle()
        # With few seats, a probe seldom wakes the server.  In a short run, one mode must be enough.
        if "2" in options and service.quiet and (service.echo or turn == TURN):
            service.stall_log(rng)
            service.settle()
        service.stop(rng)
    except (Loss, OSError, subprocess.TimeoutExpired) as error:
        service.losses.append(str(error))
    finally:
        service.kill()
    return service


def main() -> int:
    parser = argparse.ArgumentParser(description="Put random loads on the server and check every byte.")
    add = parser.add_argument
    add("--seconds", type=seconds, default=60.0, metavar="N", help="approximate time (default: %(default)s)")
    add("--quick", action="store_true", help="run 5 of the 15 modes; each option is in one of them")
    add("--seed", type=int, default=random.randrange(10**6), metavar="N", help="seed of a run to repeat")
    add("--server", type=script, default=SERVER, metavar="PATH", help="server to test (default: this one)")
    options = parser.parse_args()
    print(f"soak: --seed {options.seed}", file=sys.stderr)
    rng = random.Random(options.seed)
    protocols: tuple[list[str], ...] = [], ["--echo"], ["--every", "0.02"]
    few, many = ["--connections", "2"], ["--connections", "200", "--wait-for", "1"]
    shared = ["--connections", "20", "--wait-for", "1", "--reuse-port"]
    rest = few, [*few, "--quiet"], many, [*many, "--quiet"], shared
    modes = [protocol + seats for protocol in protocols for seats in rest]
    if options.quick:
        modes = [protocol + seats for protocol, seats in zip(itertools.cycle(protocols), rest)]
    rng.shuffle(modes)
    end = time.monotonic() + options.seconds
    served = checked = faults = losses = 0
    interrupted = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left
    try:
        for left, mode in zip(range(len(modes), 0, -1), modes):
            now = time.monotonic()
            if losses and now > end:
                break
            service = soak(options.server, mode, rng, now + max(0.0, end - now) / left)
            served, checked = served + service.settled, checked + service.checked
            faults, losses = faults + service.faults, losses + len(service.losses)
            print(f"soak: {' '.join(mode)}: {service.settled:,} connections", file=sys.stderr)
            for loss in service.losses[:10]:
                print(f"  {loss}", file=sys.stderr)
    except KeyboardInterrupt:
        interrupted = True
        print("soak: interrupted", file=sys.stderr)
    figures = f"{served:,} connections served, {checked:,} bytes checked, {faults:,} faults injected"
    print(f"soak: {figures}, {losses:,} losses")
    return 1 if losses or not served else 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
