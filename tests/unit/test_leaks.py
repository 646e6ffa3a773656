from __future__ import annotations

import os
import subprocess
import threading

from tests.leaks import HELPER_FDS, LAZY_FDS, SHM, Snapshot


def test_the_leak_check_sees_processes_threads_descriptors_and_shared_memory() -> None:
    before = Snapshot.take()
    go = threading.Event()
    thread = threading.Thread(target=go.wait, name="dplaunch-left", daemon=True)
    thread.start()
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(LAZY_FDS + HELPER_FDS + 1)]
    shm = SHM / f"dplaunch-leak-{os.getpid()}"
    shm.touch()
    with subprocess.Popen(["sleep", "600"]) as child:
        found = "\n".join(before.leaks(Snapshot.take(), ()))
        allowed = "\n".join(before.leaks(Snapshot.take(), [child.pid]))
        child.kill()
    shm.unlink()
    for fd in fds:
        os.close(fd)
    go.set()
    thread.join()
    for word in (f"processes: {child.pid}", "sleep 600", "threads: dplaunch-left", "/dev/null", shm.name):
        assert word in found
    assert "processes" not in allowed
