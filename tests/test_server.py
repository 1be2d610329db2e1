"""The server with no option: the lecture's, made unbreakable."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Generator

import pytest
from conftest import DEADLINE, SERVER, Server, eventually, is_pings, read_all, read_exactly

Start = Callable[..., Server]


def reset(client: socket.socket) -> None:
    """Close with a reset, not with an end of file."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def run(*options: str, **popen: Any) -> subprocess.CompletedProcess[str]:
    """Run the server where it ends by itself."""
    command = [sys.executable, SERVER, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, **popen)


# ---------------------------------------------------------------- the lecture's order and words


def test_serves_nobody_until_two_are_there(start: Start) -> None:
    server = start()
    first = server.seat()
    first.sendall(b"early")
    server.settled()
    first.setblocking(False)
    with pytest.raises(BlockingIOError):
        first.recv(4)
    assert server.out and server.out.data == b""
    second = server.seat()
    assert second.recv(4) == b"ping"
    first.settimeout(DEADLINE)
    assert first.recv(4) == b"ping"
    server.messages(r"^early$")


def test_keeps_what_a_client_sent_that_left_before_the_second_came(start: Start) -> None:
    server = start()
    first = server.seat()
    first.sendall(b"farewell")
    first.close()
    server.settled()
    second = server.seat()
    server.messages(r"^farewell$")
    assert read_exactly(second, 4) == b"ping"
    server.err.wait_for(r"^client 1 left: 8 bytes received, ")


def test_prints_a_header_and_the_text(start: Start) -> None:
    server = start()
    first, second = server.seat(), server.seat()
    first.sendall(b"Some message...")
    port = first.getsockname()[1]
    server.messages(rf"\Adata received\.\.\. \(client 1, 127\.0\.0\.1:{port}\)\nSome message\.\.\.\n\Z")
    second.sendall(b"And another\n")
    port = second.getsockname()[1]
    server.messages(rf"\.\.\.\ndata received\.\.\. \(client 2, 127\.0\.0\.1:{port}\)\nAnd another\n\Z")


