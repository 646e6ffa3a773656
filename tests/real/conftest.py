"""Real vLLM on the built-in model: one group and one server for the whole session."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

import dplaunch
from dplaunch import demo, runtime_dir
from dplaunch.seam import frontend
from dplaunch.testing import poll_until

ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 128 * 2**20,
    "gpu_memory_utilization": 0.3,
}
"""Small and the same everywhere: float32 runs on every CPU, eager starts at once."""

SERVER_FLAGS = [
    *("--dtype", "float32"),
    *("--max-model-len", "1024"),
    "--enforce-eager",
    *("--kv-cache-memory-bytes", str(128 * 2**20)),
    *("--gpu-memory-utilization", "0.3"),
]

START_S = 240.0
"""Seconds that a launch may take on a machine that is busy with other tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/real/" in str(item.path):
            item.add_marker(pytest.mark.real)


@pytest.fixture
def no_socket_is_left() -> Iterator[None]:
    """The directories of this process's groups go with them."""
    pattern = f"{os.getpid()}-*"
    before = set(runtime_dir._parent().glob(pattern))
    yield
    assert set(runtime_dir._parent().glob(pattern)) - before == set()


@pytest.fixture(scope="session")
def vllm_is_imported() -> None:
    """For a launch that ends before its own import of vLLM would: the import's thread would stay for seconds."""
    frontend.import_vllm(quiet=True)


@pytest.fixture(scope="session")
def smollm() -> str:
    return str(demo.demo_model().path)


@pytest.fixture
def places(tmp_path: Path, smollm: str) -> Iterator[dict[str, object]]:
    """What the flags of `REFUSED` are filled in with."""
    for name, text in {"model": '{"hello": "world"}', "text": "no JSON"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield {"tmp": tmp_path, "smollm": smollm, "port": listener.getsockname()[1]}


@pytest.fixture(scope="session")
def group(smollm: str) -> Iterator[dplaunch.Group]:
    """Two ranks, shared by all tests that leave them as they found them."""
    with dplaunch.launch(model=smollm, dp=2, **ENGINE_ARGS) as group:
        yield group


@dataclass
class Command:
    """A `dplaunch` command that runs, with what it has said so far."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str] | None) -> None:
        for line in stream or ():
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        """All that it has said."""
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """The first match in what it says, now or later."""

        def found() -> re.Match[str] | None:
            if self.process.poll() is not None and not re.search(pattern, self.output):
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.output}")
            return re.search(pattern, self.output)

        match = poll_until(found, timeout_s, f"{pattern!r} in the output")
        assert match is not None
        return match

    def interrupt(self, timeout_s: float = 60.0) -> int:
        """Ctrl-C; its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.end(timeout_s)

    def end(self, timeout_s: float = 60.0) -> int:
        """Waits for its end; its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def run_command(*args: str, env: dict[str, str] | None = None) -> Command:
    """Starts `dplaunch` with these arguments."""
    return Command(
        subprocess.Popen(
            [sys.executable, "-m", "dplaunch", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
    )


@dataclass
class Server:
    """A running `dplaunch` server."""

    command: Command
    address: str
    http: httpx.Client

    def chat(self, content: str, **options: Any) -> dict[str, Any]:
        """One chat completion."""
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 16, **options}
        response = self.http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    def served_by_rank(self) -> dict[int, float]:
        """How many requests each rank has finished, from /metrics."""
        counts: dict[int, float] = {}
        pattern = r'^vllm:request_success_total\{[^}]*engine="(\d+)"[^}]*\} (\S+)$'
        for rank, count in re.findall(pattern, self.http.get("/metrics").text, re.MULTILINE):
            counts[int(rank)] = counts.get(int(rank), 0.0) + float(count)
        return counts


@pytest.fixture(scope="session")
def server(smollm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two ranks on a free port, with LoRA and the OpenAI endpoints of the model."""
    flags = ("--model", smollm, "--served-model-name", "smollm", *SERVER_FLAGS)
    with serving(tmp_path_factory.mktemp("server-logs"), *flags) as server:
        yield server


@contextmanager
def serving(log_dir: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """`dplaunch` with two ranks on a free port, ended by Ctrl-C; its exit code has to be 0."""
    ours = ("--backend", "mp", "--dp", "2", "--port", "0", "--log-dir", str(log_dir))
    command = run_command(*ours, *flags, env=env)
    try:
        address = command.wait_for(r"http://127\.0\.0\.1:\d+")[0]
        command.wait_for("Ctrl-C")
        with httpx.Client(base_url=address, timeout=120, limits=httpx.Limits(max_keepalive_connections=1)) as http:
            yield Server(command, address, http)
        assert command.interrupt() == 0, command.output
    finally:
        if command.process.poll() is None:
            command.process.kill()
            command.end()


def descendants_gone(pids: list[int], timeout_s: float) -> None:
    """Waits until none of the processes is there any more."""
    poll_until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], timeout_s, f"the end of {pids}")
