"""Carry connections from one network namespace into another.

    python forward.py DESCRIPTOR HOST PORT OWNER

DESCRIPTOR is a listening socket that was opened outside: a socket stays in the network it was made in, so
whoever holds it accepts there and connects here. OWNER, the node's folder, is there for its owner to know it by.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

CHUNK = 65536  # bytes


async def forward(listener: socket.socket, host: str, port: int) -> None:
    """Accept for ever; each connection gets one of its own to ``host:port``."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(host, port)
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        writer.close()

    server = await asyncio.start_server(handle, sock=listener)
    await server.serve_forever()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the end, and hand the end on."""
    try:
        while chunk := await reader.read(CHUNK):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


if __name__ == "__main__":
    descriptor, host, port, _ = sys.argv[1:]
    asyncio.run(forward(socket.socket(fileno=int(descriptor)), host, int(port)))
