"""The zygote: one process that has imported everything, from which ranks are forked. Runs in the helper.

It has one thread and no device, for a fork copies neither well. It serves its launcher, and ends with it,
taking along all that it forked; when it ends by itself, what it forked lives on.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.context
import os
import select
import selectors
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import send_handle
from typing import Any, NoReturn

from dplaunch.rank_main import load_function

from .messages import CallJob, Ended, Failure, Fork, Forked, Job, NotForked, RankJob, Ready, Unfit, ZygoteBoot
from .offspring import Inheritance, default_signals, run_call, run_rank
from .other_threads import other_threads
from .tree import Tree, shared_memory_names

PROCESS_TITLE = "dplaunch::zygote"

EXIT_UNFIT = 1
"""The zygote's exit code when it could not import what ranks need; the launcher was told why."""

EXIT_BUG = 70
"""The zygote's exit code after an exception of its own; what it raised is in its log."""


def serve(connection: Connection) -> NoReturn:
    """The zygote's whole life. `connection` is the launcher's; its next message is a `ZygoteBoot`."""
    default_signals()
    boot: ZygoteBoot = connection.recv()
    launcher = os.pidfd_open(boot.launcher_pid)
    if os.getppid() != boot.launcher_pid:
        os._exit(0)
    environ = dict(os.environ)
    # Nothing that is imported is garbage; looking for some takes a tenth of the time of importing.
    gc.disable()
    try:
        with _watching(launcher):
            context = _prepare(boot)
    except BaseException as error:
        connection.send(Unfit(Failure.of(error)))
        os._exit(EXIT_UNFIT)
    # Never visited again by the collector, so that the pages stay shared with the ranks.
    gc.freeze()
    gc.enable()
    imported = {name: value for name, value in os.environ.items() if environ.get(name) != value}
    connection.send(Ready(other_threads()))
    try:
        Zygote(connection, launcher, boot, context, imported).run()
    except BaseException:
        # Not through the interpreter's end, which would wait for the ranks; they can do without their zygote.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(EXIT_BUG)


@dataclass(frozen=True, slots=True)
class _Child:
    process: multiprocessing.context.Process
    pidfd: int
    tree: Tree


