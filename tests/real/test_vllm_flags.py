"""The light reading of vLLM's flags agrees with vLLM's own parser."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dplaunch.argv import python_name, scan

pytestmark = pytest.mark.real

_ASK = """
import json
from dplaunch.seam.config import make_parser
actions = make_parser()._actions
print(json.dumps([[a.option_strings, a.dest, a.nargs] for a in actions if a.option_strings]))
"""


@pytest.fixture(scope="module")
def actions() -> list[tuple[list[str], str, str | int | None]]:
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=True)
    return [tuple(action) for action in json.loads(done.stdout.splitlines()[-1]) if action[1] != "help"]


def test_short_flags_have_the_names_that_vllm_gives_them(
    actions: list[tuple[list[str], str, str | int | None]],
) -> None:
    short = {flag: dest for flags, dest, _ in actions for flag in flags if not flag.startswith("--")}
    assert {flag: python_name(flag) for flag in short} == short


def test_switches_and_valued_flags_are_told_apart_as_vllm_does(
    actions: list[tuple[list[str], str, str | int | None]],
) -> None:
    wrong = [
        flag
        for flags, _, nargs in actions
        for flag in flags
        if not flag.startswith("--no-") and (scan([flag, "x"])[python_name(flag)] is True) != (nargs == 0)
    ]
    assert wrong == []


def test_flags_with_several_values_are_known(actions: list[tuple[list[str], str, str | int | None]]) -> None:
    several = {flag for flags, _, nargs in actions if nargs in ("+", "*") for flag in flags}
    assert [flag for flag in several if scan([flag, "x", "y"])[python_name(flag)] != "x y"] == []
