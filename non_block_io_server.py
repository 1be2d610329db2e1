#!/usr/bin/env python3
"""A TCP server that serves many clients in one thread, and never blocks.

The question.  A socket blocks: `recv` waits until something arrives, and the whole program
waits with it.  How can one program serve several connections at once, without processes
and without threads?

The answer is an event loop.  Wait for all of them at once, in one call, and then do only
what can be done without waiting:

    while running:
        for descriptor, events in epoll.poll():      # sleeps until somebody is ready
            handlers[descriptor](events)             # reads or writes what it can, now

Who lives in the loop.  Each owns its descriptor, its interest (what epoll is to report)
and its end:

    event                        who handles it        what happens
    ---------------------------  --------------------  -----------------------------------
    a connection has come        Listener              it takes a seat, if one is free
    a client has sent something  Client                it is shown as a message
    a client can be written to   Flood                 it is sent pings, all that it takes
                                 Echo (--echo)         ... or its own bytes
    it is time for a beat        Heartbeat (--every)   ... or one ping
    an output can be written to  Output                what waits for it is written
    SIGINT or SIGTERM            StopSignal            the loop ends

With no option this is the lecture's server: it accepts two clients, then serves both.
What they send goes to standard output, everything else to standard error.
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
import stat
import sys
import time
from os import read, write

try:
    import resource
    from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, PIPE_BUF, epoll, select
except ImportError:
    sys.exit("this system has no epoll: run the server on Linux, in a container, a virtual machine or WSL")

TYPE_CHECKING = False  # as in typing, whose import would lengthen the start
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, TextIO

# -------------------------------------------------------------------- words and constants

PING = b"ping"
PINGS = memoryview(PING * 65536)  # 256 KiB a send; at 4 bytes a send the calls cost more than the bytes
RESTS = b"", b"ing", b"ng", b"g"  # what a ping still lacks, by the letters that were sent

READ_SIZE = 65536  # bytes of one read: how much of everybody's time one client may take
PENDING_LIMIT = 1024 * 1024  # characters that a stalled output takes, until all has gone out
ACCEPTS = 16  # connections taken at a time: a burst of them must not starve the connected
SPARE_FILES = 16  # descriptors besides the seats': standard streams, epoll, listener, signals
GLANCES = 16  # looks before a sleep: to fall asleep and to wake up takes longer than an echo
MOMENT = 1.0  # seconds until the listener tries again, where nobody leaves before
PATIENCE = 1.0  # seconds in which a stalled output must move, or be given up, when all ends
DAY = 86400.0  # seconds; epoll_wait(2) takes no timeout of more than 24 days

OPTIONS = (  # set on the listener, inherited by its connections: socket(7), tcp(7)
    (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),  # can restart at once, though old connections linger
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # a machine that vanished does not keep its seat
    (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),  # an urgent byte keeps its place, and is not lost
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),  # a short answer leaves at once
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 16384),  # who does not read costs kB, not MB
)
SHORTAGE = errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM  # accept(2): it may work later

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but tab and newline, DEL, C1


def count(number: int, noun: str) -> str:
    """How a person writes it: `1 ping`, `1,204,113 pings`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def name_of(address: Any) -> str:
    """A socket's address as text: `127.0.0.1:10001`, `[::1]:10001`."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# -------------------------------------------------------------------- the loop


class Loop:
    """Waits, looks up whose descriptor it is, hands over."""

    def __init__(self) -> None:
        self.running = True
        self.epoll = epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.interests: dict[int, int] = {}
        # What is to be called once, and its time.monotonic() in seconds; 0 is right after this batch.
        self.timers: dict[Callable[[], None], float] = {}

    def run(self) -> None:
        """Serve until `running` is false.  No handler may block."""
        handlers = self.handlers
        while self.running:
            for descriptor, events in self.wait():
                handlers[descriptor](events)
            for callback in self.due():
                callback()

    def wait(self) -> Iterable[tuple[int, int]]:
        """Wait until something is ready or a timer is due; (descriptor, event mask) of the ready."""
        for _ in range(GLANCES):
            ready = self.epoll.poll(0)
            if ready:
                return ready
            os.sched_yield()
        if not self.timers:
            return self.epoll.poll()
        return self.epoll.poll(min(max(0.0, min(self.timers.values()) - time.monotonic()), DAY))

    def due(self) -> Iterable[Callable[[], None]]:
        """The callbacks whose time has come, each given out once."""
        now = time.monotonic()
        callbacks = [callback for callback, when in self.timers.items() if when <= now]
        for callback in callbacks:
            del self.timers[callback]
        return callbacks

    def watch(self, descriptor: int, interest: int, handler: Callable[[int], None]) -> None:
        """From now on call handler(events) when something of the interest is true of the descriptor.

        With no interest the descriptor leaves the set: a reset would be reported even so, and
        without end (epoll_ctl(2)).
        """
        before = self.interests.get(descriptor, 0)
        if interest == before:
            return
        self.handlers[descriptor], self.interests[descriptor] = handler, interest
        if not before:
            self.epoll.register(descriptor, interest)
        elif interest:
            self.epoll.modify(descriptor, interest)
        else:
            self.epoll.unregister(descriptor)
            self.handlers[descriptor] = lambda events: None  # one of this batch may still come


# -------------------------------------------------------------------- those who live in it


class StopSignal:
    """Ends the loop on SIGINT or SIGTERM, between two events and never in the middle of one.

    A signal is made a descriptor, too: signal.set_wakeup_fd() writes a byte into a pipe.
    """

    name = "signal"

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # the byte is written where Python has a handler
        loop.watch(reader, EPOLLIN, self.ready)

    def ready(self, events: int) -> None:
        """Stop.  From here on Python's own end would let a second signal kill: it is ignored."""
        self.loop.running = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


