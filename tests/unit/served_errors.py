"""What vLLM's server makes of an error, in any version of the window."""

from __future__ import annotations

from typing import Any


def create_error_response(error: Exception) -> Any:
    """vLLM's ErrorResponse."""
    try:
        from vllm.entrypoints.serve.exception_handling import error_response
    except ModuleNotFoundError:
        from vllm.entrypoints.serve.utils import error_response  # up to 0.27
    return error_response.create_error_response(error)
