"""What a stand-in engine lives in: a process of its own, or a thread that plays one.

The engine ends by exit codes and signals, waits for SIGTERM and writes to stderr. In a thread these would hit
the test's own process, so there they are simulated; everything above this module is the same for both.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import threading
import time
from types import TracebackType
from typing import NoReturn, Protocol, Self

from dplaunch.backend import RankBoot
from dplaunch.channel import RankChannel


class SimulatedExit(BaseException):
    """Raised in a thread that plays a process, where a process would end; `returncode` as in `subprocess`.

    Not an Exception, so that no handler on the way mistakes it for an error.
    """

    def __init__(self, returncode: int) -> None:
        super().__init__(returncode)
        self.returncode = returncode


class StopFlag:
    """An event with a file descriptor, so that one poll waits for it and for sockets together."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.RLock()
        self.killed = threading.Event()
        self.ignore_terminate = False

    def fileno(self) -> int:
        """Readable from `terminate` or `kill` on."""
        return self._fd

    def terminate(self) -> None:
        """Plays SIGTERM; nothing happens when that is ignored. Safe in a signal handler."""
        if not self.ignore_terminate:
            self._set()

    def kill(self) -> None:
        """Plays SIGKILL."""
        self.killed.set()
        self._set()

    def wait(self, timeout_s: float | None) -> bool:
        """Whether it was set within `timeout_s` seconds; None waits for ever."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        return bool(poller.poll(None if timeout_s is None else max(0, round(timeout_s * 1000))))

    def close(self) -> None:
        """Gives the descriptor back; a later `terminate` or `kill` does nothing."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _set(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)


class InProcessChannel(RankChannel):
    """The channel of a rank that is a thread; it brings that rank's signals."""

    def __init__(self, boot: RankBoot, stop: StopFlag) -> None:
        super().__init__(boot.handshake_address, boot.rank, boot.incarnation)
        self.stop = stop

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, SimulatedExit):
            # A process that is gone sends nothing more.
            self._socket.close(linger=0)
        super().__exit__(kind, error, trace)


class Host(Protocol):
    """What the engine asks of the process that it lives in."""

    stop: StopFlag

    def stopped(self) -> bool:
        """Whether the engine was asked to end."""

    def sleep(self, seconds: float) -> None:
        """Waits, whether or not the engine was asked to end."""

    def ignore_sigterm(self) -> None:
        """From now on only SIGKILL ends the engine."""

    def die(self, returncode: int) -> NoReturn:
        """Ends the process at once: an exit code, or minus a signal's number."""

    def say(self, text: str) -> None:
        """Writes a line to stderr."""

    def spawn_sleeper(self) -> int | None:
        """The pid of a new child that outlives the engine if nobody ends it; None where there can be none."""

    def report(self) -> dict[str, object]:
        """What the process sees of itself: pid, process_title, env, cpus."""


class ProcessHost:
    """A process of its own; takes SIGTERM and SIGINT while it is entered."""

    def __init__(self) -> None:
        self.stop = StopFlag()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda _number, _frame: self.stop.terminate())
        return self

    def __exit__(self, *_: object) -> None:
        # The handlers stay: a second SIGTERM on the way out must not turn an orderly end into a death.
        self.stop.close()

    def stopped(self) -> bool:
        return self.stop.wait(0)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def ignore_sigterm(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def die(self, returncode: int) -> NoReturn:
        sys.stderr.flush()
        if returncode < 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with contextlib.suppress(OSError):
                signal.signal(-returncode, signal.SIG_DFL)
            os.kill(os.getpid(), -returncode)
            time.sleep(60)
        os._exit(returncode)

    def say(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def spawn_sleeper(self) -> int | None:
        return os.posix_spawnp("sleep", ["sleep", "600"], os.environ)

    def report(self) -> dict[str, object]:
        with open("/proc/self/cmdline", "rb") as file:
            title = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
        return {
            "pid": os.getpid(),
            "process_title": title,
            "env": dict(os.environ),
            "cpus": sorted(os.sched_getaffinity(0)),
        }


class ThreadHost:
    """A thread that plays a process; raises `SimulatedExit` where a process would end."""

    def __init__(self, boot: RankBoot, stop: StopFlag) -> None:
        self.stop = stop
        self._boot = boot

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stopped(self) -> bool:
        self._check()
        return self.stop.wait(0)

    def sleep(self, seconds: float) -> None:
        self.stop.killed.wait(seconds)
        self._check()

    def ignore_sigterm(self) -> None:
        self.stop.ignore_terminate = True

    def die(self, returncode: int) -> NoReturn:
        raise SimulatedExit(returncode)

    def say(self, text: str) -> None:
        if self._boot.log_file is not None:
            with self._boot.log_file.open("a") as file:
                file.write(text + "\n")

    def spawn_sleeper(self) -> int | None:
        return None

    def report(self) -> dict[str, object]:
        boot = self._boot
        return {
            "pid": os.getpid(),
            "process_title": boot.process_title,
            "env": dict(boot.env),
            "cpus": sorted(boot.cpus),
        }

    def _check(self) -> None:
        if self.stop.killed.is_set():
            raise SimulatedExit(-signal.SIGKILL)


def host_of(boot: RankBoot, channel: RankChannel) -> ProcessHost | ThreadHost:
    """The host of the engine that got these two."""
    return ThreadHost(boot, channel.stop) if isinstance(channel, InProcessChannel) else ProcessHost()
