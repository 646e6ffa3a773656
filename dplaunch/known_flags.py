"""vLLM's flags as its own parser last listed them, so that a misspelt one is told at once.

The parser is vLLM's, and importing it takes some ten seconds. What it knew is kept for each vLLM version; without
that record nothing is refused here, and the parser refuses it later.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import platformdirs

from dplaunch.argv import nearest_flag, typed_flags
from dplaunch.errors import UsageError


def remember(version: str, flags: Iterable[str]) -> None:
    """Keeps what this vLLM's parser knows. A cache directory that cannot be written is no error."""
    with contextlib.suppress(OSError):
        path = _path(version)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a reader never sees half a file.
        new = path.with_suffix(".new")
        new.write_text(json.dumps(sorted(flags)))
        new.replace(path)


def check(version: str, argv: Sequence[str]) -> None:
    """Refuses a flag that this vLLM is known not to have.

    Raises:
        UsageError: names the flag and the nearest one.
    """
    try:
        known = set(json.loads(_path(version).read_text()))
    except (OSError, ValueError):
        return
    for flag in typed_flags(argv):
        # `--a.b 1` sets a field of `--a`, and argparse takes any unambiguous beginning.
        name = flag.partition(".")[0].replace("_", "-")
        if not any(option.startswith(name) for option in known):
            raise unknown_flag(flag, known)


def unknown_flag(flag: str, known: Iterable[str]) -> UsageError:
    """The error for a flag that nobody knows."""
    near = nearest_flag(flag, known)
    return UsageError(
        f"unknown flag {flag}",
        hint=f"Did you mean {near}?" if near else "`dplaunch --help` and `vllm serve --help=all` list what there is.",
    )


def _path(version: str) -> Path:
    return platformdirs.user_cache_path("dplaunch") / f"vllm-flags-{version}.json"
