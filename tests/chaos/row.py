"""One row of the chaos table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.chaos.rig import Rig

BOTH = ("mp", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that goes wrong.

    Args:
        name: a word or two, for the test's id.
        fault: what is done.
        when: in which situation.
        seen: what the user sees.
        kept: what is not lost.
        words: found in the messages of the events, or of the error.
        backends: where it is run.
        act: does it to a group of stand-ins under load; None where `test` is the whole row.
        test: the test that is this row, or that runs it in another way too: with real engines, as a command.
    """

    name: str
    fault: str
    when: str
    seen: str
    kept: str
    words: tuple[str, ...] = ()
    backends: tuple[str, ...] = BOTH
    act: Callable[[Rig], Awaitable[None]] | None = None
    test: str = ""
