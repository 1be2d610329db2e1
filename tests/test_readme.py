"""Tests of the README.  They type its examples into real terminals and compare the screens with it.

A heading or a folded experiment begins a session.  A block of `console` shows the lines of several
terminals.  A number at the left is the number of the terminal; lines without a number belong to the
same terminal.  The text after a prompt is typed; ^C, ^D, ^S and ^Q are keys.  All other lines must
appear, in this order, but numbers may differ.  Three dots stand for any number of lines.  A block of
`sh` below a line that names a terminal ("Terminal 3 ...") is pasted there; no other block of `sh` is run.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import faults
import pytest
from conftest import (
    DEADLINE,
    ROOT,
    SERVER,
    Server,
    Start,
    eventually,
    open_terminal,
    port_is_free,
    read_exactly,
    run,
)

import non_block_io_server

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMPTS = re.compile(r"(\$|>>>|\.\.\.|>) (?=.)|(?=\^[CQS])")
KEYS = {"^C": "\x03", "^D": "\x04", "^Q": "\x11", "^S": "\x13"}


class Block(NamedTuple):
    """Consecutive lines of one terminal, or a text that is pasted there."""

    terminal: str
    lines: list[str]
    pasted: bool = False


def sessions() -> Iterator[tuple[str, list[Block]]]:
    """Yield the titles of the README's sessions, with their blocks."""
    for part in re.split(r"^##+ |^.*<summary>", README, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        blocks: list[Block] = []
        for found in re.finditer(
            r"(?:^Terminal (\d)[^\n]*\n\n)?^```(sh|console)\n(.*?)^```", text, re.M | re.S
        ):
            lines = found[3].splitlines()
            if found[2] == "console":
                blocks += consoles(lines)
            elif found[1]:
                lines = [f"$ {lines[0]}", *(f"> {line}" for line in lines[1:])]
                blocks.append(Block(found[1], lines, pasted=True))
        if blocks:
            yield title.replace("</summary>", ""), blocks


def consoles(lines: list[str]) -> Iterator[Block]:
    """Yield the blocks of all terminals.  Without numbers at the left, there is only terminal 1."""
    if not re.match(r"\d  ", lines[0]):
        yield Block("1", lines)
        return
    text = "\n".join(lines)
    for part in re.split(r"^(?=\d  )", text, flags=re.M)[1:]:
        yield Block(part[0], [line[3:] for line in part.splitlines()])


def plain(text: str) -> str:
    """Return the visible text without the parts that differ from run to run.

    These are numbers with their sign, the plural that follows, addresses, and their width.
    """
    text = re.sub(r"[^\n]*\r(?!\n)", "", text.replace("\r\n", "\n"))  # overwritten
    text = re.sub(r"0x[0-9a-f]+|-?\d+(?:[.,]\d+)*", "#", text)
    text = re.sub(r"(# (?:client|seat|message|byte|ping))s\b", r"\1", text)
    return re.sub(r" +\n", "\n", re.sub(r" +", " ", text))


def end_session(leader: int) -> None:
    """Kill all processes of a session, also those in the background."""
    for process in [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]:
        with suppress(ProcessLookupError, PermissionError):  # it may have ended in the meantime
            if os.getsid(process) == leader:
                os.kill(process, signal.SIGKILL)


class Terminal:
    """A shell in its own terminal."""

    def __init__(self, folder: Path) -> None:
        self.screen = ""
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "TMPDIR": str(folder)}
        environment.update(PS1="$ ", PS2="> ", TERM="dumb", LC_ALL="C.UTF-8")
        environment.update(PYTHON_BASIC_REPL="1", PYTHONDONTWRITEBYTECODE="1")
        shell = "bash", "--norc", "--noprofile", "--noediting", "-i"
        self.process, self.descriptor = open_terminal(*shell, cwd=ROOT, env=environment)
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 250, 0, 0))
        threading.Thread(target=self.watch, daemon=True).start()
        self.expected: list[str] = []

    def watch(self) -> None:
        """Collect the output of the terminal."""
        with suppress(OSError):  # the shell has ended
            while True:
                self.screen += os.read(self.descriptor, 65536).decode(errors="replace")

    def replay(self, block: Block) -> None:
        """Type the commands and keys of a block; check all other lines."""
        found = None
        for line in block.lines:
            found = PROMPTS.match(line)
            if found:
                typed = line[found.end() :]
                self.await_screen(self.expected, found[0])
                key = KEYS.get(typed[:2])
                os.write(self.descriptor, (key or typed + "\n").encode())
                if typed in ("^S", "^Q"):  # the terminal does not echo them
                    continue
                line = line.replace("^D", "")
            self.expected.append(line)
        if block.pasted:  # HAProxy, which prints nothing
            eventually(listens, "a program listens on port 10001")
        else:  # A command that prints nothing has ended when the prompt appears.
            self.await_screen(self.expected, found[0] if found else "")

    def await_screen(self, expected: list[str], prompt: str = "") -> None:
        """Wait until the screen shows exactly these lines, and perhaps a prompt."""
        parts = [r"(?:.*\n)*?" if line == "..." else re.escape(plain(f"{line}\n")) for line in expected]
        ending = re.escape(plain(prompt)) if prompt else r"(?:(?:\$|>>>|>) )?"
        pattern = re.compile("".join(parts) + ending)

        def shows() -> bool:
            text = plain(self.screen)
            return bool(pattern.fullmatch(text) or (not prompt and pattern.fullmatch(text + "\n")))

        try:
            eventually(shows, "")
        except AssertionError:
            pytest.fail(
                f"expected:\n{chr(10).join(expected)}\n{prompt}\n\nshown:\n{self.screen}", pytrace=False
            )

    def close(self) -> None:
        """End the shell and all programs that it has started."""
        end_session(self.process.pid)
        self.process.wait()
        os.close(self.descriptor)


