"""The figures of a run of the benchmark: their file, and the tables that show them."""

from __future__ import annotations

import contextlib
import json
import re
from statistics import median
from typing import IO, Callable, Iterator, List, NamedTuple, Optional, Tuple

OURS, PRINTING, UNPOLLED = "this server", "this server, messages to a file", "this server, no busy polls"
THREE_LINES, CORE, THREADS = "this server, echo of 3 lines", "the core", "a thread for each client"
C_ECHO, C_SENDFILE, C_PINGS = "C, epoll", "C, sendfile", "C, 256 KiB a send"
FEW_IDLE, MANY_IDLE = "10 idle clients", "4,000 idle clients"
CLIENT, RAW_CLIENT, SOCAT, PASS = "client.py", "client.py --raw", "socat -b 262144", "python3 -c pass"
USUAL = 100  # clients, unless a table says otherwise

Rounds = List[Optional[float]]  # a figure of each round, None if the round has none
Place = Tuple[str, str]  # a part of the benchmark, and a program


class Spread(NamedTuple):
    """A figure over the rounds."""

    median: float
    lowest: float
    highest: float

    def show(self, form: str, factor: float = 1, whole: bool = False) -> str:
        """Return the median, or the whole spread: `5.1 (4.9-5.2)`."""
        text, lowest, highest = (format(value * factor, form) for value in self)
        return f"{text} ({lowest}-{highest})" if whole and self.lowest != self.highest else text


class Column(NamedTuple):
    """A column of a table: its title, the figure of each program, and how to show it."""

    title: str
    spread: Callable[[str], Spread | None]
    form: str = ",.0f"
    factor: float = 1
    whole: bool = False


class Run:
    """The figures of one run, in seconds and bytes."""

    def __init__(self) -> None:
        """Begin without figures."""
        self.complete = False  # whether everything was measured
        self.machine: dict[str, str] = {}
        self.missing: list[str] = []  # what cannot be measured here, and why
        self.parts: dict[str, dict[str, dict[str, Rounds]]] = {}  # by part, program and key

    @staticmethod
    def load(path: str) -> Run:
        """Return the run that a file holds.  Raise OSError or ValueError."""
        run = Run()
        with open(path, encoding="utf-8") as file, contextlib.suppress(json.JSONDecodeError):
            found = json.load(file)
            if isinstance(found, dict) and found.keys() == vars(run).keys():
                vars(run).update(found)
                return run
        raise ValueError("it holds no run of the benchmark")

    def save(self, file: IO[str]) -> None:
        """Write the run as JSON, the rounds of a figure on one line."""
        text = json.dumps(vars(self), indent=1)
        file.write(re.sub(r"\[[^]{[]*\]", lambda found: " ".join(found[0].split()), text) + "\n")

    def add(self, part: str, program: str, turn: int, figures: dict[str, float]) -> None:
        """Add the figures of a round, the first of which is 0, to 6 digits."""
        keys = self.parts.setdefault(part, {}).setdefault(program, {})
        for key, value in figures.items():
            rounds = keys.setdefault(key, [])
            rounds += [None] * (turn - len(rounds))
            rounds.append(float(f"{value:.6g}"))

    def programs(self, part: str) -> list[str]:
        """Return the programs that have figures in this part."""
        return list(self.parts.get(part, ()))

    def rounds(self, key: str, place: Place) -> Rounds:
        """Return a figure of each round; none if it was not measured."""
        part, program = place
        return self.parts.get(part, {}).get(program, {}).get(key, [])

    def spread(self, key: str, place: Place, other: Place | None = None) -> Spread | None:
        """Return a figure, divided by that of the other place in the same round, if one is given."""
        values = [value for value in self.rounds(key, place) if value is not None]
        if other:
            pairs = zip(self.rounds(key, place), self.rounds(key, other))
            values = [one / divisor for one, divisor in pairs if one is not None and divisor]
        return Spread(median(values), min(values), max(values)) if values else None

    def column(
        self, part: str, key: str, title: str, factor: float = 1, form: str = ",.0f", whole: bool = False
    ) -> Column:
        """Return a column of figures."""
        return Column(title, lambda program: self.spread(key, (part, program)), form, factor, whole)

    def ratio(self, part: str, key: str, title: str, ours: str = OURS, whole: bool = True) -> Column:
        """Return a column that divides our figure by the program's."""

        def spread(program: str) -> Spread | None:
            return self.spread(key, (part, ours), (part, program))

        return Column(title, spread, ",.2f", whole=whole)

    def growth(self, size: int) -> Column:
        """Return a column that divides the cost of an echo with so many clients by the usual cost."""

        def spread(program: str) -> Spread | None:
            return self.spread("cost", (f"echo {size}", program), (f"echo {USUAL}", program))

        return Column(f"{size:,} ÷ {USUAL}", spread, ",.2f", whole=True)


