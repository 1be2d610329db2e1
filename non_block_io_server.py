#!/usr/bin/env python3
"""A TCP server that serves many clients in one thread and never blocks.

The question.  A socket blocks: `recv` waits until data arrives, and the whole program waits with it.
How can one program serve several connections at once, without processes and without threads?

The answer is an event loop.  Wait for all descriptors in one call.  Then make only calls that do not wait:

    while running:
        for descriptor, events in epoll.poll():             # waits until a descriptor is ready
            interest = tasks[descriptor].send(events)       # resumes its task, up to the next `await ready`
            epoll.modify(descriptor, interest)              # the events that the task waits for now

A task is a coroutine that owns one descriptor.  It looks like blocking code, with an `await` at each
place where that code would block.  Every such wait ends in `await ready(interest)`: it hands the
interest (a mask of events) to the loop, and returns the events that epoll has reported, or 0 if another
task or a timer has woken this one.

    task                   waits for                           when it is resumed
    ---------------------  ----------------------------------  -----------------------------------
    Server.accept          EPOLLIN, while a seat is free       gives new connections a seat
    Server.serve           until enough clients are connected  runs the client's protocol:
      flood                EPOLLIN and EPOLLOUT                prints a message, sends many pings
      echo                 EPOLLIN; EPOLLOUT with unsent data  prints a message, sends it back
      heartbeat            EPOLLIN and the next beat           prints a message, sends one ping
    Output.run             EPOLLOUT, while it is stalled       writes queued text
    read_signals           EPOLLIN                             empties the signal pipe

Read in this order: `ready` and `Loop`, then `Client`, then the protocols.  This third of the file is the
idea.  The rest makes it hold: the server and its listener, the text of messages, outputs that stall,
signals, the trace, the command line.

With no option, the server waits for two clients, then serves both.  It runs until a signal.
Messages go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import io
import math
import operator
import os
import re
import signal
import socket
import stat
import struct
import sys
import time
import types
import warnings
from contextlib import ExitStack, suppress
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
    from typing import Any, Callable, Coroutine, Generator, Iterable, Iterator, TextIO

    Task = Coroutine[Any, Any, None]  # yields its interest, is sent events
    Protocol = Callable[["Client"], Task]

# -------------------------------------------------------------------- constants

PING = b"ping"
PINGS = memoryview(PING * 65536)  # 256 KiB per send, because each call is expensive
READ_SIZE = 65536  # bytes per read, so that a client that sends a lot does not starve the others
ACCEPTS = 16  # accepts per event, so that a burst of new clients does not starve connected ones
WRITES = 256  # writes of an output per event, so that a slow terminal does not starve the clients
CALLS = 16  # calls of Client.write without a wait: then the other tasks have their turn
ERRORS = 16  # errors one after the other in a task that does not wait: then it is ended
BUSY_POLLS = 16  # non-blocking polls before a blocking one: sleeping and waking costs more than an echo
LONG_YIELD = 0.0005  # seconds: if a yield of the processor takes longer, another program needs it
QUEUE_LIMIT = 16 * 1024 * 1024  # bytes in a client's queue; a client with more is disconnected
OUTPUT_LIMIT = 1024 * 1024  # an output with more bytes in its queue counts as full
SPARE_FILES = 16  # descriptors that belong to no client: outputs, epoll, listener, signal pipe, pings
TIMER_SCAN = 0.001  # seconds between two scans of all timers
RETRY_DELAY = 1.0  # seconds until a call that failed because a resource ran out is repeated
LINGER_TIMEOUT = 1.0  # seconds to wait for a client's end of file after ours
FLUSH_TIMEOUT = 1.0  # seconds to wait for a stalled output at shutdown
DRAIN_TIMEOUT = 5.0  # seconds to wait for a slow output at shutdown
FINISH_TIMEOUT = 0.2  # seconds to serve clients that continue to send at shutdown
FINISH_POLL = 0.01  # seconds to wait for space in a connection at shutdown
SIGNAL_TIMEOUT = 0.1  # seconds to wait for a stop signal when standard output breaks
MAX_TIMEOUT = 86400.0  # seconds; epoll_wait(2) accepts no timeout of more than 24 days
NEVER = math.inf
NOTHING = bytearray()  # one object for all clients: memory for each of them would be a megabyte for 10,000
TCP_RTO_MAX_MS = 44  # from linux/tcp.h, since Linux 6.15
FATAL = KeyboardInterrupt, SystemExit, MemoryError  # exceptions that end the server, from any task
MESSAGE_TITLE = "data received..."
OUT_OF_MEMORY = "out of memory: the server cannot continue"

# -------------------------------------------------------------------- the loop


@types.coroutine
def ready(interest: int) -> Generator[int, int, int]:
    """Wait until epoll reports one of these events; return them (0 after a wake).

    This is the only place where a task waits.  The loop raises an error here if epoll cannot watch the
    descriptor (OSError), or if `interest` is no mask of events (TypeError).
    """
    return (yield interest)


async def fail(error: Exception) -> None:
    """Raise an error in the running task, by way of the loop: it ends a task that ignores each error."""
    await ready(error)  # type: ignore[arg-type]


class Loop:
    """The event loop: it waits for events and resumes the task of each ready descriptor."""

    def __init__(self) -> None:
        self.running = True
        self.epoll = epoll()
        self.tasks: dict[int, Task] = {}  # by descriptor
        self.interests: dict[int, int] = {}  # by descriptor, as epoll knows them; the oldest first
        self.woken: dict[int, Task | None] = {}  # whose tasks are resumed after this batch; a new task
        self.timers: dict[int, float] = {}  # when to wake a task: time.monotonic()
        self.next_timer = NEVER  # no timer is due before
        self.on_end: Callable[[int, BaseException | None], None]  # gets a task's descriptor and exception

    def run(self) -> None:
        """Resume tasks until `running` is false."""
        while self.running:
            self.resume(self.wait())
            if self.woken or self.timers:
                self.resume(self.due())

    def resume(self, batch: Iterable[tuple[int, Any]]) -> None:
        """Run each task of a batch to its next `await ready`, and tell epoll what it waits for.

        `batch` holds pairs of a descriptor and its events.
        """
        tasks, interests = self.tasks, self.interests
        for descriptor, events in batch:
            try:
                interest = tasks[descriptor].send(events)
                changed = interest is not interests[descriptor]
            except BaseException as end:
                if descriptor in tasks:  # else the event is stale: an earlier one has ended the task
                    self.end(descriptor, end)
            else:
                if changed:
                    self.change_interest(descriptor, interest)

    def wait(self) -> list[tuple[int, int]]:
        """Wait until a descriptor is ready or a timer is due; return (descriptor, events) pairs."""
        for _ in range(BUSY_POLLS):
            batch = self.epoll.poll(0)
            if batch or not self.timeout():
                return batch
            before = time.monotonic()
            with suppress(OSError):  # a sandbox may forbid this call
                os.sched_yield()  # lets another program use this processor
            if time.monotonic() - before > LONG_YIELD:
                break
        return self.epoll.poll(self.timeout())

    def timeout(self) -> float:
        """Return how long epoll may wait, in seconds; -1 is without limit."""
        if self.woken:
            return 0.0
        if not self.timers:
            return -1.0
        return min(max(0.0, self.next_timer - time.monotonic()), MAX_TIMEOUT)

    def due(self) -> Iterator[tuple[int, int | None]]:
        """Yield the woken tasks and those whose timer is due, with 0 for events, or None for a new task."""
        if self.timers and (now := time.monotonic()) >= self.next_timer:
            due = [descriptor for descriptor, when in self.timers.items() if when <= now]
            for descriptor in due:
                del self.timers[descriptor]
            self.wake(due)
            self.next_timer = max(min(self.timers.values(), default=NEVER), now + TIMER_SCAN)
        for descriptor in list(self.woken):  # a task that is woken again waits for the next batch
            if descriptor in self.woken:  # else an earlier task has ended it
                task = self.woken.pop(descriptor)
                if task:
                    self.tasks[descriptor], self.interests[descriptor] = task, 0
                yield descriptor, None if task else 0

    def change_interest(self, descriptor: int, interest: Any) -> None:
        """Tell epoll what a task waits for.  An error is raised in the task; too many end it."""
        for _ in range(ERRORS):
            try:
                return self.watch(descriptor, interest)
            except Exception as raised:
                error = raised
            try:
                interest = self.tasks[descriptor].throw(error)
            except BaseException as end:
                return self.end(descriptor, end)
        self.end(descriptor, error)

    def watch(self, descriptor: int, interest: Any) -> None:
        """Register an interest with epoll.  Raises OSError, TypeError, or an exception in its place."""
        if isinstance(interest, Exception):
            raise interest
        if not (isinstance(interest, int) and 0 <= interest < 1 << 32):
            raise TypeError(f"a task can only await ready(interest): {interest!r:.80} is no mask of events")
        before = self.interests[descriptor]
        if interest == before:
            return
        if interest == 0:  # with an interest of 0, epoll would report EPOLLHUP and EPOLLERR endlessly
            self.epoll.unregister(descriptor)
        elif before:
            self.epoll.modify(descriptor, interest)
        else:
            self.epoll.register(descriptor, interest)
        del self.interests[descriptor]  # it becomes the newest
        self.interests[descriptor] = interest

    def end(self, descriptor: int, error: BaseException | None = None) -> None:
        """Forget a task that has ended, or end it, and report that to `on_end`."""
        task = self.tasks.pop(descriptor, None) or self.woken.pop(descriptor, None)
        if not task:
            return
        self.timers.pop(descriptor, None)
        if self.interests.pop(descriptor, 0):
            with suppress(OSError):  # before close(2), because another process may hold a copy: epoll(7)
                self.epoll.unregister(descriptor)
        if isinstance(error, FATAL):
            raise error
        try:
            task.close()
        except FATAL:
            raise
        except BaseException as mistake:
            error = error or mistake
        self.on_end(descriptor, None if isinstance(error, StopIteration) else error)

    def start(self, name: str, descriptor: int, task: Task) -> None:
        """Start a task after this batch.  `name` is for --trace: see TracedLoop.

        Raises TypeError if `task` is no coroutine, ValueError if the descriptor has a task.
        """
        if not isinstance(task, types.CoroutineType):
            raise TypeError(f"a task is the call of an `async def` function, not a {type(task).__name__}")
        if descriptor in self.tasks or self.woken.get(descriptor):
            task.close()
            raise ValueError(f"descriptor {descriptor} already has a task")
        self.woken[operator.index(descriptor)] = task

    def wake(self, descriptors: Iterable[int]) -> None:
        """Resume tasks without events after this batch, in this order.  Raises TypeError."""
        for descriptor in descriptors:
            self.woken.setdefault(operator.index(descriptor))

    def wake_at(self, when: float, descriptor: int) -> None:
        """Resume a task without events at `when` (time.monotonic()).  Raises TypeError, ValueError."""
        when += 0.0  # raises an error for what is no float
        if math.isnan(when):
            raise ValueError("NaN is not a time")
        self.timers[operator.index(descriptor)] = when
        self.next_timer = min(self.next_timer, when)

    def close(self) -> None:
        """End all tasks, so that Python does not end them later."""
        for task in [*self.tasks.values(), *self.woken.values()]:
            if task:
                with suppress(BaseException):
                    task.close()
        self.epoll.close()


# -------------------------------------------------------------------- a client's connection


class Client:
    """A connection that has a seat, as a protocol sees it.

    A protocol is an `async def` function of a client.  `read`, `write`, `queue` and `sleep` are for every
    protocol; `interest`, `receive` and `send` are the ground floor, which never waits, for a protocol that
    awaits `ready` itself.  When a protocol returns, the client gets what is queued, then the end of
    file.  When it raises an exception, the client gets a reset.

    The socket is non-blocking although epoll has reported it ready: the event may be stale
    (an earlier event of the same batch has changed the state), a send may be larger than the
    free space in the kernel, and a task is also resumed without events.

    No code looks at EPOLLHUP and EPOLLERR: epoll reports EPOLLIN and EPOLLOUT with them, and
    the next read or write raises the error.
    """

    def __init__(self, server: Server, sock: socket.socket, name: str, address: str) -> None:
        self.server, self.loop, self.messages = server, server.loop, server.messages
        self.sock, self.descriptor, self.name, self.address = sock, sock.fileno(), name, address
        self.seated = time.monotonic()
        self.received = self.sent = 0  # bytes
        self.at_eof = False  # the client has closed or half-closed its side
        self.unsent = NOTHING  # data that the kernel has not accepted yet
        self.write_end = self.write_size = 0  # the last write() is complete when so many bytes are sent
        self.error: OSError | None = None  # why nothing more can be sent
        self.finished = False  # its protocol has returned: queue() adds nothing
        self.closed_by_protocol = False
        self.calls = self.exits = 0  # of write(); of waits after the task's end
        self.formatter: MessageFormatter | None = None  # from the first message on

    async def read(self, timeout: float | None = None) -> bytes:
        """Wait for data, print it as a message and return it; b"" is the end of file.

        Meanwhile, send what is queued.  Raises OSError if the connection is broken, TimeoutError after
        `timeout` seconds without data, EOFError when it is called again after the end of file.
        """
        deadline = await self.begin_wait(timeout)
        if self.at_eof:
            await fail(EOFError("read() after the end of file"))
        while True:
            await ready(self.interest)
            self.flush()
            data = self.receive()  # also after a failed send: what had arrived can still be read
            if data:
                return data
            late = time.monotonic() >= deadline and not self.unread() and not self.has_left()
            if self.at_eof and not self.error:
                return b""
            if self.error and (late or not self.messages.full):
                await fail(self.error)
            if late:
                await fail(TimeoutError(f"no data for {timeout:g} s"))

    async def write(self, data: bytes, timeout: float | None = None) -> None:
        """Send data, after what is queued; wait while the client reads slowly (backpressure).

        Raises OSError if the connection is broken, TimeoutError after `timeout` seconds.
        """
        deadline = await self.begin_wait(timeout)
        self.calls += 1
        if self.calls % CALLS == 0:  # a client that reads fast must not stop the others
            self.loop.wake([self.descriptor])
            await ready(self.loop.interests[self.descriptor])
        self.keep(data)
        end = self.write_end = self.sent + len(self.unsent)
        self.write_size = len(data)
        while self.sent < end and not self.error:
            if time.monotonic() >= deadline:
                await fail(TimeoutError(f"unsent data after {timeout:g} s"))
            await ready(EPOLLOUT)
            self.flush()
        if self.error:
            await fail(self.error)

    def queue(self, data: bytes) -> None:
        """Send what the kernel accepts now, and let the client's own task send the rest.

        Any task can call it.  A client that reads too slowly, so that its queue exceeds QUEUE_LIMIT bytes, is
        disconnected.  An error is raised in the client's own task.
        """
        self.keep(data)
        written = min(self.write_size, max(0, self.write_end - self.sent))  # by its own task
        if len(self.unsent) - written > QUEUE_LIMIT and not self.error:
            self.error = OSError(f"too slow: more than {QUEUE_LIMIT:,} bytes are queued")
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)  # epoll reports it, whatever the task waits for
        if self.unsent or self.error:
            self.loop.wake([self.descriptor])

    async def sleep(self, seconds: float) -> None:
        """Wait and read nothing, but send what is queued; other clients are served."""
        deadline = await self.begin_wait(seconds)
        while True:
            await ready(EPOLLOUT if self.unsent else 0)
            self.flush()
            if self.error:
                await fail(self.error)
            if time.monotonic() >= deadline:
                return

    async def begin_wait(self, timeout: float | None) -> float:
        """Let the loop wake the task after `timeout` seconds; return that time.

        Raises RuntimeError in another task, which would wait for the wrong descriptor; TypeError, ValueError.
        """
        task: Any = self.loop.tasks.get(self.descriptor)
        try:
            if self.sock.fileno() < 0:
                raise OSError("its protocol has closed the socket")
            if not task and self.exits < ERRORS:
                self.exits += 1
                self.error = self.error or OSError("the server has closed the connection")
                raise GeneratorExit  # the server ends the task: its `finally` cannot wait
            if not (task and task.cr_running):
                raise RuntimeError(f"only its own task can wait for {self.name}: use queue() to send it data")
            if timeout is None:
                return NEVER
            deadline = time.monotonic() + timeout
            self.loop.wake_at(deadline, self.descriptor)
            return deadline
        except Exception as error:  # a protocol that ignores it must not stop the others
            await fail(error)
            raise

    @property
    def interest(self) -> int:
        """What a client's task waits for: data that it can print, and space for unsent data."""
        reading = 0 if self.at_eof or self.messages.full else EPOLLIN
        return reading | EPOLLOUT if self.unsent and not self.error else reading

    def receive(self) -> bytes:
        """Read and print one chunk, at most READ_SIZE bytes; epoll reports the rest again.

        Returns b"" if nothing has arrived, if standard output is full, or at the end of file, which
        sets at_eof.  Raises OSError.
        """
        messages = self.messages
        if messages.full:
            return b""
        try:
            data = read(self.descriptor, READ_SIZE)
        except BlockingIOError:
            return b""
        self.received += len(data)
        if not data:
            self.at_eof = True
            if self.error:  # for example, the server has disconnected this client as too slow
                raise self.error
        if messages.open:
            self.show(data)
        return data

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send as many bytes as the kernel accepts now; return their number.  Raises OSError."""
        try:
            sent = write(self.descriptor, data)
        except BlockingIOError:
            return 0
        self.sent += sent
        return sent

    def send_file(self, file: int, offset: int, size: int) -> int:
        """Send bytes of a file, as `send` does; sendfile(2) copies nothing.  Raises OSError."""
        try:
            sent = os.sendfile(self.descriptor, file, offset, size)
        except BlockingIOError:
            return 0
        self.sent += sent
        return sent

    def keep(self, data: bytes) -> None:
        """Put data behind `unsent`, then send what the kernel accepts now."""
        if not (self.error or self.finished):
            self.unsent = self.unsent or bytearray()  # not NOTHING
            self.unsent += data
            self.flush()

    def flush(self) -> None:
        """Send as much of `unsent` as the kernel accepts now, and keep an OSError in `error`."""
        if self.unsent and not self.error:
            try:
                del self.unsent[: self.send(self.unsent)]  # this copies nothing, whatever the size
            except OSError as error:
                self.error = error

    def show(self, data: bytes, final: bool = False) -> None:
        """Print bytes as a message; `final` means that no more bytes follow."""
        if self.messages.failure:
            self.messages.lost += len(data)  # the server is about to exit: do not spend time on formatting
        elif data or self.formatter:
            self.formatter = self.formatter or MessageFormatter(
                f"{MESSAGE_TITLE} ({self.name}, {self.address})\n"
            )
            self.messages.write(self.formatter.format(data, final))

    def has_left(self) -> bool:
        """Return whether the client's end of file is the next thing to read.  Raises OSError."""
        with suppress(BlockingIOError):
            self.at_eof = not self.sock.recv(1, socket.MSG_PEEK)
        return self.at_eof

    def unread(self) -> int:
        """Return the number of bytes that have arrived and are unread: tcp(7), SIOCINQ."""
        with suppress(OSError, ValueError):  # the protocol has closed the socket
            return int.from_bytes(fcntl.ioctl(self.sock, termios.FIONREAD, bytes(4)), sys.byteorder)
        return 0


