"""Tests that the lecture's script has each fault of tests/faults.py, and that this server has none."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import faults
import pytest
from conftest import run

FAULTS = faults.__file__
HOW = {  # the failure of the lecture's script; another failure does not count
    "reset": r"crashes: (ConnectionReset|BrokenPipe)Error",
    "leave": r"prints 'data received\.\.\.' [1-9]",
    "split": r"crashes: UnicodeDecodeError: .* unexpected end of data",
    "bytes": r"crashes: UnicodeDecodeError",
    "starve": r"bytes of pings",
    "restart": r"crashes: OSError: .* Address already in use",
    "print": r"stalls",
    "escape": r"raw ESC",
    "stop": r"Ctrl-C: status -2 and a traceback; SIGTERM: status -15",
    "idle": r"wakes [1-9]",
    "third": r"gets nothing",
}


@pytest.fixture(scope="module")
def observations() -> dict[str, list[faults.Seen]]:
    """Return the observations of each fault; some run at the same time, because they mostly wait."""
    # All end before pytest changes the environment, between two tests: a thread that starts a
    # program at that time fails (EFAULT).
    with ThreadPoolExecutor(6) as pool:
        return dict(zip(faults.FAULTS, pool.map(faults.observe, faults.FAULTS)))


@pytest.mark.parametrize("name", faults.FAULTS)
def test_the_lecture_has_the_fault_and_this_server_does_not(
    name: str, observations: dict[str, list[faults.Seen]]
) -> None:
    (lecture_fails, lecture_words), (we_fail, our_words) = observations[name]
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
