"""The server beside others, on the same load: what an echo costs, how many pings come, how it grows.

    python3 tests/benchmark [--peers] [--quick] [--json FILE]

The server has one core, the load another.  Every figure is the median of several rounds, in each of
which everyone has a turn; ratios are formed within a round, so that a machine that slows down does not
make anyone better.  Every byte that comes is checked: a wrong one, or a server that has died, ends the
benchmark with status 1.  A slow machine does not.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from re import Match
    from typing import IO, Any

    Rounds = list[dict[str, float]]  # the figures of each round, by name
    Samples = dict[str, Rounds]  # by who was measured

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
ROOT = os.path.dirname(TESTS)
sys.path.insert(0, TESTS)
import faults  # noqa: E402

PYTHON = sys.executable
SERVER = [PYTHON, os.path.join(ROOT, "non_block_io_server.py"), "--port", "0"]
CLIENT = [PYTHON, os.path.join(ROOT, "client.py"), "--port"]
PEERS = os.path.join(HERE, "peers.py")
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]

OURS, PRINTING, LECTURE = "this server", "this server, messages to a file", "the lecture's script"
USUAL = 100  # clients, where nothing else is said
MESSAGE = b"Some message... " * 4
PATIENCE = 60  # seconds in which something must happen
SPARE_FILES = 64  # a process's descriptors besides its connections


class Failure(Exception):
    """Wrong bytes, or a dead server."""


# -------------------------------------------------------------------- processes


@contextlib.contextmanager
def running(command: list[str], core: int, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process on a core, its other streams /dev/null; it has ended when the block has."""
    streams = {**dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL), **streams}
    os.sched_setaffinity(0, {core})  # inherited, so that it holds from the first instruction
    process = subprocess.Popen(command, **streams)
    try:
        os.sched_setaffinity(0, {LOAD_CORE})
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Server:
    """A server process that listens, and its log: standard error in a file."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        """Wait until it listens."""
        self.name, self.process, self.log = name, process, log
        found = self.wait_for(r"listening on 127\.0\.0\.1:(\d+).*\n", process)
        if not found:
            raise self.failure("it does not listen")
        self.port = int(found.group(1))

    def wait_for(self, pattern: str, process: subprocess.Popen[bytes]) -> Match[str] | None:
        """The pattern's match, as soon as the log has one; None, when the process ends before that."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and process.poll() is None:
            match = re.search(pattern, self.text())
            if match:
                return match
            time.sleep(0.0002)
        return None

    def text(self) -> str:
        """What it has logged."""
        return os.pread(self.log.fileno(), 10**7, 0).decode()

    def failure(self, what: str) -> Failure:
        """What went wrong, with the server's last words."""
        return Failure(f"{self.name}: {what}; its log ends with\n{self.text()[-1000:]}")

    def connect(self) -> socket.socket:
        """A client's connection."""
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def connect_and_echo(self) -> socket.socket:
        """A client's connection, after one echo."""
        try:
            sock = self.connect()
            sock.sendall(MESSAGE)
            if sock.recv(len(MESSAGE), socket.MSG_WAITALL) != MESSAGE:
                raise self.failure("a reply has wrong bytes")
        except OSError as error:
            raise self.failure(f"with many clients, {error}") from error
        return sock


@contextlib.contextmanager
def serving(name: str, command: list[str], stdout: int | IO[bytes] = subprocess.DEVNULL) -> Iterator[Server]:
    """A server.  Raises Failure where it does not listen, or does not live on until it is stopped."""
    with tempfile.TemporaryFile() as log:
        with running(command, SERVER_CORE, stdout=stdout, stderr=log) as process:
            server = Server(name, process, log)
            yield server
            if process.poll() is not None and name != LECTURE:  # which dies with its first client
                raise server.failure(f"it has ended by itself, with status {process.returncode}")
        if command[:2] == SERVER[:2] and process.returncode:
            raise server.failure(f"stopped, it ended with status {process.returncode}")


def output(*command: str) -> str:
    """What a program prints, '' where it is not there or fails."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10 * PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()


def read(path: str) -> str:
    """A file of /proc, '' where there is none."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


# -------------------------------------------------------------------- the measurements


