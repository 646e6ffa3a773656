"""The stand-in engine's sockets: vLLM's handshake, the clients' requests, the answers."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import msgspec
import zmq

from dplaunch.backend import RankBoot
from dplaunch.testing import wire
from dplaunch.testing.faults import Fault, StandInPlan
from dplaunch.testing.host import Host, SimulatedExit

ENGINE_CORE_DEAD = b"ENGINE_CORE_DEAD"
"""What vLLM's engine core sends to its clients when it ends by an error."""

LINGER_MS = 2000
"""How long the last answers may take to leave, milliseconds."""

BLOCK_SIZE = 16
NUM_BLOCKS = 1024


def ready_payload(boot: RankBoot, plan: StandInPlan, fault: Fault) -> bytes:
    """What vLLM's engine core tells each client about itself when it is ready."""
    response = {
        "max_model_len": plan.max_model_len,
        "num_gpu_blocks": NUM_BLOCKS,
        "block_size": BLOCK_SIZE,
        "dp_stats_address": None,
        "dtype": plan.dtype,
        "vllm_version": wire.VLLM_VERSION,
        "world_size": 1,
        "data_parallel_size": 1,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "data_parallel_rank": 0,
        "max_num_seqs": plan.max_num_seqs,
        "max_num_batched_tokens": plan.max_model_len,
        "instance_id": fault.instance_id or boot.instance_id,
        "supports_lora": True,
        "max_loras": 1,
        "mamba_block_size": None,
        "kv_cache_size_tokens": NUM_BLOCKS * BLOCK_SIZE,
        "kv_cache_max_concurrency": NUM_BLOCKS * BLOCK_SIZE / plan.max_model_len,
        "kv_events_config": None,
        "weight_transfer_backend": None,
        "enable_sleep_mode": True,
        "supports_draft_weight_updates": False,
        "effective_attention_block_size": BLOCK_SIZE,
    }
    return msgspec.msgpack.encode(response)


class Sockets:
    """The engine's end of the protocol."""

    def __init__(self, handshake_address: str) -> None:
        self._context = zmq.Context()
        self._handshake = self._dealer(handshake_address)
        self.inputs: list[zmq.Socket[bytes]] = []
        self.outputs: list[zmq.Socket[bytes]] = []
        self._addresses: dict[str, Any] = {}

    def say_hello(self, host: Host) -> bool:
        """Says HELLO and waits for the addresses; False when the engine was asked to end instead."""
        self._send_status("HELLO")
        poller = zmq.Poller()
        poller.register(self._handshake, zmq.POLLIN)
        poller.register(host.stop.fileno(), zmq.POLLIN)
        ready = dict(poller.poll())
        if self._handshake not in ready:
            host.stopped()
            return False
        self._addresses = msgspec.msgpack.decode(self._handshake.recv())["addresses"]
        return True

    def say_ready(self, payload: bytes) -> None:
        """Connects to every client and says READY, to the clients first, as vLLM does."""
        for address in self._addresses["inputs"]:
            socket = self._dealer(address)
            socket.send(payload)
            self.inputs.append(socket)
        for address in self._addresses["outputs"]:
            output = self._context.socket(zmq.PUSH)
            output.connect(address)
            self.outputs.append(output)
        self._send_status("READY")

    def close(self, linger_ms: int = LINGER_MS) -> None:
        """Sends what is still to be sent, for so long, and lets go of the sockets."""
        self._context.destroy(linger=linger_ms)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            for output in self.outputs:
                output.send(ENGINE_CORE_DEAD)
        self.close(linger_ms=0 if isinstance(error, SimulatedExit) else LINGER_MS)

    def _dealer(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, wire.engine_identity())
        socket.connect(address)
        return socket

    def _send_status(self, status: str) -> None:
        message = {"status": status, "local": True, "headless": False}
        self._handshake.send(msgspec.msgpack.encode(message))
