"""A server of stand-in ranks in this process's event loop, and requests over HTTP whose answers are known."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx

from dplaunch import serve
from dplaunch.errors import ExitCode
from dplaunch.spec import LaunchSpec, ProbePolicy, RequestPolicy, RestartPolicy
from dplaunch.testing import STANDIN_ENGINE, StandInPlan, expected_tokens
from dplaunch.ui import UiOptions
from tests.chaos.rig import DEADLY, MANY
from tests.real.conftest import SERVER_FLAGS, START_S

MAX_QUEUE = 48
"""Requests that the server takes at once."""

ANSWER_S = 60.0
"""Seconds for an answer, on a machine that is busy with other tests."""


class Served:
    """A running server."""

    def __init__(self, port: int, http: httpx.AsyncClient) -> None:
        self.port = port
        self.http = http

    async def complete(self, prompt: Sequence[int], tokens: int) -> httpx.Response:
        """One completion, whole."""
        return await self.http.post("/v1/completions", json=body(prompt, tokens))

    async def is_exact(self, prompt: Sequence[int], tokens: int) -> bool:
        """Whether the answer is as foretold."""
        answer = await self.complete(prompt, tokens)
        answer.raise_for_status()
        return token_ids(answer) == expected_tokens(prompt, tokens)

    async def raw(self, data: bytes) -> bytes:
        """What comes back for some bytes, until the server closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            # A server that has read enough may close before all was sent.
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
            answer = b""
            with contextlib.suppress(ConnectionError):
                answer = await asyncio.wait_for(reader.read(), ANSWER_S)
            return answer
        finally:
            writer.close()

    async def leave(self, prompt: Sequence[int], *, after_first: bool) -> None:
        """A client that asks for a long stream and goes away, at once or after its first piece."""
        data = json.dumps(body(prompt, 900) | {"stream": True}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(head.encode() + data)
            await writer.drain()
            if after_first:
                await asyncio.wait_for(reader.readuntil(b"data: "), ANSWER_S)
        finally:
            writer.transport.abort()

    async def crowd_leaves(self, count: int, at_a_time: int = 32) -> None:
        """So many clients come and go."""
        gate = asyncio.Semaphore(at_a_time)

        async def one(number: int) -> None:
            async with gate:
                await self.leave([20 + number % 800, 7], after_first=number % 3 != 0)

        await asyncio.gather(*(one(number) for number in range(count)))

    async def running(self) -> float:
        """Requests in the engines, by vLLM's own count."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        kinds = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return sum(float(line.split()[-1]) for line in lines if line.startswith(kinds))


def body(prompt: Sequence[int], tokens: int) -> dict[str, object]:
    """A completion's request by token ids, which brings token ids back."""
    return {
        "model": "smollm",
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def token_ids(answer: httpx.Response) -> list[int]:
    """The tokens of a completion."""
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


@contextlib.asynccontextmanager
async def served(model: str, log_dir: Path, *, max_queue: int = MAX_QUEUE) -> AsyncIterator[Served]:
    """The command's own server, until the block ends: then SIGTERM, and it ends in order."""
    listener = serve._bind("127.0.0.1", 0)
    spec = LaunchSpec(
        model=model,
        dp=2,
        vllm_argv=(*SERVER_FLAGS, "--served-model-name", "smollm"),
        engine=STANDIN_ENGINE,
        engine_args={"standin": StandInPlan(default=DEADLY, token_delay_s=0.02)},
        log_dir=log_dir,
        log_stats=True,
        restart=RestartPolicy(limit=MANY, window_s=3.0, backoff_s=0.02),
        probe=ProbePolicy(interval_s=0.5, timeout_s=10.0),
        requests=RequestPolicy(max_queue=max_queue),
        base_id="served",
    )
    serving = asyncio.create_task(serve._serve(spec, UiOptions(quiet=True), listener))
    try:
        port: int = listener.getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_S) as http:
            await _await_health(http, serving)
            yield Served(port, http)
    finally:
        if not serving.done():
            os.kill(os.getpid(), signal.SIGTERM)
        code = await asyncio.wait_for(serving, START_S)
        listener.close()
    if code != ExitCode.OK:
        raise RuntimeError(f"the server ended with {code!r}")


async def _await_health(http: httpx.AsyncClient, serving: asyncio.Future[ExitCode]) -> None:
    async with asyncio.timeout(START_S):
        while not serving.done():
            # The socket listens before there is anyone to answer, so that this waits rather than fails.
            with contextlib.suppress(httpx.HTTPError, socket.error):
                if (await http.get("/health", timeout=5.0)).status_code == 200:
                    return
    serving.result()
    raise RuntimeError("the server ended before it served")