# -------------------------------------------------------------------- protocols


async def echo(client: Client) -> None:
    """Send each chunk back.  Read nothing while a chunk is unsent: this is backpressure."""
    messages = client.messages
    while not client.at_eof:
        await ready(0 if messages.full else EPOLLIN)
        data = client.receive()
        if data:
            sent = client.send(data)
            if sent < len(data):
                await client.write(data[sent:])
        del data  # an idle client keeps no chunk in memory


async def flood(client: Client) -> None:
    """Send pings as fast as the client reads them."""
    pings = client.server.pings = client.server.pings or Pings()
    while not client.at_eof:
        events = await ready(client.interest | EPOLLOUT)
        if events != EPOLLOUT:  # a wake tries both: the client that has waited longest is read first
            client.receive()
        if events != EPOLLIN and not client.at_eof:
            pings.send(client)
    cut = client.sent % len(PING)
    if cut:
        await client.write(PING[cut:])


async def heartbeat(client: Client) -> None:
    """Send one ping per beat, at the same time to all clients; skip beats while a ping is unsent."""
    first, every = client.server.serving_since, client.server.every
    beat = max(0, math.ceil((client.seated - first) / every))  # the number of the next beat
    while not (client.at_eof or client.error):
        client.loop.wake_at(first + beat * every, client.descriptor)
        await ready(client.interest)
        client.receive()
        client.flush()
        passed = (time.monotonic() - first) / every  # beats
        if passed >= beat:
            beat = math.floor(passed) + 1
            if not client.at_eof and not client.unsent:
                client.queue(PING)


