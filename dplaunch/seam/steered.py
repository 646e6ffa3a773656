"""An AsyncLLM whose steering goes to its group: what vLLM's routes call is done to all ranks, and to those to come.

The methods are replaced in the one object that is the group's, as `frontend.guard_health` does it.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from dplaunch.errors import DplaunchError, StandstillError, UsageError, WeightsError
from dplaunch.seam import older
from dplaunch.weights import Stance

if TYPE_CHECKING:
    from dplaunch.verbs import Verbs

STATUS: tuple[tuple[type[Exception], HTTPStatus], ...] = (
    (UsageError, HTTPStatus.BAD_REQUEST),
    (WeightsError, HTTPStatus.CONFLICT),
    (StandstillError, HTTPStatus.SERVICE_UNAVAILABLE),
)
"""What a route answers. Not 500 for weights: trainers send what failed with that once more, and the rest is gone."""


@functools.cache
def _failure_class() -> type[DplaunchError]:
    if older.has_graceful_errors():
        from vllm.exceptions import GracefulHTTPError as Base
    else:
        Base = older.moved("GenerationError")

    class SteeringFailure(DplaunchError, Base):  # type: ignore[misc]
        """An error of ours, as vLLM's server takes it."""

        def __init__(self, error: DplaunchError, status: HTTPStatus) -> None:
            DplaunchError.__init__(self, error.message, hint=error.hint, detail=error.detail)
            # What the server sends is `message` alone.
            self.message = str(error)
            self.http_status = self.status_code = status

        def __str__(self) -> str:
            return self.message

    return SteeringFailure


def as_answer(error: DplaunchError) -> DplaunchError:
    """The error with the status that a server is to answer with; 500 for what is nobody's fault."""
    status = next((status for kind, status in STATUS if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)
    failure: Callable[..., DplaunchError] = _failure_class()
    return failure(error, status)


def steer(engine: Any, verbs: Verbs) -> None:
    """Has an AsyncLLM do to its group what it is told."""
    for name, method in {**_standing(engine, verbs), **_serving(engine, verbs), **_weights(engine, verbs)}.items():
        setattr(engine, name, _answering(method))


def _answering(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(method)
    async def answering(*args: Any, **kwargs: Any) -> Any:
        try:
            return await method(*args, **kwargs)
        except DplaunchError as error:
            raise as_answer(error) from error

    return answering


def _standing(engine: Any, verbs: Verbs) -> dict[str, Callable[..., Awaitable[Any]]]:
    def record(level: int) -> None:
        if engine.logger_manager is not None:
            engine.logger_manager.record_sleep_state(int(verbs.stance is Stance.ASLEEP), level)

    async def sleep(level: int = 1, mode: Any = "abort") -> None:
        await verbs.sleep(level, mode)
        record(level)

    async def wake_up(tags: list[str] | None = None) -> bool:
        awake = await verbs.wake_up(tags)
        if awake:
            record(0)
        return awake

    async def is_sleeping() -> bool:
        return verbs.stance is Stance.ASLEEP

    async def pause_generation(
        *, mode: Any = "abort", wait_for_inflight_requests: bool | None = None, clear_cache: bool = True
    ) -> None:
        # The caches are emptied always: what is in them may be of other weights when the group goes on.
        # The switch is the older way to say mode="wait"; the route of vLLM before 0.32 always passes it.
        await verbs.pause("wait" if wait_for_inflight_requests else mode)

    async def resume_generation() -> None:
        await verbs.resume()

    async def is_paused() -> bool:
        return verbs.stance is not Stance.SERVING

    async def release_kv_cache_memory() -> None:
        raise UsageError(
            "a group gives its KV cache's memory back with the weights', or not at all", hint="POST /sleep."
        )

    return {
        "sleep": sleep,
        "wake_up": wake_up,
        "is_sleeping": is_sleeping,
        "is_paused": is_paused,
        "pause_generation": pause_generation,
        "resume_generation": resume_generation,
        "release_kv_cache_memory": release_kv_cache_memory,
    }


def _serving(engine: Any, verbs: Verbs) -> dict[str, Callable[..., Awaitable[Any]]]:
    of_workers = engine.collective_rpc

    async def reset_prefix_cache(reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        return await verbs.reset_prefix_cache(reset_running_requests, reset_connector)

    async def add_lora(lora_request: Any) -> bool:
        return await verbs.add_lora(lora_request)

    async def remove_lora(lora_id: int) -> bool:
        return await verbs.remove_lora(lora_id)

    async def collective_rpc(
        method: Any, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(method, str) and await verbs.of_workers(method, tuple(args), kwargs or {}):
            return [None]
        return await of_workers(method, timeout, args, kwargs)

    return {
        "reset_prefix_cache": reset_prefix_cache,
        "add_lora": add_lora,
        "remove_lora": remove_lora,
        "collective_rpc": collective_rpc,
    }


def _weights(engine: Any, verbs: Verbs) -> dict[str, Callable[..., Awaitable[Any]]]:
    transfers = verbs.transfers

    async def init_weight_transfer_engine(request: Any) -> None:
        await transfers.connect(request.init_info, engine.vllm_config.parallel_config.world_size)

    async def shutdown_weight_transfer_engine() -> None:
        await transfers.disconnect()

    async def start_weight_update() -> None:
        await transfers.start()

    async def start_draft_weight_update() -> None:
        await transfers.start(draft=True)

    async def update_weights(request: Any) -> None:
        await transfers.part(request.update_info)

    async def finish_weight_update(weight_version: str | None = None) -> None:
        await transfers.finish(weight_version)

    async def update_weight_version(new_version: str) -> None:
        await verbs.call_them_version(new_version)

    async def get_weight_version() -> str:
        return verbs.weight_version

    made = (
        *(init_weight_transfer_engine, shutdown_weight_transfer_engine, start_weight_update),
        *(start_draft_weight_update, update_weights, finish_weight_update, update_weight_version, get_weight_version),
    )
    return {method.__name__: method for method in made}


def follow_unloading(app: Any, verbs: Verbs) -> None:
    """Has the OpenAI app remove an adapter from the ranks too: vLLM's only forgets its name."""
    models = getattr(app.state, "openai_serving_models", None)
    if models is None:
        return
    unload = models.unload_lora_adapter

    async def unload_lora_adapter(request: Any) -> Any:
        answer = await unload(request)
        if isinstance(answer, str):
            await verbs.forget_lora(request.lora_name)
        return answer

    models.unload_lora_adapter = unload_lora_adapter