def test_tells_who_came_and_who_left(start: Start) -> None:
    server = start()
    clients = [server.seat(), server.seat()]
    ports = [client.getsockname()[1] for client in clients]
    clients[0].sendall(b"12345")
    server.messages("^12345$")
    assert is_pings(read_exactly(clients[0], 4000))
    clients[0].shutdown(socket.SHUT_WR)
    pings = len(b"ping" * 1000 + read_all(clients[0])) // 4
    server.err.wait_for("^client 1 left")
    reset(clients[1])
    server.err.wait_for("^client 2 was reset")
    lines = server.stop().splitlines()
    assert lines[0] == f"listening on 127.0.0.1:{server.port}, waiting for 2 clients"
    assert lines[1] == f"client 1 connected from 127.0.0.1:{ports[0]}, 1 of 2 seats taken"
    assert lines[2] == f"client 2 connected from 127.0.0.1:{ports[1]}, 2 of 2 seats taken"
    assert lines[3] == "serving 2 clients"
    assert lines[4] == f"client 1 left: 5 bytes received, {pings:,} pings sent, 1 of 2 seats taken"
    assert re.match(r"client 2 was reset: 0 bytes received, [\d,]+ pings sent, 0 of 2 seats taken$", lines[5])
    sent = pings + int(re.findall(r"([\d,]+) pings", lines[5])[0].replace(",", ""))
    assert lines[6:] == [f"stopped: 2 clients served, 5 bytes received, {sent:,} pings sent"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("clients", [0, 1, 2])
def test_stops_at_a_signal_with_a_summary(start: Start, number: int, clients: int) -> None:
    server = start()
    for _ in range(clients):
        server.seat()
    last = server.stop(number).splitlines()[-1]
    assert re.match(rf"stopped: {clients if clients == 2 else 0} clients served, 0 bytes received, ", last)


def test_the_stream_is_pings_however_it_is_cut(start: Start) -> None:
    server = start()
    small, other = server.seat(small=True), server.seat()
    other.sendall(b"x")
    data = b""
    for size in (1, 2, 3, 5, 7, 4093, 65537):
        data += read_exactly(small, size)
    data += read_exactly(small, 2_000_000)
    small.shutdown(socket.SHUT_WR)
    assert is_pings(data + read_all(small))  # to a whole last ping
    assert is_pings(read_exactly(other, 4_000_000))


@pytest.mark.parametrize("read", [1, 6, 1001, 12_345])
def test_no_ping_is_cut_where_the_server_stops(start: Start, read: int) -> None:
    server = start()
    small, _ = server.seat(small=True), server.seat()
    data = read_exactly(small, read)
    server.settled()
    server.process.send_signal(signal.SIGTERM)
    assert is_pings(data + read_all(small))
    server.stop()  # twice does no harm


def test_who_sends_without_end_gets_pings_and_leaves_the_other_its_turn(start: Start) -> None:
    server = start("--quiet")
    busy, other = server.seat(), server.seat()
    busy.setblocking(False)
    received = b""
    while len(received) < 1_000_000:
        with suppress(BlockingIOError):
            busy.send(b"x" * 65536)
        with suppress(BlockingIOError):
            received += busy.recv(65536)
    assert is_pings(received[:1_000_000])
    assert is_pings(read_exactly(other, 1_000_000))


def test_a_third_client_waits_and_takes_the_seat_that_is_given_back(start: Start) -> None:
    server = start()
    first, second = server.seat(), server.seat()
    third = server.connect()
    third.sendall(b"patience")
    server.settled()
    assert "client 3" not in server.err.text
    first.close()
    assert read_exactly(third, 8) == b"pingping"
    server.messages("^patience$")
    server.err.wait_for(r"^client 3 connected from .*, 2 of 2 seats taken$")
    assert read_exactly(second, 4) == b"ping"


# ---------------------------------------------------------------- nothing is polled


def test_is_idle_when_nothing_happens(start: Start) -> None:
    server = start()
    server.settled()  # nobody there
    server.seat()
    server.settled()  # one waits
    server.seat()
    server.settled()  # two that do not read
    server.connect()
    server.settled()  # one waits in the backlog


@pytest.mark.parametrize("leave", [lambda client: client.close(), reset])
def test_is_idle_when_all_have_left(start: Start, leave: Callable[[socket.socket], None]) -> None:
    server = start()
    for client in (server.seat(), server.seat()):
        leave(client)
    server.err.wait_for("0 of 2 seats taken")
    server.settled()


def test_an_event_of_a_task_that_the_same_batch_has_ended_does_no_harm() -> None:
    import non_block_io_server

    loop, resumed = non_block_io_server.Loop(), []
    pairs = [socket.socketpair() for _ in range(2)]

    def task(other: int) -> Generator[int, int, None]:
        events = yield select.EPOLLIN
        resumed.append(events)
        if events:  # the other one is ready, too
            loop.resume([(other, 0)])
            loop.running = False

    (ours, _), (theirs, _) = pairs
    for descriptor, other in (ours.fileno(), theirs.fileno()), (theirs.fileno(), ours.fileno()):
        loop.start("task", descriptor, task(other))
    for _, end in pairs:
        end.send(b"ping")
    loop.run()
    assert resumed == [select.EPOLLIN, 0]


def test_who_does_not_read_costs_little(start: Start) -> None:
    server = start()
    server.seat(), server.seat()
    server.settled()
    sent = re.findall(r"([\d,]+) pings sent$", server.stop())[-1]
    assert 0 < 4 * int(sent.replace(",", "")) < 2 * 400_000  # megabytes without TCP_NOTSENT_LOWAT


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "sent, shown",
    [
        ("привет", "привет"),
        ("one\n", "one"),
        ("one\n\n", "one\n  "),
        ("\n", ""),
        ("a\nb\tc\nd", "a\n  b\tc\n  d"),
        ("\x1b[31mred\x07\r\n", r"\x1b[31mred\x07"),
        ("a\rb\r\r\n", r"a\x0db\x0d"),
        ("\x00\x7f\x80\x9f\xa0", "\\x00\\x7f\\x80\\x9f\xa0"),
        (
            "hi\ndata received... (client 2, 10.0.0.1:9)\nforged",
            "hi\n  data received... (client 2, 10.0.0.1:9)\n  forged",
        ),
    ],
)
def test_shows_text_and_obeys_none(start: Start, sent: str, shown: str) -> None:
    server = start("--wait-for", "1")
    server.seat().sendall(sent.encode())
    server.messages(rf"\Adata received\.\.\. \(client 1, .*\)\n{re.escape(shown)}\n\Z")


