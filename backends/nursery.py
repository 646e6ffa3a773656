"""The launcher's side of a zygote: starts it, asks it for processes, and notices when either ends.

One zygote serves all groups of a launcher that need the same one, in whatever event loops and threads they
are, and outlives them for a while, so that the next launch finds it warm.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

from dplaunch.backend import Exit
from dplaunch.errors import BackendError, DplaunchError

from .child import STATUS_LOST, Child
from .helper import Helper, start_helper
from .messages import Ended, Fork, Forked, Job, NotForked, Ready, Unfit

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0
"""Seconds for a killed zygote to be seen gone; it takes milliseconds."""


class ZygoteLostError(BackendError):
    """Raised when the zygote ended before it made the process that it was asked for; the process never ran.

    Args:
        replaceable: whether another one will do; one that never served would end as this one did.
    """

    def __init__(self, message: str, *, hint: str = "", detail: str = "", replaceable: bool = False) -> None:
        super().__init__(message, hint=hint, detail=detail)
        self.replaceable = replaceable


@dataclass(frozen=True, slots=True)
class ZygoteKey:
    """Groups with equal keys share a zygote.

    Args:
        start_method: "fork" or "spawn".
        preload: "module:function" that imports what ranks need; None for nothing.
        loader_env: the variables that only count when a program is loaded; all others are set after a fork.
    """

    start_method: str
    preload: str | None
    loader_env: tuple[tuple[str, str], ...]


class Nursery:
    """One zygote and its children. Thread-safe; ended for good when the zygote ends.

    Args:
        key: what kind of zygote.
        env: its whole environment.
        on_idle: called, from any thread, whenever the last child has ended, and when it has no more use.
    """

    def __init__(self, key: ZygoteKey, env: Mapping[str, str], on_idle: Callable[[Nursery], None]) -> None:
        self.key = key
        self.ready = threading.Event()
        self.other_threads: tuple[str, ...] = ()
        self._on_idle = on_idle
        self._lock = threading.Lock()
        self._children: dict[int, Child] = {}
        self._next = 0
        self._failure: DplaunchError | None = None
        self._over = False
        self._told_to_end = False
        self._helper: Helper = start_helper(key.start_method, key.preload, env)
        self._outbox: queue.SimpleQueue[Fork | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="dplaunch::zygote reader", daemon=True)
        # Apart from the callers: a zygote that is busy importing reads nothing, and the socket's buffer is small.
        self._writer = threading.Thread(target=self._write, name="dplaunch::zygote writer", daemon=True)
        self._reader.start()
        self._writer.start()

    @property
    def pid(self) -> int:
        """The zygote's process id."""
        return self._helper.pid

    @property
    def usable(self) -> bool:
        """Whether it can be asked for a process."""
        return not self._over

    @property
    def busy(self) -> bool:
        """Whether any child is alive or asked for."""
        with self._lock:
            return bool(self._children)

    def fork(self, job: Job) -> Child:
        """Asks for a process and returns at once; `Child.born` says when it exists.

        Raises:
            ZygoteLostError: when the zygote has ended.
        """
        child = Child(session=self.pid)
        with self._lock:
            if self._over:
                raise self._lost_error()
            self._next += 1
            self._children[self._next] = child
            self._outbox.put(Fork(self._next, job))
        return child

    def end(self) -> None:
        """Ends the zygote, and every child that is left with its whole tree. Blocks for milliseconds."""
        with self._lock:
            self._over = self._told_to_end = True
            children = list(self._children.values())
        for child in children:
            child.kill()
        self._helper.kill()
        self._reader.join(END_TIMEOUT_S)
        for child in children:
            with contextlib.suppress(TimeoutError):
                child.cleared.result(END_TIMEOUT_S)

    def disown(self) -> None:
        """Called in a forked copy of the launcher: the zygote and its children belong to the original."""
        self._over = True
        self._helper.forget()

    def _write(self) -> None:
        while (request := self._outbox.get()) is not None:
            try:
                self._helper.connection.send(request)
            except OSError:
                return  # the reader finds the same, and tells everyone

    def _read(self) -> None:
        connection = self._helper.connection
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._take(connection.recv(), connection)
        self._be_lost()

    def _take(self, message: object, connection: Connection) -> None:
        match message:
            case Ready(threads):
                self._be_ready(threads)
            case Unfit(failure):
                self._failure = failure.as_error("the helper process could not import what ranks need")
            case Forked(number, files=files):
                received = [recv_handle(connection) for _ in range(1 + files)]
                self._children[number].be_born(message, received[0], received[1:])
            case NotForked(number, failure):
                self._children[number].be_lost(failure.as_error("a process could not be made"))
                self._forget(number)
            case Ended(number, returncode):
                exit_ = Exit(reason=STATUS_LOST) if returncode is None else Exit.from_returncode(returncode)
                self._children[number].end(exit_)
                self._forget(number)

    def _be_ready(self, threads: tuple[str, ...]) -> None:
        self.other_threads = threads
        self.ready.set()
        if threads:
            logger.warning(
                "The helper process has %d threads besides its main one (%s), which forked ranks will lack. "
                "If a rank hangs at its start, use --start-method spawn.",
                len(threads),
                ", ".join(threads),
            )

    def _forget(self, number: int) -> None:
        with self._lock:
            del self._children[number]
            idle = not self._children
        if idle:
            self._on_idle(self)

    def _be_lost(self) -> None:
        """The zygote is gone. Its children are not: from now on their pidfds say when they end."""
        with self._lock:
            self._over = True
            children = dict(self._children)
        self._outbox.put(None)
        self._helper.reap()
        orphans = {}
        for number, child in children.items():
            if child.born.done():
                orphans[child.pidfd] = number
            else:
                child.be_lost(self._lost_error())
                self._forget(number)
        self._writer.join()
        self._helper.close()
        self._watch_orphans(orphans)
        self._on_idle(self)

    def _watch_orphans(self, orphans: dict[int, int]) -> None:
        poller = select.poll()
        for pidfd in orphans:
            poller.register(pidfd, select.POLLIN)
        while orphans:
            for pidfd, _ in poller.poll():
                poller.unregister(pidfd)
                number = orphans.pop(pidfd)
                self._children[number].end(Exit(reason=STATUS_LOST))
                self._forget(number)

    def _lost_error(self) -> DplaunchError:
        if self._failure is not None:
            return self._failure
        return ZygoteLostError(
            f"the helper process that makes ranks ended: {self._helper.describe_end()}",
            hint="The next launch starts a new one. If it ends again, use --start-method spawn.",
            detail=self._helper.log_tail(),
            replaceable=self.ready.is_set() or self._told_to_end,
        )
