#!/usr/bin/env python3
"""A TCP server that serves many clients in one thread and never blocks.

The question.  A socket blocks: `recv` waits until data arrives, and the whole program waits with it.
How can one program serve several connections at once, without processes and without threads?

The answer is an event loop.  Wait for all descriptors in one call.  Then make only calls that do not wait:

    while running:
        for descriptor, events in epoll.poll():    # waits until a descriptor is ready
            tasks[descriptor].send(events)         # resumes the task that owns it

A task is a generator that owns one descriptor.  It reads like a program that blocks, with a `yield`
wherever that program would block.  It yields its interest (the mask of the events that it waits for),
and the loop resumes it with the events that epoll reports, or with 0 when another task or a timer wakes
it (Loop.wake).  A task can also yield another task.  This is a call: the loop runs the called task until
it ends, then resumes the caller (PEP 342: a trampoline).

    task            waits for                           when it is resumed
    --------------  ----------------------------------  -----------------------------------
    Server.accept   EPOLLIN, while a seat is free       gives new connections a seat
    Server.serve    until enough clients are connected  runs the client's protocol:
      flood         EPOLLIN and EPOLLOUT                prints a message, sends many pings
      echo          EPOLLIN; EPOLLOUT with unsent data  prints a message, sends it back
      heartbeat     EPOLLIN and the next beat           prints a message, sends one ping
    Server.beat     the time of the next beat           resumes the clients
    Output.run      EPOLLOUT, while it is stalled       writes queued text
    stop_signal     EPOLLIN                             ends the loop

With no option, the server waits for two clients, then serves both.  It runs until a signal.
Messages go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import functools
import os
import re
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from os import read, write

try:
    import fcntl
    import resource
    import termios
    from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, PIPE_BUF, epoll, poll

    STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
except (ImportError, AttributeError):  # not Linux: the module can be imported; main() prints NO_EPOLL
    epoll = None  # type: ignore[assignment, misc]

TYPE_CHECKING = False  # as in typing, whose import would make the start slower
if TYPE_CHECKING:
    from typing import Any, Callable, Generator, Iterable, TextIO

    Task = Generator[Any, Any, None]  # yields an interest or a task to call; is sent events
    Protocol = Callable[["Client"], Task]

# -------------------------------------------------------------------- constants

PING = b"ping"
PINGS = memoryview(PING * 65536)  # 256 KiB per send, because each call is expensive
READ_SIZE = 65536  # bytes per read, so that a client that sends a lot does not starve the others
ACCEPTS = 16  # accepts per event, so that a burst of new clients does not starve connected ones
BUSY_POLLS = 16  # non-blocking polls before a blocking one: sleeping and waking costs more than an echo
WRITES = 256  # writes of an output per event, so that a slow terminal does not starve the clients
OUTPUT_LIMIT = 1024 * 1024  # an output with more bytes in its queue counts as full
SPARE_FILES = 16  # descriptors that belong to no client: outputs, epoll, listener, signal pipe, pings
RETRY_DELAY = 1.0  # seconds before a call that failed for lack of a resource is tried again
FLUSH_TIMEOUT = 1.0  # seconds to wait for a stalled output at shutdown
DRAIN_TIMEOUT = 5.0  # seconds to wait for a slow output at shutdown
FINISH_TIMEOUT = 0.2  # seconds to read from clients that continue to send at shutdown
SIGNAL_TIMEOUT = 0.1  # seconds to wait for a stop signal when standard output breaks
MAX_TIMEOUT = 86400.0  # seconds; epoll_wait(2) accepts no timeout of more than 24 days
NO_DESCRIPTOR = -1  # the key of the beat's task, which owns no descriptor
TCP_RTO_MAX_MS = 44  # from linux/tcp.h, since Linux 6.15
# accept(2): the backlog is empty, or the connection that accept would have returned is broken.
NETWORK_ERRORS = (
    "EAGAIN ECONNABORTED EPROTO ENETDOWN ENOPROTOOPT EHOSTDOWN ENONET EHOSTUNREACH EOPNOTSUPP ENETUNREACH"
)
MESSAGE_TITLE = "data received..."
IN_USE = "address already in use (another program uses this port; stop it, or choose another with --port)"
OUT_OF_MEMORY = b"out of memory: the server cannot continue"


class CannotContinue(Exception):
    """A failure that ends the server with status 1.  Its text gives the reason in one line."""


def count(number: int, noun: str) -> str:
    """Return a number with its noun in the right form: `1 ping`, `1,204,113 pings`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def why(error: BaseException) -> str:
    """Return why a call failed, in the system's words if it has any: `No space left on device`."""
    if getattr(error, "errno", 0) == errno.EADDRINUSE:
        return IN_USE
    return getattr(error, "strerror", None) or repr(error)