class Pings:
    """A source of pings: a file in memory that is full of them, or memory if this is not possible."""

    def __init__(self) -> None:
        self.file = -1
        with suppress(AttributeError, OSError):  # an old C library, a sandbox, a limit on the size of files
            self.file = os.memfd_create("pings")
            if write(self.file, PINGS) + write(self.file, PING) == len(PINGS) + len(PING):
                return  # one ping more, because a send may begin inside a ping
        self.close()

    def send(self, client: Client) -> None:
        """Send as many pings as the kernel accepts now, from the byte at which the last send has ended."""
        cut = client.sent % len(PING)
        try:
            client.send(PINGS[cut:]) if self.file < 0 else client.send_file(self.file, cut, len(PINGS))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self.close()  # a container can allow memfd_create(2) and refuse sendfile(2)

    def close(self) -> None:
        """Close the file."""
        if self.file >= 0:
            close(os.close, self.file)
        self.file = -1


# -------------------------------------------------------------------- the server


class Server:
    """The clients, the start of serving, and the totals."""

    def __init__(self, loop: Loop, options: Any, protocol: Protocol, messages: Output, log: Output) -> None:
        self.loop, self.protocol, self.messages, self.log = loop, protocol, messages, log
        self.seats, self.wait_for, self.every = options.connections, options.wait_for, options.every
        self.unit, self.unit_size = ("ping", len(PING)) if protocol in (flood, heartbeat) else ("byte", 1)
        self.new_client = TracedClient if options.trace else Client
        self.listener = attempt(f"listen on {name_of((options.host, options.port))}", listen, options)
        self.pings: Pings | None = None  # from the first flood on
        self.clients: dict[int, Client] = {}  # by descriptor
        self.serving, self.serving_since = False, 0.0
        self.accepted = self.served = 0
        self.received = self.sent = 0  # bytes and units, of the clients that have disconnected
        loop.on_end = self.task_ended

    async def accept(self) -> None:
        """The listener's task: accept connections while a seat is free; others wait in the backlog."""
        reported = ""
        while True:
            try:  # an error of epoll_ctl(2) is also raised here
                if not self.serving and len(self.clients) >= self.wait_for:
                    self.loop.woken.pop(self.listener.fileno(), None)  # its turn is after the clients
                    self.loop.wake([*self.clients, self.listener.fileno()])
                    await ready(0)  # a client that has disconnected leaves now
                    if len(self.clients) >= self.wait_for:
                        self.begin()
                await ready(EPOLLIN if len(self.clients) < self.seats else 0)
                for _ in range(min(ACCEPTS, self.seats - len(self.clients))):
                    sock, address = self.listener.accept()
                    reported = ""
                    self.seat(sock, name_of(address))
                    if not self.serving and len(self.clients) >= self.wait_for:
                        break
            except OSError as error:
                if error.errno not in [getattr(errno, name) for name in NETWORK_ERRORS.split()]:
                    if why(error) != reported:
                        reported = why(error)
                        self.log.write_line(f"not accepting for now: {reported}")
                        if error.errno == errno.EMFILE and not self.clients:
                            self.log.write_line("no client can connect: raise the limit (ulimit -n)")
                    # The connection stays in the backlog, so epoll would report the listener on every wait.
                    self.loop.wake_at(time.monotonic() + RETRY_DELAY, self.listener.fileno())
                    await ready(0)

    def seat(self, sock: socket.socket, address: str) -> None:
        """Give a connection a seat and start its task."""
        descriptor = sock.fileno()
        if descriptor in self.clients:  # its number is free, so its socket is closed
            self.clients[descriptor].sock.detach()
        self.loop.end(descriptor, OSError("its protocol has closed the socket"))
        self.accepted += 1
        self.served += self.serving
        client = self.new_client(self, sock, f"client {self.accepted}", address)
        try:
            sock.setblocking(False)  # before another task can send something
        except OSError as error:
            client.error = error
        self.clients[descriptor] = client
        self.loop.start(client.name, descriptor, self.serve(client))
        self.log.write_line(f"{client.name} connected from {address}, {self.seats_taken()}")

    def begin(self) -> None:
        """Start serving: wake the tasks of the waiting clients."""
        self.serving, self.serving_since, self.served = True, time.monotonic(), len(self.clients)
        self.log.write_line(f"serving {count(self.served, 'client')}")
        self.loop.wake(self.clients)

    async def serve(self, client: Client) -> None:
        """A client's task: wait until serving starts, run the protocol, end the stream."""
        try:
            if client.error:
                raise client.error
            interest = EPOLLIN
            while not self.serving and not client.has_left():
                await ready(interest)
                interest = 0 if client.unread() else EPOLLIN  # leave the data in the kernel
            if client.at_eof:  # a port probe: it has connected, sent nothing and closed
                return
            await self.protocol(client)
            client.finished = True
            await client.write(b"")  # returns when everything is sent
            if not client.at_eof and not client.has_left():
                client.closed_by_protocol = True
                # Now only half-close: a reset could discard data in transit (RFC 1122, 4.2.2.13).
                client.sock.shutdown(socket.SHUT_WR)
                deadline = time.monotonic() + LINGER_TIMEOUT
                with suppress(TimeoutError):
                    while await client.read(deadline - time.monotonic()) and time.monotonic() < deadline:
                        pass
        except (*FATAL, GeneratorExit):
            raise
        except BaseException:  # the connection is broken, or the protocol has a fault
            with suppress(OSError):  # data that arrived before the error can still be read
                arrived = client.received + client.unread()
                while client.received < arrived and not client.at_eof:
                    while self.messages.full:
                        await ready(0)
                    client.receive()
            raise

    def task_ended(self, descriptor: int, error: BaseException | None) -> None:
        """Log the mistake that has ended a task; disconnect the client if it was a client's task."""
        client = self.clients.get(descriptor)
        if error and not (client and isinstance(error, OSError)):
            self.log.write_line(describe(error))
        if client:
            reason = self.reason(client, error)
            client.show(b"", final=True)
            self.forget(client, complete=not error)
            totals = self.totals(client.received, client.sent // self.unit_size)
            counted = "" if self.serving else ", not counted as a client"
            self.log.write_line(f"{client.name} {reason}: {totals}{counted}, {self.seats_taken()}")
            self.loop.wake([self.listener.fileno()])  # the next connection in the backlog can get the seat

    def reason(self, client: Client, error: BaseException | None) -> str:
        """Return in what way a client's connection has ended, for the log."""
        if error is None:
            return "was closed by its protocol" if client.closed_by_protocol else "left"
        if not isinstance(error, OSError):
            return f"was lost ({type(error).__name__} in its protocol)"
        with suppress(OSError):  # if the kernel still has the connection, the error is not a reset
            if error.errno not in RESET_ERRORS or client.sock.getpeername():
                return f"was lost ({why(error)})"
        return "was reset"

    def forget(self, client: Client, complete: bool) -> None:
        """End a client's task, close its connection and free the seat.

        If the stream is incomplete, send a reset, so that the client knows that data is missing.
        """
        del self.clients[client.descriptor]
        self.received += client.received
        self.sent += client.sent // self.unit_size
        try:
            self.loop.end(client.descriptor)  # before the socket is closed
        finally:  # also if the protocol's own `finally` ends the server
            client.descriptor = -1  # the number can belong to another client soon
            with suppress(OSError):
                if not complete:
                    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            close(client.sock.close)

    def finish(self) -> None:
        """Serve the data that has arrived, then end all tasks of clients.

        This is the same loop, but it resumes only clients that have sent data or have unsent data.  It goes
        on until there are none, or for FINISH_TIMEOUT, or as long as data that has arrived becomes less.
        """
        arrived = {client: client.received + client.unread() for client in self.clients.values()}
        if not self.serving:  # a client that has sent something is served now
            self.serving, self.served = True, sum(size > 0 for size in arrived.values())
        self.loop.wake(self.clients)  # a client that waited is served
        deadline, left = time.monotonic() + FINISH_TIMEOUT, NEVER
        while True:
            self.loop.resume(self.loop.due())
            self.messages.drain()
            clients = self.clients
            unsent = any(client.unsent for client in clients.values())
            events = self.loop.epoll.poll(FINISH_POLL if unsent else 0, len(self.loop.tasks) + 1)
            batch = [(d, e) for d, e in events if d in clients and (e & EPOLLIN or clients[d].unsent)]
            if not (batch or unsent or self.loop.woken):
                break
            before, left = left, sum(max(0, arrived.get(c, 0) - c.received) for c in clients.values())
            if time.monotonic() > deadline and left >= before:
                break
            self.loop.resume(batch)
        for client in list(self.clients.values()):
            self.cut_off(client, arrived.get(client, 0))

    def cut_off(self, client: Client, arrived: int) -> None:
        """Print data that has arrived, complete a cut ping, end the task and the connection."""
        unsent = client.unsent or self.loop.interests.get(client.descriptor, 0) & EPOLLOUT
        complete = self.unit == "ping" or not (unsent or client.unread())
        with suppress(OSError):  # the connection is broken
            while client.received < arrived:  # for example, because the client does not read its echo
                self.messages.drain()
                if not client.receive():
                    break
            client.show(b"", final=True)
            if client.sent % self.unit_size:
                with suppress(OSError):  # 0 removes the limit, so that the rest of the ping fits
                    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0)
                client.send(PING[client.sent % self.unit_size :])
        self.forget(client, complete and client.sent % self.unit_size == 0)

    def summary(self) -> str:
        """Return the last line of the log."""
        dropped = f", {count(self.log.dropped, 'log line')} dropped" if self.log.dropped else ""
        totals = self.totals(self.received, self.sent)
        return f"stopped: {count(self.served, 'client')} served, {totals}{dropped}"

    def seats_taken(self) -> str:
        """Return how many seats are taken, as text."""
        return f"{len(self.clients):,} of {count(self.seats, 'seat')} taken"

    def totals(self, received: int, sent: int) -> str:
        """Return bytes received and units (bytes or pings) sent, as text."""
        return f"{count(received, 'byte')} received, {count(sent, self.unit)} sent"

    def close(self) -> None:
        """Close all sockets and the file of pings."""
        for client in list(self.clients.values()):
            self.forget(client, complete=False)
        close(self.listener.close)
        if self.pings:
            self.pings.close()


