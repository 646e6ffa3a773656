"""What older vLLMs of the window lack or have elsewhere. Each part says from which version on it is not needed.

vLLM's own version is not asked: a part is used where the name is not there, so that a build between two releases works.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from http import HTTPStatus
from typing import Any

from dplaunch.errors import RequestError
from dplaunch.identity import base_of
from dplaunch.seam.names import modules_of

# Names that moved.


def moved(name: str) -> Any:
    """A name that `names` has in several modules, from the one in which the installed vLLM has it.

    Raises:
        ImportError: when no module that we know has it.
    """
    for module in modules_of(name):
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # It is there, and something that it needs is not.
        except AttributeError:
            continue
    raise ImportError(f"vLLM has no {name} in any of {', '.join(modules_of(name))}")


# In a rank.


PORTS_EACH = 32
"""So many ports the Ray executor tries for its workers to meet at."""

PORTS_BEHIND = 100
"""The first of them is so far behind the data parallel master's."""

PORTS = range(20000, 32000)
"""Below those that Linux gives to whoever asks for any (net.ipv4.ip_local_port_range)."""


def master_port(instance_id: str, rank: int) -> int:
    """`ParallelConfig.data_parallel_master_port` for an independent rank whose executor is Ray.

    From there on that executor looks for a port (vllm/v1/executor/ray_executor_v2.py, `_select_tcpstore_port`), and
    its workers bind what it has found seconds later. Ranks that know of no others all look from the same one. With
    this each rank of a group has ports of its own, and another group most likely others. vLLM needs none from 0.29 on.

    Args:
        instance_id: the rank's unique id.
        rank: the global data-parallel rank.
    """
    group = zlib.crc32(base_of(instance_id).encode())
    return PORTS[(group + rank) % (len(PORTS) // PORTS_EACH) * PORTS_EACH] - PORTS_BEHIND


class OlderCore:
    """Utility methods that vLLM's engine core has by now. Stands behind vLLM's class, whose own are taken first."""

    def set_weight_version(self, weight_version: str) -> None:
        """Nothing: 0.26 keeps no version; the launcher does. vLLM has it from 0.27 on."""

    def compute_weight_checksums(self) -> list[dict[str, str]]:
        """For each worker a digest of each parameter, its name behind "worker:". vLLM has it from 0.32 on."""
        digests: list[dict[str, str]] = self.collective_rpc(digest_weights)  # type: ignore[attr-defined]
        return digests


def digest_weights(worker: Any) -> dict[str, str]:
    """SHA-256 over the bytes of each of the worker's parameters, by "worker{rank}:{name}"."""
    worker = getattr(worker, "worker", worker)
    parameters = worker.model_runner.get_model().named_parameters()
    return {f"worker{worker.rank}:{name}": _digest(parameter) for name, parameter in parameters}


def _digest(tensor: Any) -> str:
    import torch

    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy()).hexdigest()


@contextlib.contextmanager
def config_of(worker: Any) -> Iterator[None]:
    """Makes the worker's config vLLM's current one while weights are loaded; vLLM does it itself from 0.27 on."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        yield


def without_mtp_check() -> contextlib.AbstractContextManager[None]:
    """Where a bucket need not hold all of a draft model's layers; before 0.27 vLLM does not ask for them."""
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
    except ModuleNotFoundError:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = disable_mtp_completeness_check()
    return context


# In the frontend.


def has_graceful_errors() -> bool:
    """Whether vLLM has `GracefulHTTPError`, as it does from 0.29 on."""
    from vllm import exceptions

    return hasattr(exceptions, "GracefulHTTPError")


def workers_let_go() -> bool:
    """Whether workers can be told to let go of a trainer, as from 0.32 on; before, they do when they meet the next."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return hasattr(AsyncLLM, "shutdown_weight_transfer_engine")


def failure_class() -> type[RequestError]:
    """The class of a request's errors where vLLM has no `GracefulHTTPError`, which it has from 0.29 on.

    Its server answers a `GenerationError` with the status that it carries; `pass_on` brings ours there.
    """
    generation_error = moved("GenerationError")

    class RequestFailure(RequestError, generation_error):  # type: ignore[misc, valid-type]
        """A request that failed, as vLLM's server takes it."""

        def __init__(self, message: str, *, retryable: bool) -> None:
            RequestError.__init__(self, message, retryable=retryable)
            self.status_code = HTTPStatus.SERVICE_UNAVAILABLE if retryable else HTTPStatus.INTERNAL_SERVER_ERROR

    return RequestFailure


def pass_on_failures(engine: Any) -> None:
    """Has `AsyncLLM.generate` and `encode` hand on a `RequestError` as it is.

    Before 0.29 vLLM makes of it an `EngineGenerateError` without words; the error itself is its cause.
    """
    if not has_graceful_errors():
        engine.generate, engine.encode = _passing_on(engine.generate), _passing_on(engine.encode)


def _passing_on(method: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    from vllm.v1.engine.exceptions import EngineGenerateError

    @functools.wraps(method)
    async def passing_on(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        # Closed with the caller's iterator, not when it is collected: closing aborts the request.
        async with contextlib.aclosing(method(*args, **kwargs)) as outputs:  # type: ignore[type-var]
            try:
                async for output in outputs:
                    yield output
            except EngineGenerateError as error:
                if isinstance(error.__cause__, RequestError):
                    raise error.__cause__ from error.__cause__.__cause__
                raise

    return passing_on


def quiet_config(config: Any) -> None:
    """Keeps vLLM from configuring its loggers; up to 0.30 only the environment says so, when vLLM is imported."""
    if (logging := getattr(config, "logging_config", None)) is not None:
        logging.configure_logging = False