def name_of(address: Any) -> str:
    """Return a socket's address as text: `127.0.0.1:10001`, `[::1]:10001`."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# -------------------------------------------------------------------- the loop


class Loop:
    """The event loop: it waits for events and resumes the task of each ready descriptor."""

    def __init__(self) -> None:
        self.running = True
        self.epoll = epoll()
        self.tasks: dict[int, Task] = {}  # by descriptor
        self.callers: dict[int, list[Task]] = {}  # by descriptor: tasks whose call has not returned
        self.interests: dict[int, int] = {}  # by descriptor, as epoll knows them
        self.timers: dict[int, float] = {}  # when to resume a task without events: time.monotonic()

    def run(self) -> None:
        """Resume tasks until `running` is false."""
        while self.running:
            self.resume(self.wait())
            if self.timers:
                self.resume(self.due())

    def resume(self, batch: Iterable[tuple[int, Any]]) -> None:
        """Run each task to its next yield, and do what it yields.

        `batch` holds pairs of a descriptor and its events.  An earlier event of the batch may have
        ended a task.  Resuming it raises StopIteration again, which does no harm.
        """
        tasks, interests = self.tasks, self.interests
        for descriptor, events in batch:
            try:
                result = tasks[descriptor].send(events)
                if result == interests[descriptor]:
                    continue
            except Exception as end:
                result = end
            self.handle(descriptor, result)

    def handle(self, descriptor: int, result: Any) -> None:
        """Handle what a task has yielded or raised.  Return when a task waits or the last one has ended.

        An exception goes to the caller of the task that raised it; an error of set_interest goes to
        the task itself.  It is raised there at the yield.
        """
        callers = self.callers[descriptor]
        while callers or not isinstance(result, Exception):
            try:
                if isinstance(result, Exception):  # a call has ended: its caller continues
                    task = self.tasks[descriptor] = callers.pop()
                    if isinstance(result, StopIteration):
                        result = task.send(result.value)
                    else:
                        result = task.throw(result)
                elif hasattr(result, "send"):  # a call: the called task runs in the place of this one
                    callers.append(self.tasks[descriptor])
                    self.tasks[descriptor] = result
                    result = result.send(None)
                else:
                    callers.append(self.tasks[descriptor])  # if this fails, the error is raised in this task
                    self.set_interest(descriptor, result)
                    callers.pop()
                    return
            except Exception as end:
                result = end
        with suppress(OSError):  # if the task has closed its descriptor, the kernel has removed it
            self.epoll.unregister(descriptor)
        self.interests.pop(descriptor, None)  # a stale event may resume an ended task again
        if not isinstance(result, StopIteration):
            raise result

    def set_interest(self, descriptor: int, interest: int) -> None:
        """Tell epoll what a task waits for.

        Raises OSError (no memory, too many watches); TypeError, ValueError or OverflowError if a task has
        yielded neither an interest nor a task.
        """
        before = self.interests[descriptor]
        if interest == before:
            return
        if interest == 0:  # with an interest of 0, epoll would report EPOLLHUP and EPOLLERR endlessly
            self.epoll.unregister(descriptor)
        elif before:
            self.epoll.modify(descriptor, interest)
        else:
            self.epoll.register(descriptor, interest)
        self.interests[descriptor] = interest

    def wait(self) -> Iterable[tuple[int, int]]:
        """Wait until a descriptor is ready or a timer is due; return (descriptor, events) pairs."""
        timeout = -1.0
        if self.timers:
            timeout = min(max(0.0, min(self.timers.values()) - time.monotonic()), MAX_TIMEOUT)
        for _ in range(BUSY_POLLS if timeout else 0):
            ready = self.epoll.poll(0)
            if ready:
                return ready
            with suppress(OSError):  # a sandbox may forbid this call
                os.sched_yield()  # lets another process use this processor
        return self.epoll.poll(timeout)

    def due(self) -> Iterable[tuple[int, int]]:
        """Return the descriptors whose timer is due, with no events, and forget these timers."""
        now = time.monotonic()
        due = {descriptor: 0 for descriptor, when in self.timers.items() if when <= now}
        for descriptor in due:
            del self.timers[descriptor]
        return due.items()

    def wake(self, descriptors: Iterable[int], when: float = 0.0) -> None:
        """Resume tasks without events at `when` (time.monotonic()), or after this batch."""
        # Use this for a task that may be running, because a generator cannot be resumed while it runs.
        self.timers.update(dict.fromkeys(descriptors, when))

    def start(self, name: str, descriptor: int, task: Task, counted: object = None) -> None:
        """Run a new task to its first yield.  `name` and `counted` are for --trace: see TracedLoop."""
        self.tasks[descriptor], self.callers[descriptor], self.interests[descriptor] = task, [], 0
        self.resume([(descriptor, None)])


# -------------------------------------------------------------------- a client's connection


class Client:
    """A connection that has a seat, as a protocol sees it.  No method waits.

    The socket is non-blocking although epoll has reported it ready: the event may be stale
    (an earlier event of the same batch has changed the state), a send may be larger than the
    free space in the kernel, and a task is also resumed without events.

    No code looks at EPOLLHUP and EPOLLERR: epoll reports EPOLLIN and EPOLLOUT with them, and
    the next read or write raises the error.
    """

    def __init__(self, server: Server, sock: socket.socket, name: str, address: str) -> None:
        self.server, self.messages, self.name = server, server.messages, name
        self.sock, self.descriptor = sock, sock.fileno()
        self.formatter = MessageFormatter(f"{MESSAGE_TITLE} ({name}, {address})\n")
        self.received = self.sent = 0  # bytes
        self.unsent = b""  # bytes that the protocol has queued: see flush()
        self.at_eof = False  # the client has closed or half-closed its side
        self.reason = "left"

    @property
    def reading(self) -> int:
        """The interest in reading: EPOLLIN, or 0 at the end of file or while standard output is full."""
        return 0 if self.at_eof or self.messages.full else EPOLLIN

    def receive(self) -> bytes:
        """Read and print one chunk, at most READ_SIZE bytes; epoll reports the rest again.

        Returns b"" if nothing has arrived, if standard output is full, or at the end of file, which
        sets at_eof.  Raises OSError.
        """
        if self.messages.full:
            return b""
        try:
            data = read(self.descriptor, READ_SIZE)
        except BlockingIOError:
            return b""
        self.received += len(data)
        self.at_eof = not data
        if self.messages.open:
            self.show(data)
        return data

    def send(self, data: bytes | memoryview) -> int:
        """Send as many bytes as the kernel accepts now; return their number.  Raises OSError."""
        try:
            sent = write(self.descriptor, data)
        except BlockingIOError:
            return 0
        self.sent += sent
        return sent

    def flush(self) -> None:
        """Send as much of `unsent` as the kernel accepts now.  Raises OSError."""
        if self.unsent:
            self.unsent = self.unsent[self.send(self.unsent) :]

    def show(self, data: bytes, final: bool = False) -> None:
        """Print bytes as a message; `final` means that no more bytes follow."""
        if self.messages.failure:
            self.messages.lost += len(data)  # to format it would delay the exit
        else:
            self.messages.write(self.formatter.format(data, final))

    def break_off(self) -> None:
        """Let the close send a reset instead of an end of file, because the stream is incomplete."""
        with suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def unread(self) -> int:
        """Return the number of bytes that have arrived and are unread: tcp(7), SIOCINQ.  Raises OSError."""
        return int.from_bytes(fcntl.ioctl(self.sock, termios.FIONREAD, bytes(4)), sys.byteorder)


class MessageFormatter:
    """A formatter that turns the bytes of one client into lines to print.  It uses no socket."""

    def __init__(self, header: str) -> None:
        self.header = header
        self.partial = b""  # an incomplete UTF-8 character, or a CR whose LF may follow

    def format(self, data: bytes, final: bool = False) -> str:
        """Return a message to print, or "" if none is complete; `final` means that no bytes follow.

        A character or a CR LF split across two reads is joined; a byte that is not UTF-8 becomes
        U+FFFD.  Lines after the first are indented.  A first line that looks like a header is
        also indented, so data cannot imitate a header.
        """
        data = self.partial + data
        text, used = codecs.utf_8_decode(data, "replace", final)
        self.partial = data[used:]
        if text.endswith("\r") and not self.partial and not final:
            text, self.partial = text[:-1], b"\r"
        if not text:
            return ""
        text = text.replace("\r\n", "\n")
        text = text[:-1] if text.endswith("\n") else text
        if not text.isprintable():
            text = "\n  ".join(line if line.isprintable() else escape(line) for line in text.split("\n"))
        indent = "  " if text.startswith(MESSAGE_TITLE) else ""
        return f"{self.header}{indent}{text}\n"


JOINERS = "\u200c\u200d"  # they form Persian words and emoji families
# Runs of characters other than letters, digits, printable ASCII, tabs and spaces; or one joiner.
UNUSUAL = f"[^\\w\t !-~\xa0\u1680\u2000-\u200a\u202f\u205f\u3000{JOINERS}]+|[{JOINERS}]"


def escape(line: str) -> str:
    r"""Escape characters that could harm a terminal or mislead a reader: `\x1b`, `\u202e`, `\U000e0041`.

    These are all controls except tab, line and paragraph separators, and all format, surrogate,
    private-use and unassigned characters.  A joiner between two visible characters is kept.
    """

    def escaped(found: re.Match[str]) -> str:
        """Return a joiner between two visible characters as it is, and other characters escaped."""
        if found[0] in JOINERS:
            before, after = line[found.start() - 1 : found.start()], line[found.end() : found.end() + 1]
            if (before + after).isprintable() and before.strip() and after.strip():
                return found[0]
        return repr(found[0])[1:-1].replace("\\r", "\\x0d")  # repr escapes what is not printable

    return re.sub(UNUSUAL, escaped, line)  # re compiles it at its first use


# -------------------------------------------------------------------- protocols


def flood(client: Client) -> Task:
    """Send pings as fast as the client reads them."""
    pings = pings_file()
    while not client.at_eof:
        events = yield client.reading | EPOLLOUT
        if events & EPOLLIN:
            client.receive()
        if events & EPOLLOUT and not client.at_eof:
            cut = client.sent % len(PING)  # bytes already sent of a ping that a partial send has cut
            if pings is None:
                client.send(PINGS[cut:])
            else:
                with suppress(BlockingIOError):  # sendfile(2) copies nothing
                    client.sent += os.sendfile(client.descriptor, pings, cut, len(PINGS))
    while client.sent % len(PING):
        yield EPOLLOUT
        client.send(PING[client.sent % len(PING) :])


@functools.lru_cache(maxsize=None)
def pings_file() -> int | None:
    """Return the descriptor of a file in memory that is full of pings; None if this is not possible."""
    with suppress(AttributeError, OSError):  # an old C library, a sandbox, a limit on the size of files
        file = os.memfd_create("pings")
        if write(file, PINGS) + write(file, PING) == len(PINGS) + len(PING):  # a send may begin inside a ping
            return file
    return None


def echo(client: Client) -> Task:
    """Send each chunk back.  Read nothing while a chunk is unsent: this is backpressure."""
    # For speed, this repeats the code of client.receive() and client.send() (README: Speed).
    descriptor, messages = client.descriptor, client.messages
    while True:
        data, sent = b"", 0  # an idle client keeps no chunk in memory
        yield EPOLLIN
        while messages.full:
            yield 0
        try:
            data = read(descriptor, READ_SIZE)
            if not data:
                client.at_eof = True
                return
            client.received += len(data)
            if messages.open:
                client.show(data)
            sent = write(descriptor, data)
        except BlockingIOError:
            pass
        client.sent += sent
        while sent < len(data):
            yield EPOLLOUT
            sent += client.send(data[sent:])


def heartbeat(client: Client) -> Task:
    """Send one ping per beat.  Skip beats while a ping is unsent, so that unsent data stays bounded."""
    server, beats = client.server, client.server.beats
    while client.unsent or not client.at_eof:
        events = yield client.reading | (EPOLLOUT if client.unsent else 0)
        if events & EPOLLIN:
            client.receive()
        if server.beats > beats and not client.unsent and not client.at_eof:
            client.unsent = PING
        beats = server.beats
        client.flush()


# -------------------------------------------------------------------- the server


class Server:
    """The clients, the start of serving, the timer of the beat, and the totals."""

    def __init__(self, loop: Loop, options: Any, protocol: Protocol, messages: Output, log: Output) -> None:
        self.loop, self.protocol, self.messages, self.log = loop, protocol, messages, log
        self.seats, self.wait_for, self.every = options.connections, options.wait_for, options.every
        self.unit, self.unit_size = ("ping", len(PING)) if protocol in (flood, heartbeat) else ("byte", 1)
        self.listener = attempt(f"listen on {name_of((options.host, options.port))}", listen, options)
        self.clients: dict[int, Client] = {}  # by descriptor
        self.serving = False
        self.accepted = self.served = self.beats = 0
        self.received = self.sent = 0  # bytes and units, of the clients that have disconnected

    def accept(self) -> Task:
        """The listener's task: accept connections while a seat is free; others wait in the backlog."""
        reported = ""
        while True:
            try:  # an error of epoll_ctl(2) is also raised here, at the yield
                yield EPOLLIN if len(self.clients) < self.seats else 0
                for _ in range(min(ACCEPTS, self.seats - len(self.clients))):
                    sock, address = self.listener.accept()
                    self.seat(sock, name_of(address))
                    reported = ""
            except OSError as error:
                if error.errno not in [getattr(errno, name) for name in NETWORK_ERRORS.split()]:
                    if why(error) != reported:
                        reported = why(error)
                        self.log.write_line(f"not accepting for now: {reported}")
                        if error.errno == errno.EMFILE and not self.clients:
                            self.log.write_line("no descriptor is left for any client (ulimit -n)")
                    # The connection stays in the backlog, so epoll would report the listener on every wait.
                    self.loop.wake([self.listener.fileno()], time.monotonic() + RETRY_DELAY)
                    yield 0

    def seat(self, sock: socket.socket, address: str) -> None:
        """Give a connection a seat and start its task.  Start serving if enough clients have a seat."""
        self.accepted += 1
        client = Client(self, sock, f"client {self.accepted}", address)
        self.clients[client.descriptor] = client
        self.log.write_line(f"{client.name} connected from {address}, {self.seats_taken()}")
        self.loop.start(client.name, client.descriptor, self.serve(client), client)
        if self.serving:
            self.served += 1
        elif len(self.clients) >= self.wait_for:
            self.loop.resume([(descriptor, 0) for descriptor in self.clients])  # disconnected clients leave
            if len(self.clients) >= self.wait_for:
                self.begin()

    def begin(self) -> None:
        """Start serving: wake the tasks of the waiting clients and start the beat."""
        self.serving, self.served = True, len(self.clients)
        self.log.write_line(f"serving {count(self.served, 'client')}")
        self.loop.wake(self.clients)
        if self.every:
            self.loop.start("beat", NO_DESCRIPTOR, self.beat(), self)

    def beat(self) -> Task:
        """The beat's task: resume all clients at each beat."""
        due = time.monotonic()
        while True:
            self.loop.wake([NO_DESCRIPTOR], due)
            yield 0
            now = time.monotonic()
            if now >= due:  # else an output that is no longer full has woken every task
                self.beats += 1
                self.loop.wake(self.clients)
                due = now + self.every - (now - due) % self.every  # on a fixed schedule; skips missed beats

    def serve(self, client: Client) -> Task:
        """A client's task: wait until serving starts, run the protocol, close the connection."""
        try:
            client.sock.setblocking(False)
            interest = EPOLLIN
            while not self.serving and not client.at_eof:
                yield interest
                with suppress(BlockingIOError):
                    client.at_eof = not client.sock.recv(1, socket.MSG_PEEK)
                    interest = 0  # further data waits in the kernel
            if not client.at_eof:  # else it is a port probe: it connects, sends nothing and closes
                yield self.protocol(client)  # a call: `yield from` costs more (README: Speed)
        except MemoryError:
            raise
        except Exception as error:  # the connection is broken, or the protocol has a fault
            client.reason = "was reset" if isinstance(error, ConnectionError) else f"was lost ({why(error)})"
            with suppress(OSError, ValueError):  # data that arrived before the error can still be read
                arrived = client.received + client.unread()
                while client.received < arrived and not client.at_eof:
                    while self.messages.full:
                        yield 0
                    client.receive()
            client.break_off()
        client.show(b"", final=True)
        del self.clients[client.descriptor]
        with suppress(OSError):  # close(2): the descriptor is free even after an error
            client.sock.close()
        received, sent = client.received, client.sent // self.unit_size
        self.received += received
        self.sent += sent
        totals = self.totals(received, sent) + ("" if self.serving else ", not counted as a client")
        self.log.write_line(f"{client.name} {client.reason}: {totals}, {self.seats_taken()}")
        self.loop.wake([self.listener.fileno()])  # the next connection in the backlog can get the seat

    def finish(self) -> None:
        """Serve the data that has arrived.  At exit, the kernel sends each client an end of file."""
        self.serving = True
        self.loop.resume([(descriptor, 0) for descriptor in self.clients])  # a client that waited is served
        deadline = time.monotonic() + FINISH_TIMEOUT
        for client in list(self.clients.values()):  # a copy, because a client that ends is removed
            try:
                self.finish_client(client, deadline)
            except (OSError, ValueError):  # the connection is broken, or its protocol has closed it
                client.break_off()

    def finish_client(self, client: Client, deadline: float) -> None:
        """Serve all data that has arrived, and data that follows before the deadline; complete a cut ping."""

        def progress() -> int:
            """Return a number that grows while data is served.  Endless pings do not count as progress."""
            return client.received + min(client.sent, client.received)

        arrived, before = client.received + client.unread(), -1
        while progress() > before and (client.received < arrived or time.monotonic() < deadline):
            before = progress()
            self.messages.drain()
            self.loop.resume([(client.descriptor, EPOLLIN)])
            if client.descriptor not in self.clients:
                return
        unserved = client.received < arrived  # for example, because the client does not read its echo
        while client.received < arrived:  # print it, at least
            self.messages.drain()
            if not client.receive():
                break
        client.show(b"", final=True)
        cut = client.sent % self.unit_size
        if cut:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0)  # space for the rest
            client.send(PING[cut:])
        unsent = client.unsent or self.loop.interests.get(client.descriptor) == EPOLLOUT
        if client.sent % self.unit_size or (self.unit == "byte" and (unserved or unsent)):
            client.break_off()  # a ping or an answer is incomplete

    def summary(self) -> str:
        """Return the last line of the log."""
        received = self.received + sum(client.received for client in self.clients.values())
        sent = self.sent + sum(client.sent // self.unit_size for client in self.clients.values())
        dropped = f", {count(self.log.dropped, 'log line')} dropped" if self.log.dropped else ""
        return f"stopped: {count(self.served, 'client')} served, {self.totals(received, sent)}{dropped}"

    def seats_taken(self) -> str:
        """Return how many seats are taken, as text."""
        return f"{len(self.clients):,} of {count(self.seats, 'seat')} taken"

    def totals(self, received: int, sent: int) -> str:
        """Return bytes received and units (bytes or pings) sent, as text."""
        return f"{count(received, 'byte')} received, {count(sent, self.unit)} sent"


def listen(options: Any) -> socket.socket:
    """Return a listener on the host's first usable address, IPv4 first.  Raises OSError, UnicodeError."""
    # A name in bytes needs no codec for international names, and so no import of three modules.
    name = options.host.encode() if options.host.isascii() else options.host
    errors = []
    for family, _, _, _, address in sorted(socket.getaddrinfo(name, options.port, 0, socket.SOCK_STREAM)):
        try:
            return listen_on(family, address, options)
        except OSError as error:
            errors.append(error)
    raise errors[0]


def listen_on(family: int, address: Any, options: Any) -> socket.socket:
    """Return a non-blocking listener.  Raises OSError."""
    sock = socket.socket(family)
    for level, option, value in (  # socket(7), tcp(7); the connections inherit them
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),  # a restart works while old connections exist
        (socket.SOL_SOCKET, socket.SO_REUSEPORT, options.reuse_port),
        (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),  # an urgent byte keeps its place in the stream
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),  # a short answer leaves immediately
        (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 16384),  # bounds the kernel memory of unread pings
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # detects a peer that vanished without closing:
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),  # after 60 s of silence,
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),  # probes it every 10 s,
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),  # 6 times
        (socket.IPPROTO_TCP, TCP_RTO_MAX_MS, 10000),  # also detects one that does not acknowledge data
        (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::"),  # :: also accepts IPv4
    ):
        try:
            sock.setsockopt(level, option, value)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:  # not an option of this kernel, or of IPv4
                raise
    sock.bind(address)
    sock.listen(65535)  # the kernel reduces it to net.core.somaxconn
    sock.setblocking(False)  # a connection may vanish after epoll has reported it
    return sock


