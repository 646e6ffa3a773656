"""vLLM's own AsyncLLM over our client.

AsyncLLM builds its engine-core client in one place, `EngineCoreClient.make_async_mp_client`. We put a function
there that hands out our client to the thread that is building ours, and vLLM's own to everybody else.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from dplaunch.client import GroupClient
from dplaunch.errors import DplaunchError, GroupDeadError
from dplaunch.inflight import Failed
from dplaunch.seam import failures, older, prompts, wire
from dplaunch.seam.traits import engine_traits

_PENDING: contextvars.ContextVar[Callable[[Any], Any] | None] = contextvars.ContextVar("pending", default=None)
_IMPORT_LOCK = threading.Lock()


@contextlib.contextmanager
def preserved_environ() -> Iterator[None]:
    """Puts `os.environ` back: importing vLLM, and making its objects, sets variables in the user's process."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@contextlib.contextmanager
def _logging(quiet: bool) -> Iterator[None]:
    # Within preserved_environ, which puts it back.
    if quiet:
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    yield


def import_vllm(*, quiet: bool = False) -> None:
    """Imports what the frontend needs; takes seconds the first time. May be called from any thread.

    Args:
        quiet: keeps vLLM from configuring its loggers, for a caller that does it.
    """
    with _IMPORT_LOCK, preserved_environ(), _logging(quiet):
        import vllm.v1.engine.async_llm  # noqa: F401