class Output:
    """A text stream that may stall: standard output or standard error.

    What is written while a batch of events is handled goes out after it, as far as the
    reader takes it; the rest waits for EPOLLOUT, as for any peer.  Nobody adds to more than
    PENDING_LIMIT; `drained` is called when so much has gone out.
    """

    def __init__(self, loop: Loop, stream: TextIO | None, name: str, vital: bool) -> None:
        self.loop, self.name, self.vital = loop, name, vital
        self.open = stream is not None  # None: whoever started us had closed it
        self.drained: Callable[[], None] = lambda: None
        self.texts: list[str] = []
        self.unsent = memoryview(b"")
        self.size = self.sent = 0  # characters since nothing waited, bytes that have gone out
        if stream:
            self.descriptor, self.encoding = stream.fileno(), stream.encoding
            self.own = self.reopened()

    def reopened(self) -> int:
        """A descriptor to write to without ever waiting; -1 where there is none.

        O_NONBLOCK on the descriptor that we were given would hold for everyone who shares
        it, the shell for one (fcntl(2)): so a pipe or a terminal is opened anew.
        """
        if stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            return self.descriptor  # a file has no reader to wait for
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            return os.open(f"/proc/self/fd/{self.descriptor}", flags)
        except OSError:  # a socket, another user's terminal (after su), or no /proc
            return -1

    def put(self, data: memoryview) -> int:
        """Write some of the bytes; return how many.  Raises BlockingIOError instead of waiting."""
        if self.own >= 0:
            return write(self.own, data)
        if select([], [self.descriptor], [], 0)[1]:
            size = 1 if os.isatty(self.descriptor) else PIPE_BUF  # that much does not block: pipe(7)
            return write(self.descriptor, data[:size])
        raise BlockingIOError

    def write(self, text: str) -> None:
        """Take text, to be written after this batch of events."""
        if self.open:
            if not self.size:
                self.loop.timers[self.flush] = 0.0
            self.texts.append(text)
            self.size += len(text)

    def gathered(self) -> memoryview:
        """The texts, taken as one piece of bytes."""
        text, self.texts = "".join(self.texts), []
        return memoryview(text.encode(self.encoding, "backslashreplace"))

    def flush(self, events: int = 0) -> None:
        """Write what the reader takes.  Exits where a vital output is broken."""
        try:
            while self.texts or self.unsent:
                if not self.unsent:
                    self.unsent = self.gathered()
                written = self.put(self.unsent)
                self.sent += written
                self.unsent = self.unsent[written:]
        except BlockingIOError:
            self.loop.watch(self.descriptor, EPOLLOUT, self.flush)
            return
        except OSError as error:
            self.open, self.texts, self.unsent = False, [], memoryview(b"")
            if self.vital:
                sys.exit(f"{self.name} can no longer be written: {error.strerror}")
        was_full, self.size = self.size > PENDING_LIMIT, 0
        self.loop.watch(self.descriptor, 0, self.flush)
        if was_full and self.loop.running:
            self.drained()

    def drain(self) -> int:
        """Write all that waits, for as long as the reader takes some; return the bytes left."""
        while self.size:
            self.flush()
            if self.size and not select([], [self.descriptor], [], PATIENCE)[1]:
                return len(self.unsent) + len(self.gathered())
        return 0