# -------------------------------------------------------------------- standard output and standard error


class Output:
    """A queue for standard output or standard error, which may stall like any peer."""

    def __init__(self, loop: Loop, name: str, stream: TextIO | None) -> None:
        """`stream` is None if the output was closed before the start, or is not wanted."""
        self.loop, self.name, self.open = loop, name, stream is not None
        self.queue = bytearray()
        self.full = False  # set above OUTPUT_LIMIT, reset when everything is written
        self.dropped = 0  # log lines
        self.failure = ""  # why nothing more is written
        self.lost = 0  # bytes that were queued and not written
        self.drain_time = DRAIN_TIMEOUT  # seconds that drain() can still wait
        if stream is not None:
            self.encoding = stream.encoding
            self.descriptor, self.write_limit = nonblocking(attempt(f"use {name}", stream.fileno))

    def write(self, text: str) -> None:
        """Queue text.  The caller must check `full` first, because the queue has no limit."""
        if self.open and text:
            if not self.queue:
                self.loop.wake([self.descriptor])  # run() writes it after this batch of events
            self.queue += text.encode(self.encoding, "backslashreplace")
            self.full = self.full or len(self.queue) > OUTPUT_LIMIT

    def write_line(self, line: str) -> None:
        """Queue a line of the log, or drop and count it while the output is full."""
        if self.full:
            self.dropped += 1
        else:
            self.write(f"{line}\n")

    def run(self) -> Task:
        """The output's task: write the queue as fast as the reader reads it."""
        reported = 0  # dropped lines
        while True:
            self.flush()
            if self.failure and self.name == "standard output":
                raise CannotContinue(f"{self.name} {self.failure}")
            if self.full and not self.queue:
                self.full = False
                if self.dropped > reported:
                    dropped = count(self.dropped - reported, "log line")
                    self.write_line(f"{dropped} dropped: {self.name} was full")
                    reported = self.dropped
                self.loop.wake(self.loop.interests)  # the clients can be read again
            try:
                yield EPOLLOUT if self.queue else 0
            except OSError:  # no memory or too many watches: try again later
                self.loop.wake([self.descriptor], time.monotonic() + RETRY_DELAY)
                yield 0

    def flush(self) -> None:
        """Write as much as the kernel accepts now.  After a failure, drop the queue and count its bytes."""
        try:
            for _ in range(WRITES):
                if self.failure or not self.queue:
                    break
                if self.write_limit and not is_ready(self.descriptor, EPOLLOUT, 0.0):
                    break
                del self.queue[: write(self.descriptor, self.queue[: self.write_limit])]
        except BlockingIOError:
            pass
        except OSError as error:
            self.failure = f"can no longer be written: {why(error)}"
        if self.failure:
            self.lost += len(self.queue)
            self.queue.clear()

    def drain(self) -> None:
        """Write everything.  Drop the rest if a write waits FLUSH_TIMEOUT, or all together DRAIN_TIMEOUT."""
        deadline = time.monotonic() + self.drain_time
        self.flush()
        while self.queue:
            if time.monotonic() > deadline:
                self.failure = "is too slow"
            elif not is_ready(self.descriptor, EPOLLOUT, FLUSH_TIMEOUT):
                self.failure = "has stalled"
            self.flush()
        self.drain_time = deadline - time.monotonic()
        self.full = False


