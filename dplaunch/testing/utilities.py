"""The utility calls of the stand-in engine, under vLLM's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dplaunch import bucket
from dplaunch.backend import RankBoot
from dplaunch.testing import wire
from dplaunch.testing.devices import opened
from dplaunch.testing.faults import Fault, StandInPlan, When
from dplaunch.testing.host import Host
from dplaunch.testing.weights import StandInWeights

LORA_ID = 1
"""The place of the adapter's number in vLLM's LoRARequest, which travels as an array."""


class Utilities:
    """Each public method is a call; what it returns is sent back.

    Args:
        abort_all: aborts every request in flight.
        misbehave: has a fault happen from now on.
        grandchild: the pid of the process that the engine left running, if any.
    """

    def __init__(
        self,
        boot: RankBoot,
        plan: StandInPlan,
        host: Host,
        abort_all: Callable[[], None],
        misbehave: Callable[[Fault], None],
        grandchild: int | None,
    ) -> None:
        self._boot = boot
        self._plan = plan
        self._host = host
        self._abort_all = abort_all
        self._misbehave = misbehave
        self._grandchild = grandchild
        self._fault = plan.fault_of(boot.rank, boot.incarnation)
        self._loras: set[int] = set()
        self._weight_version = "default"
        self.weights = StandInWeights(plan.copies_weights)
        self._depot = bucket.Depot()
        self._on_device = 0
        self._asleep: set[str] = set()
        self._paused = False

    def dplaunch_report(self) -> dict[str, Any]:
        """Who the rank is, as seen from inside."""
        seen = self._host.report()
        env = seen["env"]
        masked = env.get("CUDA_VISIBLE_DEVICES") if isinstance(env, dict) else None
        return seen | {
            "rank": self._boot.rank,
            "incarnation": self._boot.incarnation,
            "instance_id": self._fault.instance_id or self._boot.instance_id,
            "engine_id": self._boot.engine_id,
            "data_parallel_index": self._boot.rank,
            "devices": masked.split(",") if masked else [str(core) for core in self._boot.cpus],
            "dtype": self._plan.dtype,
            "executor": "uni",
            "grandchild": self._grandchild,
        }

    def dplaunch_ping(self) -> None:
        """Nothing: the answer itself is the sign of life."""

    def echo(self, value: Any = None) -> Any:
        """The argument."""
        return value

    def misbehave(self, fault: dict[str, Any]) -> None:
        """Takes on a `Fault`, given by its fields: at once where it is one of AFTER_READY."""
        self._misbehave(Fault(**{**fault, "when": When(fault.get("when", When.AFTER_READY))}))

    def work(self, seconds: float) -> None:
        """Does nothing else for so long, as a call that loads weights."""
        self._host.sleep(seconds)

    def get_supported_tasks(self) -> list[str]:
        return ["generate"]

    def collective_rpc(
        self, method: Any, timeout: float | None = None, args: Any = (), kwargs: Any = None
    ) -> list[Any]:
        """One answer, as from one worker: what was called, and with what."""
        return [{"method": method, "args": args, "kwargs": kwargs}]

    def is_sleeping(self) -> bool:
        return bool(self._asleep)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        if not self._plan.can_sleep:
            raise ValueError("sleep mode is not enabled")
        if mode == "abort":
            self._abort_all()
        self._asleep = {"weights", "kv_cache"}
        if level > 1:
            self.weights.lose()

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self._asleep -= self._asleep if tags is None else set(tags)
        self._paused = self._paused and bool(self._asleep)
        return not self._asleep

    def pause_scheduler(self, mode: str = "abort", clear_cache: bool = True) -> None:
        if mode == "abort":
            self._abort_all()
        self._paused = True

    def resume_scheduler(self) -> None:
        self._paused = False

    def is_scheduler_paused(self) -> bool:
        return self._paused

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        return True

    def reset_mm_cache(self) -> None:
        pass

    def reset_encoder_cache(self) -> None:
        pass

    def execute_dummy_batch(self) -> None:
        pass

    def profile(self, is_start: bool = True, profile_prefix: str | None = None) -> None:
        pass

    def add_lora(self, lora_request: list[Any]) -> bool:
        self._loras.add(lora_request[LORA_ID])
        return True

    def remove_lora(self, lora_id: int) -> bool:
        known = lora_id in self._loras
        self._loras.discard(lora_id)
        return known

    def list_loras(self) -> set[int]:
        return self._loras

    def pin_lora(self, lora_id: int) -> bool:
        return lora_id in self._loras

    def dplaunch_sees(self, path: str, secret: str) -> bool:
        host, _, secret = secret.rpartition("@")
        return int(host or 0) == self._pretended_host and bucket.sees(path, secret)

    def dplaunch_landmark(self) -> tuple[str, str]:
        path, secret = self._depot.landmark()
        return path, f"{self._pretended_host}@{secret}"

    @property
    def _pretended_host(self) -> int:
        return self._plan.hosts.get(self._boot.rank, 0)

    def taken_buckets(self) -> int:
        """How many came over the network."""
        return self._depot.taken

    def dplaunch_begin_weights(self, verify: bool = True) -> None:
        self.weights.begin()

    def dplaunch_take_bucket(self, data: bytes) -> str:
        return self._depot.take(data)

    def dplaunch_load_bucket(self, path: str, entries: list[Any], handle: bytes = b"") -> None:
        self._host.sleep(self._plan.load_s)
        if not handle:
            self.weights.load(path, entries)
            return
        self._on_device += 1
        with opened(handle) as there:
            self.weights.load(there, entries)

    def dplaunch_device(self) -> str:
        return self._plan.devices.get(self._boot.rank, "")

    def dplaunch_sees_device(self, handle: bytes, secret: bytes) -> bool:
        if self._boot.rank in self._plan.blind:
            return False
        with opened(handle) as there:
            return Path(there).read_bytes() == secret

    def buckets_on_device(self) -> int:
        """How many this rank has read on its device."""
        return self._on_device

    def dplaunch_end_weights(self) -> None:
        self._depot.clear()
        self.weights.end()
        self._loras.clear()  # As vLLM, which unloads them with the model that they belong to.

    def dplaunch_reload_weights(self, path: str | None) -> None:
        self._host.sleep(self._plan.load_s)
        self.weights.reload(path)
        self._loras.clear()

    def dplaunch_weight_checksum(self) -> str:
        return f"{self.weights.checksum}{' but not quite' if self._fault.deviates else ''}"

    def set_weight_version(self, weight_version: str) -> None:
        self._weight_version = weight_version

    def get_weight_version(self) -> str:
        return self._weight_version


def call(utilities: Utilities, call_id: int, method: str, arguments: list[Any]) -> wire.UtilityOutput:
    """The answer to one call; one that fails, or that there is none of, fails in vLLM's words."""
    try:
        result = getattr(utilities, method)(*arguments)
    except Exception as error:
        return wire.UtilityOutput(call_id, f"Call to {method} method failed: {error}")
    return wire.UtilityOutput(call_id, None, (None, result))


def stands_still(utilities: Utilities) -> bool:
    """Whether the engine sleeps or is paused, and answers nothing."""
    return utilities.is_sleeping() or utilities.is_scheduler_paused()
