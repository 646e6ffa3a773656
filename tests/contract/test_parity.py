"""The same launch on mp and on Ray: what is compared is the same, and what may differ is a short list."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from dplaunch.testing import Fault, StandInPlan
from tests.contract.parity import BY_NATURE, FIELDS, Observed, failure, observe
from tests.contract.test_start_failures import CRASHES
from tests.ray_for_tests import RayForTests

pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs/backends.md"

BACKENDS = ("mp", "ray")

Twins = Mapping[str, Observed]

_twins: dict[str, Observed] = {}


@pytest.fixture
async def twins(ray_cluster: RayForTests, vllm_imported: None, tmp_path: Path) -> Twins:
    """The same launch on both; made once."""
    for backend in BACKENDS:
        if backend not in _twins:
            _twins[backend] = await observe(backend, tmp_path / backend)
    return _twins


@pytest.mark.parametrize("name", FIELDS)
def test_both_backends_show_the_same(name: str, twins: Twins) -> None:
    mp, ray = (FIELDS[name].of(twins[backend]) for backend in BACKENDS)
    assert mp, "nothing to compare"
    assert mp == ray


FAILURES = (
    *("exits before HELLO", "is killed while loading", "segfaults while loading", "raises while loading"),
    *("hangs while loading", "is somebody else"),
)
"""Some of each kind: an exit code, signals, an exception, a deadline, a wrong answer."""

DEADLINE_S = 5.0
"""Seconds within which the rank that does not hang is ready, on a busy machine too."""


@pytest.mark.parametrize("case", FAILURES)
async def test_a_start_that_fails_is_told_in_the_same_words(
    case: str, ray_cluster: RayForTests, vllm_imported: None, tmp_path: Path
) -> None:
    crash = CRASHES[case]
    # The other one loads until it is stopped, unless there is a deadline: that is for this one.
    other = Fault() if crash.fault.hang else Fault(slow_start_s=60)
    plan = StandInPlan(faults={(0, 0): other, (1, 0): crash.fault})
    timeout_s = DEADLINE_S if crash.fault.hang else crash.start_timeout_s
    mp, ray = [await failure(backend, tmp_path / backend, plan, start_timeout_s=timeout_s) for backend in BACKENDS]
    assert mp[0] == crash.error.__name__
    assert mp == ray


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_rows(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table behind a heading."""
    lines = iter(text[text.index(heading) :].splitlines())
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            rows.append(cells(line))
        elif rows:
            break
    return rows[2:]


def test_the_table_in_the_documentation_says_what_was_seen(twins: Twins) -> None:
    expected = []
    for name, field in FIELDS.items():
        shown = [field.shown(twins[backend]) for backend in BACKENDS]
        expected.append([name, *shown, "yes" if len(set(shown)) == 1 else "no"])
    for name, show in BY_NATURE.items():
        shown = [show(twins[backend]) for backend in BACKENDS]
        assert len(set(shown)) == 2, f"{name} does not differ"
        expected.append([name, *shown, "no"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in expected)
    assert table_rows(DOC.read_text(), "## What is the same") == expected, f"it should be:\n{table}"


# The contract suite itself.

COLLECT = """
import collections, sys, pytest
class Count:
    def pytest_collection_modifyitems(self, items):
        found = [item.callspec.params.get("backend_name") for item in items if hasattr(item, "callspec")]
        print("counted", *(f"{name}={count}" for name, count in collections.Counter(found).items() if name))
sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "tests/contract"], plugins=[Count()]))
"""


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    """How many contract tests there are for each backend."""
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("counted ")]
    return {name: int(count) for name, count in (word.split("=") for word in line.split()[1:])}


def test_the_contract_has_as_many_tests_for_each_backend(counts: dict[str, int]) -> None:
    assert set(counts) == {"mp", "ray", "fake"}
    assert len(set(counts.values())) == 1
    assert counts["mp"] > 50


def skipping(path: Path) -> Iterator[str]:
    """The tests of a file that may skip themselves."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
            if any(isinstance(call, ast.Attribute) and call.attr == "skip" for call in calls):
                yield node.name


def test_the_documentation_says_how_many_they_are_and_which_are_skipped(counts: dict[str, int]) -> None:
    text = DOC.read_text()
    assert f"Each backend runs {counts['mp']} tests" in text
    skips = {name for path in (ROOT / "tests/contract").glob("test_*.py") for name in skipping(path)}
    assert skips == set(re.findall(r"`(test_\w+)`", text[text.index("## The contract suite") :]))