@pytest.mark.parametrize(
    "pieces, shown",
    [
        ([b"\xd0", b"\xbf"], "п"),
        ([b"a\xe2", b"\x82", b"\xacb"], "a|€b"),
        ([b"\xff\xfeok"], "��ok"),
        ([b"a\xd0", b"b"], "a|�b"),
    ],
)
def test_joins_a_letter_that_was_cut_and_survives_what_is_no_text(
    start: Start, pieces: Any, shown: str
) -> None:
    server = start("--wait-for", "1", "--every", "3600")
    client = server.seat()
    for piece in pieces:
        client.sendall(piece)
        server.settled()  # so that each is a read of its own
    expected = "".join(rf"data received.*\n{re.escape(part)}\n" for part in shown.split("|"))
    server.messages(rf"\A{expected}\Z")


@pytest.mark.parametrize("leave", [lambda client: client.shutdown(socket.SHUT_WR), reset])
def test_shows_the_letter_that_was_never_finished(
    start: Start, leave: Callable[[socket.socket], None]
) -> None:
    server = start("--wait-for", "1")
    client = server.seat()
    client.sendall(b"\xd0")
    server.settled()
    leave(client)
    server.messages("^�$")


def test_shows_at_once_what_an_ascii_locale_cannot(start: Start) -> None:
    server = start("--wait-for", "1", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    server.seat().sendall("да\n".encode())
    server.messages(r"^\\u0434\\u0430$")


def test_a_bulk_of_one_does_not_hold_up_the_other(start: Start) -> None:
    server = start()
    bulk, quiet = server.seat(), server.seat()
    server.settled()
    server.process.send_signal(signal.SIGSTOP)  # so that both find the server unprepared
    bulk.setblocking(False)
    size = 0
    with suppress(BlockingIOError):
        while size < 10_000_000:
            size += bulk.send(b"x" * 65536)
    quiet.sendall(b"quick\n")
    server.process.send_signal(signal.SIGCONT)
    server.messages("^quick$")
    eventually(lambda: server.out.data.count(b"x") == size, "all is shown")  # type: ignore[union-attr]
    assert size > 1_000_000
    assert server.out.data.index(b"quick") < 300_000  # type: ignore[union-attr]


# ---------------------------------------------------------------- leaving in every manner


def leave_unread(client: socket.socket) -> None:
    client.sendall(b"last words")
    client.close()  # unread pings make this a reset


def leave_with_words_and_reset(client: socket.socket) -> None:
    client.sendall(b"last words")
    reset(client)


def leave_half(client: socket.socket) -> None:
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    assert is_pings(b"ping" + read_all(client))


MANNERS = [leave_unread, leave_with_words_and_reset, leave_half]


@pytest.mark.parametrize("leave", MANNERS)
@pytest.mark.parametrize("options", [[], ["--every", "0.01"]])
def test_survives_leaving_and_shows_the_last_words(start: Start, options: Any, leave: Any) -> None:
    server = start(*options)
    first, second = server.seat(), server.seat()
    read_exactly(first, 4)
    leave(first)
    server.messages("^last words$")
    server.err.wait_for("^client 1 (left|was reset): 10 bytes received, .* 1 of 2 seats taken$")
    assert is_pings(read_exactly(second, 8))
    third = server.seat()
    assert is_pings(read_exactly(third, 8))
    server.stop()


@pytest.mark.parametrize("leave", MANNERS[:2])
def test_survives_leaving_before_it_serves(start: Start, leave: Any) -> None:
    server = start()
    leave(server.seat())
    second = server.seat()
    server.messages("^last words$")
    assert is_pings(read_exactly(second, 8))


@pytest.mark.parametrize("leave", MANNERS[:2])
def test_survives_leaving_in_the_backlog(start: Start, leave: Any) -> None:
    server = start()
    first, _ = server.seat(), server.seat()
    leave(server.connect())
    first.close()
    server.messages("^last words$")
    server.err.wait_for("^client 3 (left|was reset): 10 bytes received, ")


def test_survives_a_port_scan(start: Start) -> None:
    server = start()
    for _ in range(50):
        reset(server.connect())
    server.err.wait_for("^client 50 was reset: 0 bytes")
    server.settled()
    first, second = server.seat(), server.seat()
    assert is_pings(read_exactly(first, 8) + read_exactly(second, 8))
    server.stop()


def test_an_urgent_byte_is_a_byte(start: Start) -> None:
    server = start("--wait-for", "1")
    client = server.seat()
    client.sendall(b"before ")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b" after\n")
    eventually(lambda: len(re.findall("before|!|after", server.out.text)) == 3, "all of it is shown")  # type: ignore[union-attr]
    server.settled()


