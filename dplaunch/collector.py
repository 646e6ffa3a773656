"""How often Python's garbage collector looks for cycles while many requests are in flight."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

RARELY = 10_000
"""New objects between two looks, where Python's own is 700 (2000 from 3.13 on).

A batch makes them by the hundred thousand, all of them in use, and each look goes through the young ones: with
thousands of requests in flight that took a quarter of the frontend's time.
"""

_lock = threading.Lock()
_holders = 0
_before = (0, 0, 0)


@contextlib.contextmanager
def collected_rarely() -> Iterator[None]:
    """Has the collector look rarely, in the whole process; what was set before is put back by the last who leaves.

    Nothing changes where it is switched off, or looks more rarely already.
    """
    global _holders, _before
    with _lock:
        _holders += 1
        if _holders == 1:
            _before = gc.get_threshold()
            if 0 < _before[0] < RARELY:
                gc.set_threshold(RARELY, *_before[1:])
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            # Not what somebody else has set meanwhile.
            if _holders == 0 and gc.get_threshold() == (RARELY, *_before[1:]):
                gc.set_threshold(*_before)
