"""The server beside others, under the same load.

    python3 tests/benchmark [PART ...] [--peers] [--quick] [--json FILE]

    start     time from the start of the process until it listens
    client    client.py: pings a second, and a file through the echo
    pings     pings to two clients
    memory    memory for each connection, of the server and of the kernel
    echo      echoes a second, their cost and their latency, for 1 to 10,000 clients

The server has one core, the load another.  Each figure is the median of several rounds.  In each round
every program has its turn, and each ratio uses the figures of one round, so that a machine that slows
down favors no program.  Every byte is checked: a wrong one, or a server that has ended, ends the benchmark
with status 1.  When it is interrupted, it shows what it has measured, and exits with status 130.
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
    MESSAGE,
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
    use_core,
)
from benchmark.report import Column, Figures, Samples, column, paired, ratio, table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

PEERS = os.path.join(HERE, "peers.py")
CLIENT = [PYTHON, os.path.join(ROOT, "client.py"), "--port"]
OURS, PRINTING, C_ECHO, C_PINGS = (
    "this server",
    "this server, messages to a file",
    "C, epoll",
    "C, 256 KiB a send",
)
RAW_CLIENT, SOCAT, PASS = "client.py --raw", "socat -b 262144", "python3 -c pass"
IPERF3 = {"iperf3": [], "iperf3 -Z": ["-Z"]}
USUAL = 100  # clients, unless a table says otherwise
SPARE_FILES = 64  # descriptors of a process besides its connections


class Bench:
    """The programs to measure, their figures, and the figures that cannot be measured here."""

    def __init__(self, quick: bool, peers: bool, folder: str) -> None:
        """Find the programs; build and install missing ones, if possible."""
        self.quick, self.folder = quick, folder
        self.rounds, self.seconds = (1, 0.04) if quick else (9, 0.5)  # many short ones, because noise varies
        self.missing: list[str] = []
        self.complete = False  # whether everything was measured
        model = re.search(r"model name\s*: (.*)", read("/proc/cpuinfo"))
        self.machine = {
            "kernel": f"Linux {platform.release()}",
            "congestion control": read("/proc/sys/net/ipv4/tcp_congestion_control"),
            "processor": model.group(1) if model else platform.machine(),
            "cores": str(os.cpu_count()),
            "Python": f"{platform.python_implementation()} {platform.python_version()}",
            "iperf3": output("iperf3", "--version").partition("\n")[0],
            "socat": "".join(re.findall(r"socat version (\S+)", output("socat", "-V"))),
        }
        for tool in "iperf3", "socat":
            if not self.machine[tool]:
                self.missing.append(f"{tool}: it is not installed")
        if SERVER_CORE == LOAD_CORE:
            self.missing.append(
                "the server on its own core: this Python cannot choose one, or there is only one"
            )

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        wanted = [1, 10, USUAL] if quick else [1, 10, USUAL, 1000, 5000, 10000]
        self.sizes = [size for size in wanted if hard < 0 or size <= max(hard - SPARE_FILES, USUAL)]
        if self.sizes != wanted:
            self.missing.append(f"{wanted[-1]:,} connections: the limit is {hard:,} open files (ulimit -Hn)")

        self.begin, self.pings, self.file = Samples(OURS), Samples(OURS), Samples(RAW_CLIENT)
        self.counted, self.unread, self.memory = Samples(), Samples(), Samples()
        self.echoes = {size: Samples(OURS) for size in self.sizes}

        echo = [*SERVER, "--echo", "--wait-for", "1", "--connections", str(wanted[-1])]
        self.servers = {OURS: [*echo, "--quiet"], PRINTING: echo}
        self.senders = {OURS: SERVER, LECTURE: faults.command(LECTURE)}
        self.load = [PYTHON, os.path.join(HERE, "load.py")]
        self.build_c()
        self.servers["Python, bare recv and send"] = [PYTHON, PEERS, "plain"]
        for kind in ("protocol", "streams"):
            self.servers[f"asyncio, {kind}"] = [PYTHON, PEERS, f"asyncio-{kind}"]
        if peers:
            self.install_peers()

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
        self.machine["compiler"] = output(compiler, "--version").partition("\n")[0]
        self.load = [built["load"]]
        self.servers[C_ECHO] = [built["peers"], "echo"]
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

    def expected(self) -> dict[str, float]:
        """Return about how many seconds each part takes."""
        turn = 1.2 * self.seconds + 0.15  # includes the warm-up and the start of the processes
        file = 0.5 if self.quick else 1.5
        unread = 0.4 if self.quick else 3 * len(self.senders)
        echo = sum(len(self.servers) * (turn + size / 8000) for size in self.sizes)
        return {
            "start": 0.15 * self.starts(),
            "client": self.rounds * (self.seconds + 0.5 + 2 * file),
            "pings": self.rounds * (turn * len(self.senders) + (0.8 if self.quick else 3.2)) + unread,
            "memory": len(self.servers) * (0.2 + self.sizes[-1] / 5000),
            "echo": self.rounds * echo,
        }

    def starts(self) -> int:
        """Return how often the start is measured."""
        return 3 if self.quick else 25

    def turns(self, programs: list[str]) -> Iterator[tuple[str, list[str]]]:
        """Yield each round: its title, and the programs in a different order."""
        for turn in range(self.rounds):
            first = turn % len(programs)
            yield f"round {turn + 1} of {self.rounds}", programs[first:] + programs[:first]

    def run_load(self, server: Server, kind: str, *more: str) -> Figures:
        """Return the load's figures."""
        words = [kind, str(server.process.pid), str(server.port), str(self.seconds), *more]
        done = subprocess.run([*self.load, *words], check=False, capture_output=True, text=True)
        if done.returncode:
            raise server.failure(f"with {' '.join([kind, *more])}, {done.stderr.strip()}")
        figures: Figures = json.loads(done.stdout)
        figures["busy"] = figures["cpu"] / figures["seconds"]
        return figures

    def measure_start(self) -> None:
        """Measure how long it takes to listen, beside a Python that does nothing."""
        for _ in range(self.starts()):
            start = time.perf_counter()
            with serving(OURS, SERVER):
                listening = time.perf_counter() - start
            start = time.perf_counter()
            with running([PYTHON, "-c", "pass"], SERVER_CORE) as process:
                process.wait()
                nothing = time.perf_counter() - start
            self.begin.add_round({OURS: {"time": listening}, PASS: {"time": nothing}})
        progress(f"start: {listening * 1e3:.0f} ms, {PASS}: {nothing * 1e3:.0f} ms")

    def measure_client(self) -> None:
        """Measure how fast client.py reads pings and moves a file through the echo."""
        source = os.path.join(self.folder, "source")
        with open(source, "wb") as file:
            file.writelines(os.urandom(10**6) for _ in range(8 if self.quick else 1000))
        programs = [RAW_CLIENT, SOCAT] if self.machine["socat"] else [RAW_CLIENT]
        for title, names in self.turns(programs):
            rate = self.client_pings()
            self.counted.add_round({"client.py": {"rate": rate}})
            progress(f"client, {title}, pings: {rate / 1e6:,.0f} MB/s")
            self.file.add_round()
            for name in names:
                rate = self.move_file(name, source)
                self.file.add(name, {"rate": rate})
                progress(f"client, {title}, a file, {name}: {rate / 1e6:,.0f} MB/s")

    def client_pings(self) -> float:
        """Return bytes a second, from the count that the client prints."""
        with serving(OURS, SERVER) as server:
            command, pipe = [*CLIENT, str(server.port)], subprocess.PIPE
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
            command = [*CLIENT, str(server.port), "--raw"]
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
        for title, names in self.turns(programs):
            self.pings.add_round()
            for name in names:
                if name in IPERF3:
                    got = self.run_iperf3(IPERF3[name])
                else:
                    with serving(name, self.senders[name]) as server:
                        got = self.run_load(server, "pings")
                if got:
                    less, more = sorted((got["bytes"], got["other"]))
                    got["rate"], got["share"] = (less + more) / got["seconds"], less / more
                    self.pings.add(name, got)
                    progress(f"pings, {title}, {name}: {got['rate'] / 1e6:,.1f} MB/s")
        self.missing += [f"{name}: it failed" for name in programs if name not in self.pings.names()]

    def run_iperf3(self, options: list[str]) -> Figures:
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
        self.measure_unread()
        if not read("/proc/self/smaps_rollup"):
            self.missing.append("the server's memory: this kernel has no /proc/PID/smaps_rollup")
            return
        self.memory.add_round()
        for name in self.servers:
            if name == PRINTING:
                continue
            with serving(name, self.servers[name]) as server, contextlib.ExitStack() as stack:
                sizes = []
                for number in range(1, self.sizes[-1] + 1):
                    stack.enter_context(server.connect_and_echo())
                    if number in (1, self.sizes[-1]):
                        sizes.append(resident(server.process.pid))
            size = (sizes[1] - sizes[0]) / (self.sizes[-1] - 1)
            self.memory.add(name, {"bytes": size})
            progress(f"memory, {name}: {size / 1e3:.2f} kB for each connection")

    def measure_unread(self) -> None:
        """Measure the kernel's memory for a client that never reads, once the server can send no more."""
        if not shutil.which("ss"):
            self.missing.append("the kernel's memory for a client that never reads: ss is not installed")
            return
        self.unread.add_round()
        for name in [OURS] if self.quick else list(self.senders):
            with serving(name, self.senders[name]) as server, server.connect(), server.connect():
                before, now = -1.0, 0.0
                while now > before:
                    time.sleep(0.1 if self.quick else 1)
                    before, now = now, kernel_memory(server.port) / 2
            self.unread.add(name, {"bytes": now})
            progress(f"memory, a client that never reads, {name}: {now / 1e3:,.0f} kB in the kernel")

    def measure_echo(self) -> None:
        """Measure the rate, the cost and the latency of echoes, by number of clients."""
        with contextlib.ExitStack() as stack:
            messages = stack.enter_context(tempfile.TemporaryFile())
            servers = {}
            for name, command in self.servers.items():
                stdout = messages if name == PRINTING else subprocess.DEVNULL
                servers[name] = stack.enter_context(serving(name, command, stdout))
            for title, names in self.turns(list(servers)):
                for size in self.sizes:
                    self.echoes[size].add_round()
                    for name in names:
                        if name == PRINTING and size != USUAL:
                            continue
                        got = self.run_load(servers[name], "echo", str(size))
                        got["rate"], got["cost"] = got["echoes"] / got["seconds"], got["cpu"] / got["echoes"]
                        self.echoes[size].add(name, got)
                        progress(f"echo, {title}, clients: {size:,}, {name}: {got['rate']:,.0f} echoes/s")

    def figures(self) -> dict[str, object]:
        """Return everything measured, for a program: in seconds and bytes."""
        parts = {"start": self.begin, "client pings": self.counted, "client file": self.file}
        parts.update({"pings": self.pings, "unread": self.unread, "memory": self.memory})
        parts.update({f"echo {size}": samples for size, samples in self.echoes.items()})
        about = {"machine": self.machine, "rounds": self.rounds, "missing": self.missing}
        about["complete"] = self.complete
        return {**about, **{part: samples.summary() for part, samples in parts.items() if samples.rounds}}

    def tables(self) -> Iterator[str]:
        """Yield the tables, at most 100 columns wide.  A table without figures is empty."""
        usual, alone = self.echoes[USUAL], self.echoes[1]
        echo = [
            column(usual, "rate", "echoes/s"),
            ratio(usual, "rate", "echoes ÷ theirs"),
            column(usual, "cost", "CPU µs/echo", 1e6, ".2f"),
            ratio(usual, "cost", "CPU ÷ theirs"),
        ]
        yield table(f"echo, {USUAL} clients, {len(MESSAGE)} bytes", usual.names(), echo)
        latency = [
            column(usual, "median", "median µs", 1e6),
            column(usual, "p99", "99 % µs", 1e6),
            column(alone, "median", "1 client: median µs", 1e6, ".1f"),
            ratio(alone, "median", "median ÷ theirs"),
        ]
        yield table(f"latency of an echo, {USUAL} clients", list(self.servers), latency)

        costs = [column(samples, "cost", f"{size:,}", 1e6, ".2f") for size, samples in self.echoes.items()]
        most = self.sizes[-1]
        if most > USUAL:
            growth = Column(
                f"{most:,} ÷ {USUAL}",
                lambda name: paired(self.echoes[most], usual, name, name, "cost"),
                ".2f",
            )
            costs.append(growth)
        yield table("CPU µs/echo, by clients", alone.names(), costs)

        pings = [
            column(self.pings, "rate", "MB/s", 1e-6, ",.1f"),
            ratio(self.pings, "rate", "MB/s ÷ theirs"),
            column(self.pings, "share", "smaller share ÷ larger", 1, ".2f"),
        ]
        yield table("pings, 2 clients", self.pings.names(), pings)
        memory = [
            column(self.memory, "bytes", "kB of the server, idle", 1e-3, ".2f"),
            column(self.unread, "bytes", "kB of the kernel, never reads", 1e-3),
        ]
        yield table("memory for a client", [*self.servers, *list(self.senders)[1:]], memory)
        file = [column(self.file, "rate", "MB/s", 1e-6), ratio(self.file, "rate", "MB/s ÷ theirs")]
        yield table("a file through the echo", self.file.names(), file)
        yield table("reading and counting pings", ["client.py"], [column(self.counted, "rate", "MB/s", 1e-6)])
        start = [column(self.begin, "time", "ms", 1e3), ratio(self.begin, "time", "ms ÷ theirs")]
        yield table("start, until it listens", self.begin.names(), start)

    def report(self) -> Iterator[str]:
        """Yield the report, as text."""
        yield paragraph("; ".join(f"{key}: {value}" for key, value in self.machine.items() if value) + ".")
        cores = f"Server on core {SERVER_CORE}, load on core {LOAD_CORE}"
        if SERVER_CORE == LOAD_CORE:
            cores = "Server and load on any core"
        yield paragraph(
            f"{cores}; rounds: {self.rounds}, of {self.seconds} s. All figures are medians."
            " A column with '÷ theirs' divides this server's figure (in the table of a file, client.py's)"
            " by that of the row, round by round. More than 1 is better for echoes/s and MB/s; less than 1"
            " is better for times."
        )
        if not self.complete:
            yield paragraph("The benchmark ended early: the figures are from fewer rounds.")
        yield from filter(None, self.tables())
        idle = [
            f"{part}, {name} ({busy:.0%})"
            for part, samples in (("echo", self.echoes[USUAL]), ("pings", self.pings))
            for name in samples.names()
            for busy in [samples.median(name, "busy")]
            if busy is not None and busy < 0.9
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


def stop(*_: object) -> None:
    """Interrupt the measurement once, because the benchmark must still end its processes."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Measure and report; return the exit status."""
    parser = argparse.ArgumentParser(prog="benchmark", description="Measure the server beside others.")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"what to measure: {', '.join(PARTS)} (default: all)")
    add("--quick", action="store_true", help="run one short round, to check that everything works")
    add(
        "--peers", action="store_true", help="also measure uvloop and trio, which pip installs the first time"
    )
    add("--json", metavar="FILE", help="also write the figures to FILE, in seconds and bytes")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part is named {unknown[0]!r} (choose from {', '.join(PARTS)})")
    parts = [part for part in PARTS if part in options.parts or not options.parts]

    status = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.quick, options.peers, folder)
        expected = bench.expected()
        seconds = sum(expected[part] for part in parts)
        progress(f"this takes about {duration(seconds)}; Ctrl-C ends it early and shows the figures so far")
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, stop)
        use_core(LOAD_CORE)
        try:
            for part in parts:
                PARTS[part](bench)
            bench.complete = True
        except KeyboardInterrupt:
            status = 130
        except (Failure, subprocess.TimeoutExpired) as failure:
            progress(str(failure))
            status = 1
    print(*bench.report(), sep="\n", end="")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(bench.figures(), file, indent=2)
    return status


if __name__ == "__main__":
    sys.exit(main())
