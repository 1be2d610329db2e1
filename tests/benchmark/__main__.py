"""The server beside others, under the same load.

    python3 tests/benchmark [PART ...] [--peers] [--quick] [--json FILE]
    python3 tests/benchmark --readme FILE

    start     time from the start of the process until it listens
    client    client.py: pings a second, and a file through the echo
    pings     pings to two clients
    memory    memory for each connection, of the server and of the kernel
    echo      echoes a second, their cost and their latency, for 1 to 10,000 clients

The server has one core, the load another.  Each figure is the median of several rounds, and the tables
also show the lowest and the highest round.  In each round every program has its turn, each time in another
order, and each ratio uses the figures of one round, so that a machine that slows down favors no program.
Every byte is checked: a wrong one, or a server that has ended, ends the benchmark with status 1.  When it
is interrupted, it shows what it has measured, and exits with status 130.

FILE holds the figures of all rounds, in seconds and bytes.  These two commands renew the README's figures:

    python3 tests/benchmark --peers --json tests/benchmark/figures.json
    python3 tests/benchmark --readme tests/benchmark/figures.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from typing import TYPE_CHECKING

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
import faults

faults.need_epoll("benchmark")  # before the import of modules that only Linux has
import resource

from benchmark.processes import (
    HERE,
    LECTURE,
    LOAD_CORE,
    PYTHON,
    ROOT,
    SERVER,
    SERVER_CORE,
    TIMEOUT,
    Failure,
    Server,
    output,
    progress,
    read,
    running,
    serving,
    stop,
    use_core,
)
from benchmark.readme import fill
from benchmark.report import (
    C_ECHO,
    C_PINGS,
    C_SENDFILE,
    CLIENT,
    CORE,
    OURS,
    PASS,
    PRINTING,
    RAW_CLIENT,
    SOCAT,
    THREADS,
    THREE_LINES,
    UNPOLLED,
    USUAL,
    Run,
    tables,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

PEERS = os.path.join(HERE, "peers.py")
CLIENT_COMMAND = [PYTHON, os.path.join(ROOT, CLIENT), "--port"]
IPERF3 = {"iperf3": [], "iperf3 -Z": ["-Z"]}
SIZES = [1, 10, USUAL, 2000, 10000]  # clients
ROUNDS = {"start": 25, "client": 25, "pings": 25, "memory": 5, "echo": 9}
SPARE_FILES = 64  # descriptors of a process besides its connections


class Bench:
    """The programs to measure, and their figures."""

    def __init__(self, quick: bool, peers: bool, folder: str) -> None:
        """Find the programs; build and install missing ones, if possible."""
        self.quick, self.folder, self.run = quick, folder, Run()
        self.rounds = {part: 2 if part == "start" else 1 for part in ROUNDS} if quick else ROUNDS
        self.seconds = 0.04 if quick else 0.5  # many short rounds, because noise varies
        self.machine, self.missing = self.run.machine, self.run.missing
        model = re.search(r"model name\s*: (.*)", read("/proc/cpuinfo"))
        socat = re.search(r"socat version \S+", output("socat", "-V"))
        self.machine["system"] = "Linux " + ".".join(platform.release().split(".")[:2])
        self.machine["processor"] = model.group(1) if model else platform.machine()
        self.machine["cores"] = f"{os.cpu_count()} cores"
        self.machine["congestion control"] = read("/proc/sys/net/ipv4/tcp_congestion_control")
        self.machine["Python"] = f"{platform.python_implementation()} {platform.python_version()}"
        self.machine["iperf3"] = version("iperf3")
        self.machine["socat"] = socat.group().replace(" version", "") if socat else ""
        for tool in "iperf3", "socat":
            if not self.machine[tool]:
                self.missing.append(f"{tool}: it is not installed")
        if SERVER_CORE == LOAD_CORE:
            self.missing.append(
                "the server on its own core: this Python cannot choose one, or there is only one"
            )

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        wanted = [size for size in SIZES if size <= USUAL] if quick else SIZES
        self.sizes = [size for size in wanted if hard < 0 or size <= max(hard - SPARE_FILES, USUAL)]
        if self.sizes != wanted:
            self.missing.append(f"{wanted[-1]:,} connections: the limit is {hard:,} open files (ulimit -Hn)")

        echo = ["--port", "0", "--wait-for", "1", "--connections", str(wanted[-1])]
        self.servers = {OURS: [*SERVER, *echo, "--echo", "--quiet"], PRINTING: [*SERVER, *echo, "--echo"]}
        self.servers[UNPOLLED] = [PYTHON, PEERS, "no-busy-polls", *echo, "--echo", "--quiet"]
        self.servers[THREE_LINES] = [PYTHON, PEERS, "three-lines", *echo, "--quiet"]
        self.timeouts = [PYTHON, PEERS, "timeouts", *echo, "--quiet"]
        self.idle_clients = {f"{n:,} idle clients": n for n in (10, 50 if quick else 4000)}
        self.senders = {OURS: SERVER, LECTURE: faults.command(LECTURE)}
        self.load = [PYTHON, os.path.join(HERE, "load.py")]
        self.build_c()
        for name, kind in (("Python, bare recv and send", "plain"), (CORE, "core"), (THREADS, "threads")):
            self.servers[name] = [PYTHON, PEERS, kind]
        for kind in ("protocol", "streams"):
            self.servers[f"asyncio, {kind}"] = [PYTHON, PEERS, f"asyncio-{kind}"]
        if peers:
            self.install_peers()
        else:
            self.missing.append("uvloop and trio: without --peers")
        for name in CORE, THREE_LINES:
            self.try_out(name)
        # Variants are for one figure.  10,000 threads are more than some systems allow.
        self.only = {PRINTING: [USUAL], UNPOLLED: [1], THREADS: [n for n in self.sizes if n <= 2000]}

    def build_c(self) -> None:
        """Compile the load and the servers in C."""
        compiler = shutil.which("cc") or shutil.which("gcc") or ""
        built = {}
        for name in ("load", "peers"):
            built[name] = os.path.join(self.folder, name)
            source = os.path.join(HERE, f"{name}.c")
            if not compiler or subprocess.call([compiler, "-O2", "-o", built[name], source], stdout=2):
                self.missing.append(
                    "the servers in C: no compiler; the load, in Python, is slower than some servers"
                )
                return
        self.machine["compiler"] = version(compiler)
        self.load = [built["load"]]
        self.servers[C_ECHO] = [built["peers"], "echo"]
        self.senders[C_SENDFILE] = [built["peers"], "sendfile"]
        self.senders[C_PINGS] = [built["peers"], "pings"]

    def install_peers(self) -> None:
        """Install the libraries, once for this Python."""
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        home = os.path.join(cache, "non_block_io_server", f"peers-{platform.python_version()}")
        python = os.path.join(home, "bin", "python")
        if not output(python, PEERS, "--versions"):
            progress(f"installing uvloop and trio in {home}")
            output(PYTHON, "-m", "venv", "--clear", home)
            output(python, "-m", "pip", "install", "--quiet", "uvloop", "trio")
        self.machine["peers"] = output(python, PEERS, "--versions")
        if self.machine["peers"]:
            for kind in ("protocol", "streams"):
                self.servers[f"uvloop, {kind}"] = [python, PEERS, f"uvloop-{kind}"]
            self.servers["trio"] = [python, PEERS, "trio"]
        else:
            self.missing.append("uvloop and trio: they cannot be installed")

    def try_out(self, name: str) -> None:
        """Leave out a server that does not work."""
        try:
            with serving(name, self.servers[name]) as server:
                server.connect_and_echo().close()
        except Failure as failure:
            lines = str(failure).splitlines()
            self.missing.append(f"{lines[0]} {lines[-1]}")
            del self.servers[name]

    def expected(self) -> dict[str, float]:
        """Return about how many seconds each part takes."""
        turn = 1.2 * self.seconds + 0.02  # includes the warm-up and the start of the load
        file = 0.1 if self.quick else 1.5
        iperf3 = 2 * (0.3 if self.quick else 1.2) if self.machine["iperf3"] else 0
        unread = 0.3 if self.quick else 3 * len(self.senders)
        sizes = [size for name in self.servers for size in self.only.get(name, self.sizes)]
        times = {
            "start": 0.1,
            "client": self.seconds + 0.2 + file * (2 if self.machine["socat"] else 1),
            "pings": len(self.senders) * (turn + 0.1) + iperf3,
            "memory": unread + len(self.servers) * (0.1 + self.sizes[-1] / 5000),
            "echo": sum(turn + size / 8000 for size in sizes)
            + sum(turn + 0.1 + size / 5000 for size in self.idle_clients.values()),
        }
        return {part: self.rounds[part] * seconds for part, seconds in times.items()}

    def turns(self, part: str, programs: list[str]) -> Iterator[tuple[int, str, list[str]]]:
        """Yield each round: its number, its title, and the programs in a different order."""
        rounds = self.rounds[part]
        for turn in range(rounds if programs else 0):
            first = turn % len(programs)
            yield turn, f"{part}, round {turn + 1} of {rounds}", programs[first:] + programs[:first]

    def run_load(self, server: Server, kind: str, *more: str) -> dict[str, float]:
        """Return the load's figures."""
        words = [kind, str(server.process.pid), str(server.port), str(self.seconds), *more]
        done = subprocess.run([*self.load, *words], check=False, capture_output=True, text=True)
        if done.returncode:
            raise server.failure(f"with {' '.join([kind, *more])}, {done.stderr.strip()}")
        figures: dict[str, float] = json.loads(done.stdout)
        figures["busy"] = figures["cpu"] / figures["seconds"]
        return figures

    def measure_start(self) -> None:
        """Measure how long it takes to listen, beside a Python that does nothing."""
        for turn, title, names in self.turns("start", [OURS, PASS]):
            for name in names:
                start = time.perf_counter()
                if name == OURS:
                    with serving(OURS, SERVER):
                        seconds = time.perf_counter() - start
                else:
                    with running([PYTHON, "-c", "pass"], SERVER_CORE) as process:
                        process.wait()
                        seconds = time.perf_counter() - start
                self.run.add("start", name, turn, {"time": seconds})
                progress(f"{title}, {name}: {seconds * 1e3:.1f} ms")

    def measure_client(self) -> None:
        """Measure how fast client.py reads pings and moves a file through the echo."""
        source = os.path.join(self.folder, "source")
        with open(source, "wb") as file:
            file.writelines(os.urandom(10**6) for _ in range(8 if self.quick else 1000))
        programs = [CLIENT, RAW_CLIENT, *([SOCAT] if self.machine["socat"] else [])]
        for turn, title, names in self.turns("client", programs):
            for name in names:
                rate = self.client_pings() if name == CLIENT else self.move_file(name, source)
                self.run.add("client", name, turn, {"rate": rate})
                progress(f"{title}, {name}: {rate / 1e6:,.0f} MB/s")

    def client_pings(self) -> float:
        """Return bytes a second, from the count that the client prints."""
        with serving(OURS, SERVER) as server:
            command, pipe = [*CLIENT_COMMAND, str(server.port)], subprocess.PIPE
            with running(command, LOAD_CORE, stdin=pipe, stderr=pipe) as client:
                server.wait_for(r"\n.+\n", client)  # it is connected
                start = time.perf_counter()
                with server.connect():  # with the second client, the pings start
                    time.sleep(self.seconds)
                    printed = client.communicate(timeout=TIMEOUT)[1].decode()
                seconds = time.perf_counter() - start
            found = re.search(r"received ([\d,]+) pings?\s*$", printed)
            if client.returncode or not found:
                raise server.failure(f"client.py ended with status {client.returncode}: {printed}")
        return int(found.group(1).replace(",", "")) * 4 / seconds

    def move_file(self, name: str, source: str) -> float:
        """Return bytes a second in one direction, including the program's start and end."""
        with serving(OURS, self.servers[OURS]) as server, open(source, "rb") as given, memory_file() as got:
            command = [*CLIENT_COMMAND, str(server.port), "--raw"]
            if name == SOCAT:
                command = [*SOCAT.split(), "-t", str(TIMEOUT), "-", f"TCP:127.0.0.1:{server.port}"]
            start = time.perf_counter()
            with running(command, LOAD_CORE, stdin=given, stdout=got, stderr=subprocess.PIPE) as client:
                printed = client.communicate(timeout=TIMEOUT)[1].decode()
                seconds = time.perf_counter() - start
            if client.returncode or not same_bytes(given, got):
                raise server.failure(f"{name} did not return the file: {printed}")
        return os.path.getsize(source) / seconds

    def measure_pings(self) -> None:
        """Measure how many pings arrive and how equal the shares of the two clients are."""
        programs = [*self.senders, *(IPERF3 if self.machine["iperf3"] else ())]
        for turn, title, names in self.turns("pings", programs):
            for name in names:
                if name in IPERF3:
                    got = self.run_iperf3(IPERF3[name])
                else:
                    with serving(name, self.senders[name]) as server:
                        got = self.run_load(server, "pings")
                if got:
                    less, more = sorted((got.pop("bytes"), got.pop("other")))
                    got["rate"], got["share"] = (less + more) / got.pop("seconds"), less / more
                    self.run.add("pings", name, turn, got)
                    progress(f"{title}, {name}: {got['rate'] / 1e6:,.1f} MB/s")
        done = self.run.programs("pings")
        self.missing += [f"{name}: it failed" for name in programs if name not in done]

    def run_iperf3(self, options: list[str]) -> dict[str, float]:
        """Return what iperf3's client sends to its server in two streams, or nothing if it fails."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            where = ["-p", str(free.getsockname()[1])]
        receiver = ["iperf3", "-s", "-1", "-B", "127.0.0.1", "--forceflush", *where]
        sender = ["iperf3", "-c", "127.0.0.1", "-P", "2", "--json", *where, *options]
        sender += ["-n", "100M"] if self.quick else ["-t", "1"]
        with running(receiver, LOAD_CORE, stdout=subprocess.PIPE) as process:
            assert process.stdout
            any(b"listening" in line for line in process.stdout)  # waits until it listens, or ends
            with running(sender, SERVER_CORE, stdout=subprocess.PIPE) as client:
                printed = client.communicate(timeout=TIMEOUT)[0]
        try:
            one, other = (stream["receiver"] for stream in json.loads(printed)["end"]["streams"])
        except (ValueError, KeyError):
            return {}
        return {"bytes": one["bytes"], "other": other["bytes"], "seconds": one["seconds"]}

    def measure_memory(self) -> None:
        """Measure the memory of an idle connection (server) and of an unread one (kernel)."""
        idle = [name for name in self.servers if name not in (PRINTING, UNPOLLED)]
        if not read("/proc/self/smaps_rollup"):
            self.missing.append("the server's memory: this kernel has no /proc/PID/smaps_rollup")
            idle = []
        unread = [OURS] if self.quick else list(self.senders)
        if not shutil.which("ss"):
            self.missing.append("the kernel's memory for a client that never reads: ss is not installed")
            unread = []
        for turn, title, names in self.turns("memory", unread):
            for name in names:
                size = self.unread(name)
                self.run.add("unread", name, turn, {"bytes": size})
                progress(f"{title}, a client that never reads, {name}: {size / 1e3:,.0f} kB in the kernel")
        for turn, title, names in self.turns("memory", idle):
            for name in names:
                size = self.idle(name, turn)
                progress(f"{title}, {name}: {size / 1e3:.2f} kB for each connection")

    def idle(self, name: str, turn: int) -> float:
        """Add the server's memory for each connection, and return it: what all but the first one need."""
        sizes, first, size = self.only.get(name, self.sizes), 0, 0.0
        with serving(name, self.servers[name]) as server, contextlib.ExitStack() as stack:
            for number in range(1, sizes[-1] + 1):
                stack.enter_context(server.connect_and_echo())
                if number in sizes:
                    now = resident(server.process.pid)
                    first = first or now
                    if number > 1:
                        size = (now - first) / (number - 1)
                        self.run.add(f"memory {number}", name, turn, {"bytes": size})
        return size

    def unread(self, name: str) -> float:
        """Return the kernel's memory for a client that never reads, once the server can send no more."""
        with serving(name, self.senders[name]) as server, server.connect(), server.connect():
            before, now = -1.0, 0.0
            while now > before:
                time.sleep(0.1 if self.quick else 1)
                before, now = now, kernel_memory(server.port) / 2
        return now

    def measure_echo(self) -> None:
        """Measure the rate, the cost and the latency of echoes, by number of clients."""
        with contextlib.ExitStack() as stack:
            messages = stack.enter_context(tempfile.TemporaryFile())
            servers = {}
            for name, command in self.servers.items():
                stdout = messages if name == PRINTING else subprocess.DEVNULL
                servers[name] = stack.enter_context(serving(name, command, stdout))
            for turn, title, names in self.turns("echo", list(servers)):
                for size in self.sizes:
                    for name in names:
                        if size in self.only.get(name, self.sizes):
                            rate = self.add_echoes(f"echo {size}", name, turn, servers[name], size)
                            progress(f"{title}, clients: {size:,}, {name}: {rate:,.0f} echoes/s")
        if THREE_LINES in self.servers:
            self.measure_timeouts()

    def measure_timeouts(self) -> None:
        """Measure the cost of echoes beside idle clients with a timeout each."""
        for turn, title, names in self.turns("echo", list(self.idle_clients)):
            for name in names:
                with serving(name, self.timeouts) as server, contextlib.ExitStack() as stack:
                    for _ in range(self.idle_clients[name]):
                        stack.enter_context(server.connect_and_echo())
                    rate = self.add_echoes("timeouts", name, turn, server, 10)
                progress(f"{title}, beside {name}: {rate:,.0f} echoes/s")

    def add_echoes(self, part: str, name: str, turn: int, server: Server, size: int) -> float:
        """Add the figures of clients that send and wait for their echo; return the rate."""
        got = self.run_load(server, "echo", str(size))
        echoes, seconds = got.pop("echoes"), got.pop("seconds")
        got["rate"], got["cost"] = echoes / seconds, got.pop("cpu") / echoes
        self.run.add(part, name, turn, got)
        return got["rate"]

    def report(self) -> Iterator[str]:
        """Yield the report, as text at most 100 columns wide."""
        yield paragraph(", ".join(filter(None, self.machine.values())) + ".")
        cores = f"Server on core {SERVER_CORE}, load on core {LOAD_CORE}"
        if SERVER_CORE == LOAD_CORE:
            cores = "Server and load on any core"
        rounds = ", ".join(f"{part} {rounds}" for part, rounds in self.rounds.items())
        yield paragraph(
            f"{cores}; rounds: {rounds}; a load takes {self.seconds} s. Figures are medians, with the"
            " lowest and the highest round in parentheses. A column with '÷ theirs' divides this server's"
            " figure (in the table of a file, client.py's) by that of the row, round by round. More than 1"
            " is better for echoes/s and MB/s; less than 1 is better for times."
        )
        if not self.run.complete:
            yield paragraph("The benchmark ended early: the figures are from fewer rounds.")
        yield from filter(None, tables(self.run))
        idle = [
            f"{part}, {name} ({busy.median:.0%})"
            for part in (f"echo {USUAL}", "pings")
            for name in self.run.programs(part)
            for busy in [self.run.spread("busy", (part, name))]
            if busy and busy.median < 0.9
        ]
        if idle:
            yield paragraph(
                "These servers used only a part of their core, because the load was slower or other programs"
                f" ran; they can do more: {'; '.join(idle)}."
            )
        if self.missing:
            yield paragraph(f"Not measured: {'; '.join(self.missing)}.")


