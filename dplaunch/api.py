"""The two calls that start a group from Python."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from dplaunch.errors import UsageError
from dplaunch.events import Listener
from dplaunch.spec import (
    DEFAULT_START_TIMEOUT_S,
    ClusterOptions,
    ExecutorKind,
    LaunchSpec,
    Mode,
    ProbePolicy,
    RequestPolicy,
    RestartPolicy,
    StartMethod,
)

if TYPE_CHECKING:
    from dplaunch.group import AsyncGroup
    from dplaunch.sync import Group

E = TypeVar("E", bound=StrEnum)


def launch(
    model: str | None = None,
    *,
    dp: int = 1,
    backend: str = "mp",
    devices: Sequence[Sequence[int | str]] | None = None,
    executor: str = "auto",
    mode: str = "auto",
    start_method: str = "fork",
    start_timeout_s: float = DEFAULT_START_TIMEOUT_S,
    shutdown_timeout_s: float = 10.0,
    restart: RestartPolicy | None = None,
    probe: ProbePolicy | None = None,
    requests: RequestPolicy | None = None,
    min_ranks: int = 1,
    log_dir: str | Path | None = None,
    name: str | None = None,
    env: Mapping[str, str] | None = None,
    log_stats: bool = False,
    ray_address: str | None = None,
    nodes: Sequence[str] = (),
    num_gpus: float = 1.0,
    placement_groups: Sequence[Any] = (),
    bundle_indices: Sequence[Sequence[int]] | None = None,
    any_vllm: bool = False,
    progress: bool | None = None,
    listener: Listener | None = None,
    **engine_args: Any,
) -> Group:
    """Starts a group of ranks and returns when all are ready; close it, or use it in a with statement.

    Works from a notebook, from a script without a `__main__` guard, from standard input, and in a process that
    has initialised CUDA. From inside a running event loop use `launch_async`.

    Args:
        model: a path or a hub name; None for the built-in model.
        dp: number of data-parallel ranks.
        backend: "mp" for processes of this machine, "ray" for actors of a Ray cluster, or another that is installed.
        devices: for each rank its devices, for example [[0], [1]]; cores where there is no accelerator.
        executor: "auto", "uni", "mp" or "ray": how each rank drives its devices.
        mode: "auto", "independent" or "lockstep".
        start_method: "fork" from a process that has imported vLLM, or "spawn" to import it anew in each rank.
        start_timeout_s: seconds until a rank that is not ready fails the launch.
        shutdown_timeout_s: seconds that ranks get to end by themselves.
        restart: when a rank that dies comes back; None for three times in five minutes.
        probe: when a rank that says nothing is taken for hung; None for a minute without an answer.
        requests: what becomes of requests when ranks die or too many come; None for the defaults.
        min_ranks: the group is dead with fewer ranks than this.
        log_dir: where the ranks' logs go; None for a new directory under the user's state directory.
        name: the group's id; None for a fresh one.
        env: variables set in every rank.
        log_stats: whether vLLM collects its metrics (they are global to a process).
        ray_address: the Ray cluster to attach to, "auto" or "HOST:PORT", and to leave running at the end. None for
            the one in `RAY_ADDRESS`, else the one that this process is connected to already, else a local one that
            ends with the group.
        nodes: the machines of the cluster that may be used, by name or address; all when left out.
        num_gpus: the share of a device that each worker of a rank holds; below 1 leaves room for a trainer beside it.
        placement_groups: your own Ray placement groups: one for each rank, or one for all.
        bundle_indices: for each rank the bundles of its placement group that are its own, for example [[0], [1]].
        any_vllm: tries a vLLM that dplaunch was not checked with, as `DPLAUNCH_ANY_VLLM=1` does.
        progress: whether the start is shown; None shows it on a terminal.
        listener: told everything that happens to the group.
        **engine_args: vLLM's engine arguments, as `vllm.LLM` takes them: max_model_len=4096.

    Raises:
        DplaunchError: when the group cannot be started; its subclasses say which kind.
    """
    from dplaunch.sync import Group

    spec = make_spec(
        model,
        dp=dp,
        backend=backend,
        devices=devices,
        executor=executor,
        mode=mode,
        start_method=start_method,
        start_timeout_s=start_timeout_s,
        shutdown_timeout_s=shutdown_timeout_s,
        restart=restart,
        probe=probe,
        requests=requests,
        min_ranks=min_ranks,
        log_dir=log_dir,
        name=name,
        env=env,
        log_stats=log_stats,
        ray_address=ray_address,
        nodes=nodes,
        num_gpus=num_gpus,
        placement_groups=placement_groups,
        bundle_indices=bundle_indices,
        any_vllm=any_vllm,
        engine_args=engine_args,
    )
    return Group(spec, progress=progress, listeners=[listener] if listener else [])


def launch_async(model: str | None = None, **options: Any) -> Launching:
    """The same for asyncio: `async with dplaunch.launch_async(...) as group`, or `group = await ...`.

    Takes the arguments of `launch`.
    """
    progress: bool | None = options.pop("progress", None)
    listener: Listener | None = options.pop("listener", None)
    names = set(inspect.signature(make_spec).parameters) - {"model", "engine_args"}
    known = {key: options.pop(key) for key in list(options) if key in names}
    return Launching(make_spec(model, **known, engine_args=options), progress, [listener] if listener else [])


class Launching:
    """A launch that has not begun: await it, or enter it."""

    def __init__(self, spec: LaunchSpec, progress: bool | None, listeners: Sequence[Listener]) -> None:
        self._spec = spec
        self._progress = progress
        self._listeners = listeners
        self._group: AsyncGroup | None = None

    async def _open(self) -> AsyncGroup:
        from dplaunch.group import open_group

        return await open_group(self._spec, progress=self._progress, listeners=self._listeners)

    def __await__(self) -> Generator[Any, None, AsyncGroup]:
        return self._open().__await__()

    async def __aenter__(self) -> AsyncGroup:
        self._group = await self._open()
        return self._group

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._group is not None:
            await self._group.close()


def make_spec(
    model: str | None,
    *,
    dp: int = 1,
    backend: str = "mp",
    devices: Sequence[Sequence[int | str]] | None = None,
    executor: str = "auto",
    mode: str = "auto",
    start_method: str = "fork",
    start_timeout_s: float = DEFAULT_START_TIMEOUT_S,
    shutdown_timeout_s: float = 10.0,
    restart: RestartPolicy | None = None,
    probe: ProbePolicy | None = None,
    requests: RequestPolicy | None = None,
    min_ranks: int = 1,
    log_dir: str | Path | None = None,
    name: str | None = None,
    env: Mapping[str, str] | None = None,
    log_stats: bool = False,
    ray_address: str | None = None,
    nodes: Sequence[str] = (),
    num_gpus: float = 1.0,
    placement_groups: Sequence[Any] = (),
    bundle_indices: Sequence[Sequence[int]] | None = None,
    any_vllm: bool = False,
    engine_args: Mapping[str, Any] | None = None,
) -> LaunchSpec:
    """A LaunchSpec from the plain values that Python callers and the command give.

    Raises:
        UsageError: when a value cannot be.
    """
    return LaunchSpec(
        model=model,
        dp=dp,
        backend=backend,
        engine_args=engine_args or {},
        devices=None if devices is None else tuple(tuple(str(d) for d in group) for group in devices),
        executor=_choice(ExecutorKind, "executor", executor),
        mode=_choice(Mode, "mode", mode),
        start_method=_choice(StartMethod, "start_method", start_method),
        start_timeout_s=start_timeout_s,
        shutdown_timeout_s=shutdown_timeout_s,
        restart=restart or RestartPolicy(),
        probe=probe or ProbePolicy(),
        requests=requests or RequestPolicy(),
        min_ranks=min_ranks,
        log_dir=None if log_dir is None else Path(log_dir),
        base_id=name,
        env=env or {},
        log_stats=log_stats,
        cluster=ClusterOptions(
            address=ray_address,
            nodes=_several("nodes", nodes),
            num_gpus=num_gpus,
            placement_groups=_several("placement_groups", placement_groups),
            bundle_indices=None if bundle_indices is None else _bundles(bundle_indices),
        ),
        any_vllm=any_vllm,
    )


def _several(name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    # A string is a sequence too, of letters; and a single group is easily given for a list of one.
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UsageError(f"{name} must be a list, not {values!r}", hint=f"Write {name}=[...], also for a single one.")
    return tuple(values)


def _bundles(groups: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(_several("bundle_indices of a rank", indices) for indices in _several("bundle_indices", groups))


def _choice(kind: type[E], name: str, value: str) -> E:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(kind)
        raise UsageError(f"{name} cannot be {value!r}", hint=f"Choose one of: {choices}.") from None
