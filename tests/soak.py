#!/usr/bin/env python3
"""A soak: random clients that behave in every manner, in every mode of the server, for as long as you like.

    python3 tests/soak.py --seconds 600

Each mode (pings, --echo, --every; few seats or many; --quiet or not) is a server of its own, and
lives through turns of two kinds:

    crowd   many clients at once, each with words, a manner of reading and a manner of leaving
            drawn by lot, while the server is suspended and its outputs stall now and then
    stall   its standard output is not read until it can do no more than send pings

After each, when nobody is there any more, all is settled: every byte that was read, every
message that was shown, every figure that was told, the process's descriptors, its memory and
its processor time.

Nothing is judged by how long it takes, but for this: nothing at all for STALL seconds is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, AnyStr, Callable

STALL = 60.0  # seconds
TURN = 2.0  # seconds that clients of a crowd go on coming
CROWD = 20  # clients at once
QUEUE = 64  # clients that may wait for a seat: where a backlog is full, the kernel loses some
MEMORY = 24 << 20  # bytes that a server may have more than at its start
GROWTH = 4 << 20  # ... and at its end more than when it was warm: an allocator keeps some

PINGS = b"ping" * (1 << 17)
ROWS = "".join(f"{row:07d} Grüße, 世界{' ' if row % 20 else chr(10)}" for row in range(150000)).encode()
NOISE = random.Random(0).getrandbits(8 << 20).to_bytes(1 << 20, "big")
PHRASES = (
    b"Some message...\n",
    b"data received... (client 1, 127.0.0.1:1)\n",
    "Grüße, 世界 🙂".encode(),
    b"\x1b[31mred\x07\r\n\n\n  and\tmore\x00\xc2\x9b",
    b"no text: \xff\xfe\xe4\xb8 \xf0\x9f\x99",
)

LISTENING = re.compile(r"listening on \S+:(\d+)\b.*")
CONNECTED = re.compile(r"client (\d+) connected from (\S+), .*")
GONE = re.compile(r"client (\d+) (.+?): ([\d,]+) bytes? received, ([\d,]+) \w+ sent\b.*")
STOPPED = re.compile(r"stopped: ([\d,]+) clients? served, ([\d,]+) bytes? received, ([\d,]+) \w+ sent\b.*")
HEADER = re.compile(r"data received\.\.\. \(client (\d+), (\S+)\)")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Wrong(Exception):
    """What the server must not do."""


def visible(data: bytes) -> str:
    """How these bytes are shown, but for newlines: one at the end of a piece is not, and pieces vary."""
    text = data.decode("utf-8", "replace").replace("\n", "")
    return CONTROL.sub(lambda control: f"\\x{ord(control[0]):02x}", text)


def differ(what: str, real: AnyStr, due: AnyStr) -> None:
    """Raise Wrong, with the first difference, where there is one."""
    if real != due:
        at = next((at for at, (a, b) in enumerate(zip(real, due)) if a != b), min(len(real), len(due)))
        raise Wrong(f"{what}: {real[at : at + 20]!r} in place of {due[at : at + 20]!r}, at {at}")


class Patience:
    """Ends when, for so many seconds, nothing has changed; a pause of the whole machine counts as one."""

    def __init__(self, seconds: float = STALL) -> None:
        self.seconds, self.idle, self.last = seconds, 0.0, time.monotonic()
        self.state: tuple[int, ...] = ()

    def ended(self, *state: int) -> bool:
        now = time.monotonic()
        self.idle = self.idle + min(now - self.last, 1.0) if state == self.state else 0.0
        self.last, self.state = now, state
        return self.idle >= self.seconds


def numbers(*texts: str) -> list[int]:
    return [int(text.replace(",", "")) for text in texts]


class Client:
    """One connection, and what is known of it."""

    def __init__(self, server: Server, rng: random.Random, words: bytes) -> None:
        self.server, self.rng, self.words = server, rng, words
        self.urgent = -1  # index of the byte that is sent out of band
        self.bite = self.gulp = 1 << 18  # bytes of one send, and of one recv, at most
        self.sent = self.got = self.faults = 0
        self.ended = False  # its end of file has come
        self.polite = False  # nothing may be lost, in either direction
        self.certain = False  # all that it has sent has arrived
        self.number = 0  # in the headers of its messages
        self.shown: list[str] = []
        self.size = 0  # characters shown
        self.fate: tuple[int, str, int, int] | None = None  # number, how it went, received, sent
        self.told = ""  # what should be shown
        server.wait(lambda: server.made() - server.accepted < QUEUE, "clients are accepted")
        self.sock = socket.socket()
        self.sock.settimeout(STALL)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if rng.random() < 0.3:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        if rng.random() < 0.3:  # odd segments: on loopback, the server's sends are cut between pings else
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, rng.randrange(501, 1461, 2))
        turn = next(server.turns)  # an address of its own: none is used again
        self.sock.bind((f"127.{1 + turn // 62500 % 250}.{turn // 250 % 250}.{1 + turn % 250}", 0))
        self.address = "{}:{}".format(*self.sock.getsockname())
        server.clients[self.address] = self
        self.start = time.monotonic()
        self.sock.connect(("127.0.0.1", server.port))
        self.sock.setblocking(False)

    def move(self, got: int = 0, reading: bool = True, seconds: float = STALL) -> bool:
        """Send all words, and read until `got` bytes have come; False if for `seconds` nothing moves."""
        patience = Patience(seconds)
        while self.sent < len(self.words) or (self.got < got and not self.ended):
            readers, writers = [self.sock] * reading, [self.sock] * (self.sent < len(self.words))
            readable, writable, _ = select.select(readers, writers, [], min(seconds, 1.0))
            if writable:
                self.send()
            if readable:
                self.read()
            # Pings do not count while words wait: they come without end.
            if patience.ended(self.sent, 0 if writers and not self.server.echo else self.got):
                if seconds < STALL:
                    return False
                raise Wrong(f"stalled: {self.sent} of {len(self.words)} sent, {self.got} of {got} got")
        return True

    def send(self) -> None:
        if self.sent == self.urgent:
            self.sent += self.sock.send(self.words[self.sent : self.sent + 1], socket.MSG_OOB)
        else:
            end = self.urgent if self.sent < self.urgent else len(self.words)
            self.sent += self.sock.send(memoryview(self.words)[self.sent : min(self.sent + self.bite, end)])

    def read(self) -> None:
        data = self.sock.recv(self.gulp)
        if self.server.echo:
            due = self.words[self.got : min(self.got + len(data), self.sent)]
        else:
            due = PINGS[self.got % 4 : self.got % 4 + len(data)]
        differ(f"after {self.got} bytes got", data, due)
        self.got += len(data)
        self.ended = not data
        if self.ended and not self.polite:
            raise Wrong("the server has closed it")
        if self.server.every and self.got > 4 * ((time.monotonic() - self.start) / self.server.every + 3):
            raise Wrong(f"got {self.got} bytes, more than a ping a beat")

    def arrive(self, seconds: float = STALL) -> None:
        """Wait until all that was sent is acknowledged: the server's kernel has it, and keeps it."""
        patience = Patience(seconds)
        while not self.certain and not patience.ended():
            self.certain = not struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))[0]
            time.sleep(0.001)

    def leave(self) -> None:
        """Half-close, and read to the end of file."""
        self.move()
        self.polite = self.certain = True
        self.sock.shutdown(socket.SHUT_WR)
        patience = Patience()
        while not self.ended:
            self.move(self.got + 1)
            if patience.ended():  # pings may come without end
                raise Wrong("its end of file is not answered")
        self.sock.close()

    def reset(self) -> None:
        self.faults += 1
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def live(self) -> None:
        """All by lot: in what pieces it sends, how it reads, how it leaves."""
        rng, server, size = self.rng, self.server, len(self.words)
        self.bite = rng.choice((1 if size < 1000 else 4096, 1 << 16, 1 << 18))
        if size and rng.random() < 0.3:
            self.urgent = rng.randrange(size)
        manner = rng.choice(("scan", "idle", "mute", "dribs", "full"))
        self.faults += (manner in ("scan", "mute")) + (self.urgent >= 0) + (size > 1 << 16)
        if manner == "mute":
            self.move(reading=False, seconds=0.02)
        elif manner == "dribs":
            self.gulp = rng.randint(1, 7) if size < 1000 else 20000
            for _ in range(3 if server.every else 100):
                if not self.move(self.got + 1, seconds=0.05):
                    break
            self.gulp = 1 << 18
        elif manner == "full":
            self.move(size if server.echo else 0 if server.every else int(2 ** rng.uniform(2, 20)))
        if manner == "idle" or rng.random() < 0.2:
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
        if server.echo and self.got == size:  # nothing is unread, so that nothing is reset
            self.polite = self.certain = True
        self.faults += not self.polite
        self.sock.close()

    def check(self) -> None:
        """Raise Wrong where the server's account of it is not true."""
        number, how, received, sent = self.fate or (0, "", 0, 0)
        due, echo = sent if self.server.echo else 4 * sent, self.server.echo
        if received > self.sent or (self.certain and received < self.sent):
            raise Wrong(f"has sent {self.sent} bytes, of which {received} were received")
        if self.polite and (how != "left" or self.got != due or (echo and self.got != self.sent)):
            raise Wrong(f"has got {self.got} bytes and left, but {how} and {due} were sent")
        if self.got > due + (0 if echo else 3):
            raise Wrong(f"has got {self.got} bytes, but {due} were sent")
        if not self.server.quiet:
            differ("its words are shown", "".join(self.shown), self.told)
            if self.shown and self.number != number:
                raise Wrong(f"is client {number}, and client {self.number} in its messages")


