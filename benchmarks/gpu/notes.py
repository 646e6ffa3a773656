"""What a step finds out, told at once, so that it is known even if the step never ends."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

MARK = "NOTE "
"""Begins a line of a step's output that is for the script."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One thing that a step found out.

    Args:
        step: its name.
        name: what it is.
        value: a measured number; None for a check.
        unit: of the value.
        good: whether a check went well; None for a value.
        found: what was there, for people.
    """

    step: str
    name: str
    value: float | None = None
    unit: str = ""
    good: bool | None = None
    found: str = ""


class Notes:
    """A step's way to tell.

    Args:
        step: its name.
    """

    def __init__(self, step: str) -> None:
        self._step = step

    def value(self, name: str, value: float, unit: str = "s") -> None:
        """A measured number."""
        self._tell(Note(step=self._step, name=name, value=float(value), unit=unit))

    def check(self, name: str, good: bool, found: object = "") -> None:
        """Whether something is as it should be; the step goes on in any case."""
        self._tell(Note(step=self._step, name=name, good=bool(good), found=str(found)[:300]))

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs a part that the rest can do without; a check that fails says what it raised. Returns its result."""
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.check(name, False, f"{type(error).__name__}: {error}")
            return None

    def _tell(self, note: Note) -> None:
        print("\n" + MARK + json.dumps(asdict(note)), flush=True)


def read(output: str) -> list[Note]:
    """The notes in a step's output; a line that another process wrote into is left out."""
    found = []
    for line in output.splitlines():
        if line.startswith(MARK):
            with contextlib.suppress(ValueError, TypeError):
                found.append(Note(**json.loads(line.removeprefix(MARK))))
    return found
