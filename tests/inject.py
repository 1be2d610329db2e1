#!/usr/bin/env python3
"""Fault injection: make the server's system calls fail, one at a time, and check what its clients receive.

    python3 tests/inject.py                                      # all cases, some 2,500
    python3 tests/inject.py --mode echo --call write             # the cases of one call
    python3 tests/inject.py --sample 200                         # 200 random cases
    python3 tests/inject.py --case echo:write:error=EIO:when=5   # a case that failed

Each case has its own server.  strace(1) attaches to it when its modules are loaded and its own code
is about to run, so that no call of the interpreter's start counts.  strace then makes the Nth call of
one name fail with one errno, or sends a signal at that call.  Meanwhile three clients use the server:

    A  sends little, then much before it reads; it half-closes and reads to the end of file
    B  stays until the server is stopped
    C  gets the seat of the first one that leaves; it ends with a reset

Then SIGTERM stops the server.  After every fault, this must be true:

    - The server ends with status 0 and a summary.  Status 1 and one clear line are right only if
      nothing else is possible: at the start, without memory, without epoll_wait or standard output.
    - An echo is exact, or the client can see that it is incomplete.  It never has a gap or a wrong byte.
    - A client that receives an end of file has whole pings.
    - Only the client whose connection was hit may notice.  The others, and all three after EINTR and
      EAGAIN, get every byte, and everything they send is shown.
    - No traceback, no hang, no busy loop, no descriptor left open.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from select import select
from typing import BinaryIO, Callable, Iterator, NamedTuple

from soak import HEADER, SERVER, STOPPED, Loss, at_least, compare, counted, numbers, script

MODES = {"flood": [], "echo": ["--echo"], "every": ["--every", "0.02"]}
SIGNALS = "SIGTERM", "SIGINT"
DEADLINE = 10.0  # seconds until something that should happen immediately counts as a hang
MUCH = 100_000  # bytes: more than the kernel keeps for a client that does not read
PINGS = b"ping" * (MUCH // 2)
CPU = 0.5  # seconds of processor time that a case may use more than the plain run
SKIP = 77  # exit status: the machine does not allow this

# The errnos of each call's manual page (section 2), and those that a network device, a security
# module or a seccomp filter adds.  EWOULDBLOCK is EAGAIN.
PATH = "EACCES EINTR EINVAL EIO ELOOP EMFILE ENAMETOOLONG ENFILE ENODEV ENOENT ENOMEM ENOTDIR ENXIO EPERM"
NETWORK = "ECONNRESET EHOSTUNREACH ENETDOWN ENETUNREACH ETIMEDOUT"
READ = f"EAGAIN EBADF ECONNREFUSED EFAULT EINTR EINVAL EIO EISDIR ENOMEM ENOTCONN ENOTSOCK {NETWORK}"
WRITE = (
    "EACCES EAGAIN EBADF EDESTADDRREQ EDQUOT EFAULT EFBIG EINTR EINVAL EIO EMSGSIZE ENOBUFS ENOMEM ENOSPC"
    f" ENOTCONN ENOTSOCK EOPNOTSUPP EPERM EPIPE {NETWORK}"
)
SOCKOPT = "EACCES EBADF EFAULT EINVAL ENOMEM ENOPROTOOPT ENOTSOCK EPERM"
NAME = "EFAULT EINVAL ENOBUFS ENOTCONN"  # not EBADF, ENOTSOCK: Python's accept() calls it on a new socket
WAIT = "EBADF EFAULT EINTR EINVAL ENOMEM"
ACCEPT = (
    "EACCES EAGAIN EBADF ECONNABORTED EFAULT EHOSTDOWN EHOSTUNREACH EINTR EINVAL EMFILE ENETDOWN ENETUNREACH"
    " ENFILE ENOBUFS ENOMEM ENONET ENOPROTOOPT ENOSYS ENOTSOCK EOPNOTSUPP EPERM EPROTO"
)
STAT = "EACCES EBADF EFAULT EINVAL ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EOVERFLOW"
MEMORY = "ENOMEM"
CREATE = "EINVAL EMFILE ENFILE ENOMEM ENOSYS EPERM"
ERRORS = {
    "accept": ACCEPT,
    "accept4": ACCEPT,
    "bind": "EACCES EADDRINUSE EADDRNOTAVAIL EBADF EFAULT EINVAL ENOMEM ENOTSOCK EPERM",
    "brk": MEMORY,
    "close": "EBADF EINTR EIO ENOSPC",
    "dup": "EBADF EMFILE",
    "epoll_create1": CREATE,
    "epoll_ctl": "EBADF EEXIST EINVAL ELOOP ENOENT ENOMEM ENOSPC EPERM",
    "epoll_pwait": WAIT,
    "epoll_pwait2": f"{WAIT} ENOSYS",
    "epoll_wait": WAIT,
    "eventfd2": CREATE,
    "fcntl": "EBADF EINVAL EPERM",
    "fstat": STAT,
    "ftruncate": "EBADF EFBIG EINTR EINVAL EIO ENOSPC EPERM",
    "getcwd": "EACCES EFAULT ENOENT ENOMEM",
    "getdents64": "EBADF EFAULT EINVAL ENOENT ENOTDIR",
    "getpeername": NAME,
    "getrandom": "EAGAIN EFAULT EINTR EINVAL ENOSYS",
    "getsockname": NAME,
    "getsockopt": SOCKOPT,
    "ioctl": "EBADF EFAULT EINVAL ENOTTY EPERM",
    "listen": "EACCES EADDRINUSE EBADF ENOTSOCK EOPNOTSUPP",
    "lseek": "EBADF EINVAL EOVERFLOW ESPIPE",
    "lstat": STAT,
    "madvise": "EAGAIN EINVAL ENOMEM",
    "memfd_create": f"{CREATE} EFAULT",
    "mmap": "EACCES EAGAIN ENOMEM EPERM",
    "mprotect": "EACCES EINVAL ENOMEM",
    "mremap": "EAGAIN EINVAL ENOMEM",
    "munmap": "EINVAL ENOMEM",
    "newfstatat": STAT,
    "openat": PATH,
    "pipe2": "EFAULT EINVAL EMFILE ENFILE ENOSYS EPERM",
    "poll": WAIT,
    "ppoll": WAIT,
    "prlimit64": "EFAULT EINVAL EPERM ESRCH",
    "pselect6": WAIT,
    "pwrite64": WRITE,
    "read": READ,
    "readlink": STAT,
    "recvfrom": READ,
    "rt_sigaction": "EFAULT EINVAL",
    "rt_sigprocmask": "EFAULT EINVAL",
    "sched_yield": "ENOSYS EPERM",
    "select": WAIT,
    "sendfile": f"{WRITE} EOVERFLOW ESPIPE ENOSYS",
    "sendto": WRITE,
    "setsockopt": SOCKOPT,
    "shutdown": "EBADF EINVAL ENOTCONN ENOTSOCK",
    "signalfd4": CREATE,
    "socket": "EACCES EAFNOSUPPORT EINVAL EMFILE ENFILE ENOBUFS ENOMEM EPERM EPROTONOSUPPORT",
    "stat": STAT,
    "timerfd_create": CREATE,
    "timerfd_settime": "EFAULT EINVAL",
    "unlink": PATH,
    "write": WRITE,
    "writev": WRITE,
}
TRANSIENT = "EAGAIN", "EINTR"  # the call works when it is tried again
SENDING = "pwrite64", "sendfile", "sendto", "write", "writev"
ALLOCATING = "brk", "madvise", "mmap", "mprotect", "mremap", "munmap"
WAITING = "epoll_pwait", "epoll_pwait2", "epoll_wait"
ENDED_BY = (*ALLOCATING, *WAITING, "rt_sigaction")  # a server may end if one of these fails
NEVER_ENDED_BY = "prlimit64", "sched_yield"  # not even at the start

WAKE_UP = re.compile(r'write\(.*, "\\(2|17)", 1\) += -1')  # SIGINT or SIGTERM, by Python's own handler
NEVER_FAIL = "exit_group", "getpid", "rt_sigreturn"
USUAL = re.compile(r"listening on |serving |client \d+ |stopped: |not accepting")  # lines of any log

# Runs the server as Python would, but loads its modules first and then stops until strace has attached.
# If Yama lets only a parent trace, the launcher allows every process.  kill(pid, 0) marks the end.
LAUNCHER = """
import argparse, encodings.idna, locale, os, re, signal, sys
argparse.ArgumentParser().format_help()
try:
    yama = open("/proc/sys/kernel/yama/ptrace_scope").read().strip()
