"""What runs in the processes of the zygote's tests: trivial, and told by files what it saw."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import current_process, shared_memory
from pathlib import Path

from dplaunch.backend import RankBoot
from dplaunch.channel import RankChannel
from dplaunch.errors import ModelError

PRELOAD = f"{__name__}:preload"
BROKEN_PRELOAD = f"{__name__}:broken_preload"

preloaded_in: list[int] = []
imported_in = os.getpid()


def preload() -> None:
    """Leaves a trace that forked processes inherit."""
    preloaded_in.append(os.getpid())


def broken_preload() -> None:
    sys.stderr.write("about to fail")
    raise ImportError("no such wonder")


def dying_preload() -> None:
    os.write(2, b"last words")
    os.kill(os.getpid(), signal.SIGKILL)


def note(boot: RankBoot, **values: object) -> None:
    """Tells the test; at once, so that it never reads half of it."""
    path = Path(boot.payload.decode())
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"pid": os.getpid(), **values}))
    unfinished.rename(path)


def end_well(boot: RankBoot, channel: RankChannel) -> None:
    note(boot)


def end_with_7(boot: RankBoot, channel: RankChannel) -> None:
    raise SystemExit(7)


def stay(boot: RankBoot, channel: RankChannel) -> None:
    note(boot)
    _stay()


def ignore_sigterm(boot: RankBoot, channel: RankChannel) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(boot)
    _stay()


def speak(boot: RankBoot, channel: RankChannel) -> None:
    os.write(1, b"out\n")
    os.write(2, b"err\n")


def have_children(boot: RankBoot, channel: RankChannel) -> None:
    """One in the rank's process group, and one in a session of its own."""
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    pids = [subprocess.Popen(command, start_new_session=away).pid for away in (False, True)]
    note(boot, children=pids)
    _stay()


def leave_a_child(boot: RankBoot, channel: RankChannel) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    note(boot, children=[child.pid])
    os._exit(3)


def share_memory(boot: RankBoot, channel: RankChannel) -> None:
    memory = shared_memory.SharedMemory(create=True, size=4096)
    note(boot, name=memory.name)
    _stay()


def tell_all(boot: RankBoot, channel: RankChannel) -> None:
    main = sys.modules["__main__"]
    note(
        boot,
        parent=os.getppid(),
        group=os.getpgid(0),
        name=current_process().name,
        kind=f"{type(current_process()).__module__}.{type(current_process()).__name__}",
        torch="torch.multiprocessing" in sys.modules,
        main=getattr(main, "__file__", None),
        in_main_thread=threading.current_thread() is threading.main_thread(),
        preloaded_in=preloaded_in,
        imported_in=imported_in,
        env=dict(os.environ),
        cwd=os.getcwd(),
        handlers=[number for number in signal.valid_signals() if callable(signal.getsignal(number))],
        blocked=list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        files=_open_files(),
    )


def _open_files() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return found


def _stay() -> None:
    while True:
        signal.pause()


def reverse(payload: bytes) -> bytes:
    return payload[::-1]


def megabytes(payload: bytes) -> bytes:
    return payload * 2**20


def where(payload: bytes) -> bytes:
    return json.dumps(
        {"pid": os.getpid(), "parent": os.getppid(), "env": dict(os.environ), "cwd": os.getcwd()}
    ).encode()


def refuse(payload: bytes) -> bytes:
    raise ModelError("there is no model here", hint="Look elsewhere.", detail="line 1\nline 2")


def stumble(payload: bytes) -> bytes:
    raise KeyError("shoe")


def crash(payload: bytes) -> bytes:
    os.write(1, b"all is well\n")
    os.write(2, b"so far\n")
    os.kill(os.getpid(), signal.SIGSEGV)
    return b""


def hang(payload: bytes) -> bytes:
    Path(payload.decode()).write_text(str(os.getpid()))
    _stay()
    return b""
