"""A launcher of its own, to be closed or killed from outside: `python -m tests.gpu.child SETTINGS`, or stock's answers.

Prints one line of JSON when it is ready, and lives until its standard input ends.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import dplaunch
from benchmarks.gpu import looks


def _main(asked: dict[str, Any]) -> None:
    if asked["stock"]:
        _say({"answers": looks.stock_answers(asked["args"], asked["path"])})
        return
    with dplaunch.launch(model=asked["path"], progress=False, **asked["args"]) as group:
        _say({"ranks": looks.facts(group), "answers": [looks.answers(group, rank, 2) for rank in group.ranks_up]})
        sys.stdin.read()
    _say({"closed": True})


def _say(values: dict[str, Any]) -> None:
    print("\nSAID " + json.dumps(values), flush=True)  # noqa: T201


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