class Bench:
    """What there is to measure with; what was measured, and what could not be."""

    def __init__(self, quick: bool, peers: bool, folder: str) -> None:
        """Find out what is there; build and install what is not, and can be."""
        self.quick, self.folder = quick, folder
        self.rounds, self.seconds = (1, 0.04) if quick else (9, 0.5)  # many and short: noise comes and goes
        self.figures: dict[str, Any] = {}
        self.missing: list[str] = []
        model = re.search(r"model name\s*: (.*)", read("/proc/cpuinfo"))
        self.machine = {
            "kernel": f"Linux {platform.release()}",
            "congestion control": read("/proc/sys/net/ipv4/tcp_congestion_control"),
            "processor": model.group(1) if model else platform.machine(),
            "cores": str(os.cpu_count()),
            "Python": f"{platform.python_implementation()} {platform.python_version()}",
            "iperf3": output("iperf3", "--version").partition("\n")[0],
        }
        if not self.machine["iperf3"]:
            self.missing.append("iperf3: it is not installed")
        if len(CORES) == 1:
            self.missing.append("the server on a core of its own: there is only one")

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        wanted = [1, 10, USUAL] if quick else [1, 10, USUAL, 1000, 5000, 10000]
        self.sizes = [size for size in wanted if hard < 0 or size <= max(hard - SPARE_FILES, USUAL)]
        if self.sizes != wanted:
            self.missing.append(f"{wanted[-1]:,} connections: the limit is {hard:,} open files (ulimit -Hn)")

        echo = [*SERVER, "--echo", "--wait-for", "1", "--connections", str(wanted[-1])]
        self.servers = {OURS: [*echo, "--quiet"], PRINTING: echo}
        self.find_compiler()
        self.servers["Python, bare recv and send"] = [PYTHON, PEERS, "plain"]
        for kind in ("protocol", "streams"):
            self.servers[f"asyncio, {kind}"] = [PYTHON, PEERS, f"asyncio-{kind}"]
        if peers:
            self.find_peers()

    def find_compiler(self) -> None:
        """The load, and with a compiler the C loop."""
        program = os.path.join(self.folder, "load")
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler:
            source = os.path.join(HERE, "load.c")
            subprocess.run([compiler, "-O2", "-o", program, source], check=False, stdout=sys.stderr)
            self.machine["compiler"] = output(compiler, "--version").partition("\n")[0]
        if os.path.exists(program):
            self.machine["load"], self.load = "C", [program]
            self.servers["C, epoll"] = [program, "server"]
        else:
            self.machine["load"], self.load = "Python", [PYTHON, os.path.join(HERE, "load.py")]
            self.missing.append("the C loop: no compiler; the load, in Python, is slower than some servers")

    def find_peers(self) -> None:
        """The libraries, installed once for this Python."""
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
            self.missing.append("uvloop and trio: they could not be installed")

    def turns(self, everyone: list[str]) -> Iterator[tuple[str, list[str]]]:
        """Each round: its title, and everyone, in another order."""
        for turn in range(self.rounds):
            start = turn % len(everyone)
            yield f"round {turn + 1} of {self.rounds}", everyone[start:] + everyone[:start]

    def run_load(self, server: Server, kind: str, *more: str) -> dict[str, float]:
        """The load's figures."""
        words = [kind, str(server.process.pid), str(server.port), str(self.seconds), *more]
        done = subprocess.run([*self.load, *words], check=False, capture_output=True, text=True)
        if done.returncode:
            raise server.failure(f"with {' '.join([kind, *more])}, {done.stderr.strip()}")
        figures: dict[str, float] = json.loads(done.stdout)
        figures["busy"] = figures["cpu"] / figures["seconds"]
        return figures

    def measure_start(self) -> None:
        """From the start of the process until it listens, beside a Python that does nothing."""
        samples: Rounds = []
        for _ in range(3 if self.quick else 25):
            start = time.perf_counter()
            with serving(OURS, SERVER):
                listening = time.perf_counter() - start
            start = time.perf_counter()
            with running([PYTHON, "-c", "pass"], SERVER_CORE) as process:
                process.wait()
                nothing = time.perf_counter() - start
            samples.append({"listening": listening, "nothing": nothing, "ratio": listening / nothing})
        got = self.figures["start"] = medians(samples)
        progress(f"start: {got['listening'] * 1e3:.0f} ms, {got['ratio']:.2f} times python3 -c pass")

    def measure_client(self) -> None:
        """How fast client.py reads pings, and moves a file through the echo."""
        if not os.path.exists(CLIENT[1]):
            self.missing.append("client.py: it is not there")
            return
        source = os.path.join(self.folder, "source")
        with open(source, "wb") as file:
            file.writelines(os.urandom(10**6) for _ in range(8 if self.quick else 256))
        samples: Rounds = []
        for title, _ in self.turns([OURS]):
            samples.append({"pings": self.client_pings(), "file": self.client_file(source)})
            pings, file_ = (samples[-1][key] / 1e6 for key in ("pings", "file"))
            progress(f"{title}, client.py: {pings:,.0f} MB/s of pings, {file_:,.0f} MB/s of a file")
        self.figures["client"] = medians(samples)

    def client_pings(self) -> float:
        """Bytes a second, by the client's own count."""
        with serving(OURS, SERVER) as server:
            command, pipe = [*CLIENT, str(server.port)], subprocess.PIPE
            with running(command, LOAD_CORE, stdin=pipe, stderr=pipe) as client:
                server.wait_for(r"\n.+\n", client)  # it has a seat
                start = time.perf_counter()
                with server.connect():  # the second client, with which the pings begin
                    time.sleep(self.seconds)
                    told = client.communicate(timeout=PATIENCE)[1].decode()
                seconds = time.perf_counter() - start
            found = re.search(r"received ([\d,]+) pings?\s*$", told)  # and nothing else
            if client.returncode or not found:
                raise server.failure(f"client.py ended with status {client.returncode}: {told}")
        return int(found.group(1).replace(",", "")) * 4 / seconds

    def client_file(self, source: str) -> float:
        """Bytes a second in one direction, with the client's own start and end."""
        sink = os.path.join(self.folder, "sink")
        with serving(OURS, self.servers[OURS]) as server:
            command = [*CLIENT, str(server.port), "--raw"]
            with open(source, "rb") as given, open(sink, "wb") as got:
                start = time.perf_counter()
                with running(command, LOAD_CORE, stdin=given, stdout=got, stderr=subprocess.PIPE) as client:
                    told = client.communicate(timeout=PATIENCE)[1].decode()
                    seconds = time.perf_counter() - start
            if client.returncode or not filecmp.cmp(source, sink, shallow=False):
                raise server.failure(f"client.py --raw has not brought back what it was given: {told}")
        return os.path.getsize(source) / seconds

    def measure_pings(self) -> None:
        """How many pings come, and how equal the two clients' shares are."""
        commands = {OURS: SERVER, LECTURE: faults.command(LECTURE)}
        samples: Samples = {}
        for title, names in self.turns([*commands, "iperf3"] if self.machine["iperf3"] else list(commands)):
            for name in names:
                if name == "iperf3":
                    got = self.run_iperf3()
                else:
                    with serving(name, commands[name]) as server:
                        got = self.run_load(server, "pings")
                if got:
                    less, more = sorted((got["bytes"], got["other"]))
                    got["rate"], got["share"] = (less + more) / got["seconds"], less / more
                    samples.setdefault(name, []).append(got)
                    progress(f"{title}, pings, {name}: {got['rate'] / 1e6:,.1f} MB/s")
        if self.machine["iperf3"] and len(samples.get("iperf3", [])) < self.rounds:
            samples.pop("iperf3", None)
            self.missing.append("iperf3: it failed")
        self.figures["pings"] = summary(samples)
        self.measure_unread(commands)

    def run_iperf3(self) -> dict[str, float]:
        """What iperf3's server sends to its client in two streams; nothing, where that fails."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            where = ["-p", str(free.getsockname()[1])]
        server = ["iperf3", "-s", "-1", "-B", "127.0.0.1", "--forceflush", *where]
        with running(server, SERVER_CORE, stdout=subprocess.PIPE) as process:
            assert process.stdout
            any(b"listening" in line for line in process.stdout)  # waits for it, or for the end
            length = ["-n", "100M"] if self.quick else ["-t", "1"]
            told = output("iperf3", "-c", "127.0.0.1", "-R", "-P", "2", "--json", *where, *length)
        try:
            one, other = (stream["receiver"] for stream in json.loads(told)["end"]["streams"])
        except ValueError:
            return {}
        return {"bytes": one["bytes"], "other": other["bytes"], "seconds": one["seconds"]}

    def measure_unread(self, commands: dict[str, list[str]]) -> None:
        """What a client that never reads costs the kernel, when its server has sent what it could."""
        figures = self.figures["unread"] = {}
        if not shutil.which("ss"):
            self.missing.append("the kernel's memory for a client that never reads: ss is not installed")
            return
        for name in [OURS] if self.quick else list(commands):
            with serving(name, commands[name]) as server, server.connect(), server.connect():
                before, now = -1.0, 0.0
                while now > before:
                    time.sleep(0.1 if self.quick else 1)
                    before, now = now, kernel_memory(server.port) / 2
            figures[name] = now
            progress(f"a client that never reads, {name}: {now / 1e3:,.0f} kB of the kernel's memory")

    def measure_memory(self) -> None:
        """What a server grows by with each connection, which is idle after one echo."""
        figures = self.figures["memory"] = {}
        if not read("/proc/self/smaps_rollup"):
            self.missing.append("memory: this kernel has no /proc/PID/smaps_rollup")
            return
        for name in self.servers:
            if name == PRINTING:
                continue
            with serving(name, self.servers[name]) as server, contextlib.ExitStack() as stack:
                sizes = []
                for number in range(1, self.sizes[-1] + 1):
                    stack.enter_context(server.connect_and_echo())
                    if number in (1, self.sizes[-1]):
                        sizes.append(resident(server.process.pid))
            figures[name] = (sizes[1] - sizes[0]) / (self.sizes[-1] - 1)
            progress(f"memory, {name}: {figures[name] / 1e3:.2f} kB a connection")

    def measure_echoes(self) -> None:
        """How many echoes come, what one costs, how long it takes; from one connection to many."""
        samples: dict[int, Samples] = {size: {} for size in self.sizes}
        with contextlib.ExitStack() as stack:
            messages = stack.enter_context(tempfile.TemporaryFile())
            servers = {}
            for name, command in self.servers.items():
                stdout = messages if name == PRINTING else subprocess.DEVNULL
                servers[name] = stack.enter_context(serving(name, command, stdout))
            for title, names in self.turns(list(servers)):
                for size in self.sizes:
                    for name in names:
                        if name == PRINTING and size != USUAL:
                            continue
                        got = self.run_load(servers[name], "echo", str(size))
                        got["rate"], got["cost"] = got["echoes"] / got["seconds"], got["cpu"] / got["echoes"]
                        samples[size].setdefault(name, []).append(got)
                        progress(f"{title}, clients: {size:,}, {name}: {got['rate']:,.0f} echoes/s")
        self.figures["echoes"] = {str(size): summary(samples[size]) for size in self.sizes}
        usual = samples[USUAL]
        self.figures["growth"] = {
            name: {str(size): paired(samples[size][name], usual[name], "cost") for size in self.sizes}
            for name in samples[1]
        }


# -------------------------------------------------------------------- figures


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def resident(pid: int) -> int:
    """Bytes of a process in memory: smaps_rollup counts, where statm may be some pages behind."""
    found = re.search(r"Rss:\s+(\d+) kB", read(f"/proc/{pid}/smaps_rollup"))
    return int(found.group(1)) * 1024 if found else 0


def kernel_memory(port: int) -> int:
    """Bytes that the kernel holds for a port's connections, at both their ends: skmem of ss(8)."""
    told = output("ss", "-tmnH", f"sport = :{port} or dport = :{port}")
    sizes = re.findall(r"skmem:\(r(\d+),rb\d+,t\d+,tb\d+,f(\d+),w(\d+),o(\d+),bl(\d+)", told)
    return sum(int(size) for each in sizes for size in each)


