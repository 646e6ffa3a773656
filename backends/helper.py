"""The zygote as a process of the launcher: how it is executed, talked to, and reaped."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import BinaryIO

from dplaunch.backend import Exit

from .messages import ZygoteBoot

LOG_TAIL_BYTES = 4096
"""How much of the zygote's output an error message gets: a traceback."""

# The import path comes first and as plain strings: until it is set, dplaunch may not be found.
_PROGRAM = """
import sys
from multiprocessing.connection import Connection
launcher = Connection(int(sys.argv[1]))
sys.path[:] = launcher.recv()
from dplaunch.backends.zygote import serve
serve(launcher)
"""


class Helper:
    """A running zygote. Not thread-safe, except for `kill`."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection, log: BinaryIO) -> None:
        self._process = process
        self._log = log
        self._end = ""
        self._tail = ""
        self.connection = connection

    @property
    def pid(self) -> int:
        """Its process id, and that of its session."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL. Does nothing when it has ended."""
        self._process.kill()

    def reap(self) -> None:
        """Waits for its end, after its connection has closed."""
        # It may be a stopped or a broken one that closed it; there is no way back.
        self._process.kill()
        self._end = str(Exit.from_returncode(self._process.wait()))
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        self._tail = self._log.read().decode(errors="replace").strip()

    def close(self) -> None:
        """Closes the files."""
        self.connection.close()
        self._log.close()

    def forget(self) -> None:
        """In a forked copy of the launcher: closes the copies of its files, and is no longer a child to wait for."""
        self.close()
        # Or its destructor would look for a child that this process does not have, and warn.
        self._process.returncode = 0

    def describe_end(self) -> str:
        """How it ended, as "SIGKILL(-9)"."""
        return self._end or "it was told to"

    def log_tail(self) -> str:
        """The last that it wrote."""
        return self._tail


def start_helper(start_method: str, preload: str | None, env: Mapping[str, str]) -> Helper:
    """Executes a zygote in a fresh interpreter, so that the user's `__main__` and state are not in it.

    Raises:
        OSError: when the process cannot be made.
    """
    # What is imported talks to standard output; that is the user's, and this is not for him unless it fails.
    log = os.fdopen(os.memfd_create("dplaunch-zygote-log"), "w+b")
    try:
        return _execute(start_method, preload, env, log)
    except BaseException:
        log.close()
        raise


def _execute(start_method: str, preload: str | None, env: Mapping[str, str], log: BinaryIO) -> Helper:
    ours, theirs = socket.socketpair()
    with ours, theirs, _duplicate(1) as stdout, _duplicate(2) as stderr:
        boot = ZygoteBoot(
            launcher_pid=os.getpid(),
            start_method=start_method,
            preload=preload,
            stdout=stdout.fileno(),
            stderr=stderr.fileno(),
        )
        process = subprocess.Popen(
            # -P: the working directory may hold a file that is named like a module.
            [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(theirs.fileno(), boot.stdout, boot.stderr),
        )
        connection = Connection(ours.detach())
    # Small enough for the socket's buffer. A zygote that is dead by now is noticed by the reader.
    with contextlib.suppress(OSError):
        connection.send([path or os.getcwd() for path in sys.path])
        connection.send(boot)
    return Helper(process, connection, log)


def _duplicate(file: int) -> BinaryIO:
    try:
        return os.fdopen(os.dup(file), "wb", buffering=0)
    except OSError:
        # A daemon without standard streams.
        return open(os.devnull, "wb", buffering=0)
