"""Tests of the README.  They type its examples into real terminals and compare the screens with it.

A heading or a folded experiment begins a session.  A block of `console` shows the lines of several
terminals.  A number at the left is the number of the terminal; lines without a number belong to the
same terminal.  The text after a prompt is typed; ^C, ^D, ^S and ^Q are keys.  All other lines must
appear, in this order, but numbers may differ.  Three dots stand for any number of lines.  A block of
`sh` below a line that names a terminal ("Terminal 3 ...") is pasted there; no other block of `sh` is run.
Three dots below a function that was typed into Python's interpreter are its prompt; an empty line is typed.
A block of `python` that the text wants to be saved is a file in the folder of the terminals.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import faults
import pytest
from conftest import (
    DEADLINE,
    IS_PYPY,
    ROOT,
    SERVER,
    Server,
    Start,
    ending,
    eventually,
    open_terminal,
    port_is_free,
    read_exactly,
    reset,
    run,
)

import non_block_io_server

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMPTS = re.compile(r"(\$|>>>|\.\.\.|>) (?=.)|(?=\^[CQS])")
DEFINITION = re.compile(r">>> (async )?def ")
SAVED = dict(re.findall(r"[Ss]ave [\w ]+ as `(\w+\.py)`.*?^```python\n(.*?)^```", README, re.M | re.S))
KEYS = {"^C": "\x03", "^D": "\x04", "^Q": "\x11", "^S": "\x13"}


def code(pattern: str, language: str = "python") -> str:
    """Return the text of the one block of code that contains the pattern."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)
    (found,) = [block for block in blocks if re.search(pattern, block)]
    return str(found)


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
    """Yield the blocks of all terminals.  Without numbers at the left, it is a terminal without a number."""
    if not re.match(r"\d  ", lines[0]):
        yield Block("", lines)
        return
    text = "\n".join(lines)
    for part in re.split(r"^(?=\d  )", text, flags=re.M)[1:]:
        yield Block(part[0], [line[3:] for line in part.splitlines()])


def plain(text: str) -> str:
    """Return the visible text without the parts that differ from run to run.

    These are numbers with their sign, the plural that follows, addresses, and their width.
    """
    text = re.sub(r"[^\n]*\r(?!\n)", "", text.replace("\r\n", "\n"))  # overwritten
    text = re.sub(r"data=\{u32=\d+, u64=\d+\}", "data=0x0", text)  # strace before version 6.13
    text = re.sub(r"0x[0-9a-f]+|-?\d+(?:[.,]\d+)*", "#", text)
    text = re.sub(r"(# (?:client|seat|message|byte|ping))s\b", r"\1", text)
    return re.sub(r" +\n", "\n", re.sub(r" +", " ", text))


def end_session(leader: int) -> None:
    """Kill all processes of a session, also those in the background."""
    for process in [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]:
        with suppress(ProcessLookupError, PermissionError):  # it may have ended in the meantime
            if os.getsid(process) == leader:
                os.kill(process, signal.SIGKILL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with this Python, the repository's files and the programs that the text wants saved."""
    (tmp_path / "python3").symlink_to(sys.executable)
    for name in "non_block_io_server.py", "client.py", "tests":
        (tmp_path / name).symlink_to(ROOT / name)
    for name, text in SAVED.items():
        (tmp_path / name).write_text(text)
    return tmp_path


class Terminal:
    """A shell in its own terminal."""

    def __init__(self, folder: Path) -> None:
        self.screen = ""
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "TMPDIR": str(folder)}
        environment.update(PS1="$ ", PS2="> ", TERM="dumb", LC_ALL="C.UTF-8")
        environment.update(PYTHON_BASIC_REPL="1", PYTHONDONTWRITEBYTECODE="1")
        shell = "bash", "--norc", "--noprofile", "--noediting", "-i"
        self.process, self.descriptor = open_terminal(*shell, cwd=folder, env=environment)
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
        found, before = None, ""
        for line in block.lines:
            if line == "..." and DEFINITION.match(before):
                os.write(self.descriptor, b"\n")
            before = line
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
        if block.pasted or block.lines[-1] == "$ python3 core.py":  # a server that prints nothing
            try:
                eventually(listens, "")
            except AssertionError:
                pytest.fail(f"no program listens on port 10001:\n{self.screen}", pytrace=False)
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


