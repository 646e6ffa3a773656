"""What vLLM's app is made to say of errors that may be tried again."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from dplaunch.seam.failures import RETRY_AFTER_S, tell_when_to_retry


@pytest.fixture(params=["as it is made", "with its middleware built"])
def app(request: pytest.FixtureRequest) -> FastAPI:
    """An app as vLLM hands it over; which of the two depends on what it is started with."""
    app = FastAPI()

    @app.get("/{status}")
    async def answer(status: int, wait: str = "") -> JSONResponse:
        return JSONResponse({}, status, headers={"Retry-After": wait} if wait else None)

    if request.param == "with its middleware built":
        app.middleware_stack = app.build_middleware_stack()
    tell_when_to_retry(app)
    return app


async def retry_after(app: FastAPI, path: str) -> str | None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        found: str | None = (await client.get(path)).headers.get("Retry-After")
        return found


async def test_whoever_finds_no_rank_is_told_when_to_try_again(app: FastAPI) -> None:
    assert await retry_after(app, "/503") == str(RETRY_AFTER_S)


async def test_an_app_that_knows_better_is_not_corrected(app: FastAPI) -> None:
    assert await retry_after(app, "/503?wait=7") == "7"


async def test_other_answers_say_nothing_of_it(app: FastAPI) -> None:
    assert [await retry_after(app, path) for path in ("/200", "/404", "/500")] == [None, None, None]


async def test_routes_may_come_later(app: FastAPI) -> None:
    app.add_api_route("/ready/now", lambda: JSONResponse({}, 503), methods=["GET"])
    assert await retry_after(app, "/ready/now") == str(RETRY_AFTER_S)
