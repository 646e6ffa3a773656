"""What the contract tests let `Backend.call` run, each ending in its own way."""

from __future__ import annotations

import os
import signal
import sys

from dplaunch.errors import ModelError
from dplaunch.testing.host import SimulatedExit


def reverse(payload: bytes) -> bytes:
    """Answers."""
    return payload[::-1]


def refuse(payload: bytes) -> bytes:
    """Raises one of dplaunch's own errors."""
    raise ModelError("there is no such model", hint="Try another.", detail=payload.decode())


def stumble(payload: bytes) -> bytes:
    """Raises any other error."""
    raise ValueError(f"cannot read {payload!r}")


def die(payload: bytes) -> bytes:
    """Ends its process by SIGKILL after a word on stderr; `payload` is the launcher's pid, which is spared."""
    if os.getpid() == int(payload):
        raise SimulatedExit(-signal.SIGKILL)
    sys.stderr.write("the last words of a helper\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def dirty_environment(payload: bytes) -> bytes:
    """Leaves traces that must not reach the launcher; returns its pid."""
    os.environ["DPLAUNCH_TEST_TRACE"] = payload.decode()
    return str(os.getpid()).encode()
