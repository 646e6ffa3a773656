"""Runs a script's steps: each in a process of its own with a limit of its own, whatever becomes of the others.

What is found out is in `--out` after each step (NAME.json, and all output in NAME.log); the table comes last.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks.common import Comparison, machine, print_table, say
from benchmarks.gpu import devices, notes
from benchmarks.gpu.notes import Note, Notes
from benchmarks.gpu.setup import ENVIRONMENT, Setup
from benchmarks.servers import environment

LIMIT_S = 590.0
"""Seconds for a whole script unless told otherwise: ten minutes, and some for the table."""

ENOUGH_S = 20.0
"""Seconds that must be left for a step to be begun: less is not even vLLM's import."""

_ROOT = Path(__file__).resolve().parents[2]
_PR_SET_CHILD_SUBREAPER = 36
_LAST_LINES = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a script.

    Args:
        name: unique within it.
        run: what it does, in a process of its own.
        limit_s: seconds until that process is ended.
        about_s: seconds that it is expected to take, on two H100s.
        devices: how many it needs.
        on_cpu: whether a rehearsal can run it.
        env: further variables of its process.
    """

    name: str
    run: Callable[[Setup, Notes], None]
    limit_s: float
    about_s: float = 0.0
    devices: int = 1
    on_cpu: bool = True
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a step: "done", or why not, and how long it took."""

    step: str
    state: str
    seconds: float = 0.0
    notes: list[Note] = field(default_factory=list)