def nonblocking(descriptor: int) -> tuple[int, int | None]:
    """Return a descriptor of the same output, and its limit of bytes per write (None: no limit)."""
    if os.path.isfile(descriptor):  # a file has no reader to wait for
        return descriptor, None
    # O_NONBLOCK on an inherited descriptor affects every process that shares it, so open the output again.
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(f"/proc/self/fd/{descriptor}", flags), None
    except OSError:  # a socket, another user's terminal (after su), or no /proc
        return descriptor, 1 if os.isatty(descriptor) else PIPE_BUF  # pipe(7)


def is_ready(descriptor: int, interest: int, timeout: float) -> bool:
    """Wait up to `timeout` seconds for one descriptor; poll(2) also accepts files and uses epoll's bits."""
    poller = poll()
    poller.register(descriptor, interest)
    return bool(poller.poll(timeout * 1000))


# -------------------------------------------------------------------- the stop signal


def catch_signals() -> int:
    """Return a descriptor that becomes readable when a stop signal arrives: signal.set_wakeup_fd()."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup(1), background jobs: it stays ignored
            signal.signal(number, lambda *_: None)  # without a Python handler, Python writes no byte
    return reader


def block_signals() -> None:
    """Block further stop signals, because Python's own exit would let them change the exit status."""
    with suppress(OSError):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def stop_signal(loop: Loop) -> Task:
    """The signal pipe's task: end the loop after the current batch of events."""
    while not (yield EPOLLIN):  # the pipe is never drained: its first byte ends the loop; a wake (0) does not
        pass
    loop.running = False