class Client:
    """A connection on its seat: what it sends is shown, what it is owed is sent.

    It ends when both sides have said all: after the client's end of file (it half-closed, or
    closed) it gets what it is still owed, and then ours.  A reset ends it, too, but not before
    the bytes that had come earlier have been read.
    """

    noun, size = "ping", len(PING)  # what is counted as sent, and its bytes
    duplex = True  # is read while something is unsent

    def __init__(self, listener: Listener, sock: socket.socket, name: str, address: str) -> None:
        self.listener, self.messages = listener, listener.messages
        self.sock, self.descriptor, self.name = sock, sock.fileno(), name
        self.header = f"data received... ({name}, {address})\n"
        self.received = self.sent = 0  # bytes
        self.held = b""  # the first bytes of a letter, whose others are still to come
        self.ended = False  # its end of file has come
        self.sending = True  # can be sent to
        self.how = "left"

    def unsent(self) -> bytes | memoryview:
        """What is to be sent as soon as the client takes it."""
        raise NotImplementedError

    def update(self) -> None:
        """Tell epoll what this client waits for now.  When it is nothing more, say goodbye."""
        writing = self.sending and self.unsent()
        reading = not (self.ended or self.messages.size > PENDING_LIMIT or (writing and not self.duplex))
        if self.ended and not writing:
            self.leave()
        else:
            interest = (EPOLLIN if reading else 0) | (EPOLLOUT if writing else 0)
            self.listener.loop.watch(self.descriptor, interest, self.ready if writing else self.receive)

    def ready(self, events: int) -> None:
        """Read a piece, then send one: a client that sends without end still gets its pings."""
        if events & EPOLLIN:
            self.receive(events)
        if events & EPOLLOUT and self.sending:  # false, where the reading has ended it
            self.send(self.unsent())
            self.update()

    def receive(self, events: int) -> None:
        """Take and show one piece.  What is left is reported again, after the others' turn."""
        if self.messages.size > PENDING_LIMIT:  # a message would find no place: TCP slows the client
            return self.update()
        try:
            data = self.sock.recv(READ_SIZE)
        except OSError as error:
            return self.unreadable(error)
        if not data:
            return self.end()
        self.received += len(data)
        if self.messages.open:
            self.show(data)

    def send(self, data: bytes | memoryview) -> int:
        """Send what is taken at once; return how many bytes that was."""
        try:
            sent = self.sock.send(data)
        except OSError as error:
            sent = self.lose(error)
        self.sent += sent
        return sent

    def unreadable(self, error: OSError) -> None:
        """A read has failed.  Where that was a reset, all that came before it has been read by now."""
        self.lose(error)
        if not self.sending:
            self.leave()

    def end(self) -> None:
        """The client's end of file has come: it is not read again, for it would come again, at once."""
        self.ended = True
        self.update()

    def show(self, data: bytes, final: bool = False) -> None:
        """Write UTF-8 bytes as a message; a letter that two reads have cut is put together again."""
        data = self.held + data
        if data.isascii():  # in half the time; nothing is held then
            text = data.decode()
        else:
            text, used = codecs.utf_8_decode(data, "replace", final)
            self.held = data[used:]
        if text:
            text = text[:-1] if text[-1] == "\n" else text
            if not text.isprintable():  # controls are shown, not obeyed; no line passes for a header
                text = CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)
                text = text.replace("\n", "\n  ")
            self.messages.write(f"{self.header}{text}\n")

    def lose(self, error: OSError) -> int:
        """A read or a send has failed and moved 0 bytes.  Any reason but "not now" ends the connection."""
        if self.sending and not isinstance(error, BlockingIOError):
            self.sending = False
            self.how = "was reset" if isinstance(error, ConnectionError) else f"was lost ({error.strerror})"
        return 0

    def leave(self) -> None:
        """Close, and give the seat back."""
        self.ended, self.sending = True, False
        self.show(b"", final=True)
        self.listener.loop.watch(self.descriptor, 0, self.ready)
        self.sock.close()
        self.listener.release(self)


