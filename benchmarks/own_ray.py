"""A Ray cluster of this machine alone, started outside of what is measured.

`python -m benchmarks.own_ray` holds one until its standard input ends, and prints its address.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.servers import environment

STOP_LIMIT_S = 30.0
"""Seconds until a cluster that does not end by itself is killed."""

OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory, bytes; hardly anything goes through it."""

_ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def ray_head() -> Iterator[str]:
    """A running cluster in a process of its own; gives its "host:port".

    Raises:
        RuntimeError: when it ends before it has an address.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.own_ray"],
        env=environment(),
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    # Leaving Popen's own block closes its standard input, at which it ends, and waits for that.
    with process:
        try:
            address = process.stdout.readline().strip() if process.stdout else ""
            if not address:
                raise RuntimeError(f"the Ray cluster ended with {process.wait(STOP_LIMIT_S)} before it was there")
            yield address
        finally:
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()  # Its processes end with it.


@contextlib.contextmanager
def ray_here() -> Iterator[str]:
    """This process as the head and driver of a cluster; gives its "host:port". Call it from a thread that stays."""
    import ray

    # A socket's path has at most 107 characters, and Ray adds 60.
    with tempfile.TemporaryDirectory(prefix="bray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        context = ray.init(
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=directory,
        )
        try:
            yield context.address_info["gcs_address"]
        finally:
            ray.shutdown()


def _main() -> None:
    with ray_here() as address:
        print(address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    _main()
