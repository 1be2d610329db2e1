"""Tests of the messages that the server prints for the bytes of a client."""

from __future__ import annotations

import random
import socket
import sys
import unicodedata
from typing import Any

import pytest
from conftest import (
    Start,
    reset,
)

from non_block_io_server import MESSAGE_TITLE, MessageFormatter, escape

HEADER = f"{MESSAGE_TITLE} (client 1, 127.0.0.1:9)\n"


def shown(*chunks: bytes) -> list[str]:
    """Return the messages that a client's chunks make, without their headers."""
    formatter = MessageFormatter(HEADER)
    texts = [formatter.format(chunk) for chunk in chunks] + [formatter.format(b"", final=True)]
    assert all(text == "" or (text.startswith(HEADER) and text.endswith("\n")) for text in texts)
    return [text[len(HEADER) : -1] for text in texts if text]


@pytest.mark.parametrize(
    "sent, expected",
    [
        ("привет", "привет"),
        ("one\n", "one"),
        ("one\n\n", "one\n  "),
        ("\n", ""),
        (" \n ", " \n   "),
        ("a\nb\tc\nd", "a\n  b\tc\n  d"),
        ("\x1b[31mred\x07\r\n", r"\x1b[31mred\x07"),
        ("a\rb\r\r\n", r"a\x0db\x0d"),
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "GET / HTTP/1.1\n  Host: x\n  "),
        ("\x00\x7f\x80\x9f\xa0", "\\x00\\x7f\\x80\\x9f\xa0"),
        ("safe\u202egnp.exe", r"safe\u202egnp.exe"),
        ("\U000e0041\ue000\u2028\u200b\ufeff", r"\U000e0041\ue000\u2028\u200b\ufeff"),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f468\u200d\U0001f469\u200d\U0001f467"),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
        ("\u2764\ufe0f e\u0301", "\u2764\ufe0f e\u0301"),
        ("\u200da\u200c", r"\u200da\u200c"),
        ("a\u200d\u200cb a \u200db a\u200d b", r"a\u200d\u200cb a \u200db a\u200d b"),
        ("a\u200d\nb", "a\\u200d\n  b"),
        ("data received... (client 2, 10.0.0.1:9)", "  data received... (client 2, 10.0.0.1:9)"),
        ("hi\ndata received... (client 2)\nforged", "hi\n  data received... (client 2)\n  forged"),
    ],
)
def test_text_is_shown_and_misleading_characters_are_escaped(sent: str, expected: str) -> None:
    assert shown(sent.encode()) == [expected]


def test_a_split_character_after_a_carriage_return_is_joined() -> None:
    assert shown(b"a\r\xe4\xb8", b"\x96\r", b"\nb") == [r"a\x0d", "世", "\n  b"]


@pytest.mark.parametrize(
    "chunks, expected",
    [
        ([b"\xd0", b"\xbf"], ["п"]),
        ([b"a\xe2", b"\x82", b"\xacb"], ["a", "€b"]),
        ([b"\xff\xfeok"], ["\ufffd\ufffdok"]),
        ([b"a\xd0", b"b"], ["a", "\ufffdb"]),
        ([b"caf\xc3"], ["caf", "\ufffd"]),
        ([b"a\r", b"\nb"], ["a", "\n  b"]),
        ([b"a\r", b"b"], ["a", r"\x0db"]),
        ([b"a\r"], ["a", r"\x0d"]),
        ([b"a\r", b"\r\n"], ["a", r"\x0d"]),
        ([b"\r", b"\n"], [""]),
        ([b"", b""], []),
    ],
)
def test_a_character_split_across_two_reads_is_joined(chunks: list[bytes], expected: list[str]) -> None:
    assert shown(*chunks) == expected


@pytest.mark.parametrize("seed", range(3))
def test_the_ends_of_chunks_do_not_change_the_text(seed: int) -> None:
    numbers = random.Random(seed)
    parts = [b"a", b"\r", "п".encode(), "€".encode(), "\U0001f600".encode(), b"\xff", b"\xe2\x82"]
    for _ in range(300):
        data = b"".join(numbers.choices(parts, k=8))
        cuts = sorted(numbers.choices(range(len(data)), k=4))
        chunks = [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)])]
        assert "".join(shown(*chunks)) == "".join(shown(data)), chunks


def test_every_character_is_shown_or_escaped_by_its_category() -> None:
    codes = [*range(0x20000), *range(0x20000, 0xE0000, 101), *range(0xE0000, 0xE2000)]
    codes += range(0xE2000, sys.maxunicode + 1, 101)  # a sample: most of these are unassigned or private
    expected = []
    codes.remove(ord("\n"))  # no line has one
    for character in map(chr, codes):
        code, category = ord(character), unicodedata.category(character)
        if (category[0] == "C" and character != "\t") or category in ("Zl", "Zp"):
            form = "\\x{:02x}" if code < 0x100 else "\\u{:04x}" if code < 0x10000 else "\\U{:08x}"
            expected.append(form.format(code))
        else:
            expected.append(character)
    assert escape("".join(map(chr, codes))) == "".join(expected)


def test_only_a_header_looks_like_a_header() -> None:
    numbers = random.Random(7)
    words = [
        b"data received...",
        b"data ",
        b"received...",
        b"\n",
        b"\r",
        b"\r\n",
        b"x",
        b"\xff",
        b"\xe2\x80\xa8",
    ]
    for _ in range(300):
        formatter, headers, lines = MessageFormatter(HEADER), 0, []
        for _ in range(5):
            text = formatter.format(b"".join(numbers.choices(words, k=6)))
            headers += text != ""
            lines += text.splitlines()
        assert sum(line.startswith(MESSAGE_TITLE) for line in lines) == headers
        assert all(line == HEADER.strip() for line in lines if line.startswith(MESSAGE_TITLE))


# ---------------------------------------------------------------- from a real client


def test_chunks_of_real_clients_are_joined(start: Start) -> None:
    server = start("--connections", "3", "--wait-for", "1", "--every", "3600")
    for chunks, expected in (
        ([b"a\xe2", b"\x82", b"\xacb"], r"\na\n.*\n€b\n"),
        ([b"c\r", b"\nd\x1b"], r"\nc\n.*\n\n  d\\x1b\n"),
        (["\u202e\U0001f468\u200d\U0001f469".encode()], r"\n\\u202e\U0001f468\u200d\U0001f469\n"),
    ):
        client = server.seat()
        for chunk in chunks:
            client.sendall(chunk)
            server.settled()  # so that each chunk is read on its own
        server.messages(expected)


@pytest.mark.parametrize("ends", ["half-close", "reset", "the server stops"])
@pytest.mark.parametrize("options", [[], ["--echo"], ["--every", "3600"]])
def test_a_character_that_is_never_completed_is_shown(start: Start, options: Any, ends: str) -> None:
    server = start("--wait-for", "1", *options)
    client = server.seat()
    client.sendall(b"caf\xc3")
    server.messages("^caf$")
    if ends == "half-close":
        client.shutdown(socket.SHUT_WR)
    elif ends == "reset":
        reset(client)
    else:
        server.stop()
        assert server.out.rest().endswith("\n\ufffd\n")
    server.messages("^\ufffd$")