class Server:
    """The process, what it tells, and all that is checked of it."""

    def __init__(self, script: str, options: list[str]) -> None:
        self.echo, self.quiet = "--echo" in options, "--quiet" in options
        self.every = float(options[options.index("--every") + 1]) if "--every" in options else 0.0
        self.clients: dict[str, Client] = {}  # by address, until they are settled
        self.seated: dict[int, Client] = {}  # by number
        self.turns = itertools.count()
        self.settled = self.accepted = self.gone = self.received = self.sent = self.port = 0
        self.heard = self.checked = self.faults = self.base_files = self.base_memory = 0
        self.summary = [0, 0, 0]  # clients served, bytes received, pings or bytes sent
        self.wrongs: list[str] = []
        self.speaker: Client | None = None
        self.fresh = False  # the line before was a header
        self.memories: list[int] = []
        self.flowing = threading.Event(), threading.Event()  # standard output, standard error
        for flowing in self.flowing:
            flowing.set()
        command = [sys.executable, script, "--port", "0", *options]
        pipe, utf8 = subprocess.PIPE, {**os.environ, "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=utf8)
        assert self.process.stdout and self.process.stderr
        self.pool = ThreadPoolExecutor(CROWD + 2)
        self.pool.submit(self.hear, self.process.stdout, self.flowing[0], self.message)
        self.pool.submit(self.hear, self.process.stderr, self.flowing[1], self.status)

    def hear(self, stream: IO[bytes], flowing: threading.Event, take: Callable[[str], None]) -> None:
        for line in stream:
            flowing.wait()
            self.heard += 1
            take(line[:-1].decode("utf-8", "surrogateescape"))

    def message(self, line: str) -> None:
        """A line of standard output."""
        if self.speaker and (self.fresh or line.startswith("  ")):
            self.speaker.shown.append(line if self.fresh else line[2:])
            self.speaker.size += len(self.speaker.shown[-1])
            self.fresh = False
            return
        header = HEADER.fullmatch(line)
        self.speaker = self.clients.get(header[2]) if header else None
        self.fresh = True
        if header and self.speaker:
            self.speaker.number = int(header[1])
        else:
            self.wrongs.append(f"on standard output: {line[:100]!r}")

    def status(self, line: str) -> None:
        """A line of standard error."""
        listening, connected = LISTENING.fullmatch(line), CONNECTED.fullmatch(line)
        gone, stopped = GONE.fullmatch(line), STOPPED.fullmatch(line)
        if listening:
            self.port = int(listening[1])
        elif connected and connected[2] in self.clients:
            self.seated[int(connected[1])] = self.clients[connected[2]]
            self.accepted += 1
        elif gone and int(gone[1]) in self.seated:
            number, received, sent = numbers(gone[1], gone[3], gone[4])
            self.seated.pop(number).fate = number, gone[2], received, sent
            self.gone, self.received, self.sent = self.gone + 1, self.received + received, self.sent + sent
        elif stopped:
            self.summary = numbers(*stopped.groups())
        elif not line.startswith("serving "):
            self.wrongs.append(f"on standard error: {line}")

    def wait(self, true: Callable[[], bool], what: str) -> None:
        """Wait until it is true, as long as something happens."""
        patience = Patience()
        while not true():
            if self.wrongs or self.process.poll() is not None or patience.ended(self.heard):
                raise Wrong(f"waited in vain until {what}")
            time.sleep(0.002)

    def made(self) -> int:
        """Connections made."""
        return self.settled + len(self.clients)

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> int:
        """Bytes of its own that are resident, more than at its start."""
        _, resident, shared, *_ = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        more = (int(resident) - int(shared)) * resource.getpagesize() - self.base_memory
        if more > MEMORY:
            raise Wrong(f"has {more:,} bytes of memory more than at its start")
        return more

    def rest(self) -> None:
        """Wait for a moment in which it does nothing: a loop that spins has none."""
        clock = ~self.process.pid << 3 | 2  # the process's time on a processor: clock_getcpuclockid(3)
        for _ in range(100):
            before = time.clock_gettime(clock)
            time.sleep(0.05)
            if time.clock_gettime(clock) - before <= (0.001 if self.every else 0):
                return
        raise Wrong("never rests, though nothing happens")

    def suspend(self, seconds: float) -> None:
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)

    def crowd(self, rng: random.Random, end: float) -> None:
        """Many clients at once, in a world that has its moods."""
        lives = [self.pool.submit(self.lives, random.Random(rng.getrandbits(64)), end) for _ in range(CROWD)]
        while time.monotonic() < end and not any(life.done() for life in lives):
            time.sleep(rng.uniform(0, 0.05))
            self.memory()
            mood, moment = rng.randrange(3), rng.uniform(0, 0.05)
            self.faults += 1
            if mood == 2:
                self.suspend(moment)
            else:
                self.flowing[mood].clear()
                time.sleep(moment)
                self.flowing[mood].set()
        while not all(life.done() and not life.result() for life in lives):
            time.sleep(0.002)

    def lives(self, rng: random.Random, end: float) -> None:
        """One client after the other."""
        while True:
            words = b"".join(rng.choices(PHRASES, k=rng.randrange(5)))
            if rng.random() < 0.1:
                bulk = rng.choice((ROWS, ROWS, NOISE))
                start = rng.randrange(len(bulk) // 2)
                words = bulk[start : start + int(2 ** rng.uniform(12, 21.5))]
            client = Client(self, rng, words)
            try:
                client.live()
            except (Wrong, OSError) as error:
                raise Wrong(f"{client.address}: {error}") from error
            finally:
                client.sock.close()
            if time.monotonic() > end:
                return

    def stall(self, rng: random.Random) -> None:
        """Its standard output is not read until it can do no more than send pings; then it is."""
        reader, writer = Client(self, rng, PHRASES[0]), Client(self, rng, PHRASES[0])
        for client in (reader, writer):  # both have a seat
            client.move(len(client.words) if self.echo else 4)
        if self.every:  # the beats that are missed meanwhile are not made up for
            self.suspend(0.2)
            reader.start += 0.2
            reader.move(reader.got + 4)
        self.flowing[0].clear()
        try:
            writer.words += ROWS * (1 if self.quiet else 6)
            writer.move(len(writer.words) if self.echo else 0, reading=self.echo, seconds=0.05)
            self.memory()
            if not self.echo:
                reader.move(reader.got + (4 if self.every else 1 << 20))
            reader.words += PHRASES[1]
            reader.move()
            reader.arrive()
            reader.reset()
            self.rest()
        finally:
            self.flowing[0].set()
        self.faults += not self.quiet
        writer.words = writer.words[: writer.sent]
        if rng.random() < 0.5:
            writer.leave()
        else:
            writer.reset()

    def settle(self) -> None:
        """Nobody is there any more: nothing may be missing, and nothing left over."""
        self.wait(lambda: self.gone == self.made(), "every client is gone")
        clients, wrongs = list(self.clients.values()), []
        for client in [] if self.quiet else clients:
            client.told = visible(client.words[: client.fate[2]]) if client.fate else ""
        try:
            self.wait(lambda: all(client.size >= len(client.told) for client in clients), "all is shown")
        except Wrong as wrong:
            wrongs.append(str(wrong))
        for client in clients:
            try:
                client.check()
            except Wrong as wrong:
                wrongs.append(f"{client.address} {wrong}")
            self.checked += client.got + client.size
            self.faults += client.faults
        self.wrongs += wrongs
        self.settled += len(clients)
        self.clients.clear()
        if self.wrongs:
            raise Wrong("is given up")
        self.rest()
        if self.files() != self.base_files:
            raise Wrong(f"has {self.files()} descriptors, and had {self.base_files} at its start")
        self.memories.append(self.memory())

    def stop(self, rng: random.Random) -> None:
        """The end, with somebody still there, and the sum of it."""
        last = Client(self, rng, PHRASES[0] if self.echo else b"")
        last.move(len(last.words) if self.echo else 4)
        self.process.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM)))
        status = self.process.wait(STALL)
        last.sock.close()
        self.pool.shutdown()  # all that it has told is heard
        self.settled += 1
        if status or self.wrongs:
            raise Wrong(f"ended with status {status}")
        due = [self.settled, self.received + last.sent, self.sent + (last.sent if self.echo else 1)]
        if self.summary[:2] != due[:2] or self.summary[2] < due[2]:
            raise Wrong(f"has told of {self.summary}, not of {due}")
        third = len(self.memories) // 3
        if third > 3:
            growth = min(self.memories[-third:]) - max(self.memories[:third])
            if growth > GROWTH:
                raise Wrong(f"has grown by {growth:,} bytes of memory")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for flowing in self.flowing:
            flowing.set()
        self.pool.shutdown()