# -------------------------------------------------------------------- the trace


class TracedLoop(Loop):
    """A loop that logs what it does (--trace): a cause first, then its effects, indented."""

    log: Output  # run() sets it before the first task starts

    def __init__(self) -> None:
        super().__init__()
        self.start_time = time.monotonic()
        self.traced: dict[int, tuple[str, object]] = {}  # by descriptor: see start()

    def trace(self, text: str) -> None:
        """Log a line: the seconds since the start, and the text."""
        self.log.write_line(f"{time.monotonic() - self.start_time:8.3f}  {text}")

    def start(self, name: str, descriptor: int, task: Task, counted: object = None) -> None:
        """Start a task; later, log it under this name (if any), with the changes of `counted`."""
        self.traced[descriptor] = name, counted
        super().start(name, descriptor, task, counted)

    def wait(self) -> Iterable[tuple[int, int]]:
        """Wait; log how many descriptors are ready and how long that took."""
        before = time.monotonic()
        ready = list(super().wait())
        if ready:  # polls that report nothing are not logged
            self.trace(f"epoll_wait: {len(ready)} ready after {time.monotonic() - before:.3f} s")
        return ready

    def resume(self, batch: Iterable[tuple[int, Any]]) -> None:
        """Resume tasks; log which one is resumed and why, then its effects."""
        for descriptor, events in batch:
            if descriptor not in self.interests:  # an earlier event of the batch has ended the task
                continue
            name, counted = self.traced[descriptor]
            if name and events is not None:
                self.trace(f"{'' if name == 'beat' else '  '}{name}: {event_names(events) or 'resumed'}")
            before = [getattr(counted, key, None) for key in EFFECTS]
            interest, place = self.interests[descriptor], len(self.log.queue)
            super().resume([(descriptor, events)])
            later = self.log.queue[place:]  # the lines that the task itself has logged
            del self.log.queue[place:]
            changes = zip(before, [getattr(counted, key, None) for key in EFFECTS], EFFECTS.values())
            effects = [text(old, new) for old, new, text in changes if old != new]
            if effects:
                self.trace(f"    {', '.join(effects)}")
            self.log.queue += later
            waits_for = self.interests.get(descriptor, interest)
            if name and waits_for != interest:
                self.trace(f"    epoll_ctl: {name} waits for {event_names(waits_for) or 'nothing'}")


