"""This process's connection to a Ray cluster: its own, one that it attached to, or the user's.

A process has one connection at most, so its groups share it. One that was made here is given up by its last
holder; one that the user made stays as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dplaunch.errors import BackendError, DplaunchError, UsageError
from dplaunch.runtime_dir import make_runtime_dir

from .loopback import LOOPBACK, is_on_loopback, on_loopback

NAMESPACE = "dplaunch"
"""The Ray namespace of our actors; their names are unique in a whole cluster."""

OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory of a cluster that we start, bytes: what we send through it is small."""

ADDRESS_VARIABLE = "RAY_ADDRESS"
AUTH_VARIABLE = "RAY_AUTH_MODE"

_NOISY = "ray._private.worker", "ray._private.authentication.authentication_token_setup"


@dataclass(frozen=True, slots=True)
class LocalSize:
    """What a cluster that is started for us has: CPUs and GPUs of this machine."""

    cpus: int
    gpus: int


class Cluster:
    """A connection; thread-safe. Made by `hold` only.

    Attributes:
        gcs_address: "host:port" of the cluster's head, for other processes to attach to.
        node_id: Ray's id of the launcher's own node.
        address: the launcher's own address as other nodes reach it.
    """

    def __init__(self, ours: bool) -> None:
        import ray

        context = ray.get_runtime_context()
        self.ours = ours
        self.gcs_address: str = context.gcs_address
        self.node_id: str = context.get_node_id()
        self.address: str = ray.util.get_node_ip_address()


def wanted_address(address: str | None) -> str | None:
    """The address to attach to: as asked for, or as in `RAY_ADDRESS`; None for none.

    Raises:
        UsageError: for Ray Client, which knows no node of the launcher's own.
    """
    found = address or os.environ.get(ADDRESS_VARIABLE) or None
    if found is not None and found.startswith("ray://"):
        raise UsageError(
            f"the launcher cannot be a Ray Client ({found}): ranks talk to it directly",
            hint="Run it on a machine of the cluster with --ray-address auto, for example through ray job submit.",
        )
    return None if found == "local" else found


def is_connected() -> bool:
    """Whether this process is connected to a Ray cluster already; does not import Ray for that."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def hold(address: str | None, local: LocalSize) -> Cluster:
    """Connects, unless this process is connected. Blocks for seconds; call `release` once for each `hold`.

    Args:
        address: what to attach to; None to start a cluster on this machine.
        local: the size of that.

    Raises:
        BackendError: when there is no such cluster, or none can be started.
        UsageError: when the process is connected to another cluster.
    """
    global _connection
    with _lock:
        if _connection is None and not is_connected():
            _connection = _Connection(address, local)
        if _connection is None:
            cluster = Cluster(ours=False)
            _check_same(address, cluster)
            return cluster
        try:
            cluster = _connection.up.result()
        except BaseException:
            _connection = None
            raise
        if _connection.holders:
            _check_same(address, cluster)
        _connection.holders += 1
        return cluster


def release(cluster: Cluster) -> None:
    """Undoes one `hold`; the last one disconnects, and ends a cluster that was started here. Blocks for a second."""
    global _connection
    with _lock:
        if not cluster.ours or _connection is None:
            return
        _connection.holders -= 1
        if _connection.holders == 0:
            _connection.end()
            _connection = None


def _check_same(address: str | None, cluster: Cluster) -> None:
    if address is None or address == "auto" or address == cluster.gcs_address:
        return
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        if f"{socket.gethostbyname(host)}:{port}" == cluster.gcs_address:
            return
    raise UsageError(
        f"this process is connected to the Ray cluster at {cluster.gcs_address}, not to {address}",
        hint="A process has one Ray: leave ray_address out, or call ray.shutdown() first.",
    )


class _Connection:
    """A connection that is ours, in a thread of its own: a local cluster's processes end with the thread that made
    them (the kernel's parent-death signal), so it has to live as long as they."""

    def __init__(self, address: str | None, local: LocalSize) -> None:
        self.holders = 0
        self.up: Future[Cluster] = Future()
        self._address = address
        self._local = local
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dplaunch-ray", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Disconnects."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with _unset_again(AUTH_VARIABLE, "RAY_CLIENT_MODE", "RAY_USAGE_STATS_ENABLED"):
            self._live()

    def _live(self) -> None:
        directory: Path | None = None
        try:
            if self._address is None:
                directory = make_runtime_dir()
            try:
                self.up.set_result(self._connect(directory))
            except BaseException as error:
                self.up.set_exception(error)
                return
            self._ended.wait()
            with _quiet():
                import_ray().shutdown()
        finally:
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)

    def _connect(self, directory: Path | None) -> Cluster:
        ray = import_ray()
        options: dict[str, Any] = {"namespace": NAMESPACE, "configure_logging": False, "log_to_driver": False}
        if directory is None:
            options |= {"address": self._address}
            loopback = self._is_on_loopback()
        else:
            options |= {
                "address": "local",
                "include_dashboard": False,
                "num_cpus": self._local.cpus,
                "num_gpus": self._local.gpus,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_node_ip_address": LOOPBACK,
                "_temp_dir": str(directory),
            }
            loopback = True
        with _quiet(), on_loopback() if loopback else contextlib.nullcontext():
            try:
                # Or breakpoint() would lead into Ray's debugger.
                with _unset_again("PYTHONBREAKPOINT"):
                    ray.init(**options)
            except Exception as error:
                raise _connect_error(self._address, error) from error
            return Cluster(ours=True)

    def _is_on_loopback(self) -> bool:
        address = self._address or "auto"
        try:
            return is_on_loopback(address)
        except DplaunchError:
            raise
        except Exception as error:
            raise _connect_error(address, error) from error


def import_ray() -> Any:
    """Ray; the process's exception hook stays what it was."""
    hook = sys.excepthook
    import ray

    sys.excepthook = hook
    return ray


def _connect_error(address: str | None, error: Exception) -> BackendError:
    said = " ".join(str(error).split()) or type(error).__name__
    if address is None:
        return BackendError(f"Ray could not be started on this machine: {said}", hint="Try `ray start --head` by hand.")
    return BackendError(
        f"could not attach to the Ray cluster {address}: {said}",
        hint="Check it with `ray status`; leave --ray-address out to start one here.",
    )


@contextlib.contextmanager
def _unset_again(*names: str) -> Iterator[None]:
    """Takes out of the process's environment at the end what Ray has put in."""
    missing = [name for name in names if name not in os.environ]
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's remarks about running outside the main thread, which is on purpose."""

    def drop(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    loggers = [logging.getLogger(name) for name in _NOISY]
    for logger in loggers:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)


_lock = threading.Lock()
_connection: _Connection | None = None
