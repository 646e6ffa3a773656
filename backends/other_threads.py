"""Threads that a fork of this process would lack. Asked by the zygote when it has imported everything."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path

THREAD_END_S = 0.2
"""Seconds that a joined thread may still be seen by the kernel; it takes microseconds."""

CUDA_ERROR_NOT_INITIALIZED = 3


def other_threads() -> tuple[str, ...]:
    """The names of the threads of this process besides its main one, less those that a fork can do without."""
    deadline = time.monotonic() + THREAD_END_S
    tasks = Path("/proc/self/task")
    while (others := [task for task in tasks.iterdir() if task.name != str(os.getpid())]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.001)
    names = []
    for task in others:
        with contextlib.suppress(OSError):
            names.append((task / "comm").read_text().strip())
    return tuple(name for name in names if not _may_be_lost(name))


def _may_be_lost(thread: str) -> bool:
    """Whether a fork that lacks this thread is none the worse for it.

    pyarrow's allocator (imported wherever the package datasets is installed) does without its own in a fork. The
    NVIDIA driver's monitoring library, which torch counts devices with, leaves one named as CUDA's are; only with CUDA
    itself would a fork be broken. Seen with driver 580: the ranks of such a helper use their devices.
    """
    return thread == "jemalloc_bg_thd" or (thread.startswith("cuda") and not _has_initialised_cuda())


def _has_initialised_cuda() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    context = ctypes.c_void_p()
    return int(driver.cuCtxGetCurrent(ctypes.byref(context))) != CUDA_ERROR_NOT_INITIALIZED