def table(title: str, programs: list[str], columns: list[Column]) -> str:
    """Return a Markdown table with aligned columns, without the programs and columns that have no figures."""
    rows = []
    for program in programs:
        cells = []
        for column in columns:
            spread = column.spread(program)
            cells.append(spread.show(column.form, column.factor, column.whole) if spread else "")
        if any(cells):
            rows.append([program, *cells])
    if not rows:
        return ""
    head = [title, *(column.title for column in columns)]
    kept = [number for number, cells in enumerate(zip(*rows)) if any(cells)]
    head, *rows = ([row[number] for number in kept] for row in (head, *rows))
    widths = [max(map(len, cells)) for cells in zip(head, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (head, rule, *rows))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def tables(run: Run) -> Iterator[str]:
    """Yield the tables of a run, at most 100 columns wide.  A table without figures is empty."""
    usual, alone = f"echo {USUAL}", "echo 1"
    servers = list(dict.fromkeys([*run.programs(usual), *run.programs(alone)]))
    sizes = [int(part.split()[1]) for part in run.parts if part.startswith("echo ")]
    echo = [
        run.column(usual, "rate", "echoes/s", whole=True),
        run.column(usual, "cost", "CPU µs/echo", 1e6, ".2f", whole=True),
        run.ratio(usual, "cost", "CPU ÷ theirs"),
    ]
    yield table(f"echo, {USUAL} clients", servers, echo)
    latency = [
        run.column(usual, "median", "median µs", 1e6),
        run.column(usual, "p99", "99 % µs", 1e6),
        run.column(alone, "median", "1 client: median µs", 1e6, ".1f", whole=True),
        run.ratio(alone, "median", "÷ theirs"),
    ]
    yield table("latency", servers, latency)
    costs = [run.column(f"echo {size}", "cost", f"{size:,}", 1e6, ".2f") for size in sizes]
    if sizes and sizes[-1] > USUAL:
        costs.append(run.growth(sizes[-1]))
    yield table("CPU µs/echo, by clients", servers, costs)
    idle = [run.column("timeouts", "cost", "CPU µs/echo", 1e6, ".2f", whole=True)]
    yield table("10 clients, beside others with a timeout each", run.programs("timeouts"), idle)
    pings = [
        run.column("pings", "rate", "MB/s", 1e-6, ",.1f", whole=True),
        run.ratio("pings", "rate", "MB/s ÷ theirs"),
        run.column("pings", "share", "less ÷ more", 1, ".2f"),
    ]
    yield table("pings, 2 clients", run.programs("pings"), pings)
    unread = [run.column("unread", "bytes", "kB", 1e-3, whole=True)]
    yield table("the kernel's memory for a client that never reads", run.programs("unread"), unread)
    parts = [part for part in run.parts if part.startswith("memory ")]
    memory = [
        run.column(part, "bytes", f"{int(part.split()[1]):,}", 1e-3, ".2f", whole=part == parts[-1])
        for part in parts
    ]
    yield table("the server's kB for each client", run.programs(parts[0]) if parts else [], memory)
    file = [
        run.column("client", "rate", "MB/s", 1e-6, whole=True),
        run.ratio("client", "rate", "MB/s ÷ theirs", RAW_CLIENT),
    ]
    yield table("a file through the echo", [RAW_CLIENT, SOCAT], file)
    yield table("reading and counting pings", [CLIENT], file[:1])
    start = [
        run.column("start", "time", "ms", 1e3, ".1f", whole=True),
        run.ratio("start", "time", "÷ theirs"),
    ]
    yield table("start, until it listens", run.programs("start"), start)
