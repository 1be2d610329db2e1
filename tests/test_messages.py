"""Tests of the messages that the server prints for the bytes of a client."""

from __future__ import annotations

import random
import re
import socket
import sys
import unicodedata
from typing import Any, Callable

import pytest
from conftest import Start, reset

from non_block_io_server import ESCAPES, MESSAGE_TITLE, MessageFormatter, escape

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
        ("\u200da\u200c \u200d\n\u200c", "\u200da\u200c \u200d\n  \u200c"),
        ("\u3000世\u2003a\u202fb", "\u3000世\u2003a\u202fb"),
        ("1\ufe0f\u20e3\n\u2764\ufe0f\u200d\U0001f525", "1\ufe0f\u20e3\n  \u2764\ufe0f\u200d\U0001f525"),
        ("\ufe0fa \ufe0f\n\ufe0f", "\\ufe0fa \\ufe0f\n  \\ufe0f"),
        ("a\ufe0f\ufe0f\u200d\ufe0f\u3000\ufe0f", "a\ufe0f\\ufe0f\u200d\\ufe0f\u3000\\ufe0f"),
        ("a\u3164\u115f\u1160\uffa0\u034f\u17b4\u17b5b", r"a\u3164\u115f\u1160\uffa0\u034f\u17b4\u17b5b"),
        ("a\ufe00\ufe0e\U000e0100\u180b", r"a\ufe00\ufe0e\U000e0100\u180b"),
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


# Unicode's Default_Ignorable_Code_Point: no glyph.  Joiners and U+FE0F are not here.
IGNORABLE = {
    *(0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x200B, 0x200E, 0x200F, 0x3164, 0xFEFF, 0xFFA0),
    *(*range(0x180B, 0x1810), *range(0x202A, 0x202F), *range(0x2060, 0x2070), *range(0xFE00, 0xFE0F)),
    *(*range(0xFFF0, 0xFFF9), *range(0x1BCA0, 0x1BCA4), *range(0x1D173, 0x1D17B), *range(0xE0000, 0xE1000)),
}
ALWAYS_SHOWN = "\t\u200c\u200d"


def test_every_character_is_shown_or_escaped_by_its_category() -> None:
    codes = [*range(0x20000), *range(0x20000, 0xE0000, 101), *range(0xE0000, 0xE2000)]
    codes += range(0xE2000, sys.maxunicode + 1, 101)  # a sample: most of these are unassigned or private
    expected = []
    codes.remove(ord("\n"))  # no line has one
    for character in map(chr, codes):
        code, category = ord(character), unicodedata.category(character)
        escaped = category[0] == "C" or category in ("Zl", "Zp") or code in IGNORABLE
        if escaped and character not in ALWAYS_SHOWN:
            form = "\\x{:02x}" if code < 0x100 else "\\u{:04x}" if code < 0x10000 else "\\U{:08x}"
            expected.append(form.format(code))
        else:
            expected.append(character)
    assert escape("".join(map(chr, codes))) == "".join(expected)


def calls_of(function: Callable[[], Any]) -> int:
    """Return how many Python and C functions a call of a function calls."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "some text\n",
            "\n\0",
            "\x01\n",
            "\0",
            "\n",
            "\r\n",
            "\r",
            "\x1b[0m\n",
            "a\tb\n",
            "\u202e\n",
            "п\n",
        ),
        *("\u2028", "\U000e0041", "\ufe0f", "a\ufe0f", " \ufe0f\n", "\u200d", "\u0301", "a\u0301", "\u1161"),
    ],
)
def test_the_dearest_text_is_formatted_in_one_pass(unit: str) -> None:
    data = (unit * 65536).encode()[:65536]
    formatter = MessageFormatter(HEADER)
    formatter.format(data)  # each character's first use may cost more
    assert calls_of(lambda: formatter.format(data)) < 60
    assert len(formatter.format(data)) < 7 * len(data)  # "\n\0" is "\n  \\x00"


def test_many_different_characters_do_not_make_later_text_dear() -> None:
    for first in range(0x20000, 0x100000, 0x4000):
        escape("".join(map(chr, range(first, first + 0x4000))))
    assert len(ESCAPES) <= ESCAPES.SIZE
    text = "\U00105000\n" * 10_000
    escape(text)
    assert calls_of(lambda: escape(text)) < 60


@pytest.mark.parametrize(
    "text",
    [
        f"{MESSAGE_TITLE} (client 9, 10.0.0.1:9)",
        MESSAGE_TITLE,
        *(
            f"{mark}{MESSAGE_TITLE} (client 9)"
            for mark in ("\u0301", "\u0301" * 300, "\u20dd", "\u200d", "\u1161")
        ),
        *(f"{mark}{MESSAGE_TITLE}" for mark in ("\ud7b0", "\u05b0\u200c", "\u3000", "\u0301\u1161\u200d")),
        "d\u0301a\u0301ta received...",
        "data\u1161 received.\u0301.\u0301.",
        "d\u0430ta received... (client 9)",
        "d\u0430t\u0430 r\u0435\u0441\u0435iv\u0435d... (client 9)",
        "\uff44\uff41\uff54\uff41\u3000\uff52\uff45\uff43\uff45\uff49\uff56\uff45\uff44\uff0e\uff0e\uff0e",
        "\U0001d41d\U0001d41a\U0001d42d\U0001d41a received...",
        "data\xa0received...",
        "data\u2003received\u2026 (client 9)",
        "data received\u2024\u2024\u2024",
        "data received\u2025.",
    ],
)
def test_a_message_that_looks_like_a_header_is_indented(text: str) -> None:
    assert shown(text.encode()) == [f"  {text}"]


@pytest.mark.parametrize(
    "hidden", [*"\u3164\u115f\uffa0\u034f\u17b5\ufe0f\ufe00\u200b\xad\U000e0100\u202d\x1b"]
)
def test_an_invisible_character_before_a_header_is_visible(hidden: str) -> None:
    (text,) = shown(f"{hidden}{MESSAGE_TITLE}".encode())
    assert re.fullmatch(r"\\(x..|u....|U.{8})data received\.\.\.", text)


@pytest.mark.parametrize(
    "text",
    [
        "Здравствуйте.",
        "Здравствуйте, мир!",
        "\u3000世界",
        "data",
        "da\u0301ta received",
        "\u2764\ufe0f data.",
    ],
)
def test_a_message_that_does_not_look_like_a_header_is_not_indented(text: str) -> None:
    assert shown(text.encode()) == [text]


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
