"""A server whose system calls fail when a test asks for it.

A test makes a `Failing` and starts its program.  Then `fail("accept", errno.EPERM)` lets the next
call of accept fail.  The program imports this module, replaces the calls and runs the server.
It can also change the server first: `program("server.OUTPUT_LIMIT = 10_000")`.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT_OF_MEMORY = -1  # in place of an errno: the call raises MemoryError
SOCKET_CALLS = "setblocking", "setsockopt", "recv", "bind", "listen", "getsockname"
EPOLL_CALLS = "register", "modify", "unregister"
FILE_CALLS = "sendfile", "fstat", "isatty"
OTHER_CALLS = (
    (os, "pipe2"),
    (os, "sched_yield"),
    (os, "memfd_create"),
    (resource, "getrlimit"),
    (resource, "setrlimit"),
    (signal, "set_wakeup_fd"),
)
CALLS = {*SOCKET_CALLS, *EPOLL_CALLS, *FILE_CALLS, *(name for _, name in OTHER_CALLS)}
CALLS.update(["accept", "close", "read", "write", "poll", "epoll_create1"])


class Failing:
    """The test's side: the calls that must fail, and those that have failed."""

    def __init__(self, folder: Path) -> None:
        self.wanted, self.failed = folder / "wanted", folder / "failed"
        self.path, self.temporary = folder / "server.py", folder / "temporary"
        self.failed.write_text("")

    def program(self, setup: str = "pass") -> str:
        """Write a program that runs the server.

        `setup` can change the module, whose name is `server`.  It ends the program with AttributeError if it
        sets a name that the module does not have.
        """
        self.path.write_text(
            "import sys\n"
            f"sys.path[:0] = {str(ROOT)!r}, {str(ROOT / 'tests')!r}\n"
            "import failing\n"
            "import non_block_io_server\n"
            f"failing.replace_calls(non_block_io_server, {str(self.wanted)!r}, {str(self.failed)!r})\n"
            "server = failing.Existing(non_block_io_server)\n"
            f"{setup}\n"
            "server.main()\n",
            encoding="utf-8",
        )
        return str(self.path)

    def fail(self, call: str, number: int, on: str = "", times: int = 1) -> None:
        """Let the next calls fail; `on` is a part of the text that `kind` returns."""
        assert call in CALLS, f"no call is named {call}"
        self.temporary.write_text(json.dumps([call, number, on, self.count() + times]))
        self.temporary.rename(self.wanted)

    def stop(self) -> None:
        """Let no more calls fail."""
        self.fail("poll", 0, times=0)

    def count(self) -> int:
        """Return how many calls have failed."""
        return self.failed.read_text().count("\n")


class Existing:
    """A module or a class as the setup of a program sees it: only names that exist can be set."""

    def __init__(self, real: Any) -> None:
        self.__dict__["real"] = real

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        return Existing(value) if isinstance(value, (ModuleType, type)) else value

    def __setattr__(self, name: str, value: Any) -> None:
        getattr(self.real, name)  # AttributeError: it does not exist
        setattr(self.real, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.real, name)


def kind(descriptor: Any) -> str:
    """Return `listener`, `client PORT`, or what /proc calls it: `pipe:[1234]`."""
    descriptor = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    link = os.readlink(f"/proc/self/fd/{descriptor}")
    if link.startswith("socket:"):
        blocking = os.get_blocking(descriptor)
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            os.set_blocking(descriptor, blocking)  # PyPy makes such a socket a blocking one
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return "listener"
            with suppress(OSError):
                return f"client {sock.getpeername()[1]}"
    return link


def replace_calls(server: Any, wanted: str, failed: str) -> None:
    """Replace the calls of the server that a test can let fail.  `server` is the module."""

    def check(call: str, descriptor: Any = None) -> None:
        if not os.path.exists(wanted):  # this needs no descriptor
            return
        with open(wanted, encoding="ascii") as file:
            name, number, on, limit = json.load(file)
        if name != call or (on and (descriptor is None or on not in kind(descriptor))):
            return
        with open(failed, "a+", encoding="ascii") as file:
            file.seek(0)
            if len(file.readlines()) >= limit:
                return
            file.write(f"{call}\n")
        if number == OUT_OF_MEMORY:
            raise MemoryError
        raise OSError(number, os.strerror(number))

    def replace(owner: Any, name: str, has_descriptor: bool) -> None:
        call = getattr(owner, name)

        def replaced(*arguments: Any, **options: Any) -> Any:
            check(name, arguments[0] if has_descriptor else None)
            return call(*arguments, **options)

        setattr(owner, name, replaced)

    class Epoll:
        def __init__(self) -> None:
            check("epoll_create1")
            real = select.epoll()
            self.register, self.modify, self.unregister = real.register, real.modify, real.unregister
            self.poll, self.close = real.poll, real.close
            for name in EPOLL_CALLS:
                replace(self, name, True)
            replace(self, "poll", False)

    class Socket(socket.socket):
        def accept(self) -> Any:
            check("accept", self.fileno())
            sock, address = super().accept()
            return Socket(sock.family, sock.type, sock.proto, sock.detach()), address

        def close(self) -> None:
            super().close()
            check("close")  # close(2) frees the descriptor even when it fails

    for name in SOCKET_CALLS:
        setattr(Socket, name, getattr(socket.socket, name))
        replace(Socket, name, True)

    class Module:  # the server's `socket`, while every other module has the real one
        def __getattr__(self, name: str) -> Any:
            return Socket if name == "socket" else getattr(socket, name)

    server.epoll, server.socket = Epoll, Module()
    for name in ("read", "write"):
        replace(server, name, True)
    for name in FILE_CALLS:
        replace(os, name, True)
    for owner, name in OTHER_CALLS:
        replace(owner, name, False)