def test_goes_on_after_being_suspended(start: Start) -> None:
    server = start("--wait-for", "1")
    client = server.seat()
    server.process.send_signal(signal.SIGSTOP)
    client.sendall(b"are you there?")
    server.process.send_signal(signal.SIGCONT)
    server.messages("^are you there")
    server.settled()


# ---------------------------------------------------------------- a stalled output stalls nobody


NUMBERS = b"".join(b"%063d\n" % number for number in range(1 << 18))
LINES = (b"x" * 63 + b"\n") * (1 << 18)


def fill(server: Server, client: socket.socket, data: bytes = LINES) -> int:
    """Send until the server takes no more; return how many bytes but newlines have arrived, or more."""
    client.setblocking(False)
    sent, before = 0, -1
    while sent > before:
        before = sent
        with suppress(BlockingIOError):
            while True:
                sent += client.send(data[sent : sent + 65536])
        server.settled()
    client.settimeout(DEADLINE)
    (unacknowledged,) = struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, b"1234"))
    arrived = sent - int(unacknowledged)
    return arrived - arrived // 64


def digits(shown: bytes) -> bytes:
    """What is left of messages without headers, newlines and indents."""
    return re.sub(rb"data received.*|\s", b"", shown)


def test_a_stalled_standard_output_loses_nothing_and_stalls_nobody(start: Start) -> None:
    server = start(paused=True)
    writer, reader = server.seat(), server.seat()
    memory = server.status("VmRSS")
    read_exactly(writer, 100_000)
    arrived = fill(server, writer, NUMBERS)  # settled: it neither spins nor reads on
    assert arrived > 1_000_000
    assert server.status("VmRSS") - memory < 20_000, "kB"
    assert is_pings(read_exactly(reader, 5_000_000)), "pings go on"
    reset(writer)  # while it is paused: it neither spins nor is lost
    server.settled()
    assert "client 1 was reset" not in server.err.text
    assert server.out is not None
    server.out.going.set()
    server.err.wait_for("^client 1 was reset")
    eventually(lambda: len(digits(server.out.data)) >= arrived, "all that had come is shown")  # type: ignore[union-attr]
    assert digits(NUMBERS).startswith(digits(server.out.data))
    assert read_exactly(reader, 4)
    server.stop()


