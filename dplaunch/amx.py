"""Whether this CPU keeps its word about AMX, which some virtual machines announce but forbid."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dplaunch.backend import Exit

if TYPE_CHECKING:
    from dplaunch.doctor import Check

PROBE_TIMEOUT_S = 30.0
"""Seconds for the probe: importing torch from a slow disk, and two tiny multiplications."""

REFUSED = 3
"""The probe's exit code when the kernel does not give AMX to the process."""

PROBE = f"""
import ctypes, sys
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
if ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) != 0:
    sys.exit({REFUSED})
import torch
a = torch.ones(64, 64, dtype=torch.bfloat16)
q = torch.ones(1, 2, 64, 64, dtype=torch.bfloat16)
print(float((a @ a).sum()) + float(torch.nn.functional.scaled_dot_product_attention(q, q, q).sum()))
"""
"""Does what vLLM's bfloat16 attention does: asks for the tile registers, then multiplies."""

ADVICE = "Use --dtype float32: bfloat16 attention would die with SIGILL at the first request."


def check_amx(cpuinfo: Path = Path("/proc/cpuinfo"), command: tuple[str, ...] | None = None) -> Iterator[Check]:
    """A check for a CPU that announces AMX; nothing for any other.

    The trial runs in a child process, which may die of it.
    """
    from dplaunch.doctor import Check, Status

    if "amx_tile" not in _flags(cpuinfo):
        return
    try:
        done = subprocess.run(
            command or (sys.executable, "-c", PROBE),
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        found = f"announced; the trial took longer than {PROBE_TIMEOUT_S:.0f} s"
        yield Check("AMX", Status.WARN, found, "Use --dtype float32 if a rank dies with SIGILL.")
        return
    if done.returncode == 0:
        yield Check("AMX", Status.OK, "announced, and works")
    elif done.returncode == REFUSED:
        yield Check("AMX", Status.FAIL, "announced, but the kernel refuses it", ADVICE)
    elif done.returncode < 0:
        ended = Exit.from_returncode(done.returncode)
        yield Check("AMX", Status.FAIL, f"announced, but using it ends in {ended}", ADVICE)
    else:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Check("AMX", Status.WARN, f"announced; the trial failed: {last}")


def _flags(cpuinfo: Path) -> set[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