def medians(rounds: Rounds) -> dict[str, float]:
    """Each figure's median."""
    return {key: median(each[key] for each in rounds) for key in rounds[0]}


def paired(ones: Rounds, others: Rounds, key: str) -> float:
    """The median of the rounds' ratios; what was too short for the clock counts as a tiny time."""
    return median(one[key] / max(other[key], 1e-12) for one, other in zip(ones, others))


def summary(samples: Samples) -> dict[str, dict[str, float]]:
    """Everyone's medians, and as `ours/...` our figure divided by theirs."""
    result = {name: medians(rounds) for name, rounds in samples.items()}
    for name, rounds in samples.items():
        for key in {"rate", "cost", "median", "p99"} & rounds[0].keys():
            result[name][f"ours/{key}"] = paired(samples[OURS], rounds, key)
    return result


# -------------------------------------------------------------------- the report


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table for Markdown that is one for the eye, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (head, rule, *rows))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def report(bench: Bench) -> Iterator[str]:
    """The figures for a person, part by part."""
    figures = bench.figures
    yield "; ".join(f"{key}: {value}" for key, value in bench.machine.items() if value) + ".\n"
    yield (
        f"Server on core {SERVER_CORE}, load on core {LOAD_CORE}; "
        f"rounds: {bench.rounds}, of {bench.seconds} s; figures are their medians.\n"
        "A ratio is this server's figure divided by the row's, in the same round: of echoes and bytes a\n"
        "second it had better be more than 1, of times less.\n"
    )

    head = [f"echo, {USUAL} clients, {len(MESSAGE)} bytes", "echoes/s", "ratio", "CPU, µs/echo", "ratio"]
    head += ["median, µs", "99 %, µs", "1 client, µs", "ratio", "kB/connection"]
    rows = []
    for name, got in figures["echoes"][str(USUAL)].items():
        row = [name, f"{got['rate']:,.0f}", f"{got['ours/rate']:.2f}"]
        row += [f"{got['cost'] * 1e6:.2f}", f"{got['ours/cost']:.2f}"]
        row += [f"{got['median'] * 1e6:,.0f}", f"{got['p99'] * 1e6:,.0f}"]
        alone = figures["echoes"]["1"].get(name)
        row += [f"{alone['median'] * 1e6:.1f}", f"{alone['ours/median']:.2f}"] if alone else ["", ""]
        row += [f"{figures['memory'][name] / 1e3:.2f}" if name in figures["memory"] else ""]
        rows.append(row)
    yield table(head, rows)

    sizes = [f"{size:,}" for size in bench.sizes]
    grown = [str(size) for size in bench.sizes if size > 1000]
    head = ["CPU, µs/echo, by clients", *sizes, *(f"{int(size):,} ÷ {USUAL}" for size in grown)]
    rows = []
    for name, growth in figures["growth"].items():
        costs = [f"{by_name[name]['cost'] * 1e6:.2f}" for by_name in figures["echoes"].values()]
        rows.append([name, *costs, *(f"{growth[size]:.2f}" for size in grown)])
    yield table(head, rows)

    head = ["pings, 2 clients", "MB/s", "ratio", "smaller ÷ larger share", "kernel kB if never read"]
    rows = []
    for name, got in figures["pings"].items():
        unread = figures["unread"].get(name)
        row = [name, f"{got['rate'] / 1e6:,.1f}", f"{got['ours/rate']:,.2f}", f"{got['share']:.2f}"]
        rows.append([*row, f"{unread / 1e3:,.0f}" if unread else ""])
    yield table(head, rows)

    rows = [["start, until it listens", f"{figures['start']['listening'] * 1e3:.0f} ms"]]
    rows += [["divided by that of `python3 -c pass`", f"{figures['start']['ratio']:.2f}"]]
    if "client" in figures:
        rows += [["client.py reads pings", f"{figures['client']['pings'] / 1e6:,.0f} MB/s"]]
        rows += [["client.py --raw moves a file", f"{figures['client']['file'] / 1e6:,.0f} MB/s"]]
    yield table(["also", ""], rows)
    idle = [
        f"{what}, {name} ({got['busy']:.0%})"
        for what, part in (("echo", figures["echoes"][str(USUAL)]), ("pings", figures["pings"]))
        for name, got in part.items()
        if got.get("busy", 1) < 0.9
    ]
    if idle:
        yield (
            "They can do more: they used only a part of their core, as the load was too slow or others were\n"
            f"running. {'; '.join(idle)}.\n"
        )
    if bench.missing:
        yield f"Not measured: {'; '.join(bench.missing)}.\n"


def main() -> int:
    """Measure, and report; the exit status."""
    parser = argparse.ArgumentParser(description="Measure the server beside others.")
    add = parser.add_argument
    add("--quick", action="store_true", help="a fraction of a second for each, to see that all still works")
    add("--peers", action="store_true", help="also uvloop and trio, which pip installs on first use")
    add("--json", metavar="FILE", help="the figures for a program, too, in seconds and bytes")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that blocks end, and processes
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(options.quick, options.peers, folder)
            os.sched_setaffinity(0, {LOAD_CORE})
            bench.measure_start()
            bench.measure_client()
            bench.measure_pings()
            bench.measure_memory()
            bench.measure_echoes()
    except (Failure, subprocess.TimeoutExpired) as failure:
        progress(str(failure))
        return 1
    except KeyboardInterrupt:
        return 130
    print(*report(bench), sep="\n", end="")
    if options.json:
        with open(options.json, "w") as file:
            about = {"machine": bench.machine, "rounds": bench.rounds, "missing": bench.missing}
            json.dump({**about, **bench.figures}, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
