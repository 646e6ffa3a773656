"""How a name of vLLM that the seam relies on is put down, and the window of versions. names.py has the names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OLDEST, NEWEST = "0.26", "0.33"
"""The versions that the seam was checked with, both ends included."""


@dataclass(frozen=True, slots=True)
class Relied:
    """One name, or one module.

    Args:
        name: "module:qualified.name", or "module:".
        use: the arguments that we pass, or that our own method in its place takes, as in "self, one, two=": with a
            trailing = what goes by keyword, without it by position. None: it is not called.
        has: attributes that we read or set.
        mentions: names in its body, which say that it works as we think; "name=" is a keyword of a call in it.
        since: the first version that has it; earlier ones have another, or do without. `OLDEST`: all have it.
        until: the last version in which we use it; None: it is as good as ever.
        instead: what is done in the versions before `since`, where there is something to say.
    """

    name: str
    use: str | None = None
    has: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    since: str = OLDEST
    until: str | None = None
    instead: str = ""

    def is_in(self, version: str) -> bool:
        """Whether we count on it in a version such as "0.26.0"."""
        release = numbers(version)[:2]
        is_new = self.since != OLDEST and release < numbers(self.since)
        return not is_new and (self.until is None or release <= numbers(self.until))


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 26, 0) for "0.26.0rc1.dev3+cpu"."""
    found: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: next((place for place, each in enumerate(part) if not each.isdigit()), len(part))]
        if not digits:
            break
        found.append(int(digits))
        if digits != part:
            break
    return tuple(found)


def calls(module: str, uses: Mapping[str, str], since: str = OLDEST, until: str | None = None) -> Iterable[Relied]:
    """Functions of one module, each with its `use`."""
    return (Relied(f"{module}:{name}", use, since=since, until=until) for name, use in uses.items())


def fields(fields: Mapping[str, str], since: str = OLDEST) -> Iterable[Relied]:
    """Classes, each with the attributes that we read or set."""
    return (Relied(name, has=tuple(has.split()), since=since) for name, has in fields.items())
