"""The one entry point that runs inside every rank, whichever backend started it."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from dplaunch.backend import STACK_SIGNAL, RankBoot
from dplaunch.channel import RankChannel

EXIT_ENGINE_FAILED = 1
"""A rank's exit code when its engine raised; what it raised went to the launcher and to the log."""


def rank_main(boot: RankBoot) -> None:
    """Becomes the rank: environment, cores, log, then the engine until it returns.

    Called in a process of its own (or an actor's) whose imports may already be done. Returns when the engine
    ends in order; otherwise the process exits with `EXIT_ENGINE_FAILED`.
    """
    _take_shape(boot)
    with RankChannel(boot.handshake_address, boot.rank, boot.incarnation) as channel:
        channel.phase("importing")
        try:
            load_function(boot.engine)(boot, channel)
        except SystemExit as exit_:
            if exit_.code not in (None, 0):
                raise
        except BaseException as error:
            traceback.print_exc()
            channel.failed(error)
            sys.stderr.flush()
            raise SystemExit(EXIT_ENGINE_FAILED) from None


def load_function(name: str) -> Callable[..., Any]:
    """The function behind "module:function"."""
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def _take_shape(boot: RankBoot) -> None:
    # First: it writes where the kernel put the environment, and cannot find that once the environment is changed.
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(boot.process_title)
    os.environ.clear()
    os.environ.update(boot.env)
    for path in boot.sys_path:
        if path not in sys.path:
            sys.path.append(path)
    if boot.cpus:
        # Not permitted in some containers: the rank then floats, which is slower but not wrong.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, boot.cpus)
    if boot.log_file is not None:
        _redirect_output(str(boot.log_file))
    # In C, from the signal itself: it tells of a thread too that never comes back to the interpreter.
    faulthandler.register(STACK_SIGNAL, file=2)


def _redirect_output(path: str) -> None:
    # Straight to the file, not through the launcher: the last words of a crash must not depend on a reader.
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def die_with(pid: int, grace_s: float = 0.0) -> None:
    """Ends this process's whole group when the process `pid` is gone, however it went.

    `grace_s` seconds later than that, where someone else ends the group sooner and tidies up after it.

    A pidfd, not PR_SET_PDEATHSIG: the latter follows the parent, and a rank's parent is the zygote, whose death
    a rank must survive.
    """
    try:
        launcher = os.pidfd_open(pid)
    except ProcessLookupError:
        os.killpg(0, signal.SIGKILL)
        return

    def watch() -> None:
        import select
        import time

        poller = select.poll()
        poller.register(launcher, select.POLLIN)
        poller.poll()
        time.sleep(grace_s)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="dplaunch-die-with", daemon=True).start()
