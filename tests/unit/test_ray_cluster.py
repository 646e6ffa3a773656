"""This process's connection to Ray: what is attached to, what is started, and whom that can be reached by."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("ray")

from dplaunch.backends import cluster as connection
from dplaunch.backends.cluster import LocalSize

from dplaunch.errors import BackendError, UsageError
from tests.ray_for_tests import RayForTests

# In a process of its own: this one is connected to the session's cluster.
ALONE = """
import os, sys
import psutil
from dplaunch.backends import cluster
before, hook = dict(os.environ), sys.excepthook
held = cluster.hold(None, cluster.LocalSize(2, 0))
again = cluster.hold(None, cluster.LocalSize(2, 0))
assert again is held
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
heard = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == "LISTEN"}
assert heard <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, heard
assert held.address == "127.0.0.1" and held.gcs_address.startswith("127.0.0.1:")
cluster.release(again)
assert cluster.is_connected()
cluster.release(held)
assert not cluster.is_connected()
assert psutil.Process().children(recursive=True) == []
assert dict(os.environ) == before and sys.excepthook is hook
print("well")
"""


def test_a_cluster_of_our_own_is_on_loopback_only_and_leaves_no_trace() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout == "well\n", done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_where_nothing_listens_is_refused_at_once(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "is_connected", lambda: False)
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(BackendError, match="no Ray cluster answers at") as caught:
        connection.hold(f"{host}:{port}", LocalSize(1, 0))
    assert str(port) in caught.value.message
    assert time.monotonic() - begun < 30


def test_a_process_has_one_ray(ray_cluster: RayForTests) -> None:
    held = connection.hold(None, LocalSize(1, 0))
    assert not held.ours
    assert held.gcs_address == ray_cluster.address
    connection.release(held)
    assert connection.is_connected()
    with pytest.raises(UsageError, match=r"not to 10\.255\.255\.1:6379"):
        connection.hold("10.255.255.1:6379", LocalSize(1, 0))


def test_ray_client_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match="Ray Client") as caught:
        connection.wanted_address("ray://head:10001")
    assert "ray job submit" in caught.value.hint