def test_a_stalled_standard_error_stalls_nobody(start: Start) -> None:
    server = start("--connections", "50", "--wait-for", "1")
    client = server.seat()
    server.err.going.clear()
    memory = server.status("VmRSS")
    for _ in range(20_000):  # more lines than a pipe and the server's queue hold
        socket.create_connection(("127.0.0.1", server.port)).close()
    assert is_pings(read_exactly(client, 5_000_000)), "pings go on"
    server.settled()
    assert server.status("VmRSS") - memory < 20_000, "kB"
    server.err.going.set()
    server.err.wait_for("^[0-9,]+ log lines dropped: standard error was full$")
    text = server.stop()
    (dropped,) = re.findall(r"^stopped: 20,001 clients served, .*, ([0-9,]+) log lines dropped$", text, re.M)
    logged = len(re.findall("^client [0-9]+ (?:connected|left|was reset)", text, re.M))
    assert logged + int(dropped.replace(",", "")) == 2 * 20_000 + 1


@pytest.mark.parametrize("options", [[], ["--echo"], ["--every", "0.05"]])
def test_survives_a_standard_output_that_was_never_open(start: Start, options: Any) -> None:
    server = start("--wait-for", "1", *options, stdout=None, preexec_fn=lambda: os.close(1))
    client = server.seat()
    client.sendall(b"hello")
    client.shutdown(socket.SHUT_WR)
    assert b"hello" not in read_all(client) or options == ["--echo"]
    server.err.wait_for("^client 1 left: 5 bytes")
    assert "standard output is not open" in server.stop()


def test_ends_with_a_line_when_its_standard_output_is_closed(start: Start) -> None:
    reader, writer = os.pipe()
    server = start("--wait-for", "1", stdout=writer)
    os.close(writer)
    os.close(reader)
    server.seat().sendall(b"is anybody there?")
    assert server.ended(1).endswith("\nstandard output can no longer be written: Broken pipe\n")


def test_ends_with_a_line_when_its_standard_output_is_full(start: Start) -> None:
    with open("/dev/full", "w") as full:
        server = start("--wait-for", "1", stdout=full)
        server.seat().sendall(b"hello")
        assert server.ended(1).endswith(
            "\nstandard output can no longer be written: No space left on device\n"
        )


