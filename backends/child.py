"""A process that the zygote forked, as its launcher sees it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import TypeVar

from dplaunch.backend import STACK_SIGNAL, Exit

from .messages import Answer, Forked
from .tree import Tree, shared_memory_names

T = TypeVar("T")

OUTPUT_TAIL_BYTES = 8192
"""How much of a call's output an error message gets: some twenty lines and a traceback."""

STATUS_LOST = "its parent, the helper process, ended first, so nobody could collect its exit status"


class Child:
    """One process, from the request for it until nothing of it is left.

    Thread-safe. Its futures are set in the nursery's thread:
        born: when the process exists; an exception when it never will.
        ended: when the process has ended.
        cleared: when its whole tree is gone, and its shared memory with it; False if some of it would not go.
    """

    def __init__(self, session: int) -> None:
        self.born: Future[None] = _uncancellable()
        self.ended: Future[Exit] = _uncancellable()
        self.cleared: Future[bool] = _uncancellable()
        self.pid: int | None = None
        self.answer: Answer | None = None
        self.output = ""
        self._session = session
        self._shared_before = shared_memory_names()
        self._lock = threading.Lock()
        self._pidfd = -1
        self._files: list[int] = []
        self._tree: Tree | None = None
        self._doomed = False

    @property
    def pidfd(self) -> int:
        """Readable once the process has ended; -1 before it is born and after it has ended."""
        return self._pidfd

    def settled(self) -> None:
        """Notes the shared memory that the process holds, for its sudden end. Does nothing when it has ended."""
        with self._lock:
            if self._tree is not None and self._pidfd >= 0:
                self._tree.note_own_shared_memory()

    def dump_stack(self) -> None:
        """Has the process write its stacks to its log. Does nothing when it has ended."""
        with self._lock:
            if self._pidfd >= 0:
                self._signal(STACK_SIGNAL)

    def terminate(self) -> None:
        """SIGTERM to the process. Does nothing when it has ended."""
        with self._lock:
            if self._tree is None:
                self._doomed = True
            elif self._pidfd >= 0:
                self._tree.note_shared_memory()
                self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole tree; to one that is not born yet, at its birth."""
        with self._lock:
            self._doomed = True
            if self._tree is not None and self._pidfd >= 0:
                self._kill_tree(self._tree)

    def be_born(self, message: Forked, pidfd: int, files: list[int]) -> None:
        """Takes what the zygote sent about the new process."""
        with self._lock:
            self.pid, self._pidfd, self._files = message.pid, pidfd, files
            self._tree = Tree(message.pid, self._session, self._shared_before)
            if self._doomed:
                self._kill_tree(self._tree)
        self.born.set_result(None)

    def be_lost(self, error: BaseException) -> None:
        """There is no process, and will be none."""
        self.born.set_exception(error)
        self.cleared.set_result(True)

    def end(self, exit_: Exit) -> None:
        """The process has ended. What is left of its tree is ended and cleared away by a thread of its own."""
        with self._lock:
            os.close(self._pidfd)
            self._pidfd = -1
            self._read_files()
        # First, for fail-over waits for it; the rest may take a driver seconds.
        self.ended.set_result(exit_)
        try:
            threading.Thread(target=self._clear, name=f"dplaunch-clear-{self.pid}", daemon=True).start()
        except RuntimeError:
            # No more threads while the interpreter ends.
            self._clear()

    def _clear(self) -> None:
        cleared = False
        try:
            cleared = self._tree is None or self._tree.clear()
        finally:
            self.cleared.set_result(cleared)

    def _kill_tree(self, tree: Tree) -> None:
        for pidfd in tree.kill():
            os.close(pidfd)

    def _signal(self, number: signal.Signals) -> None:
        # When it has just ended, `end` is on its way.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def _read_files(self) -> None:
        if not self._files:
            return
        answer, output = self._files
        self._files = []
        self.answer = _read_answer(answer)
        size = os.fstat(output).st_size
        tail = os.pread(output, OUTPUT_TAIL_BYTES, max(0, size - OUTPUT_TAIL_BYTES))
        self.output = tail.decode(errors="replace").strip()
        os.close(output)


def _read_answer(file: int) -> Answer | None:
    # Writer and reader share one file position.
    os.lseek(file, 0, os.SEEK_SET)
    with Connection(file, writable=False) as connection:
        try:
            answer: Answer = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return None
    return answer


def _uncancellable() -> Future[T]:
    future: Future[T] = Future()
    # One waiter that gives up must not take the result from the others.
    future.set_running_or_notify_cancel()
    return future
