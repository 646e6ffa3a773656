"""Ten thousand clients that go away in the middle of their streams: `python -m tests.chaos.crowd`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from dplaunch import demo
from dplaunch.seam import frontend
from tests.chaos.resources import Sample
from tests.chaos.served import served

FREE_S = 60.0
"""Seconds for the last slots to be free."""


async def crowd(count: int, directory: Path) -> str:
    """What came of it, in one line.

    Raises:
        TimeoutError: when slots are not free afterwards.
        RuntimeError: when the next answer is not as foretold.
    """
    async with served(str(demo.demo_model().path), directory) as server:
        await server.crowd_leaves(count // 10)
        before, began = Sample.take(), time.monotonic()
        await server.crowd_leaves(count - count // 10)
        async with asyncio.timeout(FREE_S):
            while left := await server.running():
                await asyncio.sleep(0.1)
        seconds = time.monotonic() - began
        if not await server.is_exact([9, 9], 10):
            raise RuntimeError("the answer after it is not as foretold")
        after = Sample.take()
    return (
        f"{count} clients went away; {left:g} requests are left after {seconds:.0f} s; "
        f"memory {before.rss >> 20} MB, then {after.rss >> 20} MB; file descriptors {before.fds}, then {after.fds}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    frontend.import_vllm(quiet=True)
    with tempfile.TemporaryDirectory(prefix="dplcrowd") as name:
        sys.stdout.write(asyncio.run(crowd(parser.parse_args().count, Path(name))) + "\n")


if __name__ == "__main__":
    main()
