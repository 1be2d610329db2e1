"""Tests that the lecture's script has each fault of tests/faults.py, and that this server has none."""

from __future__ import annotations

import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import pytest
from conftest import run

FAULTS = faults.__file__
HOW = {  # the failure of the lecture's script; another failure does not count
    "reset": r"ends: (ConnectionReset|BrokenPipe)Error",
    "leave": r"prints 'data received\.\.\.' [1-9]",
    "split": r"ends: UnicodeDecodeError: .* unexpected end of data",
    "bytes": r"ends: UnicodeDecodeError",
    "starve": r"bytes of pings",
    "restart": r"ends: OSError: .* Address already in use",
    "print": r"stalls",
    "escape": r"raw ESC",
    "stop": r"Ctrl-C: status -2 and a traceback; SIGTERM: status -15",
    "idle": r"wakes [1-9]",
    "third": r"gets nothing",
}


@pytest.fixture(scope="module")
def observations() -> dict[tuple[str, str], faults.Seen]:
    """Return the observations of each fault on each server; some run at the same time: they mostly wait."""
    # All end before pytest changes the environment, between two tests: a thread that starts a
    # program at that time fails (EFAULT).
    cases = [(name, server) for name in faults.FAULTS for server in faults.SERVERS]
    with ThreadPoolExecutor(12) as pool:
        return dict(zip(cases, pool.map(lambda case: faults.observe(*case), cases)))


@pytest.mark.parametrize("name", faults.FAULTS)
def test_the_lecture_has_the_fault_and_this_server_does_not(
    name: str, observations: dict[tuple[str, str], faults.Seen]
) -> None:
    lecture_fails, lecture_words = observations[name, faults.LECTURE]
    we_fail, our_words = observations[name, faults.OURS]
    assert lecture_fails, lecture_words
    assert re.search(HOW[name], lecture_words), lecture_words
    assert not we_fail, our_words


def test_lists_the_faults_and_shows_the_named_one() -> None:
    listed = run(FAULTS).stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(faults.FAULTS)
    assert listed[0] == "reset     a client sends a message, never reads, and leaves"
    assert run(FAULTS, "escape").stdout == (
        "a message holds an ESC sequence\n"
        "  the lecture's script   prints the raw ESC byte: the terminal obeys\n"
        "  this server            prints \\x1b[31mred\n"
    )
    unknown = run(FAULTS, "nonsense")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("usage: faults.py ")


def test_judges_another_server() -> None:
    lecture = str(Path(faults.__file__).with_name("lecture.py"))
    script = f"exec(open({lecture!r}).read().replace('10001', '{{port}}'))"
    judged = run(FAULTS, "bytes", "--server", shlex.join(faults.SERVERS[faults.OURS]))
    assert (judged.returncode, judged.stderr) == (0, "")
    assert judged.stdout.splitlines()[1] == "  has not                continues: the other client gets pings"
    judged = run(FAULTS, "bytes", "--server", shlex.join([sys.executable, "-c", script]))
    assert (judged.returncode, judged.stderr) == (1, "")
    assert judged.stdout.splitlines()[1].startswith("  has this fault         ends: UnicodeDecodeError: ")


def test_a_server_that_sends_no_pings_cannot_be_judged() -> None:
    silent = "import time, socket; sock = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    judged = run(FAULTS, "reset", "--server", shlex.join([sys.executable, "-c", silent]), timeout=60)
    assert judged.stdout.splitlines()[1] == "  has this fault         cannot be judged: timed out"
    judged = run(FAULTS, "leave", "--server", shlex.join([sys.executable, "-c", "1 / 0"]))
    assert judged.stdout.splitlines()[1].endswith("it ends: ZeroDivisionError: division by zero")
