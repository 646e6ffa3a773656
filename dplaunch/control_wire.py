"""The control socket's protocol: JSON, one object a line. Both ends use this; nothing heavy is imported.

A client sends one request and reads lines until the one that ends the answer:

    {"v": 1, "verb": "scale", "args": {"dp": 4}}
    {"v": 1, "type": "event", "event": {...}}        none, one or many
    {"v": 1, "type": "result", "result": {...}}      or {"v": 1, "type": "error", "error": {...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dplaunch.errors import DplaunchError, ExitCode

VERSION = 1

SOCKET_NAME = "control.sock"
GROUP_FILE = "group.json"
"""Says beside the socket which group it is, for when the group itself does not answer."""

MAX_REQUEST_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 16 * 2**20
"""One line of an answer: the status of thousands of ranks."""


class ProtocolError(DplaunchError):
    """Raised when the other end of a control socket says what it may not."""

    exit_code = ExitCode.USAGE


class BusyError(DplaunchError):
    """Raised when a group has too many control connections."""

    exit_code = ExitCode.USAGE


def encode(message: Mapping[str, Any]) -> bytes:
    """One line."""
    return json.dumps({"v": VERSION, **message}, ensure_ascii=False, default=str).encode(errors="replace") + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """What is in one line.

    Raises:
        ProtocolError: when it is not one JSON object of this version.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("that is not one JSON object a line") from error
    if not isinstance(message, dict):
        raise ProtocolError("that is not one JSON object a line")
    if message.get("v") != VERSION:
        raise ProtocolError(
            f"the control socket speaks version {VERSION}, not {message.get('v')!r}",
            hint="Use the dplaunch command of the version that runs the group.",
        )
    return message


def encode_error(error: DplaunchError) -> bytes:
    """The line that ends an answer that failed."""
    facts = {
        "exit_code": int(error.exit_code),
        "busy": isinstance(error, BusyError),
        "message": error.message,
        "hint": error.hint,
        "detail": error.detail,
    }
    return encode({"type": "error", "error": facts})


class RemoteError(DplaunchError):
    """Raised when a group could not do what it was asked; carries the group's own words."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        text = {name: str(facts.get(name) or "") for name in ("message", "hint", "detail")}
        super().__init__(text["message"], hint=text["hint"], detail=text["detail"])
        known = {int(code): code for code in ExitCode}
        self.exit_code = known.get(facts.get("exit_code", 0), ExitCode.INTERNAL)