class Zygote:
    """The serving state: a selector over the launcher's requests, the launcher's end, and every child's end."""

    def __init__(
        self, connection: Connection, launcher: int, boot: ZygoteBoot, context: Any, imported: dict[str, str]
    ) -> None:
        self._connection = connection
        self._boot = boot
        self._context = context
        self._imported = imported
        self._children: dict[int, _Child] = {}
        self._engines: set[str] = set()
        self._selector = selectors.DefaultSelector()
        # Before anything else is opened: what is open now belongs to libraries, and children keep it.
        own = {connection.fileno(), launcher, boot.stdout, boot.stderr, self._selector.fileno()}
        self._theirs = _open_files() - own
        self._watch(connection, self._serve_request)
        self._watch(launcher, self._end)

    def run(self) -> NoReturn:
        """Serves until the launcher is gone."""
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _watch(self, file: Connection | int, callback: Callable[[], object]) -> None:
        self._selector.register(file, selectors.EVENT_READ, callback)

    def _serve_request(self) -> None:
        try:
            request: Fork = self._connection.recv()
        except (EOFError, OSError):
            self._end()
        try:
            self._import_engine(request.job)
            child, gate, files = self._fork(request.job)
        except Exception as error:
            self._send(NotForked(request.number, Failure.of(error)))
            return
        self._children[request.number] = child
        self._send(Forked(request.number, child.tree.pid, len(files)), child.pidfd, *files)
        for file in files:
            os.close(file)
        # Only now: a process that the launcher does not know of must never run.
        with contextlib.suppress(OSError):
            gate.send_bytes(b"go")
        gate.close()
        self._watch(child.pidfd, partial(self._report, request.number))

    def _import_engine(self, job: Job) -> None:
        """Imports a rank's engine here, once, so that no rank has to: half of what a small engine's start takes."""
        if not isinstance(job, RankJob) or job.boot.engine in self._engines or self._boot.start_method == "spawn":
            return
        self._engines.add(job.boot.engine)
        before = _open_files()
        # What goes wrong here goes wrong in the rank too, which can tell the launcher.
        with contextlib.suppress(Exception):
            load_function(job.boot.engine)
        self._theirs |= _open_files() - before

    def _send(self, message: object, *files: int) -> None:
        try:
            self._connection.send(message)
            for file in files:
                send_handle(self._connection, file, None)
        except OSError:
            self._end()

    def _fork(self, job: Job) -> tuple[_Child, Connection, list[int]]:
        before = shared_memory_names()
        with contextlib.ExitStack() as on_failure:
            waiting, gate = Pipe(duplex=False)
            on_failure.enter_context(gate)
            files = [os.memfd_create(name) for name in ("answer", "output")] if isinstance(job, CallJob) else []
            for file in files:
                on_failure.callback(os.close, file)
            with waiting:
                process = self._start(job, waiting, files)
            on_failure.pop_all()
        pid = process.pid
        if pid is None:
            raise ChildProcessError("the process was started but has no pid")
        # Here too, so that it leads its group before the launcher hears of it; a spawned one has done exec.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)
        return _Child(process, os.pidfd_open(pid), Tree(pid, os.getsid(0), before)), gate, files

    def _start(self, job: Job, gate: Connection, files: list[int]) -> multiprocessing.context.Process:
        fresh = self._boot.start_method == "spawn"
        stdout, stderr = (files[1], files[1]) if files else (self._boot.stdout, self._boot.stderr)
        with contextlib.ExitStack() as ours:
            # As connections, for those are what a spawned process can be handed.
            handles = [
                ours.enter_context(Connection(os.dup(file), readable=False)) for file in (stdout, stderr, *files[:1])
            ]
            inheritance = Inheritance(
                launcher_pid=self._boot.launcher_pid,
                gate=gate,
                stdout=handles[0],
                stderr=handles[1],
                answer=handles[2] if files else None,
                foreign=frozenset() if fresh else _open_files() - self._theirs,
                environ={} if fresh else self._imported,
            )
            target = run_call if isinstance(job, CallJob) else run_rank
            process: multiprocessing.context.Process = self._context.Process(
                target=target, args=(job, inheritance), name=job.name
            )
            if fresh:
                # What the loader and the interpreter read at exec must be the rank's own.
                ours.enter_context(_environment(job.env))
            process.start()
        return process

    def _report(self, number: int) -> None:
        child = self._children.pop(number)
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        child.process.join()
        returncode = child.process.exitcode
        child.process.close()
        self._send(Ended(number, returncode))

    def _end(self) -> NoReturn:
        try:
            # All of them first, for a stopped or stubborn one must not give the others time.
            for child in self._children.values():
                for pidfd in child.tree.kill():
                    os.close(pidfd)
            for child in self._children.values():
                child.tree.clear()
        finally:
            os._exit(0)


def _prepare(boot: ZygoteBoot) -> Any:
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(PROCESS_TITLE)
    import torch.multiprocessing

    if boot.preload is not None:
        load_function(boot.preload)()
    return torch.multiprocessing.get_context(boot.start_method)


@contextlib.contextmanager
def _watching(launcher: int) -> Iterator[None]:
    """Ends this process with the launcher while it imports and serves no selector; leaves no thread behind."""
    stop, stopping = os.pipe()

    def watch() -> None:
        poller = select.poll()
        poller.register(launcher, select.POLLIN)
        poller.register(stop, select.POLLIN | select.POLLHUP)
        if launcher in (file for file, _ in poller.poll()):
            os._exit(0)

    thread = threading.Thread(target=watch, name="dplaunch-watch")
    thread.start()
    try:
        yield
    finally:
        os.close(stopping)
        thread.join()
        os.close(stop)


def _open_files() -> frozenset[int]:
    listed = [int(name) for name in os.listdir("/proc/self/fd")]
    # Less the descriptor that did the listing, whose number will soon be another's.
    return frozenset(file for file in listed if os.path.exists(f"/proc/self/fd/{file}"))


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    saved = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(env)
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