class Echo(Client):
    """Is sent its own bytes (--echo), and is not read while it does not take them: backpressure."""

    noun, size, duplex = "byte", 1, False
    tail: bytes | memoryview = b""  # what was read and not yet taken

    def unsent(self) -> bytes | memoryview:
        """The rest of the echo."""
        return self.tail

    def send(self, data: bytes | memoryview) -> int:
        """Client.send, that keeps the rest."""
        sent = super().send(data)
        self.tail = data[sent:]
        return sent

    def receive(self, events: int) -> None:
        """Client.receive, and the sending, with as few calls as can be (README: Speed)."""
        if self.messages.size > PENDING_LIMIT:
            return self.update()
        try:
            data = read(self.descriptor, READ_SIZE)
        except OSError as error:
            return self.unreadable(error)
        if not data:
            return self.end()
        try:
            sent = write(self.descriptor, data)
        except OSError as error:
            sent = self.lose(error)
        size = len(data)
        self.received += size
        self.sent += sent
        if self.messages.open:
            self.show(data)
        if sent != size:
            self.tail = data[sent:]
            self.update()


class Heartbeat(Client):
    """Is sent one ping a beat (--every)."""

    def unsent(self) -> bytes | memoryview:
        """The rest of a ping that was cut."""
        return RESTS[self.sent % len(PING)]

    def beat(self) -> None:
        """Send a ping, if it fits and the last one is whole: what waits for a reader stays bounded."""
        if self.sending and not self.ended and not self.unsent():
            self.send(PING)
            self.update()


class Flood(Heartbeat):
    """Is sent pings, as many as it takes."""

    def unsent(self) -> bytes | memoryview:
        """Go on at the right letter, wherever a send was cut; after the end, with no more than that ping."""
        return super().unsent() if self.ended else PINGS[self.sent % len(PING) :]


