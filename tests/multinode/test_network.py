"""The machines that the other tests stand on are what they claim to be, and go without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dplaunch.testing import poll_until
from tests.multinode.netns import ROOT, Network, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

PORT = 7077


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(2) as network:
        yield network


def output(network: Network, node: int, script: str) -> str:
    with network.run(node, ["sh", "-ec", script], stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert isinstance(out, str)
    return out.strip()


def reaches(network: Network) -> bool:
    """Whether node 1 can connect to a server on node 0."""
    connect = f"import socket; socket.create_connection(('machine0', {PORT}), timeout=1).close()"
    with network.run(1, [sys.executable, "-c", connect], stderr=subprocess.DEVNULL) as process:
        return process.wait(20) == 0


def serve(network: Network) -> subprocess.Popen[bytes]:
    """A server on node 0 that accepts; returns when it listens."""
    listen = f"import socket, sys; s = socket.create_server(('{network.address(0)}', {PORT})); print(1, flush=True)"
    process = network.run(0, [sys.executable, "-c", f"{listen}; sys.stdin.read()"], stdin=-1, stdout=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    return process


def test_nodes_have_their_own_addresses_names_and_process_ids(network: Network) -> None:
    for node in (0, 1):
        assert network.address(node) in output(network, node, "ip -brief address show eth0")
        assert output(network, node, "uname -n") == network.hostname(node)
        assert output(network, node, "ls -d /proc/[0-9]* | wc -l; ls -d /proc/1").split()[-1] == "/proc/1"
    assert network.address(0) != network.address(1)
    here = {Path("/proc/self/ns/pid").readlink(), Path("/proc/self/ns/net").readlink()}
    assert not here & {Path(output(network, 0, f"readlink /proc/self/ns/{kind}")) for kind in ("pid", "net")}


def test_a_node_reaches_another_until_its_cable_is_pulled(network: Network) -> None:
    with serve(network) as server:
        assert reaches(network)
        network.cut(1)
        assert not reaches(network)
        network.mend(1)
        assert reaches(network)
        server.communicate()


def test_the_own_directory_is_another_on_each_node_and_the_launchers_is_on_node_0_alone(network: Network) -> None:
    for node in (0, 1):
        output(network, node, f"echo {node} > {network.own}/mark")
    assert [output(network, node, f"cat {network.own}/mark") for node in (0, 1)] == ["0", "1"]
    (network.launcher_only / "mark").touch()
    assert output(network, 0, f"ls {network.launcher_only}") == "mark"
    assert output(network, 1, f"ls {network.launcher_only}; mkdir {network.launcher_only}/x 2>/dev/null || true") == ""
    assert not (network.launcher_only / "x").exists()


def test_a_killed_node_has_no_process_left_and_another_can_take_its_place(network: Network) -> None:
    with serve(network) as server:
        orphan = network.run(1, ["sh", "-c", "setsid sleep 600 & exec sleep 600"])
        poll_until(lambda: len(network.processes(1)) == 3, what="both sleeps")
        pids = [process.pid for process in network.processes(1)]
        network.kill(1)
        assert network.processes(1) == []
        assert not any(map(psutil.pid_exists, pids))
        assert orphan.returncode == -signal.SIGKILL
        network.replace(1)
        assert reaches(network)
        server.communicate()


def test_orphans_are_reaped_as_on_any_machine(network: Network) -> None:
    output(network, 1, "sh -c 'sleep 0.05 &'")
    poll_until(lambda: len(network.processes(1)) == 1, what="the orphan's end")


def test_nothing_is_left_after_the_end() -> None:
    with Network(2) as network:
        network.run(1, ["sleep", "600"])
        spaces = {os.readlink(f"/proc/{process.pid}/ns/net") for n in (0, 1) for process in network.processes(n)}
        directory = network.directory
    assert len(spaces) == 2
    assert not spaces & all_network_namespaces()
    assert not directory.exists()


def test_nothing_is_left_when_the_set_up_fails_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    before = all_network_namespaces()
    network = Network(2)
    monkeypatch.setattr(network, "address", lambda node: "10.77.0.1" if node == 0 else "no address")
    with pytest.raises(RuntimeError, match="no address"):
        network.__enter__()
    assert all_network_namespaces() == before
    assert not network.directory.exists()


def test_nodes_end_with_a_test_run_that_is_killed() -> None:
    script = """
import sys
from tests.multinode.netns import Network
with Network(1) as network:
    network.run(0, ["sleep", "600"])
    print(*(process.pid for process in network.processes(0)), network.directory, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) as run:
        assert run.stdout is not None
        *pids, directory = run.stdout.readline().split()
        assert len(pids) >= 1
        run.kill()
    poll_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids), what="the node's end")
    shutil.rmtree(directory)


def test_a_machine_that_cannot_have_nodes_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in why_not()
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "ip" else tool)
    assert "no ip " in why_not()


def all_network_namespaces() -> set[str]:
    """Those of all processes."""
    found = set()
    for pid in psutil.pids():
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
        except OSError:
            continue
    return found