EFFECTS: dict[str, Callable[[Any, Any], str]] = {  # what to log when an attribute has changed
    "beats": lambda old, new: f"beat {new:,}",
    "received": lambda old, new: f"received {new - old:,}",
    "sent": lambda old, new: f"sent {new - old:,}",
    "at_eof": lambda old, new: "end of file",
    "reason": lambda old, new: str(new),
}


def event_names(events: int) -> str:
    """Return an event mask in epoll's words: `EPOLLIN EPOLLOUT`."""
    names = {EPOLLIN: "EPOLLIN", EPOLLOUT: "EPOLLOUT", EPOLLERR: "EPOLLERR", EPOLLHUP: "EPOLLHUP"}
    return " ".join(name for bit, name in names.items() if events & bit)


# -------------------------------------------------------------------- the command line

EPILOG = """\
examples:
  two terminals (serving starts when the second client connects):
    python3 non_block_io_server.py
    python3 client.py
  an echo for tests, on a free port that the first line shows:
    python3 non_block_io_server.py --echo --port 0 --connections 100 --wait-for 1
  a heartbeat:
    python3 non_block_io_server.py --every 1 --wait-for 1

With --host 0.0.0.0 (every IPv4 address) or :: (also IPv6), anyone who can reach this machine can connect.

exit status:
  0  stopped by SIGINT, SIGTERM or SIGHUP
  1  the server cannot continue; one line gives the reason
  2  wrong usage
"""
NO_EPOLL = """\
this system has no epoll: run the server on Linux, in a container (docker run --rm -it -p 10001:10001 \
-v "$PWD:/app" python /app/non_block_io_server.py --host 0.0.0.0), a virtual machine or WSL"""


