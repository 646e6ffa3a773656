"""One rank incarnation's own sockets: handshake, requests in, outputs out.

Every incarnation has its own addresses, so nothing late from a dead one can reach a live request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from dplaunch.channel import CHANNEL_IDENTITY, COMPILING
from dplaunch.seam import wire

MESSAGES_PER_TURN = 64
"""How many messages are taken from a socket before the event loop gets its turn."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a rank said that it died of: the exception's type name and message."""

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class Transport:
    """Where sockets are bound: in `directory` ("ipc") or on `host` ("tcp", ports chosen by the kernel)."""

    directory: Path | None = None
    host: str | None = None

    def bind(self, socket: zmq.Socket[bytes], name: str) -> str:
        """Binds, and returns the address that the kernel gave; nothing is probed first and bound later."""
        if self.directory is not None:
            address = f"ipc://{self.directory / name}"
            socket.bind(address)
            return address
        socket.bind(f"tcp://{self.host}:*")
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)


class RankLink:
    """The launcher's end of one incarnation. Lives in one event loop; `close` is idempotent.

    Args:
        rank: the global data-parallel rank.
        incarnation: 0 at first, one more at each restart.
        context: the group's ZeroMQ context.
        transport: where to bind.
        on_phase: called with each phase that the rank reports while it starts.
        on_output: called with the link and the frames of every message from the engine.
    """

    def __init__(
        self,
        rank: int,
        incarnation: int,
        *,
        context: zmq.Context[zmq.Socket[bytes]],
        transport: Transport,
        on_phase: Callable[[str], None],
        on_output: Callable[[RankLink, Sequence[Any]], None],
    ) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.failure: Failure | None = None
        self.failed = asyncio.Event()
        """Set when the rank has said what it died of; `failure` then says it."""
        self.closed = False
        self.heard = time.monotonic()
        """When the engine said something last, its handshake included; monotonic time, seconds."""
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[dict[str, Any]] = loop.create_future()
        """Resolves to vLLM's ready response (EngineCoreReadyResponse as a map) once the handshake is complete."""
        self._on_phase = on_phase
        self._on_output = on_output
        self._engine = b""  # Its ZeroMQ identity, which it chooses: 0 where it is alone, its rank in lockstep.
        self._response: dict[str, Any] | None = None
        self._handshaken = False
        self._readers: list[_Reader] = []
        self._sockets: list[zmq.Socket[bytes]] = []
        name = f"{rank}.{incarnation}"
        try:
            self._handshake, self.handshake_address = self._bind(context, transport, zmq.ROUTER, f"h{name}")
            self._input, self._input_address = self._bind(context, transport, zmq.ROUTER, f"i{name}")
            output, self._output_address = self._bind(context, transport, zmq.PULL, f"o{name}")
            self._read(self._handshake, self._on_handshake)
            self._read(self._input, self._on_ready_response)
            self._read(output, lambda frames: self._on_output(self, frames))
        except BaseException:
            self.close()
            raise

    def _bind(
        self, context: zmq.Context[zmq.Socket[bytes]], transport: Transport, kind: int, name: str
    ) -> tuple[zmq.Socket[bytes], str]:
        socket = context.socket(kind)
        self._sockets.append(socket)
        socket.setsockopt(zmq.LINGER, 0)
        # No high-water mark, as vLLM's own sockets: the engine's queue is bounded by the frontend's in-flight table.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        return socket, transport.bind(socket, name)

    def _read(self, socket: zmq.Socket[bytes], callback: Callable[[Sequence[Any]], None]) -> None:
        self._readers.append(_Reader(socket, callback))

    def send(self, kind: bytes, frames: Sequence[Any]) -> None:
        """Sends one message to the engine; never blocks. Does nothing on a closed link: its rank is gone."""
        if not self.closed:
            self._input.send_multipart((self._engine, kind, *frames), zmq.NOBLOCK, copy=False)

    def close(self) -> None:
        """Closes the sockets; whatever the rank still sends goes nowhere."""
        if self.closed:
            return
        self.closed = True
        for reader in self._readers:
            reader.stop()
        for socket in self._sockets:
            socket.close(linger=0)
        if not self.ready.done():
            self.ready.cancel()

    def _on_handshake(self, frames: Sequence[Any]) -> None:
        self.heard = time.monotonic()
        identity, payload = (bytes(frame.buffer) for frame in frames[:2])
        message = msgspec.msgpack.decode(payload)
        match message["status"]:
            case "PHASE" if identity == CHANNEL_IDENTITY:
                self.compiling = message["phase"] == COMPILING
                self._on_phase(message["phase"])
            case "FAILED" if identity == CHANNEL_IDENTITY:
                self.failure = Failure(message["type"], message["message"])
                self.failed.set()
            case "HELLO":
                answer = wire.encode_addresses([self._input_address], [self._output_address])
                self._handshake.send_multipart((identity, answer), zmq.NOBLOCK)
            case "READY":
                self._handshaken = True
                self._maybe_ready()

    def _on_ready_response(self, frames: Sequence[Any]) -> None:
        self.heard = time.monotonic()
        self._engine = bytes(frames[0].buffer)
        self._response = msgspec.msgpack.decode(bytes(frames[1].buffer))
        self._maybe_ready()

    def _maybe_ready(self) -> None:
        # The two arrive on two sockets, in either order.
        if self._handshaken and self._response is not None and not self.ready.done():
            self.ready.set_result(self._response)


class _Reader:
    """Calls back for each message on a socket, from the event loop, for as long as it is not stopped."""

    def __init__(self, socket: zmq.Socket[bytes], callback: Callable[[Sequence[Any]], None]) -> None:
        self._socket = socket
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._stopped = False
        self._loop.add_reader(self._fd, self._drain)
        # ZeroMQ's descriptor is edge-triggered: what came before add_reader would never be announced.
        self._loop.call_soon(self._drain)

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)

    def _drain(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            if self._stopped:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._callback(frames)
            except BaseException:
                # The loop reports it. What is behind a message that made no sense must not wait for the next edge.
                self._loop.call_soon(self._drain)
                raise
        self._loop.call_soon(self._drain)
