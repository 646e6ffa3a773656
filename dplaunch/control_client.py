"""The control socket's client: finds the groups that run here, and asks them. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dplaunch.control_wire import (
    GROUP_FILE,
    MAX_ANSWER_BYTES,
    SOCKET_NAME,
    ProtocolError,
    RemoteError,
    decode,
    encode,
)
from dplaunch.errors import NoGroupError
from dplaunch.runtime_dir import owner_pid, runtime_dirs

ANSWER_S = 10.0
"""Seconds that a group has for an answer that costs it nothing: longer, and its event loop stands still."""

BUSY_RETRY_S = 0.1
"""Seconds before a group that has too many connections is asked again."""

READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """A group that seems to run on this machine.

    Args:
        name: its id.
        pid: its launcher.
        path: its control socket.
    """

    name: str
    pid: int
    path: Path


def find_groups() -> list[GroupAddress]:
    """The user's groups on this machine, by name; what dead launchers left is removed."""
    found = []
    for directory in runtime_dirs():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads((directory / GROUP_FILE).read_text())
            found.append(GroupAddress(str(facts["name"]), owner_pid(directory), directory / SOCKET_NAME))
    return sorted(found, key=lambda group: (group.name, group.pid))


def choose(name: str | None, *, one: bool) -> list[GroupAddress]:
    """The groups that a command is about.

    Args:
        name: the one asked for; None for all.
        one: whether the command is for a single one.

    Raises:
        NoGroupError: when there is none, or there are several and a single one is wanted.
    """
    groups = find_groups()
    if not groups:
        raise NoGroupError("no group is running here", hint="Start one: dplaunch --dp 2")
    names = ", ".join(f"{group.name} (pid {group.pid})" for group in groups)
    if name is not None:
        groups = [group for group in groups if group.name == name]
        if not groups:
            raise NoGroupError(f"no group {name} is running here", hint=f"Running: {names}.")
    if one and len(groups) > 1:
        raise NoGroupError(f"{len(groups)} groups are running: {names}", hint="Say which: --group NAME.")
    return groups


def ask(group: GroupAddress, verb: str, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The result of something that is done at once.

    Raises:
        NoGroupError: when the group does not answer within `ANSWER_S`.
        RemoteError: when it refuses.
    """
    result: dict[str, Any] = {}
    for line in stream(group, verb, args, timeout_s=ANSWER_S):
        if line["type"] == "result":
            result = line["result"]
    return result


def stream(
    group: GroupAddress, verb: str, args: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
) -> Iterator[dict[str, Any]]:
    """The lines of an answer as they come, the last one with the result.

    Args:
        timeout_s: seconds without a line; None for any number.

    Raises:
        NoGroupError: when the group does not answer, or goes away before the result.
        RemoteError: when it refuses, or fails.
    """
    deadline = time.monotonic() + ANSWER_S
    while True:
        lines = _ask_once(group, encode({"verb": verb, "args": dict(args or {})}), timeout_s)
        first = next(lines, None)
        busy = first is not None and first["type"] == "error" and first["error"].get("busy")
        if not busy or time.monotonic() > deadline:
            break
        time.sleep(BUSY_RETRY_S)
    while first is not None:
        if first["type"] == "error":
            raise RemoteError(first["error"])
        yield first
        if first["type"] == "result":
            return
        first = next(lines, None)
    raise NoGroupError(f"{_name(group)} went away", hint="Its log directory says why: dplaunch logs")


def _ask_once(group: GroupAddress, request: bytes, timeout_s: float | None) -> Iterator[dict[str, Any]]:
    with contextlib.closing(_connect(group)) as connection:
        try:
            # A group that refuses has answered before it has read anything.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(request)
            connection.settimeout(timeout_s)
            for line in _lines(connection):
                message = decode(line)
                if message.get("type") not in ("event", "result", "error"):
                    raise ProtocolError(f"{_name(group)} says what this dplaunch does not know")
                yield message
        except TimeoutError:
            raise _silent(group) from None
        except ConnectionError:
            return


def _connect(group: GroupAddress) -> socket.socket:
    deadline = time.monotonic() + ANSWER_S
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(str(group.path))
        except BlockingIOError:  # its queue of connections is full
            connection.close()
            if time.monotonic() > deadline:
                raise _silent(group) from None
            time.sleep(BUSY_RETRY_S)
        except OSError as error:
            connection.close()
            raise NoGroupError(f"{_name(group)} cannot be asked: {error.strerror or error}") from error
        else:
            return connection


def _lines(connection: socket.socket) -> Iterator[bytes]:
    rest = b""
    while data := connection.recv(READ_BYTES):
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
        if len(rest) > MAX_ANSWER_BYTES:
            raise ProtocolError(f"an answer has at most {MAX_ANSWER_BYTES} bytes a line")


def _silent(group: GroupAddress) -> NoGroupError:
    return NoGroupError(f"{_name(group)} does not answer", hint=f"Is it stopped? Its processes: pstree -p {group.pid}")


def _name(group: GroupAddress) -> str:
    return f"group {group.name} (pid {group.pid})"
