"""The README's figures, from one run.  `python3 tests/benchmark --readme FILE` writes them.

TEXTS has a text for each place of the README between `<!-- figures: NAME -->` and `<!-- end of figures -->`,
with names in braces for tables and figures.  Change a sentence here, never in the README, and write it again.
The run that the README shows is figures.json; a test compares the two.
"""

from __future__ import annotations

import textwrap

from benchmark.report import (
    C_ECHO,
    CLIENT,
    CORE,
    FEW_IDLE,
    MANY_IDLE,
    OURS,
    PASS,
    RAW_CLIENT,
    SOCAT,
    THREADS,
    THREE_LINES,
    UNPOLLED,
    USUAL,
    Place,
    Run,
    Spread,
    table,
)

MOST = 10000  # clients
WIDTH = 119  # columns of the README
TEXTS = {
    "why": """\
{why}

The processor time and the memory of the server's process, from [the benchmark](#speed). None of the three
prints messages.""",
    "speed": """\
One run of `python3 tests/benchmark --peers` on {machine}. The server has one core, the load (in C) the
other. Every byte is checked. Figures are medians of {rounds} rounds ({echo_rounds} for echoes,
{memory_rounds} for memory), with the lowest and the highest round in parentheses. A column with `÷ theirs`
divides this server's figure by the row's, in the same round. [figures.json](tests/benchmark/figures.json)
holds all rounds.

{echo}

Most of the processor time of an echo is spent in the kernel, in three system calls. The loop in C makes
the same calls and needs {c_echo} % of the time. With 10,000 clients, an echo costs {growth} times as much
as with 100, and beside 4,000 idle clients with a timeout each it costs {timeouts} times as much as beside
10. The echo of three lines costs {three_lines} % more than the built-in one. The loop polls before it
sleeps, because sleeping and waking takes longer: a single client gets its echo after {polled} µs, and
without these polls after {unpolled} µs.

{pings}

`C, sendfile` sends the same file with the same socket options as this server. All ratios depend on the
machine. The {unread} kB of a client that never reads are mostly pages of that file, which all clients share.

The server starts in {start} ms, {start_ratio} times `python3 -c pass`. `client.py` counts pings at
{counted} MB/s, and `client.py --raw` moves 1 GB through the echo at {raw} MB/s, {raw_ratio} of `socat -b
262144`.""",
}


def fill(readme: str, run: Run) -> str:
    """Return the README's text with the figures of a run.  Raise ValueError if one of them is missing."""
    if run.missing or not run.complete:
        raise ValueError("not measured: " + ("; ".join(run.missing) or "the run ended early"))
    figures = {**prose(run), **markdown(run)}
    for name, text in TEXTS.items():
        parts = [part if part[0] == "|" else wrap(part) for part in text.format(**figures).split("\n\n")]
        begin, end = f"<!-- figures: {name} -->\n", "<!-- end of figures -->"
        before, found, rest = readme.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"README.md has no place for them: {begin.strip()} and {end}")
        readme = before + begin + "\n\n".join(parts) + "\n" + end + rest.partition(end)[2]
    return readme


def wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def prose(run: Run) -> dict[str, str]:
    """Return the figures that stand in sentences."""

    def spread(key: str, place: Place, other: Place | None = None) -> Spread:
        found = run.spread(key, place, other)
        if not found:
            raise ValueError(f"not measured: {', '.join(place)} (a quick run, or not all parts)")
        return found

    usual, alone, most = f"echo {USUAL}", "echo 1", f"echo {MOST}"
    return {
        "machine": ", ".join(filter(None, run.machine.values())),
        "rounds": str(len(run.rounds("rate", ("pings", OURS)))),
        "echo_rounds": str(len(run.rounds("rate", (usual, OURS)))),
        "memory_rounds": str(len(run.rounds("bytes", ("unread", OURS)))),
        "unread": spread("bytes", ("unread", OURS)).show(",.0f", 1e-3),
        "start": spread("time", ("start", OURS)).show(".0f", 1e3),
        "start_ratio": spread("time", ("start", OURS), ("start", PASS)).show(".2f"),
        "counted": spread("rate", ("client", CLIENT)).show(",.0f", 1e-6),
        "raw": spread("rate", ("client", RAW_CLIENT)).show(",.0f", 1e-6),
        "raw_ratio": spread("rate", ("client", RAW_CLIENT), ("client", SOCAT)).show(".2f"),
        "growth": spread("cost", (most, OURS), (usual, OURS)).show(".2f"),
        "c_echo": spread("cost", (usual, C_ECHO), (usual, OURS)).show(".0f", 100),
        "timeouts": spread("cost", ("timeouts", MANY_IDLE), ("timeouts", FEW_IDLE)).show(".2f"),
        "three_lines": f"{100 * spread('cost', (usual, THREE_LINES), (usual, OURS)).median - 100:.0f}",
        "polled": spread("median", (alone, OURS)).show(".1f", 1e6),
        "unpolled": spread("median", (alone, UNPOLLED)).show(".1f", 1e6),
    }


def markdown(run: Run) -> dict[str, str]:
    """Return the tables."""
    usual = f"echo {USUAL}"
    echo = [
        run.column(usual, "rate", "echoes/s"),
        run.column(usual, "cost", "CPU, µs/echo", 1e6, ".2f", whole=True),
        run.ratio(usual, "cost", "CPU ÷ theirs"),
        run.column("echo 1", "median", "1 client, µs", 1e6, ".1f"),
        run.column(f"memory {MOST}", "bytes", "kB/client", 1e-3, ".2f"),
    ]
    pings = [
        run.column("pings", "rate", "MB/s", 1e-6, ",.1f", whole=True),
        run.ratio("pings", "rate", "MB/s ÷ theirs"),
        run.column("unread", "bytes", "kernel kB, unread", 1e-3),
    ]
    why = []
    for part, key, title, factor in (
        ("echo", "cost", "µs/echo", 1e6),
        ("memory", "bytes", "kB/client", 1e-3),
    ):
        for size in 10, 100, 2000:
            head = f"{title}: {size} clients" if size == 10 else f"{size:,}"
            why.append(run.column(f"{part} {size}", key, head, factor, ",.1f"))
    return {
        "echo": table(f"echo, {USUAL} clients, 64 bytes", run.programs(usual), echo).strip(),
        "pings": table("pings, 2 clients", run.programs("pings"), pings).strip(),
        "why": table("", [THREADS, CORE, OURS], why).strip(),
    }
