"""What closed groups leave to Python's collector: an engine is part of cycles, vLLM's own and ours.

Python looks for cycles when enough objects were made since it last did, which says nothing of how large they are: ten
closed groups may still be there, 65 MB each, and what they leave behind them is memory in pieces.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

MOST = 2
"""Engines of closed groups that may wait; one at least is still held by whoever closed the last group."""

_ended: weakref.WeakSet[Any] = weakref.WeakSet()


def leave(engine: Any) -> None:
    """Takes note of the engine of a group that is closed."""
    _ended.add(engine)


def collect() -> None:
    """Collects them when they are too many. Takes some tenths of a second then: call it while ranks load."""
    if len(_ended) > MOST:
        gc.collect()
