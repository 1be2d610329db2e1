"""Exercise 2: a protocol of lines.  All clients share the values of one store.

    python3 tests/exercises/store.py --connections 100 --wait-for 1

No lock is needed: only an `await` lets another task run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import AsyncIterator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from non_block_io_server import Client, main

LONGEST = 1000  # bytes of a line
values: dict[bytes, bytes] = {}


async def lines(client: Client) -> AsyncIterator[bytes]:
    """Yield each line without its end, LF or CR LF.  Raises OSError if a line is too long."""
    rest = b""
    while data := await client.read():
        *complete, rest = (rest + data).split(b"\n")
        for line in [*complete, rest]:
            if len(line) > LONGEST:
                raise OSError("the line is too long")
        for line in complete:
            yield line.rstrip(b"\r")
    if rest:
        yield rest.rstrip(b"\r")


async def store(client: Client) -> None:
    """Answer `set NAME VALUE`, `get NAME` and `quit`."""
    async for line in lines(client):
        command, *words = line.split(b" ", 2)
        if (command, len(words)) == (b"set", 2):
            values[words[0]] = words[1]
            await client.write(b"ok\n")
        elif (command, len(words)) == (b"get", 1):
            await client.write(values.get(words[0], b"?") + b"\n")
        elif line == b"quit":
            return
        else:
            await client.write(b"use: set NAME VALUE, get NAME, quit\n")


if __name__ == "__main__":
    main(protocol=store)
