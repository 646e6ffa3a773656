"""Clusters that only their own machine can reach. Ray would give them its outer address."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from dplaunch.errors import BackendError

LOOPBACK = "127.0.0.1"

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Set to 0, Ray keeps to the loopback address, as it does by default where it supports one machine only."""

CONNECT_TIMEOUT_S = 10.0
"""Seconds for a cluster's address to answer at all; Ray itself would try for minutes."""


def is_on_loopback(address: str) -> bool:
    """Whether a cluster can be reached at the loopback address only.

    Raises:
        BackendError: when none answers there at all; Ray itself would try for minutes.
    """
    from ray._private import services

    reached = services.canonicalize_bootstrap_address(address)
    if reached is None:
        return False  # Ray looks further, and says what it found.
    refused = _knock(reached)
    if refused is None:
        return False
    host, _, port = address.rpartition(":")
    if services.is_localhost(host or address) and _knock(f"{LOOPBACK}:{port}") is None:
        return True
    raise BackendError(
        f"no Ray cluster answers at {reached}: {refused}",
        hint="See `ray status` on its head for the address, or leave --ray-address out to start one here.",
    )


def _knock(address: str) -> str | None:
    """What hinders a connection; None for nothing."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Has Ray take 127.0.0.1 for this node's address, and its processes too: it puts the outer one in its place
    otherwise, and whoever reaches that can run code in the cluster."""
    from ray._private import ray_constants

    before, in_environ = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(LOOPBACK_VARIABLE)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[LOOPBACK_VARIABLE] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if in_environ is None:
            os.environ.pop(LOOPBACK_VARIABLE, None)
        else:
            os.environ[LOOPBACK_VARIABLE] = in_environ
