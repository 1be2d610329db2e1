"""Tests of the soak and the benchmark, in short runs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEADLINE, ROOT, TEST_LIMIT, at_once, run

Result = subprocess.CompletedProcess


def run_tool(*command: str) -> Result[str]:
    return run(*command, cwd=ROOT, timeout=TEST_LIMIT)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of the file that the benchmark writes."""
    return tmp_path_factory.mktemp("benchmark") / "figures"


@pytest.fixture(scope="module")
def results(figures: Path) -> list[Result[str]]:
    """Run the soak and the benchmark at the same time, because the soak mostly waits."""
    soak = "tests/soak.py", "--quick", "--seconds", "1", "--seed", "1"
    benchmark = "tests/benchmark", "--quick", "--json", str(figures)
    return at_once(lambda command: run_tool(*command), [soak, benchmark])


def test_a_short_soak_finds_no_loss(results: list[Result[str]]) -> None:
    """Even a short soak can fail: each of its modes serves 20 random clients and has every turn."""
    result = results[0]
    assert result.returncode == 0, result.stderr[-3000:]
    line = result.stdout.splitlines()[-1]
    found = re.match(
        r"soak: ([\d,]+) connections served, ([\d,]+) bytes checked, ([\d,]+) faults injected, 0 losses", line
    )
    assert found, line
    assert all(int(figure.replace(",", "")) > 10 for figure in found.groups())


def test_a_quick_benchmark_measures_every_part(results: list[Result[str]], figures: Path) -> None:
    result = results[1]
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.match(r"this takes about \d+ s;", result.stderr)
    assert max(map(len, result.stdout.splitlines())) <= 100
    measured = json.loads(figures.read_text())
    assert measured["complete"]
    assert {"start", "client pings", "client file", "pings", "echo 1", "echo 100"} <= measured.keys()


def test_one_part_runs_alone() -> None:
    result = run_tool("tests/benchmark", "start", "--quick")
    tables = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip(" -") for line in tables] == [
        "start, until it listens",
        "",
        "this server",
        "python3 -c pass",
    ]
    unknown = run_tool("tests/benchmark", "echoes")
    assert unknown.returncode == 2
    assert "no part is named 'echoes' (choose from start, client, pings, memory, echo)" in unknown.stderr


def test_an_interrupted_benchmark_shows_its_figures() -> None:
    command = [sys.executable, "tests/benchmark", "pings"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def interrupt(number: int) -> None:
        with subprocess.Popen(command, cwd=ROOT, encoding="utf-8", **pipes) as process:  # type: ignore[call-overload]
            first = next(line for line in process.stderr if line.startswith("pings, round 1 of 9, "))
            process.send_signal(number)
            shown, errors = process.communicate(timeout=DEADLINE)
        assert (process.returncode, "Traceback" in errors) == (130, False)
        assert "The benchmark ended early" in shown
        assert re.search(r"^\| this server +\| +[\d,.]+ \| +1\.00 ", shown, re.MULTILINE), first + shown

    at_once(interrupt, [signal.SIGINT, signal.SIGTERM])