def test_goes_on_when_its_standard_error_is_closed() -> None:
    command = [sys.executable, SERVER, "--port", "0", "--wait-for", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    first = process.stderr.readline().decode()
    process.stderr.close()
    port = int(re.findall(r":(\d+),", first)[0])
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert read_exactly(client, 4) == b"ping"
    process.terminate()
    assert process.wait(DEADLINE) == 0
    process.communicate()


def test_writes_to_a_file(start: Start, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        file.write(b"before\n")
        file.flush()
        server = start("--wait-for", "1", stdout=file)
        server.seat().sendall(b"hello")
        eventually(
            lambda: (tmp_path / "out").read_bytes().endswith(b")\nhello\n"), "the message is in the file"
        )
    assert (tmp_path / "out").read_bytes().startswith(b"before\ndata received... ")


@pytest.mark.parametrize("kind", ["terminal", "socket"])
def test_stalls_nobody_on_a_terminal_or_a_socket(start: Start, kind: str) -> None:
    if kind == "terminal":
        ours, theirs = os.openpty()
    else:
        pair = socket.socketpair()
        ours, theirs = (os.dup(end.fileno()) for end in pair)
        for end in pair:
            end.close()
    server = start(stdout=theirs)
    writer, reader = server.seat(), server.seat()
    arrived = fill(server, writer)
    assert is_pings(read_exactly(reader, 5_000_000)), "pings go on"
    assert os.get_blocking(theirs), "whoever shares it would be surprised"
    os.close(theirs)
    shown = 0
    while shown < arrived:
        shown += os.read(ours, 65536).count(b"x")
    os.close(ours)
    server.process.kill()


def test_one_stalled_pipe_for_both_outputs_forges_nothing() -> None:
    command = [sys.executable, SERVER, "--port", "0", "--connections", "300", "--wait-for", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        port = int(re.findall(rb":(\d+),", process.stdout.readline())[0])
        forger = socket.create_connection(("127.0.0.1", port), DEADLINE)
        forger.setblocking(False)
        line = b"data received... (client 9, 10.0.0.1:9)\nforged\n"
        for _ in range(200):
            with suppress(BlockingIOError):
                forger.send(line * 200)
            with socket.create_connection(("127.0.0.1", port), DEADLINE) as other:
                read_exactly(other, 4)
        process.terminate()
        shown = process.stdout.read().decode().splitlines()
        forger.close()
    assert process.returncode == 0
    assert len(shown) > 10_000
    header = r"data received\.\.\. \(client 1, 127\.0\.0\.1:\d+\)"
    told = r"serving 1 client|stopped: .*|client \d+ (connected from|left:|was reset:) .* seats taken"
    after_header = False
    for text in shown:
        assert after_header or text.startswith("  ") or re.fullmatch(f"{header}|{told}", text), text
        after_header = bool(re.fullmatch(header, text))


def test_what_it_cannot_go_on_from_does_not_wait_for_a_stalled_standard_error(start: Start) -> None:
    reader, writer = os.pipe()
    server = start("--wait-for", "1", "--echo", "--trace", stdout=writer)
    os.close(writer)
    client = server.seat()
    server.err.going.clear()
    for _ in range(1000):  # fills standard error with the trace
        client.sendall(b"x")
        read_exactly(client, 1)
    os.close(reader)
    client.sendall(b"is anybody there?")
    assert server.process.wait(DEADLINE) == 1


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_stalls_nobody_where_the_output_cannot_be_reopened(start: Start, kind: str, tmp_path: Path) -> None:
    program = tmp_path / "server.py"  # as after su, where the terminal is another user's
    program.write_text(
        "import os, runpy, sys\n"
        "def refuse(path, *rest, open=os.open):\n"
        "    if str(path).startswith('/proc'): raise PermissionError\n"
        "    return open(path, *rest)\n"
        "os.open = refuse\n"
        f"runpy.run_path({SERVER!r}, run_name='__main__')\n"
    )
    ours, theirs = os.openpty() if kind == "terminal" else os.pipe()
    server = start(program=str(program), stdout=theirs)
    os.close(theirs)
    writer, reader = server.seat(), server.seat()
    writer.sendall(b"x" * 500_000 + b"\n" * 1000)
    for _ in range(5):
        assert is_pings(read_exactly(reader, 5_000_000)), "pings go on"
    server.settled()
    os.close(ours)


def test_says_that_there_are_no_descriptors() -> None:
    limits = 6, 6
    result = run("--port", "0", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
    assert result.returncode == 1
    assert re.fullmatch(r".*Too many open files\n", result.stderr)


def test_what_it_cannot_write_at_the_end_it_says(start: Start) -> None:
    server = start(paused=True)
    writer, _ = server.seat(), server.seat()
    fill(server, writer, b"x" * len(LINES))
    server.process.send_signal(signal.SIGTERM)
    text = server.ended(0)
    figures = re.search(r"served, ([\d,]+) bytes .*\n.* stalled: ([\d,]+) bytes not written\n", text)
    assert figures is not None, text
    received, lost = (int(figure.replace(",", "")) for figure in figures.groups())
    assert server.out is not None
    server.out.going.set()
    shown = server.out.rest()
    header = shown[: shown.index("\n") + 1]
    assert 0 < lost < received
    assert (len(shown) + lost - received) % len(header + "\n") == 0, "so many messages"


@pytest.mark.parametrize("options", [[], ["--echo"], ["--every", "9"]])
def test_a_letter_cut_by_the_end_of_the_server_is_shown(start: Start, options: list[str]) -> None:
    server = start("--wait-for", "1", *options)
    server.seat().sendall(b"caf\xc3")
    server.messages("^caf$")
    server.stop()
    assert server.out is not None
    assert server.out.rest().endswith("\n\ufffd\n")


def test_writes_everything_before_it_ends(start: Start) -> None:
    server = start(paused=True)
    writer, _ = server.seat(), server.seat()
    fill(server, writer)
    server.process.send_signal(signal.SIGTERM)
    assert server.out is not None
    server.out.going.set()
    text = server.stop()
    assert "stalled" not in text
    assert text.splitlines()[-1].startswith("stopped: ")
    received = int(re.findall(r"served, ([\d,]+) bytes", text)[0].replace(",", ""))
    assert server.out.rest().count("x") == received - received // 64 > 1_000_000


# ---------------------------------------------------------------- where it cannot go on


def test_says_that_the_port_is_in_use(start: Start) -> None:
    server = start()
    result = run("--port", str(server.port))
    assert result.returncode == 1
    assert re.match(
        rf"cannot listen on 127\.0\.0\.1:{server.port}: address already in use \(.*--port\)\n\Z",
        result.stderr,
    )


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "2001:db8::1", "nowhere.invalid", "x" * 70, "a..b", "999.1.1.1"]
)
def test_says_that_the_address_is_not_to_be_had(host: str) -> None:
    result = run("--port", "0", "--host", host)
    assert result.returncode == 1
    assert re.match(
        rf"cannot listen on {re.escape(f'[{host}]' if ':' in host else host)}:0: .+\n\Z", result.stderr
    )


@pytest.mark.parametrize(
    "wrong",
    [
        "--port -1",
        "--port 65536",
        "--port http",
        "--connections 0",
        "--connections 2.5",
        "--wait-for 0",
        "--wait-for 3",
        "--connections 5 --wait-for 6",
        "--every 0",
        "--every -1",
        "--every nan",
        "--every inf",
        "--every 1e999",
        "--every soon",
        "--echo --every 1",
        "--unknown",
        "extra",
    ],
)
def test_tells_the_usage(wrong: str) -> None:
    result = run(*wrong.split())
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("usage: non_block_io_server.py ")
    assert "Traceback" not in result.stderr


def test_names_what_to_use_where_there_is_no_epoll() -> None:
    program = f"import runpy, select; del select.epoll; runpy.run_path({SERVER!r}, run_name='__main__')"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert result.returncode == 1
    assert re.match(r"this system has no epoll: .*container.*virtual machine.*WSL\n\Z", result.stderr)


# ---------------------------------------------------------------- where it listens


def name_of(address: Any, host: str) -> str:
    mapped = "::ffff:" if host == "::" and "." in address[0] else ""
    return f"[{mapped}{address[0]}]:{address[1]}" if ":" in host else f"{address[0]}:{address[1]}"


@pytest.mark.parametrize(
    "host, name, reached",
    [
        ("127.0.0.1", "127.0.0.1", ["127.0.0.1"]),
        ("localhost", "127.0.0.1", ["127.0.0.1"]),
        ("0.0.0.0", "0.0.0.0", ["127.0.0.1", "127.0.0.2"]),
        ("", "0.0.0.0", ["127.0.0.1", "127.0.0.2"]),
        ("::1", "[::1]", ["::1"]),
        ("::", "[::]", ["::1", "127.0.0.1"]),
    ],
)
def test_listens_where_it_is_told_to(start: Start, host: str, name: str, reached: Any) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = start("--host", host, "--wait-for", "1")
    assert server.err.text.startswith(f"listening on {name}:{server.port}, ")
    for address in reached:
        with socket.create_connection((address, server.port), DEADLINE) as client:
            assert read_exactly(client, 4) == b"ping"
            server.err.wait_for(rf"connected from {re.escape(name_of(client.getsockname(), host))}, ")


def test_listens_on_loopback_only_and_on_port_10001_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import non_block_io_server

    monkeypatch.setattr(sys, "argv", ["non_block_io_server.py"])
    options = vars(non_block_io_server.arguments())
    assert (options["host"], options["port"], options["connections"]) == ("127.0.0.1", 10001, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_can_be_restarted_at_once(start: Start, number: int) -> None:
    server = start()
    clients = [server.seat(), server.seat()]
    read_exactly(clients[0], 4)
    server.process.send_signal(number)
    server.process.wait(DEADLINE)
    again = start("--port", str(server.port))  # while the old clients linger
    first, second = again.seat(), again.seat()
    assert is_pings(read_exactly(first, 4) + read_exactly(second, 4))
