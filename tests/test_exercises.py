"""Tests of the solutions of the README's exercises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import faults
import pytest
from conftest import DEADLINE, Server, Start, ending, read_exactly, run

FOLDER = Path(__file__).resolve().parent / "exercises"


def fifty(server: Server, *arguments: str) -> list[str]:
    """Return the program with 50 connections, and its arguments."""
    return [str(FOLDER / "fifty.py"), str(server.port), *arguments]


def echo(start: Start, **options: Any) -> Server:
    return start("--echo", "--quiet", "--connections", "50", "--wait-for", "1", **options)


@pytest.mark.parametrize("arguments", [["2000000"], ["2000000", "naive"], ["6000000"]], ids=" ".join)
def test_fifty_connections_get_every_byte(start: Start, arguments: list[str]) -> None:
    result = run(*fifty(echo(start), *arguments), timeout=4 * DEADLINE)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"50 connections, {int(arguments[0]):,} bytes each: every byte is right\n"


def test_the_naive_program_hangs_with_more_than_the_queues_hold(start: Start) -> None:
    server = echo(start)
    command = [sys.executable, *fifty(server, "20000000", "naive")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as program:
        try:
            server.err.wait_for("^client 50 connected")
            server.settled(0.2)
            assert program.poll() is None
        finally:
            program.kill()


def test_fifty_connections_notice_a_wrong_byte_and_an_early_end(start: Start) -> None:
    for behaviour, words in (
        ("garbage", "wrong bytes after"),
        ("closes", "the connection ended after 0 bytes"),
    ):
        server = start(
            *(behaviour, "--quiet", "--connections", "50", "--wait-for", "50"),
            program=str(FOLDER.parent / "misbehave.py"),
        )
        result = run(*fifty(server, "100"))
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(words)


def test_the_store_shares_values(start: Start) -> None:
    server = start("--wait-for", "1", program=str(FOLDER / "store.py"))
    one, two = server.seat(), server.seat()
    for byte in b"set name some value\r\n":
        one.sendall(bytes([byte]))
    assert read_exactly(one, 3) == b"ok\n"
    two.sendall(b"get name\nget other\nnonsense\nquit\nget name\n")
    assert ending(two)[0] == b"some value\n?\nuse: set NAME VALUE, get NAME, quit\n"
    one.sendall(b"get name")
    one.shutdown(1)
    assert ending(one) == (b"some value\n", False), "the last line has no newline"


def test_the_store_refuses_a_long_line(start: Start) -> None:
    server = start("--wait-for", "1", program=str(FOLDER / "store.py"))
    client = server.seat()
    client.sendall(b"x" * 1001)
    assert ending(client) == (b"", True)
    server.err.wait_for(r"^client 1 was lost \(the line is too long\)")


def test_the_grown_core_has_no_fault() -> None:
    seen = faults.observe_all(faults.FAULTS, [[sys.executable, str(FOLDER / "grown.py"), "{port}"]])
    found = {name: words for name, ((fails, words),) in zip(faults.FAULTS, seen) if fails}
    assert not found
