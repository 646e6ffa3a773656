"""The `dplaunch` program, also as `python -m dplaunch`. Imports little at first, so that Ctrl-C has an answer."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn


def entry() -> NoReturn:
    """Runs the command and ends the process."""
    handler = signal.getsignal(signal.SIGINT)
    # Who starts a program in the background has it ignore Ctrl-C, and it should.
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    # Takes a tenth of a second and more, in which Ctrl-C would end in a traceback.
    from dplaunch.cli import entry as run

    signal.signal(signal.SIGINT, handler)
    run()


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"dplaunch: error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    entry()
