"""A process that is asked things, one JSON line each way: what tests do on a node, they do through one."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ANSWER_S = 60.0


def answer(commands: Mapping[str, Callable[..., Any]]) -> None:
    """The asked side: answers until standard input ends. What anyone prints goes to standard error."""
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        for line in sys.stdin:
            name, arguments = json.loads(line)
            try:
                reply: dict[str, Any] = {"value": commands[name](**arguments)}
            except Exception as error:
                traceback.print_exc()
                reply = {"error": type(error).__name__, "text": str(error)}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


class AskedError(Exception):
    """Raised where the asked side raised; `kind` is the name of its class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


class Dialogue:
    """The asking side; ends the process when it is closed.

    Args:
        process: runs `answer`; started with `PIPES`.
        log: where its standard error goes, for messages.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log
        self._unread = b""

    def ask(self, command: str, *, timeout_s: float = ANSWER_S, **arguments: Any) -> Any:
        """What the command returns.

        Raises:
            AskedError: when it raised.
            RuntimeError: when the process ends instead; carries the end of its log.
            TimeoutError: when there is no answer within `timeout_s` seconds; carries the end of its log.
        """
        self.begin(command, **arguments)
        return self.finish(timeout_s)

    def begin(self, command: str, **arguments: Any) -> None:
        """Asks, and leaves the answer to `finish`."""
        if self.process.stdin is not None:
            self.process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
            self.process.stdin.flush()

    def finish(self, timeout_s: float = ANSWER_S) -> Any:
        """The answer to what was asked with `begin`; raises as `ask`."""
        reply = json.loads(self._line(time.monotonic() + timeout_s))
        if "error" in reply:
            raise AskedError(reply["error"], reply["text"])
        return reply["value"]

    def _line(self, deadline: float) -> bytes:
        if self.process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"no answer; the end of its log:\n{self._tail()}")
                more = os.read(self.process.stdout.fileno(), 2**16)
                if not more:
                    raise RuntimeError(f"it ended; the end of its log:\n{self._tail()}")
                self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def close(self, timeout_s: float = ANSWER_S) -> int:
        """Ends the conversation; the process's exit code, once it has ended by itself or was killed for being late."""
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


Starter = Callable[..., "subprocess.Popen[Any]"]


def converse(start: Starter, log: Path, **options: Any) -> Dialogue:
    """A dialogue with the process that `start(stdin=..., stdout=..., stderr=..., **options)` makes."""
    with log.open("ab") as errors:
        process = start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0, **options)
    return Dialogue(process, log)
