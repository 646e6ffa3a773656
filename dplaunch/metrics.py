"""dplaunch's own metrics, beside vLLM's in the process's Prometheus registry, and so at the server's /metrics.

Nothing is counted here: each scrape reads what the groups know of themselves.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Read = Callable[[], dict[str, Any]]
"""Returns a group's `dplaunch.status.snapshot`; called from any thread."""

RECOVERY_BUCKETS_S = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""From a small model's return in a second to weights on a slow disk."""

REQUEST_COUNTERS = {
    "accepted": "Requests taken.",
    "finished": "Requests answered to their end.",
    "aborted": "Requests given up by their caller.",
    "moved": "Times that a request was taken from a dead rank to another.",
    "replayed": "Moved requests that were sent again from their start.",
    "lost": "Requests that ended with an error because they could not be moved.",
    "poisoned": "Requests that ended with an error because ranks died of them.",
    "refused": "Requests turned away: the group was full, or nothing could serve.",
}

_shown: dict[object, Read] = {}
_lock = threading.Lock()


def show(owner: object, read: Read) -> None:
    """Adds a group to what is scraped, under its owner."""
    from prometheus_client import REGISTRY

    with _lock:
        _shown[owner] = read
        if len(_shown) == 1:
            REGISTRY.register(_groups)


def hide(owner: object) -> None:
    """Takes the owner's group out again. Idempotent."""
    from prometheus_client import REGISTRY

    with _lock:
        if _shown.pop(owner, None) is not None and not _shown:
            REGISTRY.unregister(_groups)


class GroupsCollector:
    """Reads groups when it is scraped. One for all of a process: a name may be exposed only once."""

    def describe(self) -> Iterable[Any]:
        """Nothing: the names are not to be asked for before there is a group to ask."""
        return ()

    def collect(self) -> Iterable[Any]:
        """The metrics of every group that is shown."""
        with _lock:
            readers = list(_shown.values())
        groups = []
        for read in readers:
            # One that is just closing has nothing to say; the scrape is vLLM's too and must not fail of it.
            with contextlib.suppress(Exception):
                groups.append(read())
        return families(groups)


_groups = GroupsCollector()


def families(groups: Sequence[dict[str, Any]]) -> list[Any]:
    """The metric families of groups, from their status."""
    return [*_of_groups(groups), *_of_requests(groups), *_of_ranks(groups), _recovery(groups)]


def _of_groups(groups: Sequence[dict[str, Any]]) -> list[Any]:
    from prometheus_client.core import GaugeMetricFamily as Gauge

    info = Gauge("dplaunch_group_info", "A running group.", labels=["group", "backend", "mode", "model"])
    wanted = Gauge("dplaunch_ranks_wanted", "Ranks that the group should have.", labels=["group"])
    ready = Gauge("dplaunch_ranks_ready", "Ranks that answer.", labels=["group"])
    stale = Gauge("dplaunch_ranks_stale", "Ranks that have not the group's weights.", labels=["group"])
    weights = Gauge("dplaunch_weights_info", "The weights that are served.", labels=["group", "version", "stance"])
    queue = Gauge("dplaunch_queue_depth", "Requests that wait for a rank.", labels=["group"])
    for group in groups:
        name = [group["name"]]
        info.add_metric([*name, group["backend"], group["mode"], group["model"]], 1)
        wanted.add_metric(name, group["dp"])
        ready.add_metric(name, group["ready"])
        stale.add_metric(name, sum(rank["state"] == "stale" for rank in group["ranks"]))
        weights.add_metric([*name, str(group["weights"]["version"]), group["stance"]], 1)
        queue.add_metric(name, group["requests"]["queued"])
    return [info, wanted, ready, stale, weights, queue]


def _of_requests(groups: Sequence[dict[str, Any]]) -> list[Any]:
    from prometheus_client.core import CounterMetricFamily as Counter

    made = []
    for name, help_text in REQUEST_COUNTERS.items():
        counter = Counter(f"dplaunch_requests_{name}", help_text, labels=["group"])
        for group in groups:
            counter.add_metric([group["name"]], group["requests"][name])
        made.append(counter)
    return made


def _of_ranks(groups: Sequence[dict[str, Any]]) -> list[Any]:
    from prometheus_client.core import CounterMetricFamily as Counter
    from prometheus_client.core import GaugeMetricFamily as Gauge

    labels = ["group", "rank"]
    up = Gauge("dplaunch_rank_up", "1 while the rank takes requests.", labels=labels)
    flight = Gauge("dplaunch_requests_in_flight", "Requests that the rank has.", labels=labels)
    restarts = Counter("dplaunch_rank_restarts", "Restarts of the rank.", labels=labels)
    tokens = Counter("dplaunch_rank_output_tokens", "Output tokens of the rank.", labels=labels)
    for group in groups:
        for rank in group["ranks"]:
            which = [group["name"], str(rank["rank"])]
            up.add_metric(which, float(rank["state"] == "ready"))
            flight.add_metric(which, rank["in_flight"])
            restarts.add_metric(which, rank["restarts"])
            tokens.add_metric(which, rank["tokens"])
    return [up, flight, restarts, tokens]


def _recovery(groups: Sequence[dict[str, Any]]) -> Any:
    from prometheus_client.core import HistogramMetricFamily as Histogram

    # By rank: one that is scaled away takes its numbers with it, and no sum may ever shrink.
    text = "Seconds from a rank's death until it served again."
    recovery = Histogram("dplaunch_recovery_seconds", text, labels=["group", "rank"])
    for group in groups:
        for rank in group["ranks"]:
            if seconds := rank["recovery_s"]:
                recovery.add_metric([group["name"], str(rank["rank"])], _buckets(seconds), sum_value=sum(seconds))
    return recovery


def _buckets(seconds: Sequence[float]) -> list[tuple[str, float]]:
    """How many values are at most each bound, as Prometheus counts them."""
    counts = [0] * (len(RECOVERY_BUCKETS_S) + 1)
    for value in seconds:
        counts[bisect_left(RECOVERY_BUCKETS_S, value)] += 1
    bounds = [*map(str, RECOVERY_BUCKETS_S), "+Inf"]
    return [(bound, float(sum(counts[: place + 1]))) for place, bound in enumerate(bounds)]