class Listener:
    """The port and its seats.  Who finds none free waits in the backlog: deferred, not refused."""

    name = "listener"

    def __init__(self, loop: Loop, options: argparse.Namespace, messages: Output, log: Output) -> None:
        self.loop, self.messages, self.log = loop, messages, log
        self.kind = Echo if options.echo else Heartbeat if options.every else Flood
        self.seats, self.wait_for, self.every = options.connections, options.wait_for, options.every
        self.clients: dict[Client, None] = {}  # a set, in order of arrival
        self.accepted = self.beats = self.received = self.sent = 0
        self.serving = False
        self.sock = listen(options)
        address = name_of(self.sock.getsockname())
        log.write(f"listening on {address}, waiting for {count(self.wait_for, 'client')}\n")
        log.drained = messages.drained = self.resume
        self.update()

    def update(self) -> None:
        """Accept while there is a seat, and a place for the line that tells of it."""
        accepting = len(self.clients) < self.seats and self.log.size <= 2 * PENDING_LIMIT
        self.loop.watch(self.sock.fileno(), EPOLLIN if accepting else 0, self.ready)

    def resume(self) -> None:
        """Go on where a stalled output had stopped it."""
        self.update()
        if self.serving:
            for client in list(self.clients):
                client.update()

    def ready(self, events: int) -> None:
        """Seat whoever has come, a few at a time."""
        for _ in range(min(ACCEPTS, self.seats - len(self.clients))):
            try:
                sock, address = self.sock.accept()
            except OSError as error:
                if error.errno in SHORTAGE:  # the connection stays queued, and is reported without end
                    self.log.write(f"not accepting for now: {error.strerror}\n")
                    self.loop.watch(self.sock.fileno(), 0, self.ready)
                    self.loop.timers[self.update] = time.monotonic() + MOMENT
                    return
                break  # nobody is left, or who was next is gone again (accept(2))
            self.seat(sock, name_of(address))
        self.update()

    def seat(self, sock: socket.socket, address: str) -> None:
        """Give a connection a seat; begin to serve, when enough have one."""
        sock.setblocking(False)
        self.accepted += 1
        client = self.kind(self, sock, f"client {self.accepted}", address)
        self.clients[client] = None
        self.log.write(f"{client.name} connected from {address}, {self.taken()}\n")
        if self.serving:
            client.update()
        elif self.accepted == self.wait_for:
            self.serving = True
            self.log.write(f"serving {count(self.accepted, 'client')}\n")
            self.resume()
            if self.every:
                self.due = time.monotonic()
                self.beat()

    def beat(self) -> None:
        """A ping for each client.  Beats keep to the first one's time; missed ones are left out."""
        for client in list(self.clients):
            if isinstance(client, Heartbeat):
                client.beat()
        self.beats += 1
        now = time.monotonic()
        self.due = now + self.every - (now - self.due) % self.every
        self.loop.timers[self.beat] = self.due

    def release(self, client: Client) -> None:
        """Take back the seat of a client that is gone; the next in the backlog can have it."""
        del self.clients[client]
        received, sent = client.received, client.sent // client.size
        self.received += received
        self.sent += sent
        self.log.write(f"{client.name} {client.how}: {self.tally(received, sent)}, {self.taken()}\n")
        self.update()

    def stop(self) -> None:
        """Sum up.  No ping is to stay cut, for the kernel goes on with what it was given."""
        for client in self.clients:
            client.show(b"", final=True)
            client.ended = True
            if client.unsent():
                client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0)  # no limit
                client.send(client.unsent())
        received = self.received + sum(client.received for client in self.clients)
        sent = self.sent + sum(client.sent // client.size for client in self.clients)
        served = count(self.accepted if self.serving else 0, "client")
        self.log.write(f"stopped: {served} served, {self.tally(received, sent)}\n")

    def taken(self) -> str:
        """How many seats are taken, in words."""
        return f"{len(self.clients):,} of {count(self.seats, 'seat')} taken"

    def tally(self, received: int, sent: int) -> str:
        """Bytes received and units (bytes or pings) sent, in words."""
        return f"{count(received, 'byte')} received, {count(sent, self.kind.noun)} sent"


def listen(options: argparse.Namespace) -> socket.socket:
    """A non-blocking listener.  Exits where none is to be had."""
    host, port = options.host or "0.0.0.0", options.port
    try:
        family, *_, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))  # IPv4 first
        sock = socket.socket(family)
        for level, option, value in OPTIONS:
            sock.setsockopt(level, option, value)
        if options.reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
        sock.bind(address)
        sock.listen(min(max(options.connections, socket.SOMAXCONN), 65535))
        sock.setblocking(False)
        return sock
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", 0) == errno.EADDRINUSE:
            error = OSError("it is in use; stop the program that has it, or choose another with --port")
        sys.exit(f"cannot listen on {host}, port {port}: {error}")


# -------------------------------------------------------------------- the loop, made visible


class TracedLoop(Loop):
    """A loop that tells what it does (--trace): each wait, each event, and what was done about it.

    It wraps the handlers as they are handed to the loop; they do not know of it.
    """

    log: Output
    start = time.monotonic()
    lost = 0  # lines, while the log was full

    def tell(self, who: str, what: str, done: str) -> None:
        """One line: the time in seconds, who, what epoll was told or reported, what was done."""
        if self.log.size > PENDING_LIMIT:
            self.lost += 1
            return
        lost, self.lost = f"({self.lost} lines before this lost)" if self.lost else "", 0
        line = f"{time.monotonic() - self.start:8.3f}  {who:<15}  {what:<16}  {done}{lost}"
        self.log.write(f"{line.rstrip()}\n")

    def told(self, handler: Any, *events: int) -> None:
        """Call the handler, and tell what it did."""
        room = handler.__self__
        before = [getattr(room, deed, 0) for deed in DEEDS]
        handler(*events)
        after = [getattr(room, deed, 0) for deed in DEEDS]
        done = [f"{deed} {new - old:,}" for deed, old, new in zip(DEEDS, before, after) if new > old]
        if room is not self.log:  # each of whose lines would make another
            self.tell(room.name, event_names(*events) if events else "timer", ", ".join(done))

    def wait(self) -> Iterable[tuple[int, int]]:
        """Loop.wait, told: how long it slept, how many were ready."""
        start = time.monotonic()
        ready = list(super().wait())
        self.tell("loop", "epoll_wait", f"slept {time.monotonic() - start:.3f} s, {len(ready)} ready")
        return ready

    def due(self) -> Iterable[Callable[[], None]]:
        """Loop.due, whose callbacks will tell what they did."""
        return [functools.partial(self.told, callback) for callback in super().due()]

    def watch(self, descriptor: int, interest: int, handler: Any) -> None:
        """Loop.watch, told, with a handler that will tell what it did."""
        if handler.__self__ is not self.log and interest != self.interests.get(descriptor, 0):
            self.tell(handler.__self__.name, "epoll_ctl", f"waits for {event_names(interest) or 'nothing'}")
        super().watch(descriptor, interest, functools.partial(self.told, handler))