# accept(2): the backlog is empty, or the connection that accept would have returned is broken.
NETWORK_ERRORS = (
    "EAGAIN ECONNABORTED EPROTO ENETDOWN ENOPROTOOPT EHOSTDOWN ENONET EHOSTUNREACH EOPNOTSUPP ENETUNREACH"
)
RESET_ERRORS = errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN


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
    needed = [(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)]  # a restart works while old connections exist
    if options.reuse_port:
        needed.append((socket.SOL_SOCKET, socket.SO_REUSEPORT, 1))
    if family == socket.AF_INET6:
        needed.append((socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::"))  # :: also accepts IPv4
    tuning = (  # socket(7), tcp(7); the connections inherit these options
        (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),  # an urgent byte keeps its place in the stream
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),  # a short answer leaves immediately
        (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 16384),  # bounds the kernel memory of unread pings
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # detects a peer that vanished without closing:
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),  # after 60 s of silence,
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),  # probes it every 10 s,
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),  # 6 times
        (socket.IPPROTO_TCP, TCP_RTO_MAX_MS, 10000),  # also detects one that does not acknowledge data
    )
    try:
        for option in needed:
            sock.setsockopt(*option)
        for option in tuning:
            with suppress(OSError):  # this system does not have it
                sock.setsockopt(*option)
        sock.bind(address)
        sock.listen(65535)  # the kernel reduces it to net.core.somaxconn
        sock.setblocking(False)  # a connection may vanish after epoll has reported it
    except BaseException:
        sock.close()
        raise
    return sock


