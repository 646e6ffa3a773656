"""What a rank tells its launcher besides vLLM's own handshake: phases, and what it died of.

Both ends speak msgpack over the handshake socket. The rank's channel has an identity of its own there, so
that its messages and those of vLLM's handshake cannot be mixed up.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import msgspec
import zmq

CHANNEL_IDENTITY = b"dplaunch"
"""The ZeroMQ identity of a rank's channel; vLLM's handshake uses the rank as two bytes."""

COMPILING = "compiling"
"""The phase of an engine that compiles, also while it serves."""

LINGER_MS = 2000
"""How long the last message may take to leave a dying rank, milliseconds; a launcher that is gone costs no more."""


class RankChannel:
    """The rank's end. Not thread-safe; used from the engine's main thread."""

    def __init__(self, handshake_address: str, rank: int, incarnation: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, CHANNEL_IDENTITY)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(handshake_address)
        self._head = {"rank": rank, "incarnation": incarnation}

    def phase(self, name: str) -> None:
        """Says what the rank is busy with: importing, loading, compiling, capturing, warming.

        One that serves says when it compiles, and that it serves again.
        """
        self._send({"status": "PHASE", "phase": name})

    def failed(self, error: BaseException) -> None:
        """Says what ended the engine, before the process does."""
        # What a Ray worker raised; the error around it (ray/exceptions.py, RayTaskError) is a traceback as its message.
        cause = getattr(error, "cause", None)
        told = cause if isinstance(cause, BaseException) else error
        self._send({"status": "FAILED", "type": type(told).__name__, "message": str(told)})

    def _send(self, message: dict[str, object]) -> None:
        self._socket.send(msgspec.msgpack.encode(self._head | message))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()