def listens() -> bool:
    """Return whether a program listens on port 10001.  A test connection would count as a client."""
    return f":{10001:04X} 00000000:0000 0A " in Path("/proc/net/tcp").read_text()


def missing(blocks: list[Block]) -> list[str]:
    """Return the tools that the commands need and that are missing here."""
    text = "\n".join(line for block in blocks for line in block.lines)
    commands = set(re.findall(r"^\$ (?:\w+=\S+ )?([\w/.]+) ", text, re.M)) - {"for"}
    absent = [command for command in sorted(commands) if not shutil.which(command)]
    if "strace" in commands and not absent and subprocess.call(["strace", "-o", os.devnull, "true"]):
        absent = ["the right to trace"]
    if sys.implementation.name != "cpython" and ">>> " in text:
        absent.append("CPython's interpreter")
    return absent


@pytest.mark.parametrize(("title", "blocks"), [pytest.param(*each, id=each[0]) for each in sessions()])
def test_each_session_runs_as_it_is_shown(
    title: str, blocks: list[Block], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    absent = missing(blocks)
    if absent:
        pytest.skip(f"missing: {', '.join(absent)}")
    request.getfixturevalue("port_10001")
    (tmp_path / "python3").symlink_to(sys.executable)
    terminals: dict[str, Terminal] = {}
    try:
        for block in blocks:
            if block.terminal not in terminals:
                terminals[block.terminal] = Terminal(tmp_path)
            terminals[block.terminal].replay(block)
    finally:
        for terminal in terminals.values():
            terminal.close()
        eventually(port_is_free, "the example has released port 10001")


def code(pattern: str, language: str = "python") -> str:
    """Return the text of the one block of code that contains the pattern."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)
    (found,) = [block for block in blocks if re.search(pattern, block)]
    return str(found)


def test_the_fixture_works(tmp_path: Path) -> None:
    text = code("pytest.fixture")
    (tmp_path / "test_right.py").write_text(text)
    (tmp_path / "test_wrong.py").write_text(text.replace('== b"hello"', '== b"wrong"'))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # pytest may be in .venv
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=DEADLINE)
        finally:
            end_session(process.pid)
    assert re.search(r"1 failed, 1 passed", output), output + errors
    assert re.search(r"assert b'hello' == b'wrong'", output), output


@pytest.fixture
def chat(start: Start, tmp_path: Path) -> Start:
    """Return a function that starts the chat server."""
    program = tmp_path / "chat.py"
    program.write_text(code("def chat"))

    def start_chat(*options: str) -> Server:
        environment: Any = {**os.environ, "PYTHONPATH": str(ROOT)}
        return start(*options, program=str(program), env=environment)

    return start_chat


def test_the_chat_sends_messages_to_the_others(chat: Start) -> None:
    server = chat("--connections", "4", "--wait-for", "3")
    clients = [server.seat() for _ in range(3)]
    for number, client in enumerate(clients):
        message = f"I am client {number}".encode()
        client.sendall(message)
        for other in clients:
            if other is not client:
                assert read_exactly(other, len(message)) == message
    clients[0].close()
    server.err.wait_for(r"^client 1 left: 13 bytes received, 26 bytes sent")
    clients.append(server.seat())  # a newcomer
    clients[3].sendall(b"hello")
    assert read_exactly(clients[1], 5) == read_exactly(clients[2], 5) == b"hello"
    assert server.messages(r"^hello$")
    server.stop()


@pytest.mark.parametrize("disconnects", [False, True], ids=["it reads", "it disconnects"])
def test_the_chat_waits_for_a_slow_reader(chat: Start, disconnects: bool) -> None:
    server = chat("--connections", "3", "--quiet")
    sender, slow = server.seat(), server.seat()
    quick = server.seat()
    data = os.urandom(1 << 16) * 512  # 32 MiB, more than the kernel accepts
    before = server.status("VmHWM")
    received: list[bytes] = []
    threads = [
        threading.Thread(target=sender.sendall, args=(data,), daemon=True),
        threading.Thread(target=lambda: received.append(read_exactly(quick, len(data))), daemon=True),
    ]
    for thread in threads:
        thread.start()
    server.settled()  # it does not spin
    assert threads[0].is_alive(), "everything was sent, although a client reads nothing"
    assert server.status("VmHWM") < before + (8 << 10)  # kB
    if disconnects:
        slow.close()  # with unread data: a reset
        server.err.wait_for(r"^client 2 was reset: ")
    else:
        assert read_exactly(slow, len(data)) == data
    for thread in threads:
        thread.join(DEADLINE)
    assert received == [data]
    server.stop()


def test_a_loop_starts_a_copy_for_each_core(tmp_path: Path, port_10001: int) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    cores = int(subprocess.check_output(["nproc"]))
    terminal = Terminal(tmp_path)
    try:
        os.write(terminal.descriptor, code("for core in", "sh").encode())
        eventually(lambda: terminal.screen.count("listening on") == cores, terminal.screen)
        os.write(terminal.descriptor, b"kill $(jobs -p)\n")
        assert "kill $(jobs -p)" in README
        eventually(lambda: terminal.screen.count("stopped: 0 clients") == cores, terminal.screen)
    finally:
        terminal.close()
        eventually(port_is_free, "the copies have released port 10001")


def test_it_shows_the_lectures_script() -> None:
    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]

    original = (ROOT / "tests" / "lecture.py").read_text(encoding="utf-8")
    assert len(lines(original)) == 22
    assert lines(code("conn_map")) == lines(original)


def test_its_table_of_faults_is_complete_and_its_names_exist() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", README, re.M)
    assert [name for name, _ in rows] == list(faults.FAULTS)
    answers = " ".join(answer for _, answer in rows)
    names = re.findall(r"`([\w.]+)`", answers)
    assert len(names) >= len(rows)
    for name in names:
        found: Any = non_block_io_server
        for part in name.split("."):
            found = getattr(found, part)


def test_its_names_of_the_server_exist() -> None:
    functions = re.findall(r"`((?:Loop|Client|Server|Output|MessageFormatter)\.\w+)`", README)
    assert functions
    for name in functions:
        kind, attribute = name.split(".")
        assert hasattr(getattr(non_block_io_server, kind), attribute), name
    for label in re.findall(r'\["([\w.]+): [^"]+"\]', code("Server.accept", "mermaid")):
        found: Any = non_block_io_server
        for part in label.split("."):
            found = getattr(found, part)


def test_it_lists_all_options() -> None:
    result = run(SERVER, "--help")
    helped = re.findall(r"^  (?:-\w, )?(--[\w-]+)", result.stdout, re.M)
    assert re.findall(r"^\| `(--[\w-]+)[^|]*` \|", README, re.M) == [
        name for name in helped if name != "--help"
    ]
    assert code("docker", "sh").strip() in non_block_io_server.NO_EPOLL


def test_its_links_have_targets() -> None:
    headings = re.findall(r"^##+ (.+)$", README, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert {link[1:] for link in links if link[0] == "#"} <= anchors
    contents = [
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^## (.+)$", README, re.M)
    ]
    assert [link[1:] for link in links if link[0] == "#"] == contents
    files = [link for link in links if not re.match(r"#|https://", link)]
    assert files and all((ROOT / file).is_file() for file in files)
