"""Engines of closed groups do not pile up until Python happens to look for cycles."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from dplaunch import remains


class Engine:
    """In a cycle, as vLLM's are."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _nothing_else_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No engines of groups that other tests had, and no collection by chance."""
    monkeypatch.setattr(remains, "_ended", weakref.WeakSet())
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_the_engines_of_closed_groups_are_collected_when_there_are_too_many() -> None:
    ended = []
    for _ in range(remains.MOST):
        engine = Engine()
        remains.leave(engine)
        ended.append(weakref.ref(engine))
        del engine
        remains.collect()
    assert all(each() is not None for each in ended), "a collection for each launch would cost more than it brings"
    last = Engine()
    remains.leave(last)
    remains.collect()
    assert all(each() is None for each in ended)
    assert last.itself is last, "what somebody holds stays"