def make_engine(
    config: Any,
    client: GroupClient,
    *,
    ranks: int,
    log_stats: bool,
    log_requests: bool,
    quiet: bool,
    ready_responses: Callable[[], Sequence[Mapping[str, Any]]],
) -> Any:
    """An AsyncLLM whose engine-core client is ours. Blocks; called in a thread of its own.

    Args:
        config: the group's VllmConfig.
        client: the group's data path.
        ranks: the number of ranks, for vLLM's own checks and its metrics' labels.
        log_stats: whether metrics are collected.
        log_requests: whether each request is logged.
        quiet: keeps vLLM from configuring its loggers, for a caller that does it.
        ready_responses: blocks until all ranks are ready, then gives their ready responses. Called after the
            tokenizer is loaded, so that the two overlap; what it raises ends the construction.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor import Executor

    _install_factory()
    if quiet:
        older.quiet_config(config)
    config.parallel_config.data_parallel_size = ranks
    config.parallel_config.data_parallel_size_local = ranks
    make_client = functools.partial(_make_client, client=client, ranks=ranks, ready_responses=ready_responses)
    token = _PENDING.set(make_client)
    try:
        with preserved_environ(), _logging(quiet):
            client.know_engines(engine_traits(config))
            engine = AsyncLLM(
                vllm_config=config,
                executor_class=Executor,
                log_stats=log_stats,
                log_requests=log_requests,
            )
            engine.engine_core.output_processor = engine.output_processor
            _complete_aborted(engine.output_processor, client)
            prompts.tokenize_short_ones_at_once(engine.renderer)
            older.pass_on_failures(engine)
            failures.failure_class()  # Imported now, and not in the event loop at the first failure.
            return engine
    finally:
        _PENDING.reset(token)


def end_engine(engine: Any, error: Exception) -> None:
    """Ends an AsyncLLM: requests that are under way fail with `error`, and its tasks and threads end."""
    if engine.output_handler is not None:
        engine.output_handler.cancel()
    engine.output_processor.propagate_error(error)
    engine.shutdown()


def guard_health(engine: Any, is_healthy: Callable[[], bool]) -> None:
    """Has an AsyncLLM's own health check fail while `is_healthy` is false: vLLM's /health goes by it."""
    from vllm.v1.engine.exceptions import EngineDeadError

    check = engine.check_health

    async def check_health() -> None:
        await check()
        if not is_healthy():
            raise EngineDeadError()

    engine.check_health = check_health


def unfinished(engine: Any) -> frozenset[str]:
    """The requests that an AsyncLLM has not answered to their end, by its own ids for them."""
    return frozenset(engine.output_processor.request_states)


async def abort(engine: Any, request_ids: Iterable[str]) -> None:
    """Aborts requests: each ends with what it has, and with the finish reason "abort"."""
    await engine.abort(list(request_ids), internal=True)


async def forget_media(engine: Any) -> None:
    """Has an AsyncLLM send images and sounds whole again: the engines' caches of them are about to be emptied.

    vLLM keeps the two in step (`AsyncLLM.pause_generation`); only a group that was launched with one rank has any.
    """
    await engine.renderer.clear_mm_cache_async()


def _complete_aborted(output_processor: Any, client: GroupClient) -> None:
    """Has an answer that ends with an abort hold all that came for it: the client may have kept the last tokens.

    vLLM makes that answer in `OutputProcessor.abort_requests`, of the tokens that it has been handed by then.
    """
    abort = output_processor.abort_requests

    def abort_requests(request_ids: Iterable[str], internal: bool) -> list[str]:
        names = list(request_ids)
        for name in names:
            for request_id in [name] if internal else output_processor.external_req_ids.get(name, ()):
                _hand_over(output_processor, request_id, *client.gathered(request_id))
        aborted: list[str] = abort(names, internal)
        return aborted

    output_processor.abort_requests = abort_requests


def _hand_over(output_processor: Any, request_id: str, tokens: Sequence[int], weights: str | None) -> None:
    state = output_processor.request_states.get(request_id)
    if state is None or state.detokenizer is None:
        return
    if missing := tokens[state.detokenizer.num_output_tokens() :]:
        if weights is not None:
            state.track_weight_version(weights)
        # What is under way to it comes too late, and is ignored.
        output_processor.process_outputs(wire.tokens_alone(request_id, missing, None).outputs)


def _install_factory() -> None:
    from vllm.v1.engine.core_client import EngineCoreClient

    original = EngineCoreClient.make_async_mp_client
    if getattr(original, "_dplaunch", False):
        return

    @functools.wraps(original)
    def make_async_mp_client(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        make_client = _PENDING.get()
        return original(vllm_config, *args, **kwargs) if make_client is None else make_client(vllm_config)

    make_async_mp_client._dplaunch = True  # type: ignore[attr-defined]
    EngineCoreClient.make_async_mp_client = staticmethod(make_async_mp_client)


def _make_client(
    config: Any,
    *,
    client: GroupClient,
    ranks: int,
    ready_responses: Callable[[], Sequence[Mapping[str, Any]]],
) -> Any:
    adapter = _adapter_class()(config, client, ranks)
    for rank, response in enumerate(ready_responses()):
        adapter.apply_ready(rank, response)
    return adapter


@functools.cache
def _adapter_class() -> type[Any]:
    import msgspec
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    class GroupCoreClient(AsyncMPClient):  # type: ignore[misc]
        """vLLM's client interface over a GroupClient.

        AsyncMPClient's constructor, which starts engines, is not called; its many utility methods all come down
        to the few verbs below, so those of later versions work too.
        """

        def __init__(self, config: Any, client: GroupClient, ranks: int) -> None:
            self.vllm_config = config
            self.group_client = client
            self.client_count, self.client_index = 1, 0
            self.engine_ranks_managed = list(range(ranks))
            self.core_engines = [rank.to_bytes(2, "little") for rank in range(ranks)]
            self.resources = SimpleNamespace(engine_dead=False, engine_manager=None)
            self.stats_update_address = None
            self._effective_attention_block_sizes: set[int | None] = set()
            self._kv_event_sources: dict[int, Any] = {}
            self._engine_status: dict[int, dict[str, Any]] = {}
            self.num_blocks: dict[int, int] = {}

        def apply_ready(self, rank: int, response: Mapping[str, Any]) -> None:
            """Takes over what the rank found out while starting: its block count, a fitted max_model_len."""
            self._apply_ready_response(msgspec.msgpack.encode({**response, "data_parallel_rank": rank}))
            self.num_blocks[rank] = response["num_gpu_blocks"]

        async def get_output_async(self) -> Any:
            while isinstance(outputs := await self.group_client.outputs.get(), Failed):
                self.group_client.abort(failures.end_with(self.output_processor, outputs))
            if isinstance(outputs, DplaunchError):
                self.resources.engine_dead = True
                raise EngineDeadError() from outputs
            return outputs

        async def add_request_async(self, request: Any) -> None:
            request.client_index = 0
            try:
                self.group_client.add(request)
            except GroupDeadError:
                raise
            except DplaunchError as error:
                # It stands in vLLM's table already.
                failures.forget(self.output_processor, [request.request_id])
                raise failures.as_failure(error) from error

        async def abort_requests_async(self, request_ids: list[str]) -> None:
            self.group_client.abort(request_ids)

        async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
            return await self.group_client.call(method, *args)

        async def call_utility_async(self, method: str, *args: Any) -> Any:
            return await self.group_client.call_for_one(method, *args)

        def dp_engines_running(self) -> bool:
            return self.group_client.unfinished > 0

        def ensure_alive(self) -> None:
            if self.group_client.dead is not None:
                raise EngineDeadError() from self.group_client.dead

        def shutdown(self, timeout: float | None = None) -> None:
            """Nothing: the ranks belong to the group, which outlives this object."""

    return GroupCoreClient
