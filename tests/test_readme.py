"""The README's examples, taken from it and typed into real terminals: what it shows is what happens.

A heading begins a session; a block of `console` is what one terminal shows.  Where the line
above the block names a terminal ("Terminal 2:"), the block goes on in that one.  What stands
after a prompt is typed, ^C and ^D are the keys; all other lines must appear, in that order,
numbers aside.  A line of three dots stands for any number of lines.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import socket
import struct
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest
from conftest import ROOT, eventually

README = (ROOT / "README.md").read_text()
PROMPTS = re.compile(r"(\$|>>>|\.\.\.|>) (?=.)|(?=\^[CQS])")
KEYS = {"^C": "\x03", "^D": "\x04", "^Q": "\x11", "^S": "\x13"}


class Block(NamedTuple):
    """What one terminal shows for a while."""

    terminal: str
    lines: list[str]


def sessions() -> Iterator[tuple[str, list[Block]]]:
    """The README's headings, with the blocks below each."""
    for part in re.split(r"^#+ ", README, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        blocks = [
            Block(found[1] or "1", found[2].splitlines())
            for found in re.finditer(
                r"(?:^Terminal (\d)[^\n]*\n\n?)?^```console\n(.*?)^```", text, re.M | re.S
            )
        ]
        if blocks:
            yield title, blocks


def plain(text: str) -> str:
    """As it is seen, without what differs from run to run: numbers, and the width that they take."""
    text = re.sub(r"[^\n]*\r(?!\n)", "", text.replace("\r\n", "\n"))  # written over
    return re.sub(r" +", " ", re.sub(r"\d+(?:[.,]\d+)*", "#", text))


class Terminal:
    """A shell in a terminal of its own."""

    def __init__(self, bin: Path) -> None:
        self.screen, self.shown = "", ""
        self.process, self.descriptor = pty.fork()
        if not self.process:
            os.chdir(ROOT)
            path = f"{bin}:{os.environ['PATH']}"
            environment = {"PATH": path, "PS1": "$ ", "TERM": "dumb", "LC_ALL": "C.UTF-8", "HOME": str(bin)}
            environment.update(PYTHON_BASIC_REPL="1", PYTHONDONTWRITEBYTECODE="1")
            os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"], environment)
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 250, 0, 0))
        threading.Thread(target=self.watch, daemon=True).start()
        self.expected: list[str] = []

    def watch(self) -> None:
        """Gather what is shown."""
        try:
            while True:
                self.screen += os.read(self.descriptor, 65536).decode(errors="replace")
        except OSError:  # the shell has ended
            return

    def replay(self, lines: list[str]) -> None:
        """Type what the block types; see what it shows."""
        found = None
        for line in lines:
            found = PROMPTS.match(line)
            if found:
                typed = line[found.end() :]
                self.await_screen(self.expected, found[0])
                key = KEYS.get(typed[:2])
                os.write(self.descriptor, (key or typed + "\n").encode())
                if typed in ("^S", "^Q"):  # are not echoed
                    continue
                line = line.replace("^D", "")
            self.expected.append(line)
        # What shows nothing has been done when the prompt is back.
        self.await_screen(self.expected, found[0] if found else "")

    def await_screen(self, expected: list[str], prompt: str = "") -> None:
        """Wait until the screen shows just that, and may be a prompt."""
        parts = [r"(?:.*\n)*?" if line == "..." else re.escape(plain(line)) + "\n" for line in expected]
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
        """End whoever runs in it, and the shell."""
        for kill, process in (os.killpg, os.tcgetpgrp(self.descriptor)), (os.kill, self.process):
            with suppress(ProcessLookupError):  # it may have ended by itself, this moment
                kill(process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.descriptor)


def has_turn(turn: socket.socket) -> bool:
    """Whether the port is ours now, of all the suites that run on this machine."""
    with suppress(OSError):
        turn.bind("\0the port of the README's examples")  # abstract: gone with the socket, unix(7)
        return True
    return False


def port_is_free() -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", 10001)) != 0


def missing(blocks: list[Block]) -> list[str]:
    """The tools that the commands need and that are not here."""
    words = re.findall(
        r"^\$ (?:sudo )?(\w+)", "\n".join(line for block in blocks for line in block.lines), re.M
    )
    return [word for word in sorted(set(words)) if not shutil.which(word)]


@pytest.mark.parametrize(("title", "blocks"), [pytest.param(*each, id=each[0]) for each in sessions()])
def test_what_it_shows_is_what_happens(title: str, blocks: list[Block], tmp_path: Path) -> None:
    if missing(blocks):
        pytest.skip(f"not installed: {', '.join(missing(blocks))}")
    with socket.socket(socket.AF_UNIX) as turn:
        eventually(lambda: has_turn(turn), "somebody else tests on port 10001")
        eventually(port_is_free, "somebody else has port 10001")
        replay(blocks, tmp_path)


def replay(blocks: list[Block], tmp_path: Path) -> None:
    """Type all blocks, each in its terminal."""
    (tmp_path / "python3").symlink_to(sys.executable)
    terminals: dict[str, Terminal] = {}
    try:
        for block in blocks:
            if block.terminal not in terminals:
                terminals[block.terminal] = Terminal(tmp_path)
            terminals[block.terminal].replay(block.lines)
    finally:
        for terminal in terminals.values():
            terminal.close()
