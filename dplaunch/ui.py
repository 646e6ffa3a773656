"""What the command shows and where it listens: beside the launch itself, which `LaunchSpec` says."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_HOST = "127.0.0.1"
"""Loopback: an endpoint without a key is not for the network unless asked."""

DEFAULT_PORT = 8000
"""vLLM's own default port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UiOptions:
    """How `dplaunch serve` listens and talks.

    Args:
        host: the HTTP address to bind.
        port: the HTTP port; 0 for a free one, which is then printed.
        tee: whether the ranks' output is shown too, each line with its rank in front.
        quiet: whether only the address, warnings and errors are shown.
        json_logs: whether events are written as one JSON object a line.
        server_argv: vLLM flags as typed, for vLLM's own server parser.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    tee: bool = False
    quiet: bool = False
    json_logs: bool = False
    server_argv: tuple[str, ...] = ()
