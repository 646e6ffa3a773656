"""Whether two processes are in the same place."""

from __future__ import annotations

import os
from pathlib import Path


def whereabouts() -> str:
    """The same text in two processes exactly when they can see each other's processes, files and sockets."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "mnt", "net", "ipc")]
    return " ".join([boot, *spaces])
