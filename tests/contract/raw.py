"""The launcher's end of vLLM's protocol on plain sockets: drives a rank without dplaunch's data path."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq

from dplaunch.channel import CHANNEL_IDENTITY
from dplaunch.testing import wire

TIMEOUT_S = 20.0
"""Seconds for any one message: a fresh interpreter on a busy machine takes a few."""


class Outputs(msgspec.Struct, array_like=True):
    """A message from an engine, with fields that it left out at their defaults."""

    engine_index: int = 0
    outputs: list[wire.Output] = []
    scheduler_stats: Any = None
    timestamp: float = 0.0
    utility_output: wire.UtilityOutput | None = None
    finished_requests: set[str] | None = None


@dataclass(slots=True)
class Answer:
    """What came for one request."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: int | None = None


class RawLauncher:
    """Sockets for one incarnation of one rank."""

    def __init__(self, directory: Path, name: str = "r", address: str | None = None) -> None:
        self.phases: list[str] = []
        self.failures: list[tuple[str, str]] = []
        self.finished: set[str] = set()
        self.engine_dead = False
        self.ready: dict[str, Any] = {}
        self.answers: dict[str, Answer] = {}
        self._results: dict[int, wire.UtilityOutput] = {}
        self._calls = itertools.count(1)
        self._context = zmq.Context()
        paths = [f"tcp://{address}:*" if address else f"ipc://{directory}/{name}{kind}" for kind in "hio"]
        self._handshake, self.address = self._bind(zmq.ROUTER, paths[0])
        self._input, self._inputs = self._bind(zmq.ROUTER, paths[1])
        self._output, self._outputs = self._bind(zmq.PULL, paths[2])
        self.hello: dict[str, Any] = {}
        self._ready_on_handshake = False

    def _bind(self, kind: int, address: str) -> tuple[zmq.Socket[bytes], str]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)

    def say_nothing_until_hello(self, timeout_s: float = TIMEOUT_S) -> None:
        """Takes HELLO and does not answer it."""
        self._until(lambda: bool(self.hello), timeout_s, answer_hello=False)

    def handshake(self, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Brings the rank to READY; returns its ready response."""
        self._until(lambda: self._ready_on_handshake and bool(self.ready), timeout_s)
        return self.ready

    def wait_phase(self, phase: str) -> None:
        """Waits for a phase, which comes on a connection of its own: before or after what was said elsewhere."""
        self._until(lambda: phase in self.phases, TIMEOUT_S)

    def hear_out(self, timeout_s: float = 1.0) -> None:
        """Takes what the rank still says, until it reports a failure or says nothing more."""
        while not self.failures and self._handshake.poll(int(timeout_s * 1000)):
            self._on_handshake(answer_hello=True)

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int | None = None) -> None:
        """Sends a request; None leaves max_tokens out, which means vLLM's default."""
        params = {} if max_tokens is None else {"max_tokens": max_tokens}
        fields = [request_id, list(prompt), None, params, None, time.time(), None, None, None]
        self._send(wire.ADD, fields)

    def abort(self, request_ids: Iterable[str]) -> None:
        self._send(wire.ABORT, list(request_ids))

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a utility method; a failed call raises RuntimeError with the rank's words."""
        call_id = next(self._calls)
        self._send(wire.UTILITY, [0, call_id, method, list(arguments)])
        self._until(lambda: call_id in self._results, TIMEOUT_S)
        result = self._results.pop(call_id)
        if result.failure_message is not None:
            raise RuntimeError(result.failure_message)
        return None if result.result is None else result.result[1]

    def finish(self, *request_ids: str, timeout_s: float = TIMEOUT_S) -> list[Answer]:
        """Waits until these are finished."""

        def done() -> bool:
            return all(name in self.answers and self._ended(name) for name in request_ids)

        self._until(done, timeout_s)
        return [self.answers[name] for name in request_ids]

    def wait_tokens(self, request_id: str, count: int) -> None:
        """Waits until so many tokens of the request have come."""
        self._until(lambda: len(self.answers.get(request_id, Answer()).tokens) >= count, TIMEOUT_S)

    def drain(self) -> None:
        """Takes what has arrived."""
        while self._output.poll(0):
            self._on_output()

    def wait_engine_dead(self) -> None:
        """Waits for the message of an engine core whose loop has raised."""
        self._until(lambda: self.engine_dead, TIMEOUT_S)

    def _ended(self, name: str) -> bool:
        return self.answers[name].finish_reason is not None

    def _send(self, kind: bytes, message: Any) -> None:
        self._input.send_multipart((wire.engine_identity(), kind, msgspec.msgpack.encode(message)))

    def _until(self, done: Any, timeout_s: float, answer_hello: bool = True) -> None:
        deadline = time.monotonic() + timeout_s
        poller = zmq.Poller()
        for socket in (self._handshake, self._input, self._output):
            poller.register(socket, zmq.POLLIN)
        while not done():
            left_ms = int((deadline - time.monotonic()) * 1000)
            if left_ms <= 0:
                raise TimeoutError(f"the rank did not get there in {timeout_s:g} s; phases {self.phases}")
            ready = dict(poller.poll(left_ms))
            if self._handshake in ready:
                self._on_handshake(answer_hello)
            if self._input in ready:
                self.ready = msgspec.msgpack.decode(self._input.recv_multipart()[1])
            if self._output in ready:
                self._on_output()

    def _on_handshake(self, answer_hello: bool) -> None:
        identity, payload = self._handshake.recv_multipart()
        message = msgspec.msgpack.decode(payload)
        if identity == CHANNEL_IDENTITY:
            if message["status"] == "PHASE":
                self.phases.append(message["phase"])
            else:
                self.failures.append((message["type"], message["message"]))
        elif message["status"] == "HELLO":
            assert identity == wire.engine_identity()
            self.hello = message
            if answer_hello:
                self.answer_hello()
        else:
            self._ready_on_handshake = message["status"] == "READY"

    def answer_hello(self) -> None:
        """Tells the rank its addresses."""
        addresses = {"inputs": [self._inputs], "outputs": [self._outputs], "coordinator_input": None}
        answer = msgspec.msgpack.encode({"addresses": addresses, "parallel_config": {}})
        self._handshake.send_multipart((wire.engine_identity(), answer))

    def _on_output(self) -> None:
        frames = self._output.recv_multipart()
        if frames == [b"ENGINE_CORE_DEAD"]:
            self.engine_dead = True
            return
        message = msgspec.msgpack.decode(frames[0], type=Outputs)
        if message.utility_output is not None:
            self._results[message.utility_output.call_id] = message.utility_output
        self.finished |= message.finished_requests or set()
        for output in message.outputs:
            answer = self.answers.setdefault(output.request_id, Answer())
            answer.tokens += output.new_token_ids
            answer.finish_reason = output.finish_reason
