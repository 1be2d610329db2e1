"""Tests of the benchmark, in short runs, and of the README's figures."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark import readme
from benchmark.processes import LECTURE
from benchmark.report import (
    C_ECHO,
    CLIENT,
    CORE,
    FEW_IDLE,
    MANY_IDLE,
    OURS,
    PASS,
    PRINTING,
    RAW_CLIENT,
    SOCAT,
    THREADS,
    THREE_LINES,
    UNPOLLED,
    Run,
    Spread,
    table,
    tables,
)
from conftest import ROOT, at_once, run

FIGURES = ROOT / "tests" / "benchmark" / "figures.json"  # those that the README shows
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = [OURS, UNPOLLED, THREE_LINES, CORE, THREADS, C_ECHO, PRINTING]
PLACES = "a\n<!-- figures: why -->\nold\n<!-- end of figures -->\nb\n"
PLACES += "<!-- figures: speed -->\n<!-- end of figures -->\nc\n"


def benchmark(*words: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    command = ["env", f"PYTHONIOENCODING={encoding}", sys.executable, "tests/benchmark", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding=encoding, timeout=120)


def test_a_quick_benchmark_measures_every_part(tmp_path: Path) -> None:
    file = tmp_path / "figures"
    file.write_text("an old file\n" * 10000)
    result = benchmark("--quick", "--json", str(file))
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"^this takes about \d+ s;", result.stderr, re.MULTILINE)
    assert max(map(len, result.stdout.splitlines())) <= 100

    run = Run.load(str(file))
    assert run.complete
    assert {"start", "client", "pings", "echo 1", "echo 100"} <= run.parts.keys()
    assert {OURS, UNPOLLED, THREADS} <= run.parts["echo 1"].keys()
    if "def ready(" in README:
        assert {CORE, THREE_LINES} <= run.parts["echo 1"].keys(), run.missing
    rounds = [len(run.rounds("time", ("start", program))) for program in (OURS, PASS)]
    assert rounds == [2, 2]

    refused = benchmark("--readme", str(file))  # it has too few clients
    assert refused.returncode == 1
    assert re.match(r"benchmark: cannot write the figures of .+: not measured: .+\n\Z", refused.stderr)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == README


def test_one_part_runs_alone_in_any_locale_and_each_program_is_once_the_first() -> None:
    result = benchmark("start", "--quick", encoding="ascii")
    assert result.returncode == 0, result.stderr
    tables = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    rows = [[cell.strip(" -:") for cell in line.split("|")[1:-1]] for line in tables]
    assert rows[0] == ["start, until it listens", "ms", "? theirs"]
    assert [row[0] for row in rows[1:]] == ["", OURS, PASS]
    assert re.fullmatch(
        r"[\d.]+ \([\d.]+-[\d.]+\)", rows[3][2]
    )  # the median, the lowest and the highest round
    order = [OURS, PASS, PASS, OURS]
    assert re.findall(r"^start, round \d of 2, (.+): ", result.stderr, re.MULTILINE) == order


def test_wrong_usage_is_one_line_and_loses_no_figures(tmp_path: Path) -> None:
    unknown = benchmark("echoes")
    assert unknown.returncode == 2
    assert "no part is named 'echoes' (choose from start, client, pings, memory, echo)" in unknown.stderr
    place = str(tmp_path / "no folder" / "figures")
    result = benchmark("--quick", "--json", place)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"benchmark: cannot write {place}: No such file or directory\n"
    full = benchmark("start", "--quick", "--json", "/dev/full")
    assert full.returncode == 1
    assert full.stderr.endswith("\nbenchmark: cannot write /dev/full: No space left on device\n")
    assert "python3 -c pass" in full.stdout
    for path, reason in (
        (place, "No such file or directory"),
        (__file__, "it holds no run of the benchmark"),
    ):
        result = benchmark("--readme", path)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"benchmark: cannot write the figures of {path}: {reason}\n"


def test_an_interrupted_benchmark_shows_its_figures(tmp_path: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def interrupt(number: int) -> None:
        file = tmp_path / str(number)
        file.write_text("an old file")
        command = [sys.executable, "tests/benchmark", "pings", "--json", str(file)]
        with subprocess.Popen(command, cwd=ROOT, encoding="utf-8", **pipes) as process:  # type: ignore[call-overload]
            first = next(line for line in process.stderr if line.startswith("pings, round 1 of "))
            assert file.read_text() == "an old file"
            process.send_signal(number)
            shown, errors = process.communicate(timeout=120)
        assert (process.returncode, "Traceback" in errors) == (130, False)
        assert "The benchmark ended early" in shown
        assert re.search(r"^\| this server +\| +[\d,.]+ \| +1\.00 ", shown, re.MULTILINE), first + shown
        run = Run.load(str(file))
        assert (run.complete, bool(run.rounds("rate", ("pings", OURS)))) == (False, True)

    at_once(interrupt, [signal.SIGINT, signal.SIGTERM])


@pytest.mark.parametrize("started", ["core", "non_block_io_server.py"])  # before the first round, and in it
def test_a_signal_while_a_server_starts_leaves_no_process(started: str) -> None:
    program = f"""
