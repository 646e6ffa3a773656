"""A process that shares memory of its device, tells one reader of two, who never looks, and ends.

`python -m tests.gpu.sharer freed` gives the memory back before, `left` does not.
"""

from __future__ import annotations

import sys

import torch

from dplaunch.device_memory import DeviceMemory


def _main(end: str) -> None:
    memory = DeviceMemory(torch.device("cuda:0"), 2**20)
    memory.share(2)
    memory.handle()
    if end == "freed":
        memory.free()


if __name__ == "__main__":
    _main(sys.argv[1])
