"""What /health and /ready say: the truth about the ranks that answer and that take requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dplaunch import health
from dplaunch.life import GroupLife
from dplaunch.seam import frontend


def group(*, taking: int, needed: int = 2, held: bool = False, **seen: Any) -> GroupLife:
    """As much of a group as readiness looks at."""
    supervisor = SimpleNamespace(needed=needed)
    client = SimpleNamespace(ranks=list(range(taking)), is_held=held)
    parts = {"supervisor": supervisor, "client": client, "error": None, "is_closing": False, **seen}
    return cast(GroupLife, SimpleNamespace(seen=SimpleNamespace(**parts)))


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the status says meanwhile."""
    monkeypatch.setattr(
        health,
        "snapshot",
        lambda group: {
            "state": "degraded",
            "stance": "serving",
            "ready": 3,
            "min_ranks": 2,
            "requests": {"in_flight": 5, "queued": 1},
            "ranks": [{"state": "ready"}, {"state": "ready"}, {"state": "ready"}, {"state": "down"}],
        },
    )


def test_a_group_is_ready_while_so_many_ranks_take_requests_as_are_needed() -> None:
    assert health.readiness(group(taking=2)) == {
        "ready": True,
        "state": "degraded",
        "stance": "serving",
        "needed": 2,
        "take_requests": 2,
        "answer": 3,
        "ranks": {"ready": 3, "down": 1},
        "in_flight": 5,
        "queued": 1,
    }
    assert not health.readiness(group(taking=1))["ready"]


def test_a_group_that_stands_still_takes_no_requests() -> None:
    answer = health.readiness(group(taking=2, held=True))
    assert (answer["ready"], answer["take_requests"]) == (False, 0)


@pytest.mark.parametrize("seen", [{"is_closing": True}, {"error": RuntimeError("dead")}, {"client": None}])
def test_a_group_that_ends_or_is_dead_is_not_ready_whatever_its_ranks_do(seen: dict[str, Any]) -> None:
    answer = health.readiness(group(taking=4, **seen))
    assert (answer["ready"], answer["take_requests"]) == (False, 0)


def test_the_route_answers_503_with_the_same_detail_while_the_group_is_not_ready() -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    for taking, status in ((2, 200), (1, 503)):
        app = FastAPI()
        health.add_ready_route(app, group(taking=taking))
        with TestClient(app) as client:
            response = client.get("/ready")
        assert response.status_code == status
        assert response.json()["take_requests"] == taking


async def test_vllms_own_health_check_fails_while_too_few_ranks_answer() -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    asked: list[str] = []
    healthy = True

    async def check_health() -> None:
        asked.append("vLLM")

    engine = SimpleNamespace(check_health=check_health)
    frontend.guard_health(engine, lambda: healthy)
    await engine.check_health()
    healthy = False
    with pytest.raises(EngineDeadError):
        await engine.check_health()
    assert asked == ["vLLM", "vLLM"]
