"""How often Python's garbage collector looks for cycles while the command serves."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

RARELY = 10_000
"""New objects between two looks, where Python's own is 700 (2000 from 3.13 on).

Each request makes dozens that stay in use until its end, and each look goes through the young ones.
"""


@contextlib.contextmanager
def collected_rarely() -> Iterator[None]:
    """Has the collector look rarely, in the whole process, which has to be ours; puts back what was set before.

    Nothing changes where it is switched off, or looks more rarely already.
    """
    first, *others = gc.get_threshold()
    if not 0 < first < RARELY:
        yield
        return
    gc.set_threshold(RARELY, *others)
    try:
        yield
    finally:
        gc.set_threshold(first, *others)