class Script:
    """A list of steps and what is compared between them.

    Args:
        name: as in `python -m benchmarks.gpu.NAME`.
        about: what it does.
        steps: in order.
        comparisons: between values, by their names.
    """

    def __init__(self, name: str, about: str | None, steps: Sequence[Step], comparisons: Sequence[Comparison] = ()):
        self.name = name
        self.steps = {step.name: step for step in steps}
        self.comparisons = comparisons
        self._about = about
        self._outcomes: list[Outcome] = []

    def main(self) -> None:
        """Runs what the command line asks for, and ends the process: 0 when all went well."""
        parser = self._parser()
        given = parser.parse_args()
        if unknown := [name for name in _names(given.only) if name not in self.steps]:
            parser.error(f"no step is called {unknown[0]!r}; there are {', '.join(self.steps)}")
        if given.list:
            print_table([(step.name, f"{step.about_s:.0f} s") for step in self.steps.values()])
            return
        if given.step:
            run, setup = self.steps[given.step].run, Setup(**json.loads(given.setup))
            run(setup, Notes(given.step))
            return
        there = len(devices.uuids())
        if not there and not given.cpu_rehearsal:
            say("No NVIDIA device is here. --cpu-rehearsal goes through the steps with a tiny model.")
            sys.exit(2)
        number = 0 if given.cpu_rehearsal else there
        # Not below `--out`: caches are thousands of files. The same for `--only`, which may need what others left.
        work = Path(tempfile.gettempdir()) / f"dplaunch-gpu-{os.getuid()}" / f"work-{self.name}"
        setup = Setup(dp=given.dp or number or 2, devices=number, directory=str(work))
        sys.exit(self._run_all(setup, given))

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(description=self._about)
        parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="where results go")
        parser.add_argument("--dp", type=int, help="ranks; by default one for each device")
        parser.add_argument(
            "--only", help="steps to run, apart by commas; the others as --out has them: " + ",".join(self.steps)
        )
        parser.add_argument("--limit-s", type=float, default=LIMIT_S, help=f"for all of it (default {LIMIT_S:.0f})")
        parser.add_argument(
            "--beside-others",
            action="store_true",
            help="others may hold device memory; it is not checked",
        )
        parser.add_argument("--cpu-rehearsal", action="store_true", help="a tiny model, without devices")
        parser.add_argument("--list", action="store_true", help="the steps, and about how long each takes; runs none")
        parser.add_argument("--step", help=argparse.SUPPRESS)
        parser.add_argument("--setup", help=argparse.SUPPRESS)
        return parser

    def _run_all(self, setup: Setup, given: argparse.Namespace) -> int:
        # What a step leaves behind becomes a child of this process, and is found and ended.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        given.out.mkdir(parents=True, exist_ok=True)
        Path(setup.directory).mkdir(parents=True, exist_ok=True)
        deadline, file = time.monotonic() + given.limit_s, given.out / f"{self.name}.json"
        if only := _names(given.only):
            # What an earlier call had no time for is compared with what that call has found.
            self._outcomes = [outcome for outcome in saved(file) if outcome.step not in only]
        for name in only or self.steps:
            outcome = self._outcome(self.steps[name], setup, deadline, given.out / f"{self.name}.log")
            if not (setup.cpu or given.beside_others or outcome.state.startswith("skipped")):
                outcome.notes.append(_memory_is_free(name))
            self._outcomes.append(outcome)
            end_children()
            say(f"[{self.name}] {name}: {outcome.state} after {outcome.seconds:.0f} s")
            self._save(setup, file)
        self._print()
        return 0 if all(good(outcome) for outcome in self._outcomes) else 1

    def _outcome(self, step: Step, setup: Setup, deadline: float, log: Path) -> Outcome:
        left = deadline - time.monotonic()
        if setup.cpu and not step.on_cpu:
            return Outcome(step=step.name, state="skipped: it needs a device")
        if not setup.cpu and setup.devices < step.devices:
            return Outcome(step=step.name, state=f"skipped: it needs {step.devices} devices, {setup.devices} are here")
        if left < ENOUGH_S:
            return Outcome(step=step.name, state="skipped: no time is left")
        return self._run(step, setup, min(step.limit_s, left), log)

    def _run(self, step: Step, setup: Setup, limit_s: float, log: Path) -> Outcome:
        say(f"[{self.name}] {step.name}: up to {limit_s:.0f} s")
        command = [sys.executable, "-m", f"benchmarks.gpu.{self.name}"]
        command += ["--step", step.name, "--setup", json.dumps(asdict(setup))]
        started = time.monotonic()
        with log.open("ab") as output:
            output.write(f"\n======== {step.name}\n".encode())
            output.flush()
            begin = output.tell()
            child = subprocess.Popen(
                command,
                cwd=_ROOT,
                env={**environment(), **ENVIRONMENT, **step.env, "PYTHONPATH": _python_path()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = child.wait(limit_s)
                state = "done" if code == 0 else f"FAILED with {code}"
            except subprocess.TimeoutExpired:
                state = f"FAILED: not done after {limit_s:.0f} s"
        seconds = time.monotonic() - started
        if state != "done":
            end_children()
        with log.open("rb") as told:
            told.seek(begin)
            text = told.read().decode(errors="replace")
        if state != "done":
            say("\n".join(text.splitlines()[-_LAST_LINES:]))
        return Outcome(step=step.name, state=state, seconds=seconds, notes=notes.read(text))

    def _save(self, setup: Setup, file: Path) -> None:
        result = {
            "script": self.name,
            "machine": machine(),
            "setup": asdict(setup),
            "steps": [asdict(outcome) for outcome in self._outcomes],
            "ratios": [
                {"title": line.title, "ratio": round(line.ratio(values), 4), "verdict": line.verdict(values)}
                for line, values in self._compared()
            ],
        }
        draft = file.with_suffix(".tmp")
        draft.write_text(json.dumps(result, indent=1))
        draft.replace(file)

    def _compared(self) -> list[tuple[Comparison, dict[str, list[float]]]]:
        """The comparisons of which both sides were measured."""
        values: dict[str, list[float]] = {}
        for outcome in self._outcomes:
            for note in outcome.notes:
                if note.value is not None:
                    values.setdefault(note.name, []).append(note.value)
        return [(line, values) for line in self.comparisons if {line.base, line.ours} <= set(values)]

    def _print(self) -> None:
        print("\n" + ", ".join(machine().values()))
        rows: list[tuple[str, str, str]] = []
        for outcome in self._outcomes:
            rows.append((f"{outcome.step}: {outcome.state}", f"{outcome.seconds:.0f} s", ""))
            rows += [_row(note) for note in outcome.notes]
        for line, values in self._compared():
            rows.append((f"ratio: {line.title}", f"{line.ratio(values):.3f}", line.verdict(values)))
        print_table(rows)
        failed = [outcome.step for outcome in self._outcomes if not good(outcome)]
        print(f"{self.name}: " + (f"NOT WELL: {', '.join(failed)}" if failed else "all well"), flush=True)


def saved(file: Path) -> list[Outcome]:
    """What earlier calls have left there; nothing where there was none."""
    if not file.is_file():
        return []
    found = json.loads(file.read_text())["steps"]
    return [Outcome(**{**each, "notes": [Note(**note) for note in each["notes"]]}) for each in found]


def good(outcome: Outcome) -> bool:
    """Whether a step ran to its end, or had no place here, and each of its checks went well."""
    ran = outcome.state == "done" or outcome.state.startswith("skipped: it needs")
    return ran and all(note.good is not False for note in outcome.notes)


def end_children() -> list[int]:
    """Kills whatever is left below this process; returns what was."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=10)
    return [child.pid for child in children]


def _python_path() -> str:
    # Workers that others start, as Ray does, find `inside.py` too.
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))


def _names(only: str | None) -> list[str]:
    return only.split(",") if only else []


def _memory_is_free(step: str) -> Note:
    seconds, left = devices.wait_until_free()
    found = f"after {seconds:.1f} s" if not left else f"held still: {left}"
    return Note(step=step, name="no process holds device memory at the end", good=not left, found=found)


def _row(note: Note) -> tuple[str, str, str]:
    if note.value is not None:
        return f"  {note.name}", f"{note.value:.2f} {note.unit}".rstrip(), ""
    return f"  {note.name}", note.found[:60], "ok" if note.good else "FAILED"