# -------------------------------------------------------------------- the text of messages


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
        text = escape(text[:-1] if text.endswith("\n") else text)
        imitates = text.startswith(MESSAGE_TITLE) if text.isascii() else re.match(HEADER_LIKE, text)
        return f"{self.header}{'  ' if imitates else ''}{text}\n"


JAMO = "\u1160-\u11ff\ud7b0-\ud7ff"  # letters that terminals draw over the character before them
GAP = rf"(?:[^\w.\u2024-\u2026\uff0e\n]|[{JAMO}])*"  # spaces and marks
HEADER_LIKE = (  # what looks like MESSAGE_TITLE, perhaps with foreign letters or marks in it
    "".join(rf"{GAP}(?:{letter}|[^\W\0-\x7f{JAMO}])" for letter in "datareceived")
    + rf"{GAP}(?:[\u2025\u2026]|[.\u2024\uff0e]{GAP}[.\u2024\uff0e\u2025])"  # two dots or more
)


def escape(text: str) -> str:
    r"""Escape characters that could harm a terminal or mislead a reader: `\x1b`, `\u202e`, `\U000e0041`.

    These are all controls except tab, line and paragraph separators, all format, surrogate,
    private-use and unassigned characters except joiners, and characters that no terminal shows.
    Lines after the first are indented.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text.replace("\n", "\n  ")
    text = text.translate(ESCAPES)
    # An emoji selector changes the character before it.  Without one, it is not visible.
    return re.sub("(?<![^\\s\u200c\u200d\ufe0f])\ufe0f", r"\\ufe0f", text) if "\ufe0f" in text else text


class Escapes(dict):  # type: ignore[type-arg]
    """A table for str.translate: how to show each character.  An entry is made at its first use."""

    SIZE = 0x10000  # the most entries

    def __missing__(self, code: int) -> str:
        """Return how to show a character."""
        shown = chr(code)
        if code == ord("\n"):
            shown = "\n  "
        elif not (shown.isprintable() or shown in SHOWN) or code in INVISIBLE:
            shown = ascii(shown)[1:-1] if shown != "\r" else "\\x0d"  # not `\r`
        if len(self) >= self.SIZE:
            self.clear()
        self[code] = shown
        return shown


ESCAPES = Escapes()
# str.isprintable() rejects these: a tab, spaces, and the joiners of Persian words and emoji families.
SHOWN = (
    "\t\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
    "\u200c\u200d"
)
INVISIBLE = {  # str.isprintable() accepts these, but a reader cannot see them: fillers and selectors
    *(0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x3164, 0xFFA0),
    *range(0xFE00, 0xFE0F),
    *range(0xE0100, 0xE01F0),
}


# -------------------------------------------------------------------- standard output and standard error


class Output:
    """A queue for standard output or standard error, which may stall like any peer.

    An error of standard output ends the server.  While standard error is full or cannot be written,
    lines of the log are dropped and counted.
    """

    def __init__(self, loop: Loop, name: str, stream: TextIO | None, stack: ExitStack) -> None:
        """`stream` is None if the output was closed before the start, or is not wanted."""
        self.loop, self.name, self.open = loop, name, stream is not None
        self.queue = bytearray()
        self.full = False  # set above OUTPUT_LIMIT, reset when everything is written
        self.dropped = 0  # log lines
        self.failure = ""  # why nothing more is written
        self.lost = 0  # bytes that were queued and not written
        self.in_line = False  # the last line is not complete
        self.drain_time = DRAIN_TIMEOUT  # seconds that drain() can still wait
        self.descriptor = -1
        if stream is not None:
            self.descriptor, self.write_limit = attempt(f"use {name}", open_output, stream, stack)
            encoding = getattr(stream, "encoding", None) or "utf-8"
            encoder = codecs.getincrementalencoder(encoding)("backslashreplace")
            with suppress(OSError):
                if os.fstat(self.descriptor).st_size:  # the file has its byte order mark
                    encoder.setstate(0)
            self.encode = encoder.encode
            self.newline = "\n\n".encode(encoding)[len("\n".encode(encoding)) :]

    def write(self, text: str) -> None:
        """Queue text.  The caller must check `full` first, because the queue has no limit."""
        if self.open and text:
            if not self.queue:
                self.loop.wake([self.descriptor])  # run() writes it after this batch of events
                if self.in_line:
                    self.queue += self.newline
            self.queue += self.encode(text)
            self.full = self.full or len(self.queue) > OUTPUT_LIMIT

    def write_line(self, line: str) -> None:
        """Queue a line of the log, or drop and count it while the output is full."""
        if self.full:
            self.dropped += 1
            self.loop.wake([self.descriptor] if self.failure else [])
        else:
            self.write(f"{line}\n")

    async def run(self) -> None:
        """The output's task: write the queue as fast as the reader reads it."""
        reported, problem = 0, ""  # dropped lines that the log has reported, and why others are dropped
        while True:
            if not await self.written():
                if self.name == "standard output":
                    raise SystemExit(f"{self.name} {self.failure}")
                problem = f" (it {self.failure})"
                self.dropped += self.queue.count(self.newline)
                self.queue.clear()
                self.full, retry = True, time.monotonic() + RETRY_DELAY
                while time.monotonic() < retry:
                    await self.wait(0)  # until a line is dropped
                self.failure = ""
            elif self.dropped > reported:
                dropped = self.dropped
                lines = count(dropped - reported, "log line")
                self.write(f"{lines} dropped: {self.name} was full{problem}\n")
                if await self.written():
                    reported, problem = dropped, ""
                else:
                    self.queue.clear()
            elif self.full:
                self.full = False
                self.loop.wake(self.loop.interests)  # clients can be read again: the oldest waits come first
            else:
                await self.wait(0)

    async def written(self) -> bool:
        """Wait until the queue is written; return False after a failure."""
        while self.flush():
            await self.wait(EPOLLOUT)
        return not self.failure

    async def wait(self, interest: int) -> None:
        """Wait as `ready` does.  If epoll cannot watch the output, wait RETRY_DELAY."""
        try:
            await ready(interest)
        except OSError:  # no memory, or too many watches
            self.loop.wake_at(time.monotonic() + RETRY_DELAY, self.descriptor)
            await ready(0)

    def flush(self) -> bool:
        """Write as much as the kernel accepts now; return whether the rest can be written later.

        An error is kept in `failure`.
        """
        try:
            for _ in range(WRITES):
                if self.failure or not self.queue:
                    break
                if self.write_limit and not is_ready(self.descriptor, EPOLLOUT, 0.0):
                    break
                size = write(self.descriptor, self.queue[: self.write_limit])
                self.in_line = not self.queue.endswith(self.newline, 0, size)
                del self.queue[:size]
        except BlockingIOError:
            pass
        except OSError as error:
            self.failure = f"can no longer be written: {why(error)}"
        return bool(self.queue and not self.failure)

    def drain(self) -> None:
        """Write everything.  Drop the rest if a write waits FLUSH_TIMEOUT, or all together DRAIN_TIMEOUT."""
        deadline = time.monotonic() + self.drain_time
        while self.flush():
            if time.monotonic() > deadline:
                self.failure = "is too slow"
            elif not is_ready(self.descriptor, EPOLLOUT, FLUSH_TIMEOUT):
                self.failure = "has stalled"
        self.drain_time = deadline - time.monotonic()
        self.lost += len(self.queue)
        self.queue.clear()
        if self.full:
            self.full = False
            self.loop.wake(self.loop.interests)