def soak(script: str, options: list[str], rng: random.Random, end: float) -> Server:
    """One mode, until then; what was wrong is in `wrongs`."""
    turn = min(TURN, (end - time.monotonic()) / 4)
    server = Server(script, options)
    try:
        server.wait(lambda: server.port > 0, "it listens")
        server.base_files, server.base_memory = server.files(), server.memory()
        while not server.settled or time.monotonic() < end:
            server.crowd(rng, time.monotonic() + turn)
            server.settle()
            server.stall(rng)
            server.settle()
        server.stop(rng)
    except (Wrong, OSError, subprocess.TimeoutExpired) as error:
        server.wrongs.append(str(error))
    finally:
        server.kill()
    return server


def main() -> int:
    parser = argparse.ArgumentParser(description="Put the server under random loads, and check every byte.")
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, metavar="N", help="for about so long (default: 60)")
    add("--seed", type=int, default=random.randrange(10**6), metavar="N", help="to repeat a run")
    add("--server", default=str(Path(__file__).parents[1] / "non_block_io_server.py"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    print(f"soak: --seed {options.seed}", file=sys.stderr)
    rng = random.Random(options.seed)
    kinds: tuple[list[str], ...] = [], ["--echo"], ["--every", "0.02"]
    seats = ["--connections", "2"], ["--connections", "200", "--wait-for", "1"]
    modes = [kind + seat + quiet for kind in kinds for seat in seats for quiet in ([], ["--quiet"])]
    rng.shuffle(modes)
    end = time.monotonic() + options.seconds
    served = checked = faults = losses = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    with contextlib.suppress(KeyboardInterrupt):
        for left, mode in zip(range(len(modes), 0, -1), modes):
            now = time.monotonic()
            if losses and now > end:
                break
            server = soak(options.server, mode, rng, now + max(0.0, end - now) / left)
            served, checked = served + server.settled, checked + server.checked
            faults, losses = faults + server.faults, losses + len(server.wrongs)
            print(f"soak: {' '.join(mode)}: {server.settled:,} connections served", file=sys.stderr)
            for wrong in server.wrongs[:10]:
                print(f"  {wrong}", file=sys.stderr)
    figures = f"{served:,} connections served, {checked:,} bytes checked, {faults:,} faults injected"
    print(f"soak: {figures}, {losses:,} losses")
    return 1 if losses or not served else 0


if __name__ == "__main__":
    sys.exit(main())
