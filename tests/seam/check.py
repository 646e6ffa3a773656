"""What the seam relies on, compared with what a vLLM has: a record of each version, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dplaunch.seam.names import PUBLIC, RELIED
from dplaunch.seam.relied import Relied, numbers
from tests.seam.sources import Missing, Sources

RECORDS = Path(__file__).parent / "records"


@dataclass(frozen=True, slots=True)
class Record:
    """What one version of vLLM has of all that the seam relies on in any version.

    Args:
        vllm: the version.
        signatures: the parameters of what is called; None where there is no such name.
        attributes: those of the attributes that we use, and of the names that we want mentioned, which are there.
    """

    vllm: str
    signatures: Mapping[str, str | None]
    attributes: Mapping[str, tuple[str, ...]]

    def write(self) -> Path:
        """Writes the record into the tree; one name a line."""
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{self.vllm}.json"
        content = {"vllm": self.vllm, "signatures": self.signatures, "attributes": self.attributes}
        path.write_text(json.dumps(content, indent=1, sort_keys=True, default=list) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Record:
        """A record from the tree."""
        content = json.loads(path.read_text())
        attributes = {name: tuple(found) for name, found in content["attributes"].items()}
        return cls(content["vllm"], content["signatures"], attributes)


def recorded() -> list[Record]:
    """All records in the tree, oldest version first."""
    return sorted(map(Record.read, RECORDS.glob("*.json")), key=lambda record: numbers(record.vllm))


def record(sources: Sources, version: str) -> Record:
    """What a version has, by its sources."""
    signatures: dict[str, str | None] = {}
    attributes: dict[str, set[str]] = {}
    for relied in RELIED:
        if relied.use is not None:
            signatures[relied.name] = _signature(sources, relied.name)
        else:
            signatures.setdefault(relied.name, "" if _is_there(sources, relied.name) else None)
        attributes.setdefault(relied.name, set()).update(_attributes(sources, relied))
    for name in PUBLIC:
        signatures[name] = "" if _is_there(sources, name) else None
    kept = {name: tuple(sorted(found)) for name, found in attributes.items() if found}
    return Record(version, signatures, kept)


def problems(record: Record) -> list[str]:
    """What the seam relies on and the version does not have, one line each."""
    return [*_problems(record)]


def _problems(record: Record) -> Iterator[str]:
    for name in PUBLIC:
        if record.signatures.get(name) is None:
            yield f"{name} is not there"
    for relied in RELIED:
        signature = record.signatures.get(relied.name)
        there = set(record.attributes.get(relied.name, ()))
        wanted = {*relied.has, *relied.mentions}
        if not relied.is_in(record.vllm):
            earlier = numbers(record.vllm) < numbers(relied.since)
            if earlier and signature is not None and (not wanted or wanted <= there):
                yield f"{relied.name} is there already, not only from {relied.since} on"
        elif signature is None:
            yield f"{relied.name} is not there"
        else:
            if relied.use is not None and (wrong := misfit(relied.use, signature)):
                yield f"{relied.name}({signature}): {wrong}"
            if missing := sorted(wanted - there):
                yield f"{relied.name} has no {', '.join(missing)}"


def misfit(use: str, signature: str) -> str:
    """Why a function with this signature cannot be called so; empty when it can.

    Args:
        use: as in `Relied.use`.
        signature: as in "self, one, two=, *, three="; a trailing = says that there is a default.
    """
    parameters = _split(signature)
    stars = {parameter for parameter in parameters if parameter.startswith("*")}
    takes_more, takes_any = any(len(star) > 1 and star[1] != "*" for star in stars), any(s[:2] == "**" for s in stars)
    places = []
    for parameter in parameters:
        if parameter.startswith("*"):
            break
        places.append(parameter.rstrip("="))
    named = {parameter.rstrip("=") for parameter in parameters if not parameter.startswith("*")}
    given: set[str] = set()
    for place, part in enumerate(_split(use)):
        name = part.rstrip("=")
        if part.startswith("*"):
            if part not in stars:
                return f"it takes no {part}"
        elif part.endswith("="):
            if name not in named and not takes_any:
                return f"it has no {name}"
        elif place < len(places):
            if places[place] != name:
                return f"argument {place + 1} is {places[place]}, not {name}"
        elif not takes_more:
            return f"it has no argument {place + 1}, {name}"
        given.add(name)
    needed = [each for each in parameters if not each.endswith("=") and not each.startswith("*") and each not in given]
    return f"it needs {needed[0]} too" if needed else ""


def _split(written: str) -> list[str]:
    return [part.strip() for part in written.split(",") if part.strip()]


def _signature(sources: Sources, name: str) -> str | None:
    try:
        return sources.signature(name)
    except Missing:
        return None


def _is_there(sources: Sources, name: str) -> bool:
    try:
        sources.find(name)
    except Missing:
        return False
    return True


def _attributes(sources: Sources, relied: Relied) -> set[str]:
    found: set[str] = set()
    try:
        if relied.has:
            found |= set(relied.has) & sources.attributes(relied.name)
        if relied.mentions:
            found |= set(relied.mentions) & sources.mentions(relied.name)
    except Missing:
        pass
    return found
