"""The faults of the lecture's script, shown on it and then on this server.

    python3 tests/faults.py          lists the faults
    python3 tests/faults.py NAME     shows one, or `all`

Each fault is a function.  It does what the clients do, with plain sockets, and returns its observation.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import select
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Tuple

HERE = Path(__file__).resolve().parent
DEADLINE = 15.0  # seconds to wait for something that should happen immediately
QUIET = 1.0  # seconds without data after which a client counts as not served
KEPT = 32 << 20  # bytes: more than the kernel still holds for a client after its server ended
PINGS, NOTHING, END = "pings", f"nothing for {QUIET:.0f} s", "the end"  # what a client receives

# The lecture's script: {port} replaces its port, and one more line reports the port.  Ctrl-C ends it even
# in a background job, and the kernel ends it after 10 s of processor time.
SETUP = "signal(SIGINT, default_int_handler); setrlimit(RLIMIT_CPU, (10, 10))"
REPORT = 'import sys; print("listening on 127.0.0.1:%d" % sock.getsockname()[1], file=sys.stderr)'
SCRIPT = (HERE / "lecture.py").read_text(encoding="utf-8").replace("10001", "{port}")
SCRIPT = SCRIPT.replace("sock.listen()\n", f"sock.listen()\n{REPORT}\n")
SCRIPT = f"from resource import *; from signal import *; {SETUP}; exec({SCRIPT!a})"
SERVERS = {
    "the lecture's script": ["-u", "-c", SCRIPT],  # -u: its prints are not buffered
    "this server": [str(HERE.parent / "non_block_io_server.py"), "--port", "{port}"],
}


def need_epoll(tool: str) -> None:
    """Exit with one line on a system without epoll."""
    if not hasattr(select, "epoll"):
        sys.exit(f"{tool}: epoll is needed, which only Linux has; this is {platform.system()}")


def command(name: str, port: int = 0) -> list[str]:
    """Return the command that starts one of SERVERS on the port."""
    return [sys.executable, "-X", "utf8", *(word.replace("{port}", str(port)) for word in SERVERS[name])]


class Server:
    """A server process.  The stack ends it and its clients."""

    def __init__(self, stack: ExitStack, name: str, port: int = 0, piped: bool = False) -> None:
        self.stack = stack
        self.out, self.err = os.memfd_create("out"), os.memfd_create("err")  # its output, in memory
        stack.callback(os.close, self.out)
        stack.callback(os.close, self.err)
        stdout = subprocess.PIPE if piped else self.out
        self.process = stack.enter_context(
            subprocess.Popen(command(name, port), stdout=stdout, stderr=self.err)
        )
        stack.callback(self.process.kill)
        self.until(lambda: "listening on" in text(self.err))
        self.port = int((re.findall(r"listening on \S+:(\d+)", text(self.err)) or [0])[0])  # 0: it has ended

    def clients(self, number: int = 2) -> list[socket.socket]:
        address = "127.0.0.1", self.port
        return [self.stack.enter_context(socket.create_connection(address, DEADLINE)) for _ in range(number)]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition is true or the server has ended."""
        end = time.monotonic() + DEADLINE
        while not condition() and self.process.poll() is None:
            assert time.monotonic() < end, f"it printed {text(self.out)[-500:]!r}, {text(self.err)[-500:]!r}"
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

    def outcome(self, other: socket.socket) -> tuple[bool, str]:
        """Return whether the server fails its other client, and a description."""
        got = receives(other)
        if got == END:
            self.process.wait(DEADLINE)
            return True, f"crashes: {text(self.err).splitlines()[-1]}"
        return got != PINGS, f"{'continues' if got == PINGS else 'stalls'}: the other client gets {got}"


def text(file: int) -> str:
    """Return the content of the file; the server's position in it stays."""
    return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")


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
    return got < 1 << 16, f"gives it {got:,} bytes of pings for its 4 MiB"


def restart(start: Start) -> Seen:
    """it is stopped while clients are connected, and started again immediately"""
    server = start()
    for client in server.clients():
        client.recv(1)
    server.process.terminate()
    server.process.wait(DEADLINE)
    again = start(port=server.port)
    return not again.port, "listens again" if again.port else f"crashes: {text(again.err).splitlines()[-1]}"


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
    for client in server.clients():
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    server.until(lambda: server.watched(0.1) == (0, 0, "S"))  # the connections are full
    _, times, _ = server.watched(1.2)
    return times > 0, f"wakes {times} times in 1.2 s"


def third(start: Start) -> Seen:
    """a third client connects, then the first one disconnects"""
    first, _, third_client = start().clients(3)
    first.shutdown(socket.SHUT_WR)
    got = receives(third_client)
    return got != PINGS, f"the third client gets {got}"


ALL = reset, leave, split, bytes_, starve, restart, print_, escape, stop, idle, third
FAULTS = {fault.__name__.rstrip("_"): fault for fault in ALL}


def observe(name: str) -> list[Seen]:
    """Return what each of SERVERS does in this situation."""

    def run(server: str) -> Seen:
        with ExitStack() as stack:
            return FAULTS[name](lambda **options: Server(stack, server, **options))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, SERVERS))


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the faults of the lecture's script.")
    parser.add_argument(
        "name", nargs="?", choices=(*FAULTS, "all"), help="a fault (default: list all faults)"
    )
    wanted = parser.parse_args().name
    if wanted:
        need_epoll("faults")
    for name, fault in FAULTS.items():
        if not wanted:
            print(f"{name:<8}  {fault.__doc__}")
        elif wanted in (name, "all"):
            print(fault.__doc__, flush=True)
            for server, seen in zip(SERVERS, observe(name)):
                print(f"  {server:<21}  {seen[1]}", flush=True)


if __name__ == "__main__":
    main()