def can_be_bound() -> bool:
    """Return whether a socket without SO_REUSEADDR can have port 10001."""
    with suppress(OSError), socket.socket() as sock:
        sock.bind(("", 10001))
        return True
    return False


@pytest.mark.parametrize(("title", "blocks"), [pytest.param(*each, id=each[0]) for each in sessions()])
def test_each_session_runs_as_it_is_shown(
    title: str, blocks: list[Block], folder: Path, request: pytest.FixtureRequest
) -> None:
    absent = missing(blocks)
    if absent:
        pytest.skip(f"missing: {', '.join(absent)}")
    request.getfixturevalue("port_10001")
    if (
        title == "The core"
    ):  # it has no SO_REUSEADDR: old connections must be forgotten, after a minute at most
        eventually(can_be_bound, "port 10001 has no old connections", 90)
    terminals: dict[str, Terminal] = {}
    try:
        for block in blocks:
            if block.terminal not in terminals:
                terminals[block.terminal] = Terminal(folder)
            terminals[block.terminal].replay(block)
    finally:
        for terminal in terminals.values():
            terminal.close()
        eventually(port_is_free, "the example has released port 10001")


def run_pytest(folder: Path, text: str) -> str:
    """Run the tests of this text with pytest, in a folder that is not the current one; return the output."""
    program = folder / "test_it.py"
    program.write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(program)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # pytest may be in .venv
    with subprocess.Popen(
        command,
        cwd="/",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            return process.communicate(timeout=DEADLINE)[0]
        finally:
            end_session(process.pid)


MISBEHAVES = "non_block_io_server.py --echo", "tests/misbehave.py late"
NEVER_LISTENS = MISBEHAVES[0], "sleeps.py"
FIXTURE = code("pytest.fixture")


@pytest.mark.parametrize(
    ("replace", "output"),
    [
        (("", ""), r"1 passed"),
        (('== b"hello"', '== b"wrong"'), r"assert b'hello' == b'wrong'(.|\n)*1 failed"),
        (MISBEHAVES, r"1 passed"),
        (NEVER_LISTENS, r"AssertionError: something else(.|\n)*1 error"),
    ],
    ids=["right", "wrong", "misbehaves", "never listens"],
)
def test_the_fixture(folder: Path, replace: tuple[str, str], output: str) -> None:
    (folder / "sleeps.py").write_text(
        "import sys; print('something else', file=sys.stderr); sys.stdin.read()"
    )
    assert all(f"`{text}`" in README for text in MISBEHAVES)
    assert replace[0] in FIXTURE
    shown = run_pytest(folder, FIXTURE.replace(*replace))
    assert re.search(output, shown), shown


def test_the_server_of_the_fixture_ends_with_pytest(folder: Path) -> None:
    end = (
        f"import os, pathlib; pathlib.Path({str(folder / 'port')!r}).write_text(str(echo_server[1]));"
        " os.kill(os.getpid(), 9)"
    )
    text = FIXTURE.replace("    with socket", f"    {end}\n    with socket")
    run_pytest(folder, text)
    port = int((folder / "port").read_text())

    def has_ended() -> bool:
        return not any(
            fields[3] == "0A" and fields[1].endswith(f":{port:04X}") for fields in faults.tcp_sockets()
        )

    eventually(has_ended, "the server has ended")


# ---------------------------------------------------------------- the core, and the same in asyncio

LECTURE = (ROOT / "tests" / "lecture.py").read_text(encoding="utf-8")
TWINS = {"core": code("def start.conn"), "twin": code("sock_recv")}


def test_the_core_marks_each_line_that_is_new() -> None:
    script = {line.strip() for line in LECTURE.splitlines()}
    for line in filter(None, TWINS["core"].splitlines()):
        statement, mark, _ = re.fullmatch(r"(.*?)\s*(?:(# \+)(.*))?", line).groups()  # type: ignore[union-attr]
        assert (statement.strip() in script) != bool(mark), line


@pytest.fixture
def twin(request: pytest.FixtureRequest) -> Iterator[faults.Server]:
    """Yield a server that runs a program of the README, on a free port."""
    program = TWINS[request.param]
    assert program.count("10001") == 1
    with ExitStack() as stack:
        yield faults.Server(stack, [sys.executable, "-c", program.replace("10001", "{port}")])


@pytest.mark.parametrize("twin", TWINS, indirect=True)
def test_the_core_and_its_twin_echo_every_byte(twin: faults.Server) -> None:
    clients = twin.clients(10)
    for number, client in enumerate(clients):  # each one in its turn, while the others are connected
        data = random.Random(number).choices(b"abcdefgh \n", k=300_000)
        sender = threading.Thread(target=client.sendall, args=(bytes(data),), daemon=True)
        sender.start()
        assert read_exactly(client, len(data)) == bytes(data)
        sender.join(DEADLINE)
    clients[0].shutdown(socket.SHUT_WR)
    assert clients[0].recv(1) == b""
    clients[1].sendall(b"one more")
    assert read_exactly(clients[1], 8) == b"one more"


@pytest.mark.parametrize("twin", ["core"], indirect=True)
def test_the_core_ends_at_the_first_reset(twin: faults.Server) -> None:
    (client,) = twin.clients(1)
    reset(client)
    assert twin.process.wait(DEADLINE) == 1
    assert twin.last_words() == "ConnectionResetError: [Errno 104] Connection reset by peer"


# ---------------------------------------------------------------- protocols of one's own


@pytest.fixture
def protocol(start: Start, tmp_path: Path) -> Start:
    """Return a function that starts a server with one of the README's protocols."""

    def start_protocol(name: str, *options: str) -> Server:
        program = tmp_path / "protocols.py"
        program.write_text(SAVED["protocols.py"].replace("protocol=chat", f"protocol={name}"))
        environment: Any = {**os.environ, "PYTHONPATH": str(ROOT)}
        return start(*options, program=str(program), env=environment)

    return start_protocol


def test_the_chat_sends_messages_to_the_others(protocol: Start) -> None:
    server = protocol("chat", "--connections", "4", "--wait-for", "3")
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


def test_the_chat_disconnects_a_client_that_never_reads(protocol: Start) -> None:
    server = protocol("chat", "--connections", "3", "--quiet")
    sender, slow = server.seat(), server.seat()
    quick = server.seat()
    data = os.urandom(1 << 16) * 512  # 32 MiB, more than the queue and the kernel hold
    sending = threading.Thread(target=sender.sendall, args=(data,), daemon=True)
    sending.start()
    assert read_exactly(quick, len(data)) == data, "no other client waits for it"
    sending.join(DEADLINE)
    server.err.wait_for(r"^client 2 was ")
    assert ending(slow)[1], "a reset"
    server.stop()


def test_the_echo_and_the_protocol_of_lines(protocol: Start) -> None:
    client = protocol("echo", "--wait-for", "1").seat()
    client.sendall(b"as it is")
    assert read_exactly(client, 8) == b"as it is"

    server = protocol("lines", "--wait-for", "1")
    client = server.seat()
    for byte in b"one\ntwo\r\n\nlast":
        client.sendall(bytes([byte]))
    client.shutdown(socket.SHUT_WR)
    assert ending(client) == (b"3\n3\n0\n4\n", False)
    client = server.seat()
    client.sendall(b"x" * 1001)
    assert ending(client) == (b"", True)
    server.err.wait_for(r"^client 2 was lost \(the line is too long\)")


def test_the_impatient_protocol_disconnects_a_silent_client(protocol: Start) -> None:
    server = protocol("impatient", "--wait-for", "1")
    client = server.seat()
    client.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    assert ending(client) == (b"", True)
    server.err.wait_for(r"^client 1 was lost \(")


def test_a_mistake_ends_one_connection_and_the_log_shows_it(start: Start, tmp_path: Path) -> None:
    echo = SAVED["protocols.py"].replace("protocol=chat", "protocol=echo")
    program, environment = tmp_path / "mistake.py", {**os.environ, "PYTHONPATH": str(ROOT)}

    program.write_text(echo.replace("await client.write", "client.write"))
    server = start("--wait-for", "1", program=str(program), env=environment)
    server.seat().sendall(b"hello")
    (warning,) = re.findall(r"`(coroutine .*? was never awaited)`", README)
    if not IS_PYPY:  # it warns when it frees the coroutine, much later
        server.err.wait_for(f"RuntimeWarning: {re.escape(warning)}\n *client.write\\(data\\)$")

    program.write_text(echo.replace("client.write", "client.wirte"))
    server = start("--wait-for", "1", program=str(program), env=environment)
    client, other = server.seat(), server.seat()
    client.sendall(b"hello")
    server.err.wait_for(r"mistake\.py\", line \d+, in echo(?s:.*)^ *AttributeError: .*'wirte'")
    server.err.wait_for(r"^client 1 was lost \(AttributeError in its protocol\)")
    other.sendall(b"hello")
    server.err.wait_for(r"^client 2 was lost")


def test_a_second_descriptor_has_its_own_task(start: Start, tmp_path: Path) -> None:
    (call,) = re.findall(r"`(client\.loop\.start\(.*?)`", README)
    program = tmp_path / "second.py"
    program.write_text(f"""
import os
from non_block_io_server import EPOLLIN, main, ready

async def copy(client):
    await ready(EPOLLIN)
    client.queue(os.read(descriptor, 100))

async def protocol(client):
    {call}
    while data := await client.read():
        os.write(writer, data)

descriptor, writer = os.pipe()
main(protocol=protocol)
""")
    server = start("--wait-for", "1", program=str(program), env={**os.environ, "PYTHONPATH": str(ROOT)})
    client = server.seat()
    client.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    server.stop()


# ---------------------------------------------------------------- limits


def test_the_balancer_disconnects_silent_clients_and_limits_an_address(
    start: Start, folder: Path, port_10001: int
) -> None:
    if not shutil.which("haproxy"):
        pytest.skip("missing: haproxy")
    server = start("--echo", "--quiet", "--connections", "9", "--wait-for", "1")
    config = code("haproxy", "sh")
    for old, new in ("10002", f"{server.port}"), ("client 1h", "client 2s"), ("gt 100", "gt 2"):
        assert config.count(old) == 1
        config = config.replace(old, new)
    config = re.sub(r".*10003\n", "", config)
    with subprocess.Popen(["bash", "-c", config], start_new_session=True) as process:
        try:
            eventually(listens, "HAProxy listens")
            with ExitStack() as stack:
                address = "127.0.0.1", port_10001
                served = [stack.enter_context(socket.create_connection(address, DEADLINE)) for _ in range(2)]
                for client in served:
                    client.sendall(b"hello")
                    assert read_exactly(client, 5) == b"hello"
                with suppress(ConnectionResetError):  # perhaps before it returns
                    assert ending(stack.enter_context(socket.create_connection(address, DEADLINE)))[0] == b""
                assert ending(served[0]) == ending(served[1]) == (b"", False), "they are silent"
        finally:
            end_session(process.pid)


def test_dead_clients_fill_the_backlog(start: Start) -> None:
    server = start("--connections", "1")
    server.seat()
    limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
    for _ in range(limit + 1):
        server.connect().close()
    with socket.socket() as client, pytest.raises(socket.timeout):
        client.settimeout(0.5)
        client.connect((server.host, server.port))


def test_a_quiet_server_logs_two_lines_for_each_connection(start: Start) -> None:
    server = start("--echo", "--quiet", "--wait-for", "1")
    for number in range(1, 4):
        server.seat().close()
        server.err.wait_for(f"^client {number} left")
    assert len(server.stop().splitlines()) == 1 + 1 + 3 * 2 + 1  # listening, serving, stopped


def test_a_full_disk_ends_the_server(start: Start) -> None:
    with open("/dev/full", "wb") as full:
        server = start("--wait-for", "1", stdout=full)
        server.seat().sendall(b"hello")
        assert "standard output can no longer be written: No space left on device" in server.ended(1)


def test_bytes_pass_a_client_whose_output_is_a_pipe(start: Start) -> None:
    server = start("--echo", "--quiet", "--wait-for", "1")
    command = [sys.executable, str(ROOT / "client.py"), "--port", str(server.port), "\x1b[31m"]
    result = subprocess.run(command, capture_output=True, timeout=DEADLINE)
    assert result.stdout == b"\x1b[31m\n"


# ---------------------------------------------------------------- the rest


def test_a_loop_starts_a_copy_for_each_core(folder: Path, port_10001: int) -> None:
    cores = int(subprocess.check_output(["nproc"]))
    terminal = Terminal(folder)
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

    assert len(lines(LECTURE)) == 22
    assert lines(code("conn_map")) == lines(LECTURE)


def test_its_table_of_faults_is_complete_and_its_names_exist() -> None:
    table = README.partition("\n| NAME |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", table, re.M)
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
    listed = README.partition("**Contents:**")[2].partition("\n\n")[0]
    assert re.findall(r"\(#([^)]+)\)", listed) == contents
    files = [link for link in links if not re.match(r"#|https://", link)]
    assert files and all((ROOT / file).exists() for file in files)
