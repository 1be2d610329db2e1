"""Tests of the fault injection and of many connections, with samples.  The injection finds real faults."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, TEST_LIMIT, run

SKIPPED = 77  # exit status: strace is missing, or may not trace

# This echo server works as long as no call fails.  A failed read ends it with a traceback; after a failed
# send, it continues with the next data.
BAD_SERVER = """
import os, select, signal, socket, sys

reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
signal.signal(signal.SIGTERM, lambda *_: None)
listener = socket.create_server(("127.0.0.1", 0))
print("listening on %s:%d, waiting for 2 clients" % listener.getsockname(), file=sys.stderr, flush=True)
clients, served, total = {}, 0, 0
while True:
    ready = select.select([listener, reader, *clients], [], [])[0]
    if ready == [reader]:
        break
    for sock in ready:
        if sock == reader:
            continue
        if sock is listener:
            sock, address = listener.accept()
            served += 1
            clients[sock] = "client %d, %s:%d" % (served, *address)
            continue
        try:
            data = sock.recv(65536)
        except ConnectionResetError:
            data = b""
        if data:
            print("data received... (%s)\\n%s" % (clients[sock], data.decode()), flush=True)
            total += len(data)
            try:
                sock.sendall(data)
            except OSError:
                pass
        else:
            del clients[sock]
            sock.close()
print(f"stopped: {served} clients served, {total} bytes received, {total} bytes sent", file=sys.stderr)
"""


def run_tool(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a tool; skip the test if it cannot run here."""
    result = run(str(ROOT / "tests" / tool), *arguments, timeout=TEST_LIMIT)
    if result.returncode == SKIPPED:
        pytest.skip(result.stdout.strip())
    return result


def test_a_sample_of_faults_does_no_harm() -> None:
    result = run_tool("inject.py", "--sample", "30", "--seed", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(r"^inject: 30 cases, (\d+) not reached, 0 failures\n\Z", result.stdout, re.M)
    assert found, result.stdout
    assert int(found[1]) < 15


def test_a_sandbox_that_forbids_to_block_signals_ends_the_start_with_one_line() -> None:
    result = run_tool("inject.py", "--case", "echo:rt_sigprocmask:error=EPERM:when=1")
    assert result.returncode == 0, result.stdout
    assert result.stdout == "inject: 1 case, 0 not reached, 0 failures\n"


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("echo:recvfrom:error=EIO:when=1", "its log shows an exception"),
        # The third send can be for either client, because the chunks of the echo vary.
        ("echo:sendto:error=ENOBUFS:when=3", r"client \w(, after \d+ bytes: .* instead of | sent .* stuck)"),
    ],
    ids=["traceback", "gap"],
)
def test_finds_the_faults_of_a_bad_server(case: str, wrong: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad_server.py"
    bad.write_text(BAD_SERVER)
    result = run_tool("inject.py", "--server", str(bad), "--case", case)
    assert result.returncode == 1, result.stdout + result.stderr
    first, *lines, last = result.stdout.splitlines()
    assert first == case
    assert any(re.match(f"    {wrong}", line) for line in lines), result.stdout
    assert any("(INJECTED)" in line for line in lines), result.stdout
    assert last == "inject: 1 case, 0 not reached, 1 failure"


def test_accepts_a_bad_server_without_a_fault(tmp_path: Path) -> None:
    bad = tmp_path / "bad_server.py"
    bad.write_text(BAD_SERVER)
    result = run_tool("inject.py", "--server", str(bad), "--case", "echo:recvfrom:error=EIO:when=9999")
    assert result.returncode == 0
    explained, last = result.stdout.splitlines()
    assert explained.startswith("inject: 1 not reached: the server made fewer of these calls ")
    assert last == "inject: 1 case, 1 not reached, 0 failures"


def test_reports_why_it_cannot_inject(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run(str(ROOT / "tests" / "inject.py"), "--sample", "1")
    assert (result.returncode, result.stdout) == (SKIPPED, "inject: skipped: strace is not installed\n")


def test_holds_many_connections() -> None:
    result = run_tool("many.py", "--connections", "1000", "--copies", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    first, _, descriptors, *_ = result.stdout.splitlines()
    counts = "1,000 simultaneous connections over 2 copies: 2,000 echoes of 64 bytes checked, 0 wrong"
    assert first == f"many: {counts}"
    assert max(map(len, result.stdout.splitlines())) <= 100
    found = re.fullmatch(r"descriptors of the copies +(\d+) +([\d,]+) +(\d+)", descriptors)
    assert found, result.stdout
    before, peak, after = (int(number.replace(",", "")) for number in found.groups())
    assert (peak - before, after) == (1000, before)


def test_one_connection_needs_no_plural_and_no_negative_memory() -> None:
    result = run_tool("many.py", "--connections", "1", "--copies", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("many: 1 simultaneous connection over 1 copy: 2 echoes ")
    assert "-" not in result.stdout


@pytest.mark.parametrize(("copies", "who"), [("1", "the copy"), ("2", "each of 2 copies")])
def test_reports_the_limit_that_is_too_low(copies: str, who: str) -> None:
    result = run_tool("many.py", "--connections", "9000000", "--copies", copies)
    assert result.returncode == 1
    assert re.fullmatch(rf"many: failed: {who} needs .*\(ulimit -Hn\): use more copies\n", result.stdout)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("inject.py --call nosuch", "argument --call: no errno is known for nosuch"),
        ("inject.py --jobs 0", "argument --jobs: must be at least 1"),
        ("inject.py --sample 0", "argument --sample: must be at least 1"),
        ("inject.py --sample x", "argument --sample: invalid int value: 'x'"),
        ("inject.py --case nosuch:", "argument --case: 'nosuch:' is not MODE:CALL:FAULT:when=N, for example"),
        ("inject.py --case echo:write:error=EIO:when=0", "is not MODE:CALL:FAULT:when=N, for example"),
        ("inject.py --case echo:write:error=ENOSUCH:when=1", "is not MODE:CALL:FAULT:when=N, for example"),
        ("inject.py --server nosuch", "argument --server: no such file: nosuch"),
        ("many.py --server nosuch", "argument --server: no such file: nosuch"),
        ("many.py --copies 0", "argument --copies: must be at least 1"),
        ("many.py --hold nan", "argument --hold: must be a number of seconds"),
        ("soak.py --server nosuch", "argument --server: no such file: nosuch"),
        ("soak.py --seconds 0", "argument --seconds: must be a positive number of seconds"),
        ("soak.py --seconds x", "argument --seconds: invalid float value: 'x'"),
    ],
)
def test_wrong_usage_ends_with_one_line(command: str, words: str) -> None:
    result = run_tool(*command.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr.splitlines()[-1]


def test_a_program_that_is_no_server_is_reported(tmp_path: Path) -> None:
    program = tmp_path / "nothing.py"
    program.write_text("import sys; sys.exit('nothing to serve')")
    for tool, words in (
        ("inject.py", "inject: .*without a fault"),
        ("many.py", "many: failed: a copy does not listen: nothing to serve"),
        ("soak.py", "did not happen: it listens"),
    ):
        result = run_tool(tool, "--server", str(program), *(["--quick", "--seconds=1"] * (tool == "soak.py")))
        assert result.returncode == 1
        assert re.search(words, result.stdout + result.stderr)
        assert "Traceback" not in result.stderr