def arguments() -> argparse.Namespace:
    """Return the options of the command line.  Wrong usage raises SystemExit, with status 2."""
    parser = argparse.ArgumentParser(
        description="Serve TCP clients in one thread: send them pings, and print what they send.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=10001, help="port; 0 is any free one (default: %(default)s)")
    add("--connections", type=int, default=2, metavar="N", help="number of seats (default: %(default)s)")
    add("--wait-for", type=int, metavar="M", help="start serving when M clients are connected (default: N)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--echo", action="store_true", help="send each client its own bytes, not pings")
    kind.add_argument("--every", type=float, metavar="SECONDS", help="send one ping every SECONDS")
    add("--quiet", action="store_true", help="print no messages")
    add("--reuse-port", action="store_true", help="share the port with other copies (SO_REUSEPORT)")
    add("--trace", action="store_true", help="log each event and its effects, but no busy polls")
    options = parser.parse_args()
    if options.wait_for is None:
        options.wait_for = options.connections
    seats = options.connections
    for name, least, most in ("port", 0, 65535), ("connections", 1, 10**7), ("wait_for", 1, seats):
        if not least <= getattr(options, name) <= most:
            parser.error(f"argument --{name.replace('_', '-')}: must be from {least} to {most}")
    if options.every is not None and not 0 < options.every < float("inf"):
        parser.error("argument --every: must be a positive, finite number of seconds")
    if options.host == "*":
        parser.error("argument --host: for every address use 0.0.0.0 (IPv4) or :: (also IPv6)")
    options.host = (options.host or "0.0.0.0").strip("[]")  # the first line shows an IPv6 address in brackets
    return options


def main(protocol: Protocol = flood) -> None:
    """Serve until a signal or a failure; then raise SystemExit (see EPILOG).

    `protocol` serves each client unless --echo or --every is given.
    """
    try:
        options = arguments()
        if epoll is None:
            sys.exit(NO_EPOLL)
        sys.exit(run(options, echo if options.echo else heartbeat if options.every else protocol))
    except CannotContinue as failure:
        block_signals()
        sys.exit(str(failure))
    except KeyboardInterrupt:  # before SIGINT is caught
        print("stopped: 0 clients served, 0 bytes received, 0 bytes sent", file=sys.stderr)
        sys.exit(0)
    except MemoryError:
        write(2, OUT_OF_MEMORY + b"\n")
        os._exit(1)  # Python's own exit could need memory


def run(options: argparse.Namespace, protocol: Protocol) -> int:
    """Start the tasks, run the loop, and write the last lines.  Return the exit status."""
    signals = attempt("catch signals", catch_signals)
    loop = attempt("create an epoll instance", TracedLoop if options.trace else Loop)
    messages = Output(loop, "standard output", None if options.quiet else sys.stdout)
    log = Output(loop, "standard error", sys.stderr)
    both = messages.open and log.open
    if both and attempt(f"use {messages.name}", os.path.sameopenfile, messages.descriptor, log.descriptor):
        log = messages  # two queues would write into the middle of each other's lines
    server = Server(loop, options, protocol, messages, log)
    address = name_of(attempt("read the listener's address", server.listener.getsockname))
    log.write_line(f"listening on {address}, waiting for {count(options.wait_for, 'client')}")
    if isinstance(loop, TracedLoop):
        loop.log = log
    raise_file_limit(options.connections + SPARE_FILES, log)
    if not messages.open and not options.quiet:
        log.write_line("standard output is not open: messages are not shown")
    failure = ""
    try:
        for output in {messages, log}:
            if output.open:
                loop.start("", output.descriptor, output.run())  # traced, each line would cause another
        attempt("watch for signals", loop.start, "signal", signals, stop_signal(loop))
        loop.start("listener", server.listener.fileno(), server.accept())
        attempt("wait for events", loop.run)
    except CannotContinue as error:
        # Ctrl-C also ends the program that reads our pipe.  The pipe may break before the signal arrives.
        if not (messages.failure and is_ready(signals, EPOLLIN, SIGNAL_TIMEOUT)):
            failure = str(error)
    except MemoryError:
        failure = OUT_OF_MEMORY.decode()
        server.clients.clear()  # nothing more is read
    block_signals()
    server.finish()
    log.write(f"{failure or server.summary()}\n")
    messages.drain()
    if messages.lost and not failure:
        log.write(f"{messages.name} {messages.failure}: {count(messages.lost, 'byte')} not written\n")
    log.drain()
    return 1 if failure else 0


def attempt(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments).  An error becomes CannotContinue, with what failed and why."""
    try:
        return function(*arguments)
    except (OSError, ValueError) as error:
        raise CannotContinue(f"cannot {what}: {why(error)}") from None


def raise_file_limit(need: int, log: Output) -> None:
    """Raise the soft limit on open files, as far as the hard limit allows; log a warning if it is too low."""
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < need:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(need, hard), hard))
        if hard < need:
            log.write_line(f"the seats need {need:,} open files, but the hard limit is {hard:,} (ulimit -Hn)")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        log.write_line(f"cannot raise the limit on open files to {need:,}: {reason}")


if __name__ == "__main__":
    main()
