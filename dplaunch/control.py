"""The control socket's server: in the group's event loop, for its user alone, bounded in everything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from dplaunch.control_wire import (
    MAX_REQUEST_BYTES,
    BusyError,
    ProtocolError,
    decode,
    encode_error,
)
from dplaunch.control_wire import encode as encode_line
from dplaunch.errors import DplaunchError

MAX_CONNECTIONS = 64
"""People and scripts that look at one group at once; more is a mistake."""

REQUEST_S = 10.0
"""Seconds that a client has to send its request, and to read what it was sent: it is on this machine."""

ACCEPT_PAUSE_S = 0.5
"""Seconds before the next connection is taken when the process has no descriptor left for one."""

HALF_CLOSED_S = 0.5
"""Seconds between two looks at whether a client that sends no more has gone: nothing else tells it."""

BACKLOG = 128

Answer = AsyncGenerator[dict[str, Any], None]
"""The lines of an answer, the last one with type "result"."""


class ControlServer:
    """Listens on a Unix socket.

    Args:
        answer: called with a verb and its arguments.
    """

    def __init__(self, answer: Callable[[str, dict[str, Any]], Answer]) -> None:
        self._answer = answer
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._talks: set[asyncio.Task[None]] = set()

    def open(self, path: Path) -> None:
        """Listens on `path`, whose directory must be the user's own.

        Raises:
            OSError: when it cannot be bound.
        """
        listener = self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            # It gets its name when it is private and answers: whoever finds it refusing takes it for a dead one.
            new = path.with_suffix(".new")
            listener.bind(str(new))
            new.chmod(0o600)  # the process's umask is not ours to change
            listener.listen(BACKLOG)
            new.rename(path)
        except BaseException:
            listener.close()
            raise
        self._accepting = asyncio.create_task(self._accept(listener))

    async def close(self, grace_s: float = 0.0) -> None:
        """Takes no further connection, and ends those that there are.

        Args:
            grace_s: seconds that answers under way have to come to their end.
        """
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        if self._talks and grace_s:
            await asyncio.wait(self._talks, timeout=grace_s)
        for talk in self._talks:
            talk.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:  # no descriptor left, or the client has gone again
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            self._welcome(connection)
            # When many come at once, each waits for whatever else the loop has to do.
            await asyncio.sleep(0)

    def _welcome(self, connection: socket.socket) -> None:
        refusal: DplaunchError | None = None
        if _peer_uid(connection) != os.geteuid():
            refusal = ProtocolError("this group belongs to another user")
        elif len(self._talks) >= MAX_CONNECTIONS:
            refusal = BusyError(f"{MAX_CONNECTIONS} control connections are open already", hint="Try again soon.")
        if refusal is not None:
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.setblocking(False)
                connection.send(encode_error(refusal))
            return
        talk = asyncio.create_task(self._talk(connection))
        self._talks.add(talk)
        talk.add_done_callback(self._talks.discard)

    async def _talk(self, connection: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(sock=connection, limit=MAX_REQUEST_BYTES)
        except BaseException:
            connection.close()
            raise
        try:
            # OSError: the client has gone, or does not read. What it began goes on.
            with contextlib.suppress(OSError, TimeoutError):
                await self._answer_one(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await _request(reader)
            if request is None:
                return
            saying = asyncio.ensure_future(self._say(request, writer))
            leaving = asyncio.ensure_future(_gone(reader, writer.get_extra_info("socket")))
            try:
                await asyncio.wait((saying, leaving), return_when=asyncio.FIRST_COMPLETED)
                if saying.done():
                    saying.result()
            finally:
                saying.cancel()
                leaving.cancel()
                await asyncio.gather(saying, leaving, return_exceptions=True)
        except DplaunchError as error:
            await _send(writer, encode_error(error))
        except (OSError, TimeoutError):
            raise
        except Exception as error:
            # The client is told; a fault of ours in here is no reason for the group to suffer.
            words = f"unexpected {type(error).__name__}: {error} (a bug in dplaunch)"
            await _send(writer, encode_error(DplaunchError(words)))

    async def _say(self, request: tuple[str, dict[str, Any]], writer: asyncio.StreamWriter) -> None:
        async with contextlib.aclosing(self._answer(*request)) as lines:
            async for line in lines:
                await _send(writer, encode_line(line))


async def _request(reader: asyncio.StreamReader) -> tuple[str, dict[str, Any]] | None:
    """The verb and its arguments; None when the client has gone without a word."""
    try:
        async with asyncio.timeout(REQUEST_S):
            line = await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError:
        raise ProtocolError(f"a request has at most {MAX_REQUEST_BYTES} bytes") from None
    except TimeoutError:
        raise ProtocolError(f"no request came within {REQUEST_S:g} s") from None
    message = decode(line)
    verb, arguments = message.get("verb"), message.get("args", {})
    if not isinstance(verb, str) or not isinstance(arguments, dict):
        raise ProtocolError("a request has a verb and, where it takes any, args")
    return verb, arguments


async def _gone(reader: asyncio.StreamReader, connection: Any) -> None:
    """Returns when the client has closed the connection; whatever else it sends is of no interest."""
    while await reader.read(4096):
        pass
    # One that has only said that it sends no more (`printf ... | nc -NU`) still waits for the answer.
    poller = select.poll()
    poller.register(connection.fileno(), 0)
    while not any(event & select.POLLHUP for _, event in poller.poll(0)):
        await asyncio.sleep(HALF_CLOSED_S)


async def _send(writer: asyncio.StreamWriter, line: bytes) -> None:
    writer.write(line)
    async with asyncio.timeout(REQUEST_S):
        await writer.drain()


def _peer_uid(connection: socket.socket) -> int:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)
