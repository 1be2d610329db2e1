"""A server that misbehaves, to test how a client reacts.

    python3 tests/misbehave.py BEHAVIOUR [options of non_block_io_server.py]
    MISBEHAVE=BEHAVIOUR python3 tests/misbehave.py [options ...]

Each behaviour is a protocol of a few lines.  `--help` after its name describes it.
"""

from __future__ import annotations

import fcntl
import os
import sys
import termios
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from non_block_io_server import Client, main

PART = 5  # bytes of the answer that are sent before the end


async def late(client: Client) -> None:
    """Answer after a second."""
    while data := await client.read():
        await client.sleep(1)
        await client.write(data)


async def slow(client: Client) -> None:
    """Answer one byte at a time."""
    while data := await client.read():
        for byte in data:
            await client.write(bytes([byte]))
            await client.sleep(0.01)


async def silent(client: Client) -> None:
    """Read, and never answer."""
    while await client.read():
        pass


async def closes(client: Client) -> None:
    """Send the end of file immediately."""


async def cuts(client: Client) -> None:
    """Send five bytes of the answer, then the end of file."""
    await client.write((await client.read())[:PART])


async def resets(client: Client) -> None:
    """Send five bytes of the answer, wait until they have arrived, then reset the connection."""
    await client.write((await client.read())[:PART])
    while any(fcntl.ioctl(client.sock, termios.TIOCOUTQ, bytes(4))):  # a reset would discard them
        await client.sleep(0.01)
    raise OSError("a reset")


async def halves(client: Client) -> None:
    """Send the end of file, and continue to read."""
    client.sock.shutdown(1)
    while await client.read():
        pass


async def garbage(client: Client) -> None:
    """Answer with random bytes."""
    while data := await client.read():
        await client.write(os.urandom(len(data)))


BEHAVIOURS = {each.__name__: each for each in (late, slow, silent, closes, cuts, resets, halves, garbage)}

if __name__ == "__main__":
    name = os.environ.get("MISBEHAVE") or (sys.argv.pop(1) if len(sys.argv) > 1 else "")
    if name not in BEHAVIOURS:
        print(f"usage: misbehave.py {{{','.join(BEHAVIOURS)}}} [options of the server]", file=sys.stderr)
        sys.exit(2)
    main(protocol=BEHAVIOURS[name])
