"""Launched and closed in one process, a hundred times, and nothing grows: `python -m tests.chaos.launches`."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

from dplaunch import demo
from dplaunch.seam import frontend
from dplaunch.testing import expected_tokens
from tests.leaks import SHM
from tests.real.standins import standin_group, standin_spec

WARM_UP = 40
"""Launches before the first look: what libraries make once is made by then, and the allocator has cut its memory up (it
went from 761 MB before the first launch to 913 after forty, and was between 926 and 957 from sixty to 160)."""

RSS_FIXED_BYTES, RSS_EACH_BYTES = 16 * 2**20, 2**18
"""What the allocator may keep in all, and for each launch: a group that stays would be megabytes."""


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds between two groups."""

    fds: int
    threads: int
    children: int
    shm: int
    rss: int

    @classmethod
    def now(cls) -> Held:
        """After a collection of what nobody holds any more, and without what the allocator keeps for later."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return cls(
            fds=len(os.listdir("/proc/self/fd")),
            threads=threading.active_count(),
            children=len(psutil.Process().children(recursive=True)),
            shm=len(os.listdir(SHM)),
            rss=psutil.Process().memory_info().rss,
        )


def launches(count: int, model: str, directory: Path) -> tuple[Held, Held]:
    """What was held after `WARM_UP` launches, and after `count` further ones.

    Raises:
        RuntimeError: when an answer is not as foretold.
    """
    from vllm import SamplingParams

    first: Held | None = None
    params = SamplingParams(max_tokens=5, detokenize=False)
    for number in range(WARM_UP + count):
        if number == WARM_UP:
            first = Held.now()
        with standin_group(standin_spec(model, directory, base_id=f"life{number}")) as group:
            outputs = group.generate([[number + 1]] * 4, params)
        if any(list(output.outputs[0].token_ids) != expected_tokens([number + 1], 5) for output in outputs):
            raise RuntimeError(f"an answer of launch {number} is not as foretold")
    last = Held.now()
    return first or last, last


def growth(first: Held, last: Held, count: int) -> list[str]:
    """What has grown, in words; nothing in a process that is well."""
    found = [
        f"{name}: {getattr(first, name)}, then {getattr(last, name)}"
        for name in ("fds", "threads", "children", "shm")
        if getattr(last, name) > getattr(first, name)
    ]
    if last.rss - first.rss > RSS_FIXED_BYTES + count * RSS_EACH_BYTES:
        found.append(f"memory: {first.rss >> 20} MB, then {last.rss >> 20} MB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    count = parser.parse_args().count
    frontend.import_vllm(quiet=True)
    with tempfile.TemporaryDirectory(prefix="dpllives") as name:
        first, last = launches(count, str(demo.demo_model().path), Path(name))
    sys.stdout.write(f"{count} launches after the first {WARM_UP}: {first}, then {last}\n")
    if found := growth(first, last, count):
        sys.exit("grown: " + "; ".join(found))


if __name__ == "__main__":
    main()
