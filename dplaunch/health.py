"""GET /ready: whether the group takes requests, with detail. /health is vLLM's own route, over a truthful engine."""

from __future__ import annotations

from collections import Counter
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from dplaunch.status import snapshot

if TYPE_CHECKING:
    from dplaunch.life import GroupLife


def readiness(group: GroupLife) -> dict[str, Any]:
    """What GET /ready answers: counts only, for it asks for no key.

    `ready` is whether at least `needed` ranks take requests; `state` is that of `dplaunch status`.
    """
    now, seen = snapshot(group), group.seen
    supervisor, client = seen.supervisor, seen.client
    needed = now["min_ranks"] if supervisor is None else supervisor.needed
    rests = client is None or client.is_held or seen.error is not None or seen.is_closing
    taking = 0 if client is None or rests else len(client.ranks)
    return {
        "ready": taking >= needed,
        "state": now["state"],
        "stance": now["stance"],
        "needed": needed,
        "take_requests": taking,
        "answer": now["ready"],
        "ranks": dict(Counter(rank["state"] for rank in now["ranks"])),
        "in_flight": now["requests"]["in_flight"],
        "queued": now["requests"]["queued"],
    }


def add_ready_route(app: Any, group: GroupLife) -> None:
    """Adds GET /ready to a FastAPI app."""
    from fastapi.responses import JSONResponse

    async def ready() -> JSONResponse:
        answer = readiness(group)
        return JSONResponse(answer, HTTPStatus.OK if answer["ready"] else HTTPStatus.SERVICE_UNAVAILABLE)

    app.add_api_route("/ready", ready, methods=["GET"], response_class=JSONResponse)
