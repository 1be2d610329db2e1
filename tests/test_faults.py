"""Tests that the lecture's script has each fault of tests/faults.py, and that this server has none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import faults
import pytest
from conftest import TEST_LIMIT, at_once, run

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
    """Return the observations of each fault."""
    # All end before pytest changes the environment, between two tests: a thread that starts a
    # program at that time fails (EFAULT).
    return dict(zip(faults.FAULTS, faults.observe_all(faults.FAULTS, faults.SERVERS.values())))


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


# A server without any of the faults, as a student may write it.  It sends 4 bytes at a time.
STUDENT = r"""
import codecs, os, select, signal, socket, sys

for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, lambda *_: sys.exit(0))
os.set_blocking(1, False)
listener = socket.create_server(("", int(sys.argv[1])))
poll, clients = select.epoll(), {}
poll.register(listener, select.EPOLLIN)
while True:
    for descriptor, events in poll.poll():
        if descriptor == listener.fileno():
            sock, _ = listener.accept()
            sock.setblocking(False)
            clients[sock.fileno()] = sock, codecs.getincrementaldecoder("utf-8")("replace")
            poll.register(sock, select.EPOLLIN | select.EPOLLOUT)
            continue
        sock, decoder = clients[descriptor]
        try:
            if events & select.EPOLLIN:
                data = sock.recv(1024)
                if not data:
                    raise EOFError
                os.write(1, decoder.decode(data).replace("\x1b", "\\x1b").encode())
            if events & select.EPOLLOUT:
                sock.send(b"ping")
        except BlockingIOError:
            pass
        except (OSError, EOFError):
            poll.unregister(descriptor)
            clients.pop(descriptor)[0].close()
"""


def test_judges_any_server(tmp_path: Path) -> None:
    """It finds no fault in a slow one, and the faults in one that has some."""
    (tmp_path / "student.py").write_text(STUDENT)
    (tmp_path / "worse.py").write_text(
        STUDENT.replace("(OSError, EOFError)", "EOFError").replace(r'.replace("\x1b", "\\x1b")', "")
    )

    def judge(case: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        name, program = case
        server = f"{sys.executable} {tmp_path}/{program}.py {{port}}"
        return run(FAULTS, name, "--server", server, timeout=TEST_LIMIT)

    right, crashing, raw = at_once(judge, [("all", "student"), ("reset", "worse"), ("escape", "worse")])
    assert (right.returncode, right.stdout.splitlines()[-1]) == (0, "faults: 0 of 11"), right.stdout
    assert (crashing.returncode, raw.returncode) == (1, 1)
    assert re.search("^  your server +FAULT  crashes: ConnectionResetError", crashing.stdout, re.M)
    assert re.search("^  your server +FAULT  prints the raw ESC byte", raw.stdout, re.M)


@pytest.mark.parametrize(
    ("server", "status", "words"),
    [
        ("nowhere/nosuch", 2, "argument --server: no such program: 'nowhere/nosuch'"),
        ("'", 2, "argument --server: No closing quotation"),
        ("", 2, "argument --server: no such program: ''"),
        ("true", 1, "FAULT  does not serve: it does not listen: status 0"),
        ("sh -c 'echo no >&2; exit 3'", 1, "FAULT  does not serve: it does not listen: no"),
    ],
)
def test_reports_a_server_that_cannot_be_checked(server: str, status: int, words: str) -> None:
    result = run(FAULTS, "third", "--server", server)
    assert result.returncode == status
    assert words in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