except OSError:
    yama = ""
if yama == "1":
    import ctypes
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
del sys.argv[0]
path = sys.argv[0]
text = open(path, encoding="utf-8").read()
code = compile(text, path, "exec")
for module in re.findall(r"^(?:    )?(?:from|import) ([\\w.]+)", text, re.M):
    __import__(module)
names = {"__name__": "__main__", "__file__": path}
os.kill(os.getpid(), signal.SIGSTOP)
try:
    exec(code, names)
finally:
    os.kill(os.getpid(), 0)
"""


class Skip(Exception):
    """A reason why nothing can be injected on this machine."""


class Case(NamedTuple):
    """One fault: what happens at the Nth call of this name."""

    mode: str
    call: str
    fault: str  # "error=EIO", "signal=SIGTERM", or nothing
    when: int

    def __str__(self) -> str:
        return f"{self.mode}:{self.call}:{self.fault}:when={self.when}"

    @property
    def is_signal(self) -> bool:
        return self.fault.startswith("signal=")

    @property
    def is_transient(self) -> bool:
        if self.call in (*ALLOCATING, "close"):  # a close that strace suppresses is no EINTR
            return not self.fault
        return not self.fault or self.fault.rpartition("=")[2] in TRANSIENT


class Plain(NamedTuple):
    """The calls, descriptors and time of a mode without a fault."""

    calls: Counter[str]  # how often each call is made
    starting: Counter[str]  # ... until epoll reports the first client
    files: int  # open descriptors, with one client left
    cpu: float  # seconds of processor time


class Client:
    """One connection, and the data that it sends and receives."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.echo, self.every = run.case.mode == "echo", run.case.mode == "every"
        self.sock = socket.socket()
        self.sock.settimeout(DEADLINE)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1001)  # odd segments: sends cut pings
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.bind(("127.0.0.1", 0))
        self.port: int = self.sock.getsockname()[1]
        self.data = b""
        self.sent = self.got = 0
        self.end = ""  # how it ended: "left", "end of file", "reset", "stuck"

    def queue(self, size: int) -> None:
        """Queue so many more bytes.  Each position in them looks different."""
        count = len(self.data) // 8
        self.data += b"".join(b"%s%06d," % (self.name.encode(), count + row) for row in range(size // 8))

    def exchange(self, due: int, reading: bool = True) -> None:
        """Send everything, and read until `due` bytes have arrived."""
        end = time.monotonic() + DEADLINE
        while self.sent < len(self.data) or (reading and self.got < due):
            readers = [self.sock] * (reading and self.got < due)
            readable, writable, _ = select(readers, [self.sock] * (self.sent < len(self.data)), [], DEADLINE)
            if writable:
                self.sent += self.sock.send(self.data[self.sent : self.sent + 65536], socket.MSG_DONTWAIT)
            if readable:
                self.read()
            if time.monotonic() > end:
                raise socket.timeout

    def read(self) -> None:
        """Read a chunk and check it.  Raises EOFError at an end of file."""
        data = self.sock.recv(10007)
        if not data:
            raise EOFError
        due = self.data[self.got : self.sent] if self.echo else PINGS[self.got % 4 :]
        compare(f"client {self.name}, after {self.got} bytes", data, due[: len(data)])
        self.got += len(data)

    def transfer(self, size: int, pings: int) -> None:
        """Send so many bytes; read the echo, or so many bytes of pings."""
        self.queue(size)
        self.exchange(len(self.data) if self.echo else self.got + (4 if self.every else pings))

    def play(self, role: Callable[[Client], None]) -> None:
        """Connect, play a role, and note how the connection ends."""
        try:
            self.sock.connect(("127.0.0.1", self.run.port))
            role(self)
            self.end = "left"
        except EOFError:
            self.end = "end of file"
        except socket.timeout:
            self.end = "stuck"
        except OSError:
            self.end = "reset"
        except Loss as wrong:
            self.run.wrongs.append(str(wrong))
            self.end = "wrong"
        self.sock.close()

    @property
    def is_whole(self) -> bool:
        """Return whether it has received everything that the server must send."""
        return self.got == self.sent == len(self.data) if self.echo else self.got % 4 == 0


def leaves(client: Client) -> None:
    """Send little, then much; half-close; read to the end of file."""
    client.transfer(80, 4000)
    client.queue(MUCH if client.echo else 80)
    client.exchange(0, reading=False)
    client.transfer(80, MUCH)
    client.sock.shutdown(socket.SHUT_WR)
    while True:
        client.read()


def stays(client: Client) -> None:
    """Stay while the others connect and leave; send a last message; read to the end of file."""
    client.transfer(80, 4000)
    client.run.until(client.run.others_have_ended, "the other clients are served")
    client.transfer(80, 4000)
    client.run.ready = True
    client.run.until(lambda: client.run.last_message, "the server is checked")
    client.queue(80)
    client.exchange(0, reading=False)
    client.run.last_sent = True
    while True:
        client.read()


def resets(client: Client) -> None:
    """Send little, read, and reset the connection."""
    client.transfer(80, 4000)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def outlet(is_socket: bool) -> tuple[BinaryIO, int]:
    """Return both ends of an output: a pipe or a socket, which the server must handle differently."""
    ours, theirs = (end.detach() for end in socket.socketpair()) if is_socket else os.pipe()
    return open(ours, "rb"), theirs


class Run:
    """One case: the server, strace, three clients, and the failures."""

    def __init__(self, script: str, case: Case, plain: Plain | None = None) -> None:
        self.case, self.plain = case, plain
        self.wrongs: list[str] = []
        self.lines: list[str] = []
        self.roles: list[Future[None]] = []
        self.ready = self.last_message = self.last_sent = False  # how far client B is
        self.port = self.files = 0
        self.cpu = 0.0
        with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
            self.trace = Path(directory, "trace")
            self.pool = stack.enter_context(ThreadPoolExecutor(5))
            self.start(stack, script)
            self.clients = {name: Client(self, name) for name in "ABC"}
            try:
                self.serve()
            except Loss as wrong:
                self.wrongs.append(str(wrong))
            self.stop()
            self.traced()

    def start(self, stack: contextlib.ExitStack, script: str) -> None:
        """Start the server up to its own first call, and attach strace."""
        environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "LANGUAGE": "C", "PYTHONUTF8": "1"}
        command = [sys.executable, "-c", LAUNCHER, script, *MODES[self.case.mode], "--port", "0"]
        outputs = [outlet(self.case.mode == "every"), outlet(False)]
        theirs = [descriptor for _, descriptor in outputs]
        self.files_of = {os.readlink(f"/proc/self/fd/{theirs[0]}"): "output"}
        self.files_of[os.readlink(f"/proc/self/fd/{theirs[1]}")] = "log"
        self.process = subprocess.Popen(command, stdout=theirs[0], stderr=theirs[1], env=environment)
        stack.enter_context(self.process)
        stack.callback(self.process.kill)
        for descriptor in theirs:
            os.close(descriptor)
        self.out, self.err = (self.pool.submit(stack.enter_context(ours).read) for ours, _ in outputs)
        os.waitpid(self.process.pid, os.WUNTRACED)
        names = f"accept,accept4,getsockname,kill,{self.case.call}" if self.case.fault else "all"
        command = ["strace", "-y", "-o", str(self.trace), "-p", str(self.process.pid), "-e", f"trace={names}"]
        if self.case.fault:
            command += ["-e", "inject={1}:{2}:when={3}".format(*self.case)]
        self.strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        stack.enter_context(self.strace)
        stack.callback(self.strace.kill)
        assert self.strace.stderr
        line = self.strace.stderr.readline()
        if "attached" not in line:
            raise Skip(f"strace cannot trace a process: {line.strip()}")
        self.process.send_signal(signal.SIGCONT)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until the condition is true.  A client has its own, shorter deadline."""
        end = time.monotonic() + 3 * DEADLINE
        while not condition():
            if time.monotonic() > end:
                raise Loss(f"did not happen: {what}")
            time.sleep(0.002)

    def has_exited(self) -> bool:
        return self.process.poll() is not None

    def traced(self) -> list[str]:
        """Return the lines that strace has written until now."""
        with contextlib.suppress(FileNotFoundError):  # not yet, or no longer
            self.lines = self.trace.read_text(errors="replace").splitlines()
        return self.lines

    def is_listening(self) -> bool:
        """Find the port.  strace shows it even if the server's log fails."""
        port = re.search(r"^getsockname\(.*sin_port=htons\((\d+)\).* = 0$", "\n".join(self.traced()), re.M)
        self.port = int(port[1]) if port else 0
        return self.port > 0

    def has_ended(self, name: str) -> bool:
        """Return whether this client has ended, or waits for a close() that strace has suppressed."""
        return bool(self.clients[name].end) or (self.case.call == "close" and name in self.struck())

    def others_have_ended(self) -> bool:
        return self.has_ended("A") and self.has_ended("C")

    def serve(self) -> None:
        """Run the clients, and check the server while one of them is left."""
        a, b, c = self.clients.values()
        self.until(lambda: self.is_listening() or self.has_exited(), "it listens")
        self.roles = [self.pool.submit(client.play, role) for client, role in ((a, leaves), (b, stays))]
        self.until(lambda: self.has_ended("A") or self.has_ended("B"), "a client leaves")
        self.roles.append(self.pool.submit(c.play, resets))
        self.until(
            lambda: self.others_have_ended() and (self.ready or self.has_ended("B")), "clients are served"
        )
        if self.ready and not self.has_exited():
            self.rest()
            self.send_signal(signal.SIGSTOP)  # the last message arrives before the stop signal
            self.last_message = True
            self.until(lambda: self.last_sent or b.end, "a last message is sent")

    def rest(self) -> None:
        """Wait until it uses no processor time: a loop that spins never does.  Count descriptors."""
        clock = ~self.process.pid << 3 | 2  # the process's time on a processor: clock_getcpuclockid(3)
        busy = 0.002 if self.case.mode == "every" else 0.0
        with contextlib.suppress(OSError):  # it may end now
            for _ in range(100):
                before = time.clock_gettime(clock)
                time.sleep(0.02)
                self.cpu = time.clock_gettime(clock)
                self.files = len(os.listdir(f"/proc/{self.process.pid}/fd"))
                if self.cpu - before <= busy and not (self.plain and self.files > self.plain.files):
                    return
            if self.cpu - before > busy:
                self.wrongs.append("never sleeps, although nothing happens")

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def stop(self) -> None:
        """Stop the server.  Its clients end with it."""
        self.send_signal(signal.SIGTERM)
        self.send_signal(signal.SIGCONT)
        try:
            self.until(lambda: self.has_exited() or self.lost_wake_up(), "it stops")
        except Loss as wrong:
            self.wrongs.append(str(wrong))
        self.process.kill()
        self.last_message = True
        for role in self.roles:
            role.result()
        self.strace.wait()

    def injected(self) -> str:
        """Return the line of strace that shows the fault; "" if the program itself made no such call."""
        for line in self.traced():
            if line.startswith("kill("):
                break
            if "(INJECTED" in line or "si_code=SI_KERNEL" in line:
                return line
        return ""

    def lost_wake_up(self) -> bool:
        """Return whether the kernel never causes this fault: a signal that does not wake the server."""
        return bool(WAKE_UP.match(self.injected()))

    def struck(self) -> set[str]:
        """Return what the fault has hit: "A", "B", "C", "output", "log", or some other file."""
        names = dict(self.files_of)
        ports = {str(client.port): name for name, client in self.clients.items()}
        for line in self.traced():
            accepted = re.match(r"accept4?\(.*sin_port=htons\((\d+)\).* = \d+<(.+?)>$", line)
            if accepted:
                names[accepted[2]] = ports.get(accepted[1], "")
            if "(INJECTED" in line:
                if "TCP_NOTSENT_LOWAT, [16384]" in line:  # full buffers: a cut ping ends in a reset
                    return set(self.clients)
                return {names.get(file, file) for file in re.findall(r"\d<(.+?)>", line)}
        return set()

    def may_fail(self, struck: set[str]) -> bool:
        """Return whether status 1 is right, because nothing else is possible after this fault."""
        case = self.case
        if case.is_signal or case.is_transient or case.call in NEVER_ENDED_BY or not self.plain:
            return False
        if case.when <= self.plain.starting[case.call] or case.call in ENDED_BY:
            return True
        if struck & {"A", "B", "C"}:
            return False
        if case.call == "epoll_ctl":  # if only epoll is full, it can be tried again
            return not ("CTL_ADD" in self.injected() and case.fault in ("error=ENOSPC", "error=ENOMEM"))
        return "output" in struck

    def judge(self) -> None:
        """Check the status, the log, the clients and the messages."""
        case, status = self.case, self.process.returncode
        struck = set() if case.is_transient else self.struck()
        out, err = (future.result().decode(errors="replace") for future in (self.out, self.err))
        wrong = self.wrongs.append
        if re.search(r"Traceback|Exception ignored|\[Errno|Error\b", err):
            wrong("its log shows an exception")
        early = self.plain and case.is_signal and case.when <= self.plain.starting[case.call]
        summary = STOPPED.search(err)
        if status == 0:
            if not summary and "log" not in struck:
                wrong("status 0 without a summary")
        elif status == 1 and self.may_fail(struck):
            reasons = [line for line in err.splitlines() if not USUAL.match(line)]
            if len(reasons) != 1 and "log" not in struck:
                wrong(f"status 1 with {len(reasons)} lines that give a reason")
        elif not early or -status not in (signal.SIGTERM, signal.SIGINT):
            wrong(f"ended with status {status}")
        if not err.startswith("listening on ") and status == 0 and not early and "log" not in struck:
            wrong("its log does not begin with the address")
        self.judge_clients(struck, status == 0 and not case.is_signal)
        self.judge_messages(out, summary, struck)

    def judge_clients(self, struck: set[str], served: bool) -> None:
        """Check how each client ended.  `served`: a client that was not hit has no reason to notice."""
        for name, client in self.clients.items():
            seen = f"client {name} sent {client.sent}, got {client.got}, saw {client.end or 'nothing'}"
            if client.end == "stuck":
                self.wrongs.append(seen)
            elif served and name not in struck:
                whole = client.is_whole or (name == "C" and self.case.mode != "echo")
                if client.end != ("left" if name == "C" else "end of file") or not whole:
                    self.wrongs.append(f"{seen}, although the fault is not its own")
            elif client.end == "end of file" and not client.is_whole:
                cut = self.case.mode != "echo"  # a ping; an echo cannot be shorter after a failed send
                if cut or (name in struck and self.case.call in SENDING):
                    self.wrongs.append(f"{seen}: it cannot see that something is missing")

    def judge_messages(self, out: str, summary: re.Match[str] | None, struck: set[str]) -> None:
        """Check the messages of each client, and that the summary agrees."""
        shown = {str(client.port): "" for client in self.clients.values()}
        sender = ""
        for line in out.splitlines():
            header = HEADER.fullmatch(line)
            if header:
                sender = header[2].rpartition(":")[2]
            elif sender in shown:
                shown[sender] += line.strip()
            else:
                self.wrongs.append(f"shown without a header: {line[:60]!r}")
        for name, client in self.clients.items():
            text = shown[str(client.port)]
            try:
                compare(f"shown of client {name}", text, client.data[: min(client.sent, len(text))].decode())
            except Loss as wrong:
                self.wrongs.append(str(wrong))
            if summary and not struck and not self.case.is_signal and len(text) != client.sent:
                self.wrongs.append(f"shown of client {name}: {len(text)} of {client.sent} bytes")
            served = (
                text and len(text) == client.sent and client.is_whole
            )  # nothing is left to read or to send
            if self.case.is_signal and client.end == "reset" and served:
                self.wrongs.append(f"client {name} was reset, although everything was read and sent")
        received = numbers(summary[2])[0] if summary else 0
        total = sum(len(text) for text in shown.values())
        if summary and "output" not in struck and received != total:
            self.wrongs.append(f"{received} bytes received in the summary, but {total} shown")


def measure(script: str, mode: str) -> Plain:
    """Run a mode without a fault; return its calls, descriptors and time."""
    run = Run(script, Case(mode, "", "", 0))
    run.judge()
    if run.wrongs:
        err = run.err.result().decode(errors="replace")
        raise Loss(f"{mode}, without a fault: {'; '.join(run.wrongs)}\n{err}")
    calls: Counter[str] = Counter()
    starting: Counter[str] = Counter()
    for line in run.lines:
        name = line.partition("(")[0]
        if name == "kill":
            break
        if name in WAITING and not starting and not line.endswith(" = 0"):
            starting = Counter(calls)
        if name.isidentifier():
            calls[name] += 1
    return Plain(calls, starting, run.files, run.cpu)


def cases_of(mode: str, plain: Plain) -> Iterator[Case]:
    """Yield every fault of a mode: at the 1st, 2nd and 5th call of a name, and at every 4th after it."""
    for call, count in sorted(plain.calls.items()):
        faults = [f"error={name}" for name in ERRORS.get(call, "").split()]
        faults += [f"signal={name}" for name in SIGNALS]
        for when in range(1, count + 1):
            if when == 2 or when % 4 == 1:
                yield from (Case(mode, call, fault, when) for fault in faults)


def trial(script: str, case: Case, plain: Plain) -> tuple[bool, str]:
    """Run a case; return whether the fault was reached, and the failures as text."""
    run = Run(script, case, plain)
    if run.lost_wake_up():
        return False, ""
    injected = run.injected()
    run.judge()
    if plain.cpu + CPU < run.cpu:
        run.wrongs.append(f"used {run.cpu:.2f} s of processor time, and {plain.cpu:.2f} s without the fault")
    if not run.wrongs:
        return bool(injected), ""
    log = run.err.result().decode(errors="replace").splitlines()
    seen = [f"strace: {injected or 'the fault was not reached'}", f"status {run.process.returncode}"]
    lines = [str(case), *run.wrongs, *seen, *(f"log: {line}" for line in log[-8:])]
    return bool(injected), "\n    ".join(lines)


def chosen(options: argparse.Namespace, plains: dict[str, Plain]) -> list[Case]:
    """Return the cases that the command line selects."""
    if options.case:
        return [options.case]
    cases = [case for mode, plain in plains.items() for case in cases_of(mode, plain)]
    cases = [case for case in cases if options.call in (None, case.call)]
    # Each case has its own rank, so a seed draws the same ones even if the number of calls varies.
    cases.sort(key=lambda case: random.Random(f"{options.seed} {case}").random())
    return cases[: options.sample]


def a_case(text: str) -> Case:
    """Return the case MODE:CALL:FAULT:when=N, as the tool prints it."""
    faults = [f"error={name}" for name in errno.errorcode.values()] + [f"signal={name}" for name in SIGNALS]
    found = re.fullmatch(r"(\w+):(\w+):([\w=]+):when=([1-9]\d*)", text)
    if not (found and found[1] in MODES and found[2] in ERRORS and found[3] in faults):
        example = "echo:write:error=EIO:when=5"
        raise argparse.ArgumentTypeError(f"{text!r} is not MODE:CALL:FAULT:when=N, for example {example}")
    return Case(found[1], found[2], found[3], int(found[4]))


def inject(options: argparse.Namespace) -> int:
    """Run the cases, print those that fail and the total; return the exit status."""
    if not shutil.which("strace"):
        raise Skip("strace is not installed")
    mode = options.case.mode if options.case else options.mode
    plains = {name: measure(options.server, name) for name in MODES if mode in (None, name)}
    unknown = {call for plain in plains.values() for call in plain.calls} - {*ERRORS, *NEVER_FAIL}
    if unknown:
        print(f"inject: no errno is known for {', '.join(sorted(unknown))}", file=sys.stderr)
    cases = chosen(options, plains)
    if not cases:
        made = sorted({call for plain in plains.values() for call in plain.calls} & {*ERRORS})
        raise Loss(f"the server does not call {options.call}; it calls {', '.join(made)}")
    print(f"inject: {counted(len(cases), 'case')}, --seed {options.seed}", file=sys.stderr)
    failures = missed = done = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        results = [pool.submit(trial, options.server, case, plains[case.mode]) for case in cases]
        try:
            for result in results:
                reached, text = result.result()
                done, missed, failures = done + 1, missed + (not reached), failures + bool(text)
                if text:
                    print(text, flush=True)
        except KeyboardInterrupt:
            print("inject: interrupted", file=sys.stderr)
        finally:
            for result in results:
                result.cancel()
    if missed:  # busy polls, chunks of an echo and beats vary
        print(f"inject: {missed:,} not reached: the server made fewer of these calls than in the plain run")
    print(f"inject: {counted(done, 'case')}, {missed:,} not reached, {counted(failures, 'failure')}")
    return 1 if failures or done < len(cases) or not done else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the server's system calls fail and check its clients.")
    add = parser.add_argument
    add("--mode", choices=MODES, help="only this mode of the server (default: all)")
    add("--call", metavar="NAME", help="only faults of this system call (default: all)")
    add("--sample", type=at_least(1), metavar="N", help="only N cases, drawn at random (default: all)")
    add("--seed", type=int, default=random.randrange(10**6), metavar="N", help="seed of a sample to repeat")
    add("--case", type=a_case, metavar="CASE", help="only this case, as it was printed")
    add(
        "--jobs",
        type=at_least(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="cases at a time (default: processors)",
    )
    add("--server", type=script, default=SERVER, metavar="PATH", help="server to test (default: this one)")
    options = parser.parse_args()
    if options.call not in (None, *ERRORS):
        parser.error(f"argument --call: no errno is known for {options.call}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left
    try:
        return inject(options)
    except Skip as reason:
        print(f"inject: skipped: {reason}")
        return SKIP
    except Loss as wrong:
        print(f"inject: {wrong}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