import os, runpy, signal, subprocess, sys
pids = []
class Popen(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__(command, **options)
        if any(word.endswith({started!r}) for word in command):
            pids.append(self.pid)
            os.kill(os.getpid(), signal.SIGTERM)  # before the caller knows the process
subprocess.Popen = Popen
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # until the benchmark catches it
sys.argv[1:] = ["--quick", "start"]
try:
    runpy.run_path("tests/benchmark", run_name="__main__")
finally:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            print("left:", pid)
        except ProcessLookupError:
            print("ended")
"""
    result = run("-c", program, cwd=ROOT, timeout=120, env={**os.environ, "PATH": ""})  # without a compiler
    assert (result.returncode, result.stdout.splitlines()[-1:]) == (130, ["ended"]), result.stderr
    assert "Traceback" not in result.stderr


def test_a_ratio_uses_the_figures_of_one_round() -> None:
    run = Run()
    for turn, (ours, theirs) in enumerate([(1, 2), (20, 10), (3, None), (400, 1000), (0, 4)]):
        run.add("echo", OURS, turn, {"rate": ours})
        if theirs:
            run.add("echo", "C", turn, {"rate": theirs})
    assert run.rounds("rate", ("echo", "C")) == [2, 10, None, 1000, 4]
    assert run.spread("rate", ("echo", OURS)) == Spread(3, 0, 400)
    assert run.spread("rate", ("echo", OURS), ("echo", "C")) == Spread(0.45, 0, 2)
    assert run.spread("rate", ("echo", OURS), ("echo", "trio")) is None
    columns = [run.column("echo", "rate", "echoes", whole=True), run.ratio("echo", "rate", "÷")]
    assert table("title", ["C", "trio"], [*columns, run.column("none", "rate", "no figures")]) == (
        "| title |      echoes |                ÷ |\n"
        "| ----- | ----------: | ---------------: |\n"
        "| C     | 7 (2-1,000) | 0.45 (0.00-2.00) |\n"
    )


def full_run() -> Run:
    """Return a run that has all figures of the README, in two rounds."""
    run = Run()
    run.complete = True
    run.machine = {"system": "Linux 6.18", "iperf3": ""}
    for turn in range(2):
        for size in 1, 10, 100, 2000, 10000:
            for factor, program in enumerate(PROGRAMS, 4):
                cost = factor * (1 + turn) * 1e-6
                echo = {"rate": 1 / cost, "cost": cost, "median": cost * 10, "p99": cost * 90, "busy": 1.0}
                run.add(f"echo {size}", program, turn, echo)
                run.add(f"memory {size}", program, turn, {"bytes": factor * 1000.0})
        for program in CLIENT, RAW_CLIENT, SOCAT:
            run.add("client", program, turn, {"rate": 1e9})
        for program in OURS, PASS:
            run.add("start", program, turn, {"time": 0.05 if program == OURS else 0.04})
        run.add("pings", OURS, turn, {"rate": 9.4e9 / (1 + turn / 5), "share": 1.0})
        run.add("pings", LECTURE, turn, {"rate": 1.4e6, "share": 1.0})
        for program, cost in ((FEW_IDLE, 8e-6), (MANY_IDLE, 9e-6)):
            run.add("timeouts", program, turn, {"cost": cost})
        run.add("unread", OURS, turn, {"bytes": 170000.0})
    return run


def test_the_readme_gets_the_figures_of_a_run(tmp_path: Path) -> None:
    with open(tmp_path / "figures", "w") as file:
        full_run().save(file)
    text = readme.fill(PLACES, Run.load(str(tmp_path / "figures")))
    assert re.match(r"a\n<!-- figures: why -->\n\| .*\.\n<!-- end of figures -->\nb\n", text, re.DOTALL)
    assert text.endswith("\n<!-- end of figures -->\nc\n")
    assert readme.fill(text, full_run()) == text
    assert max(map(len, text.splitlines())) <= readme.WIDTH
    assert max(len(line) for table in tables(full_run()) for line in table.splitlines()) <= 100
    words = " ".join(text.split())
    for sentence in (
        "on Linux 6.18. The server",
        "medians of 2 rounds (2 for echoes, 2 for memory)",
        "needs 225 % of the time. With 10,000 clients, an echo costs 1.00 times as much"
        " as with 100, and beside 4,000 idle clients with a timeout each it costs 1.12 times as much as",
        "The echo of three lines costs 50 % more",
        "its echo after 60.0 µs, and without these polls after 75.0 µs.",
        "starts in 50 ms, 1.25 times `python3 -c pass`. `client.py` counts pings at 1,000 MB/s",
        "| this server | 187,500 | 6.00 (4.00-8.00) | 1.00 | 60.0 | 4.00 |",
        "| a thread for each client | 12.0 | 12.0 | 12.0 | 8.0 | 8.0 | 8.0 |",
    ):
        assert sentence in words


@pytest.mark.parametrize("lacks", ["echo 10000", "start", "complete", "iperf3", "a place"])
def test_the_readme_needs_all_figures(lacks: str) -> None:
    run, places = full_run(), PLACES
    if lacks == "complete":
        run.complete = False
    elif lacks == "iperf3":
        run.missing = ["iperf3: it is not installed"]
    elif lacks == "a place":
        places = PLACES.replace("speed", "fast")
    else:
        del run.parts[lacks]
    with pytest.raises(ValueError, match="speed" if lacks == "a place" else "not measured: "):
        readme.fill(places, run)


def test_the_readmes_figures_are_those_of_its_run() -> None:
    if not FIGURES.exists():
        pytest.skip("figures.json is missing")
    assert readme.fill(README, Run.load(str(FIGURES))) == README
