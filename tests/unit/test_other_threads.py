"""Which threads of the zygote are worth a warning."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import pytest
from dplaunch.backends import other_threads as threads


@pytest.mark.parametrize(
    ("name", "status", "expected"),
    [
        ("a_pool", 3, ("a_pool",)),
        ("jemalloc_bg_thd", 3, ()),
        ("cuda0000240000a", 3, ()),
        ("cuda0000240000a", 0, ("cuda0000240000a",)),
        ("cuda0000240000a", None, ()),
    ],
)
def test_threads_that_a_fork_can_do_without_are_left_out(
    name: str, status: int | None, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(library: str) -> SimpleNamespace:
        if status is None:
            raise OSError(library)
        return SimpleNamespace(cuCtxGetCurrent=lambda context: status)

    monkeypatch.setattr(ctypes, "CDLL", load)
    stop, named = threading.Event(), threading.Event()

    def wait() -> None:
        with open("/proc/thread-self/comm", "w") as comm:
            comm.write(name)
        named.set()
        stop.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert named.wait(10)
        found = threads.other_threads()
        assert tuple(each for each in found if each == name) == expected
    finally:
        stop.set()
        thread.join()