PARTS = {
    "start": Bench.measure_start,
    "client": Bench.measure_client,
    "pings": Bench.measure_pings,
    "memory": Bench.measure_memory,
    "echo": Bench.measure_echo,
}


def version(program: str) -> str:
    """Return a program's name and version, without details in parentheses."""
    return re.sub(r" \(.*?\)", "", output(program, "--version").partition("\n")[0])


def memory_file() -> IO[bytes]:
    """Return a new file in memory, because a disk could be slower than the program."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("sink"), "w+b")
    return tempfile.TemporaryFile()


def same_bytes(one: IO[bytes], other: IO[bytes]) -> bool:
    """Return whether two files hold the same bytes."""
    one.seek(0)
    other.seek(0)
    while True:
        chunk = one.read(10**6)
        if chunk != other.read(10**6):
            return False
        if not chunk:
            return True


def resident(pid: int) -> int:
    """Return a process's bytes in memory.  smaps_rollup counts them; statm can be some pages behind."""
    found = re.search(r"Rss:\s+(\d+) kB", read(f"/proc/{pid}/smaps_rollup"))
    return int(found.group(1)) * 1024 if found else 0


def kernel_memory(port: int) -> int:
    """Return the bytes that the kernel holds for both ends of a port's connections: skmem of ss(8)."""
    printed = output("ss", "-tmnH", f"sport = :{port} or dport = :{port}")
    sizes = re.findall(r"skmem:\(r(\d+),rb\d+,t\d+,tb\d+,f(\d+),w(\d+),o(\d+),bl(\d+)", printed)
    return sum(int(size) for each in sizes for size in each)


def paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False) + "\n"


def duration(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def write_json(path: str, run: Run | None = None) -> bool:
    """Write the run; without one, only try whether this is possible.  Return whether it is."""
    try:
        with open(path, "w" if run else "a", encoding="utf-8") as file:
            if run:
                run.save(file)
    except OSError as error:
        progress(f"benchmark: cannot write {path}: {error.strerror}")
        return False
    return True


def write_readme(path: str) -> int:
    """Write the figures of a run into the README; return the exit status."""
    readme = os.path.join(ROOT, "README.md")
    try:
        with open(readme, "r+", encoding="utf-8") as file:
            text = fill(file.read(), Run.load(path))
            file.seek(0)
            file.write(text)
            file.truncate()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        progress(f"benchmark: cannot write the figures of {path}: {reason}")
        return 1
    return 0


def main() -> int:
    """Measure and report; return the exit status."""
    parser = argparse.ArgumentParser(prog="benchmark", description="Measure the server beside others.")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"what to measure: {', '.join(PARTS)} (default: all)")
    add("--quick", action="store_true", help="run one short round, to check that everything works")
    add(
        "--peers", action="store_true", help="also measure uvloop and trio, which pip installs the first time"
    )
    add("--json", metavar="FILE", help="also write the figures of all rounds to FILE")
    add("--readme", metavar="FILE", help="measure nothing; write the figures of FILE into README.md")
    options = parser.parse_args()
    if options.readme:
        return write_readme(options.readme)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part is named {unknown[0]!r} (choose from {', '.join(PARTS)})")
    parts = [part for part in PARTS if part in options.parts or not options.parts]

    status = 0
    if options.json and not write_json(options.json):
        return 1
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.quick, options.peers, folder)
        expected = bench.expected()
        seconds = sum(expected[part] for part in parts)
        progress(f"this takes about {duration(seconds)}; Ctrl-C ends it early and shows the figures so far")
        use_core(LOAD_CORE)
        try:
            for part in parts:
                PARTS[part](bench)
            bench.run.complete = True
        except KeyboardInterrupt:
            status = 130
        except (Failure, subprocess.TimeoutExpired) as failure:
            progress(str(failure))
            status = 1
    if options.json and not write_json(options.json, bench.run):
        status = 1
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a locale may lack a character
    print(*bench.report(), sep="\n", end="")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the first round
        sys.exit(130)
