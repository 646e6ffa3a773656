"""vLLM's frontend after the number of ranks has changed: its check of `data_parallel_rank`, its metrics' labels.

vLLM's own scaling (`AsyncLLM.scale_elastic_ep`) makes all loggers anew, with which every counter starts at 0 again.
Here the loggers of those that stay go on as they are, and so do their counters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def resize(engine: Any, ranks: int) -> None:
    """Tells an AsyncLLM how many ranks there are. Call it in its event loop, before a new rank can answer.

    Args:
        engine: the AsyncLLM.
        ranks: the number of ranks from now on. What is still to come from one that is no more is counted nowhere.
    """
    client, config = engine.engine_core, engine.vllm_config
    parallel = config.parallel_config
    before = parallel.data_parallel_size
    parallel.data_parallel_size = parallel.data_parallel_size_local = ranks
    client.engine_ranks_managed = list(range(ranks))
    client.core_engines = [rank.to_bytes(2, "little") for rank in range(ranks)]
    for rank in [rank for rank in client.num_blocks if rank >= ranks]:
        config.cache_config.num_gpu_blocks -= client.num_blocks.pop(rank)
    if engine.logger_manager is not None:
        _resize_loggers(engine.logger_manager, config, before, ranks)


def joined(engine: Any, rank: int, response: Mapping[str, Any]) -> None:
    """Takes over what a rank that has joined found out while it started."""
    engine.engine_core.apply_ready(rank, response)
    for logger in engine.logger_manager.stat_loggers if engine.logger_manager is not None else ():
        if _is_prometheus(logger):
            _tell_config(logger)


def _is_prometheus(logger: Any) -> bool:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    return isinstance(logger, PrometheusStatLogger)


def _resize_loggers(manager: Any, config: Any, before: int, ranks: int) -> None:
    from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter

    manager.engine_indexes = list(range(ranks))
    for place, logger in enumerate(manager.stat_loggers):
        if isinstance(logger, PerEngineStatLoggerAdapter):
            _resize_each(logger, config, ranks)
        elif _is_prometheus(logger):
            resized = _grown(logger, config, ranks) if ranks > before else logger
            _drop_series({str(rank) for rank in range(ranks, len(resized.engine_indexes))})
            _tell_config(resized)
            manager.stat_loggers[place] = resized
        else:
            # One of a plugin, for all ranks together: it can only be made anew.
            manager.stat_loggers[place] = type(logger)(vllm_config=config, engine_indexes=list(range(ranks)))


def _resize_each(adapter: Any, config: Any, ranks: int) -> None:
    loggers = adapter.per_engine_stat_loggers
    make = type(next(iter(loggers.values())))
    adapter.engine_indexes = list(range(ranks))
    adapter.per_engine_stat_loggers = {
        rank: loggers[rank] if rank in loggers else make(config, rank) for rank in range(ranks)
    }


# Prometheus. vLLM's logger makes its metrics through classes that are its attributes (its own way to write to Ray's
# metrics instead). Ours hand out the metric of that name that is there, which knows what the old ranks have counted.


def _grown(logger: Any, config: Any, ranks: int) -> Any:
    from prometheus_client import REGISTRY

    plain = getattr(type(logger), "dplaunch_plain", type(logger))
    # What is still to come of a rank that is no more must find its metrics, or vLLM's frontend would die of it.
    engines = list(range(max(ranks, len(logger.engine_indexes))))
    there = _metrics()
    grown = _keeping(plain, there)(config, engines)
    for name, metric in there.items():
        if name not in _metrics():  # the constructor has taken all of them out
            REGISTRY.register(metric)
    return grown


def _keeping(cls: Any, there: Mapping[str, Any]) -> Any:
    from prometheus_client import Counter, Gauge, Histogram

    def made(kind: Any) -> Any:
        if not issubclass(kind, Counter | Gauge | Histogram):
            return _keeping(kind, there)

        def same_or_new(name: str, *args: Any, **kwargs: Any) -> Any:
            return there.get(name.removesuffix("_total")) or kind(name, *args, **kwargs)

        return staticmethod(same_or_new)

    kinds = {name: made(getattr(cls, name)) for name in dir(cls) if name.endswith("_cls")}
    return type(cls.__name__, (cls,), {**kinds, "dplaunch_plain": cls})


def _metrics() -> dict[str, Any]:
    """vLLM's metrics in this process, by name, found as its own loggers find them."""
    from prometheus_client import REGISTRY

    found = [metric for metric in list(REGISTRY._collector_to_names) if hasattr(metric, "_name")]
    return {metric._name: metric for metric in found if metric._name.startswith("vllm:")}


def _drop_series(engines: Collection[str]) -> None:
    """Takes the metrics of ranks that are no more out of sight."""
    for metric in _metrics().values():
        labels = [sample.labels for family in metric.collect() for sample in family.samples]
        for values in {
            tuple(each[name] for name in metric._labelnames) for each in labels if each.get("engine") in engines
        }:
            metric.remove(*values)


def _tell_config(logger: Any) -> None:
    """Shows the cache's size anew: its series have the numbers for labels."""
    from prometheus_client import REGISTRY

    name = "vllm:cache_config_info"
    if (shown := _metrics().get(name)) is not None:
        shown.clear()
        REGISTRY.unregister(shown)  # a logger as vLLM made it registers another
    logger.log_engine_initialized()
    if shown is not None and name not in _metrics():
        REGISTRY.register(shown)
