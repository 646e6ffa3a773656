"""dplaunch's Prometheus metrics, and the dashboard that shows them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dplaunch import metrics
from dplaunch.counters import Counters
from tests.unit.statuses import group_status, rank_status

prometheus_client = pytest.importorskip("prometheus_client")

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture
def owner() -> Iterator[object]:
    """Whoever shows a group; it is hidden again at the end."""
    owner = object()
    yield owner
    metrics.hide(owner)


def exposed() -> str:
    """What a server of this process would answer at /metrics."""
    text: bytes = prometheus_client.generate_latest(prometheus_client.REGISTRY)
    return text.decode()


def value(name: str, **labels: str) -> float | None:
    found: float | None = prometheus_client.REGISTRY.get_sample_value(name, labels)
    return found


def test_a_group_is_exposed_as_it_is_when_it_is_scraped(owner: object) -> None:
    status = group_status(
        name="g",
        ranks=[rank_status(0, in_flight=3, tokens=70), rank_status(1, state="stale", restarts=2)],
        requests={"queued": 4, "moved": 9, "lost": 1},
    )
    metrics.show(owner, lambda: status)
    assert value("dplaunch_rank_up", group="g", rank="0") == 1
    assert value("dplaunch_rank_up", group="g", rank="1") == 0
    assert value("dplaunch_rank_restarts_total", group="g", rank="1") == 2
    assert value("dplaunch_requests_in_flight", group="g", rank="0") == 3
    assert value("dplaunch_rank_output_tokens_total", group="g", rank="0") == 70
    assert value("dplaunch_queue_depth", group="g") == 4
    assert value("dplaunch_requests_moved_total", group="g") == 9
    assert value("dplaunch_requests_lost_total", group="g") == 1
    assert value("dplaunch_ranks_wanted", group="g") == 2
    assert value("dplaunch_ranks_stale", group="g") == 1
    assert value("dplaunch_weights_info", group="g", version="0", stance="serving") == 1
    assert value("dplaunch_group_info", group="g", backend="mp", mode="independent", model="m") == 1
    status["requests"]["moved"] = 10
    assert value("dplaunch_requests_moved_total", group="g") == 10
    metrics.hide(owner)
    # Another group of this process may be exposed too.
    assert not [line for line in exposed().splitlines() if line.startswith("dplaunch_") and 'group="g"' in line]


def test_every_counter_of_the_data_path_is_exposed() -> None:
    assert metrics.REQUEST_COUNTERS.keys() == set(Counters.__slots__)


def test_recoveries_are_a_histogram(owner: object) -> None:
    status = group_status(name="g", ranks=[rank_status(0, recovery_s=[0.5, 0.7, 9.0, 1000.0]), rank_status(1)])
    metrics.show(owner, lambda: status)
    counts = {
        bound: value("dplaunch_recovery_seconds_bucket", group="g", rank="0", le=bound)
        for bound in ("0.5", "1.0", "5.0", "10.0", "600.0", "+Inf")
    }
    assert counts == {"0.5": 1, "1.0": 2, "5.0": 2, "10.0": 3, "600.0": 3, "+Inf": 4}
    assert value("dplaunch_recovery_seconds_count", group="g", rank="0") == 4
    assert value("dplaunch_recovery_seconds_sum", group="g", rank="0") == pytest.approx(1010.2)
    assert value("dplaunch_recovery_seconds_count", group="g", rank="1") is None


def test_two_groups_of_a_process_share_each_name_and_one_that_fails_spoils_nothing(owner: object) -> None:
    def fail() -> dict[str, Any]:
        raise TimeoutError

    others = [object(), object()]
    metrics.show(owner, lambda: group_status(name="a"))
    metrics.show(others[0], lambda: group_status(name="b"))
    metrics.show(others[1], fail)
    text = exposed()
    assert text.count("# TYPE dplaunch_rank_up gauge") == 1
    assert 'dplaunch_ranks_wanted{group="a"}' in text
    assert 'dplaunch_ranks_wanted{group="b"}' in text
    for other in others:
        metrics.hide(other)
    assert 'dplaunch_ranks_wanted{group="b"}' not in exposed()


# The dashboard.


def test_every_metric_of_the_dashboard_exists() -> None:
    shown = {name for expression in expressions() for name in re.findall(r"\b(?:dplaunch_|vllm:)\w+", expression)}
    assert len(shown) > 15
    assert shown - own_names() - vllm_names() == set()
    # What is worth counting is worth showing.
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in own_names()} - bare == set()


def test_the_dashboards_panels_do_not_overlap_and_are_told_apart() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*found, *(variable.get("definition", "") for variable in dashboard["templating"]["list"])]


def own_names() -> set[str]:
    """The names of all samples of a group that has lost and got back a rank."""
    status = group_status(name="g", ranks=[rank_status(0, recovery_s=[1.0])])
    return {sample.name for family in metrics.families([status]) for sample in family.samples}


def vllm_names() -> set[str]:
    """The names of vLLM's samples, from its source: its registry is filled by a running engine only."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(found.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    suffixes = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    made = re.findall(r"_(gauge|counter|histogram)_cls\(\s*name=\"(vllm:\w+)\"", source)
    assert len(made) > 20
    return {name + suffix for kind, name in made for suffix in suffixes[kind]}