DEEDS = "accepted", "beats", "received", "sent"  # what a room counts


def event_names(events: int) -> str:
    """An event mask in epoll's words: `EPOLLIN EPOLLOUT`."""
    names = {EPOLLIN: "EPOLLIN", EPOLLOUT: "EPOLLOUT", EPOLLERR: "EPOLLERR", EPOLLHUP: "EPOLLHUP"}
    return " ".join(name for bit, name in names.items() if events & bit)


# -------------------------------------------------------------------- the command line


def arguments() -> argparse.Namespace:
    """The command line.  Wrong usage ends the program, with argparse's message and status 2."""
    parser = argparse.ArgumentParser(description="Serve pings to TCP clients, and show what they send.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="(127.0.0.1); 0.0.0.0: all IPv4, :: all")
    add("--port", type=int, default=10001, metavar="N", help="(10001); 0: a free one")
    add("--connections", type=int, default=2, metavar="N", help="seats (2)")
    add("--wait-for", type=int, metavar="M", help="begin to serve when M clients are there (N)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--echo", action="store_true", help="send each client its own bytes, not pings")
    kind.add_argument("--every", type=float, metavar="SECONDS", help="send one ping every SECONDS")
    add("--quiet", action="store_true", help="print no messages")
    add("--reuse-port", action="store_true", help="share the port with other copies (SO_REUSEPORT)")
    add("--trace", action="store_true", help="tell each turn of the loop")
    options = parser.parse_args()
    options.wait_for = options.connections if options.wait_for is None else options.wait_for
    limits = (("port", 0, 65535), ("connections", 1, 10**7), ("wait_for", 1, options.connections))
    for option, least, most in limits:
        if not least <= getattr(options, option) <= most:
            parser.error(f"argument --{option.replace('_', '-')}: must be from {least} to {most}")
    if options.every is not None and not 0 < options.every < float("inf"):
        parser.error("argument --every: must be a positive, finite number of seconds")
    return options


def allow_files(needed: int, log: Output) -> None:
    """Raise the soft limit on open files to what is needed, as far as the hard limit lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < needed:  # negative: RLIM_INFINITY
        soft = needed if hard < 0 else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            log.write(f"the seats need {needed:,} open files, but the hard limit is {hard:,} (ulimit -Hn)\n")


def main() -> None:
    """Serve until a signal comes.  Exits with status 1, and a line that says why, where that cannot be."""
    options = arguments()
    loop = TracedLoop() if options.trace else Loop()
    messages = Output(loop, None if options.quiet else sys.stdout, "standard output", vital=True)
    log = Output(loop, sys.stderr, "standard error", vital=False)
    if messages.open and log.open and os.path.sameopenfile(messages.descriptor, log.descriptor):
        log = messages  # two would write into the midst of each other's lines
    if isinstance(loop, TracedLoop):
        loop.log = log
    try:
        StopSignal(loop)
        allow_files(options.connections + SPARE_FILES, log)
        if not messages.open and not options.quiet:
            log.write("standard output is not open: messages are not shown\n")
        listener = Listener(loop, options, messages, log)
        loop.run()
        listener.stop()
        left = messages.drain() if messages is not log else 0
        if left:
            log.write(f"{messages.name} has stalled: {count(left, 'byte')} not written\n")
    except (OSError, SystemExit) as error:  # not left to Python: it would wait for a stalled stream
        log.write(f"{error}\n")
        sys.exit(1)
    finally:
        log.drain()


if __name__ == "__main__":
    main()
