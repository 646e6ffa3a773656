"""The one place where errors become an exit code and words on standard error."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import click

from dplaunch.errors import DplaunchError, ExitCode

BROKEN_PIPE_CODE = 141
"""What a shell shows for a command that SIGPIPE ended."""


def run_at_boundary(run: Callable[[], None], *, debug: bool) -> int:
    """Runs a command; returns the exit code, whatever happens in it.

    Args:
        run: the command.
        debug: whether an unexpected error's traceback is shown rather than kept in a file.
    """
    try:
        return _run_and_flush(run)
    except DplaunchError as error:
        say(error.message, error.hint, error.detail)
        return error.exit_code
    except click.ClickException as error:
        say(error.format_message(), "See dplaunch --help.")
        return ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        return ExitCode.INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
            # What is still buffered would fail again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE_CODE
        _report_unexpected(error, debug)
        return ExitCode.INTERNAL


def _run_and_flush(run: Callable[[], None]) -> int:
    code: int = ExitCode.OK
    try:
        run()
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    # Here rather than at the interpreter's end, where a closed pipe can only be complained about.
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def say(message: str, *more: str) -> None:
    """Writes an error and what follows from it to standard error."""
    click.echo(f"dplaunch: error: {message}", err=True)
    for text in more:
        if text:
            click.echo(text, err=True)


def _report_unexpected(error: Exception, debug: bool) -> None:
    text = "".join(traceback.format_exception(error))
    file = None if debug else _keep(text)
    what = f"unexpected {type(error).__name__}: {error}".splitlines()[0]
    if file is None:
        say(what, "This is a bug in dplaunch.", text)
    else:
        say(f"{what} (a bug in dplaunch; traceback in {file})")


def _keep(text: str) -> Path | None:
    """Writes a traceback to a file of its own; None where there is no place for one."""
    import platformdirs

    name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for directory in (platformdirs.user_state_path("dplaunch"), Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            file = directory / name
            file.write_text(text, encoding="utf-8")
            return file
    return None


def _nobody_reads_stdout() -> bool:
    poller = select.poll()
    try:
        poller.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))