def open_output(stream: TextIO, stack: ExitStack) -> tuple[int, int | None]:
    """Return a descriptor to write to, and the most bytes per write (None: no limit).

    `stack` closes the descriptor if it is not the stream's own.  Raises OSError, ValueError.
    """
    try:
        stream.flush()  # before our own text
        given = stream.fileno()
    except (AttributeError, io.UnsupportedOperation):
        raise ValueError("it has no descriptor") from None
    status, terminal = os.fstat(given), os.isatty(given)
    is_pipe = stat.S_ISFIFO(status.st_mode)
    writable = fcntl.fcntl(given, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR)
    if not writable or not (terminal or is_pipe or stat.S_ISSOCK(status.st_mode)):
        return given, None  # a file has no reader to wait for
    # O_NONBLOCK on an inherited descriptor affects every process that shares it, so open the output again,
    # if that opens the same thing.  Major number 5 are /dev/tty and /dev/ptmx, which open another terminal.
    if is_pipe or (terminal and os.major(status.st_rdev) != 5):
        with suppress(OSError):  # another user's terminal (after su), or no /proc
            descriptor = os.open(f"/proc/self/fd/{given}", os.O_WRONLY | os.O_NONBLOCK)
            stack.callback(close, os.close, descriptor)
            return descriptor, None
    return given, 1 if terminal else PIPE_BUF  # pipe(7)


def is_ready(descriptor: int, interest: int, timeout: float) -> bool:
    """Wait up to `timeout` seconds for one descriptor; poll(2) also accepts files and uses epoll's bits."""
    poller = poll()
    poller.register(descriptor, interest)
    return bool(poller.poll(timeout * 1000))


