"""How a request's error reaches whoever asked: out of `AsyncLLM.generate` and `encode`, and over HTTP.

vLLM hands an exception in a request's queue to its caller, and one of its own `GracefulHTTPError`s unchanged; its
server answers that with the status that it carries, and as an event where an answer is streamed. Ours is both that
and a `RequestError`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from dplaunch.errors import DplaunchError, RequestError
from dplaunch.inflight import Failed
from dplaunch.seam import older

RETRY_AFTER_S = 1
"""What a client is told to wait before it tries again, seconds: a moved load settles in less."""


@functools.cache
def failure_class() -> type[RequestError]:
    """The class of errors that vLLM passes on."""
    if not older.has_graceful_errors():
        return older.failure_class()
    from vllm.exceptions import GracefulHTTPError

    class RequestFailure(RequestError, GracefulHTTPError):  # type: ignore[misc]
        """A request that failed, as vLLM's frontend and server take it."""

        def __init__(self, message: str, *, retryable: bool) -> None:
            RequestError.__init__(self, message, retryable=retryable)
            self.http_status = HTTPStatus.SERVICE_UNAVAILABLE if retryable else HTTPStatus.INTERNAL_SERVER_ERROR

    return RequestFailure


def as_failure(error: DplaunchError) -> RequestError:
    """The error as vLLM passes it on; what is no request's own fault may be tried again."""
    failure = failure_class()(error.message, retryable=error.retryable if isinstance(error, RequestError) else True)
    failure.__cause__ = error
    return failure


def end_with(output_processor: Any, failed: Failed) -> list[str]:
    """Hands a request's error to its caller, who gets nothing more of it.

    Args:
        output_processor: AsyncLLM's.
        failed: the request, which vLLM may have forgotten meanwhile.

    Returns:
        What is to be aborted with it: where one of `n` answers fails, all do.
    """
    state = output_processor.request_states.get(failed.request_id)
    if state is None:
        return []
    names = [failed.request_id] if state.parent_req is None else sorted(state.parent_req.child_requests)
    forget(output_processor, names)
    state.queue.put(as_failure(failed.error))
    return [name for name in names if name != failed.request_id]


def forget(output_processor: Any, request_ids: Iterable[str]) -> None:
    """Takes requests out of vLLM's table."""
    output_processor.abort_requests(request_ids, internal=True)


def tell_when_to_retry(app: Any) -> None:
    """Has a FastAPI app tell its clients when to try again.

    Outside of what vLLM has put around the app: it has built that already, and takes no further middleware.
    """
    app.middleware_stack = RetryAfter(app.middleware_stack or app.build_middleware_stack())


class RetryAfter:
    """Adds Retry-After to every 503 of an ASGI app that does not say it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""

        async def say(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
                headers = message.setdefault("headers", [])
                if not any(name.lower() == b"retry-after" for name, _ in headers):
                    message["headers"] = [*headers, (b"retry-after", str(RETRY_AFTER_S).encode())]
            await send(message)

        await self._app(scope, receive, say)
