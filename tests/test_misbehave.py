"""Tests of the peer that misbehaves: what a client sees of each behaviour."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Callable

import pytest
from conftest import Start, ending, read_exactly, run

MISBEHAVE = str(Path(__file__).with_name("misbehave.py"))
Peer = Callable[..., socket.socket]


@pytest.fixture
def peer(start: Start) -> Callable[[str], socket.socket]:
    """Return a function that connects to a new server with this behaviour, and sends `hello, peer`."""

    def connect(behaviour: str) -> socket.socket:
        environment = {**os.environ, "MISBEHAVE": behaviour}
        client = start("--wait-for", "1", program=MISBEHAVE, env=environment).connect()
        client.sendall(b"hello, peer")
        return client

    return connect


@pytest.mark.parametrize(
    ("behaviour", "trace"),
    [
        ("late", r"received 11\n.* waits for a wake\n.* woken\n.* sent 11$"),
        ("slow", r"received 11\n.* sent 1\n.* waits for a wake\n(.* woken\n.* sent 1\n){10}"),
    ],
)
def test_late_and_slow(start: Start, behaviour: str, trace: str) -> None:
    server = start(behaviour, "--wait-for", "1", "--quiet", "--trace", program=MISBEHAVE)
    client = server.connect()
    client.sendall(b"hello, peer")
    assert read_exactly(client, 11) == b"hello, peer"
    assert re.search(trace, server.stop(), re.M)


def test_silent(peer: Peer) -> None:
    client = peer("silent")
    client.shutdown(socket.SHUT_WR)
    assert ending(client) == (b"", False)


def test_closes(start: Start) -> None:
    client = start("--wait-for", "1", program=MISBEHAVE, env={**os.environ, "MISBEHAVE": "closes"}).connect()
    assert ending(client) == (b"", False)


def test_cuts(peer: Peer) -> None:
    assert ending(peer("cuts")) == (b"hello", False)


def test_resets(peer: Peer) -> None:
    assert ending(peer("resets")) == (b"hello", True)


def test_halves(start: Start) -> None:
    server = start("--wait-for", "1", program=MISBEHAVE, env={**os.environ, "MISBEHAVE": "halves"})
    client = server.seat()
    assert client.recv(1) == b""
    client.sendall(b"the server still reads this")
    server.messages("^the server still reads this$")


def test_garbage(peer: Peer) -> None:
    answer = read_exactly(peer("garbage"), 11)
    assert len(answer) == 11
    assert answer != b"hello, peer"


def test_the_name_can_be_an_argument(start: Start) -> None:
    server = start("cuts", "--wait-for", "1", program=MISBEHAVE)
    client = server.connect()
    client.sendall(b"hello, peer")
    assert ending(client) == (b"hello", False)


def test_a_wrong_name_is_wrong_usage() -> None:
    for arguments in [], ["nosuch"]:
        environment = {name: value for name, value in os.environ.items() if name != "MISBEHAVE"}
        result = run(MISBEHAVE, *arguments, env=environment)
        assert (result.returncode, result.stdout) == (2, "")
        assert re.match(r"usage: misbehave\.py \{late,slow,", result.stderr)