def log_warnings(log: Output, stack: ExitStack) -> None:
    """Write what Python would print itself to the log, such as the warning about a forgotten `await`."""

    def show(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        """Log a warning, in the place of warnings.showwarning()."""
        log.write_line(escape(warnings.formatwarning(message, category, filename, lineno).rstrip()))

    def show_ignored(ignored: Any) -> None:
        """Log an exception that Python cannot raise, in the place of sys.unraisablehook()."""
        log.write_line(f"Exception ignored: {describe(ignored.exc_value)}")

    stack.callback(setattr, warnings, "showwarning", warnings.showwarning)
    stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
    warnings.showwarning, sys.unraisablehook = show, show_ignored


# -------------------------------------------------------------------- signals


def catch_signals(loop: Loop, stack: ExitStack) -> int:
    """Let the stop signals end the loop, until `stack` ends: then the handlers and the mask are as before.

    Returns a descriptor that becomes readable when a signal arrives: signal.set_wakeup_fd().
    """
    process = os.getpid()

    def end_loop(number: int, frame: Any) -> None:
        """Handle a stop signal."""
        if os.getpid() == process:
            if loop.running:  # the first of many, which would interrupt this handler
                signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            loop.running = False
            with suppress(OSError):  # wakes epoll even if a library has replaced the wakeup descriptor
                write(writer, b"\0")
        else:  # a forked child has inherited this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    stack.callback(close, os.close, reader)
    stack.callback(close, os.close, writer)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    stack.callback(signal.set_wakeup_fd, before)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup(1): it stays ignored
            stack.callback(signal.signal, number, signal.signal(number, end_loop))
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a parent may have blocked them
    stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
    return reader


async def read_signals(reader: int) -> None:
    """The signal pipe's task: empty it.  A signal writes a byte there, so that epoll stops waiting."""
    while True:
        try:
            await ready(EPOLLIN)
            read(reader, READ_SIZE)
        except BlockingIOError:  # woken by another task
            pass
        except OSError as error:
            raise SystemExit(f"cannot watch for signals: {why(error)}") from None


# -------------------------------------------------------------------- the trace


class TracedLoop(Loop):
    """A loop that logs which tasks it resumes, with which events, and what they wait for (--trace)."""

    log: Output  # run() sets it before the first task starts

    def __init__(self) -> None:
        super().__init__()
        self.start_time = time.monotonic()
        self.names: dict[int, str] = {}  # by descriptor; "" for outputs, because each line would cause more

    def trace(self, text: str) -> None:
        """Log a line: the seconds since the start, and the text."""
        self.log.write_line(f"{time.monotonic() - self.start_time:8.3f}  {text}")

    def start(self, name: str, descriptor: int, task: Task) -> None:
        """Start a task; log it under this name, if it has one."""
        super().start(name, descriptor, task)
        self.names[descriptor] = name

    def wait(self) -> list[tuple[int, int]]:
        """Wait; log how many descriptors are ready, and after how long."""
        before = time.monotonic()
        batch = super().wait()
        if batch:  # polls that report nothing are not logged
            self.trace(f"epoll_wait: {len(batch)} ready after {time.monotonic() - before:.3f} s")
        return batch

    def resume(self, batch: Iterable[tuple[int, Any]]) -> None:
        """Resume tasks; log each one, with its events, before it runs."""
        for descriptor, events in batch:
            if descriptor in self.tasks and self.names[descriptor]:
                self.trace(f"  {self.names[descriptor]}: {event_names(events or 0) or 'woken'}")
            super().resume([(descriptor, events)])

    def watch(self, descriptor: int, interest: Any) -> None:
        """Register an interest; log it if it has changed."""
        before = self.interests[descriptor]
        super().watch(descriptor, interest)
        if self.names[descriptor] and interest != before:
            waits_for = event_names(interest) or "a wake"
            self.trace(f"    epoll_ctl: {self.names[descriptor]} waits for {waits_for}")


class TracedClient(Client):
    """A client that logs what it receives and sends."""

    def receive(self) -> bytes:
        """Receive; log the number of bytes, or the end of file."""
        before = self.at_eof
        data = super().receive()
        if data or self.at_eof != before:
            self.trace(f"received {len(data):,}" if data else "end of file")
        return data

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send; log the number of bytes."""
        sent = super().send(data)
        self.trace(f"sent {sent:,}")
        return sent

    def send_file(self, file: int, offset: int, size: int) -> int:
        """Send bytes of a file; log their number."""
        sent = super().send_file(file, offset, size)
        self.trace(f"sent {sent:,}")
        return sent

    def trace(self, text: str) -> None:
        """Log a line below the one that shows which task is resumed."""
        assert isinstance(self.loop, TracedLoop)
        self.loop.trace(f"    {self.name}: {text}")


def event_names(events: int) -> str:
    """Return an event mask in epoll's words: `EPOLLIN EPOLLOUT`."""
    names = {EPOLLIN: "EPOLLIN", EPOLLOUT: "EPOLLOUT", EPOLLERR: "EPOLLERR", EPOLLHUP: "EPOLLHUP"}
    return " ".join(name for bit, name in names.items() if events & bit) or (hex(events) if events else "")


# -------------------------------------------------------------------- the command line

DESCRIPTION = "Serve TCP clients in one thread: send them pings, and print what they send."
EXAMPLES = """\
examples:
  two terminals (serving starts when the second client connects):
    python3 non_block_io_server.py
    python3 client.py
  an echo for tests, on a free port that the first line shows:
    python3 non_block_io_server.py --echo --port 0 --connections 100 --wait-for 1
  a heartbeat:
    python3 non_block_io_server.py --every 1 --wait-for 1

"""
EPILOG = """\
With --host 0.0.0.0 (every IPv4 address) or :: (also IPv6), anyone who can reach this machine can connect.

exit status:
  0  stopped by SIGINT, SIGTERM or SIGHUP
  1  the server cannot continue; one line gives the reason
  2  wrong usage
"""
NO_EPOLL = """\
this system has no epoll: run the server on Linux, in a container (docker run --rm -it -p 10001:10001 \
-v "$PWD:/app" python /app/non_block_io_server.py --host 0.0.0.0), a virtual machine or WSL"""
IN_USE = "address already in use (another program uses this port; stop it, or choose another with --port)"


def count(number: int, noun: str) -> str:
    """Return a number with its noun in the right form: `1 ping`, `1,204,113 pings`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def why(error: BaseException) -> str:
    """Return why a call failed, in the system's words if it has any: `No space left on device`."""
    if getattr(error, "errno", 0) == errno.EADDRINUSE:
        return IN_USE
    if isinstance(error, UnicodeError):
        return "this is no name of a host"
    try:
        return escape(str(getattr(error, "strerror", None) or error)) or type(error).__name__
    except Exception:  # an error of a protocol can have any text
        return type(error).__name__


def describe(error: BaseException) -> str:
    """Return an exception with its traceback, as text that is safe on a terminal."""
    try:
        import traceback  # here, because its import would make the start slower

        lines = traceback.format_exception(type(error), error, error.__traceback__)
    except Exception:  # for example, no descriptor is free for an import
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = f" ({place.tb_frame.f_code.co_filename}, line {place.tb_lineno})" if place else ""
        lines = [f"{type(error).__name__}: {why(error)}{where}"]
    return escape("".join(lines).rstrip())


def name_of(address: Any) -> str:
    """Return a socket's address as text: `127.0.0.1:10001`, `[::1]:10001`, `[fe80::1%eth0]:10001`."""
    host, port = address[:2]
    if len(address) == 4 and address[3]:  # the interface of a link-local address
        with suppress(OSError, AttributeError):  # it has vanished, or this is PyPy
            host += f"%{socket.if_indextoname(address[3])}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def arguments(protocol: Protocol | None = None) -> argparse.Namespace:
    """Return the options of the command line, for a protocol of one's own or the built-in ones (None).

    Wrong usage raises SystemExit, with status 2.
    """
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EXAMPLES + EPILOG, formatter_class=style)
    if protocol:
        text = (getattr(protocol, "__doc__", None) or "Serve TCP clients in one thread.").strip()
        parser.description, parser.epilog = re.sub("\n[ \t]+", "\n", text), EPILOG
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=10001, help="port; 0 is any free one (default: %(default)s)")
    add("--connections", type=int, default=2, metavar="N", help="number of seats (default: %(default)s)")
    add("--wait-for", type=int, metavar="M", help="start serving when M clients are connected (default: N)")
    parser.set_defaults(echo=False, every=None)
    if not protocol:
        kind = parser.add_mutually_exclusive_group()
        kind.add_argument("--echo", action="store_true", help="send each client its own bytes, not pings")
        kind.add_argument("--every", type=float, metavar="SECONDS", help="send one ping every SECONDS")
    add("--quiet", action="store_true", help="print no messages")
    add("--reuse-port", action="store_true", help="share the port with other copies (SO_REUSEPORT)")
    add("--trace", action="store_true", help="log each event and its effects, but no busy polls")
    options = parser.parse_args()
    if options.wait_for is None:
        options.wait_for = options.connections
    limits = {"port": (0, 65535), "connections": (1, 10**7), "wait_for": (1, options.connections)}
    for name, (least, most) in limits.items():
        if not least <= getattr(options, name) <= most:
            hint = ", the number of --connections" if name == "wait_for" else ""
            parser.error(f"argument --{name.replace('_', '-')}: must be from {least} to {most}{hint}")
    if options.every is not None and not 1e-9 <= options.every < NEVER:
        parser.error("argument --every: must be a finite number of seconds, at least 1e-9")
    options.host = options.host.strip("[]")  # the first line shows an IPv6 address in brackets
    if options.host in ("", "*"):
        parser.error("argument --host: for every address use 0.0.0.0 (IPv4) or :: (also IPv6)")
    return options


def main(protocol: Protocol | None = None) -> None:
    """Serve until a stop signal, with the options of the command line.

    `protocol` is an `async def` function that serves one client (default: flood, echo or heartbeat).
    Afterwards, the process has the signal handlers and the open files that it had before.

    Raises SystemExit: with 1 if the server cannot continue, after a line that gives the reason; with 2
    after wrong usage.  A protocol's own SystemExit or KeyboardInterrupt also goes on to the caller.
    """
    try:
        options = attempt("read the options", arguments, protocol)
        if epoll is None:
            sys.exit(NO_EPOLL)
        kind = echo if options.echo else heartbeat if options.every else flood
        with ExitStack() as stack:
            run(options, protocol or kind, stack)
    except (SystemExit, MemoryError, OSError) as end:
        reason = end.code if isinstance(end, SystemExit) else OUT_OF_MEMORY
        if isinstance(end, OSError):
            reason = f"cannot put back what the process had before: {why(end)}"
        if not isinstance(reason, str):
            raise
        with suppress(OSError):  # Python would print it, but not in a thread, and not without memory
            write(2, f"{reason}\n".encode(errors="backslashreplace"))
        raise SystemExit(1) from None


def run(options: argparse.Namespace, protocol: Protocol, stack: ExitStack) -> None:
    """Start the tasks, run the loop and stop.  `stack` undoes everything.

    Raises SystemExit, KeyboardInterrupt, MemoryError: see main.
    """
    loop = attempt("create an epoll instance", TracedLoop if options.trace else Loop)
    stack.callback(loop.close)
    signals = attempt("catch signals", catch_signals, loop, stack)
    messages = Output(loop, "standard output", None if options.quiet else sys.stdout, stack)
    log = Output(loop, "standard error", sys.stderr, stack)
    both = messages.open and log.open
    if both and attempt(f"use {messages.name}", os.path.sameopenfile, messages.descriptor, log.descriptor):
        log = messages  # two queues would write into the middle of each other's lines
    log_warnings(log, stack)
    server = Server(loop, options, protocol, messages, log)
    stack.callback(server.close)
    address = name_of(attempt("read the listener's address", server.listener.getsockname))
    log.write_line(f"listening on {address}, waiting for {count(options.wait_for, 'client')}")
    if isinstance(loop, TracedLoop):
        loop.log = log
    raise_file_limit(options.connections, log, stack)
    if not messages.open and not options.quiet:
        log.write_line("standard output is not open: messages are not shown")
    for output in {messages, log}:
        if output.open:
            loop.start("", output.descriptor, output.run())
    loop.start("signals", signals, read_signals(signals))
    loop.start("listener", server.listener.fileno(), server.accept())
    end = None
    try:
        attempt("wait for events", loop.run)
    except FATAL as error:
        end = error
    if messages.failure and loop.running:  # Ctrl-C may also end our reader: the pipe breaks before the signal
        is_ready(signals, EPOLLIN, SIGNAL_TIMEOUT)
    stop(server, end if loop.running else None)


def stop(server: Server, end: BaseException | None) -> None:
    """Serve data that has arrived and write the last lines; raise what has ended the loop, if any."""
    messages, log = server.messages, server.log
    for descriptor in server.listener.fileno(), messages.descriptor, log.descriptor:
        server.loop.end(descriptor)  # accept no more clients; from now on, drain() writes
    while not isinstance(end, MemoryError):
        try:
            server.finish()
            break
        except FATAL as error:  # from a protocol
            end = error if isinstance(error, MemoryError) else end or error
    reason = OUT_OF_MEMORY if isinstance(end, MemoryError) else getattr(end, "code", None)
    failure = reason if isinstance(reason, str) else ""
    if log is not messages:
        log.failure = ""  # try again
    log.write(f"{failure or server.summary()}\n")
    messages.drain()
    if messages.lost and not failure:
        log.write(f"{messages.name} {messages.failure}: {count(messages.lost, 'byte')} not written\n")
    log.drain()
    if failure:
        raise SystemExit(1)
    if end:
        raise end


def close(function: Callable[..., None], *descriptor: int) -> None:
    """Call a function that closes a descriptor.  close(2): it is free even after an error."""
    with suppress(OSError):
        function(*descriptor)


def attempt(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments).  An error becomes SystemExit, with what failed and why."""
    try:
        return function(*arguments)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot {what}: {why(error)}") from None


def raise_file_limit(connections: int, log: Output, stack: ExitStack) -> None:
    """Raise the soft limit on open files, as far as the hard limit allows; log a warning if it is too low."""
    need = connections + SPARE_FILES
    try:
        need = max(need, connections + len(os.listdir("/proc/self/fd")))  # a parent may leave many files open
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < need:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(need, hard), hard))
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        if hard < need:
            log.write_line(f"the seats need {need:,} open files, but the hard limit is {hard:,} (ulimit -Hn)")
    except (OSError, ValueError) as error:
        log.write_line(f"cannot raise the limit on open files to {need:,}: {why(error)}")


if __name__ == "__main__":
    if epoll is not None:  # main() unblocks them: so a further Ctrl-C at Python's exit changes no exit status
        with suppress(OSError):  # a sandbox may forbid this call
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    main()
