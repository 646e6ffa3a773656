"""What is asked of a cluster's nodes, and of this process, before anything is started."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from dplaunch.backends import probe
from dplaunch.backends.ray import RayBackend
from dplaunch.backends.whereabouts import whereabouts

from dplaunch import seam
from dplaunch._version import __version__
from dplaunch.errors import BackendError, ExitCode
from tests.ray_for_tests import RayForTests

ROOT = Path(__file__).parents[2]


def answer(**altered: Any) -> dict[str, Any]:
    """What a node says that has all that it must have, but for what is altered."""
    good: dict[str, Any] = {
        "python": platform.python_version(),
        "dplaunch": __version__,
        "vllm": seam.installed_version(),
        "missing": [],
    }
    return {**good, **altered}


def test_a_node_like_this_one_is_taken() -> None:
    probe._check("10.0.0.7", answer())


@pytest.mark.parametrize(
    ("altered", "words", "hint"),
    [
        ({"dplaunch": "0.0.1"}, "node 10.0.0.7 has dplaunch 0.0.1, this machine has", "--nodes"),
        ({"vllm": "0.1"}, "node 10.0.0.7 has vLLM 0.1, this machine has", "Install the same"),
        ({"python": "3.9.1"}, "node 10.0.0.7 has Python 3.9.1, this machine has", "Install the same"),
        ({"vllm": None}, "node 10.0.0.7 has no vLLM, this machine has", "Install the same"),
        (
            {"dplaunch": None, "vllm": None, "error": "No module named 'zmq'"},
            "node 10.0.0.7 has no dplaunch (No module named 'zmq'), this machine has",
            "Install the same",
        ),
        ({"missing": ["/models/m"]}, "node 10.0.0.7 does not have /models/m", "hub name"),
    ],
)
def test_what_a_node_lacks_is_told_with_its_name_and_both_versions(
    altered: dict[str, Any], words: str, hint: str
) -> None:
    with pytest.raises(BackendError) as caught:
        probe._check("10.0.0.7", answer(**altered))
    assert caught.value.message.startswith(words)
    assert hint in caught.value.hint


PROBED = """
import json, pickle, sys
if sys.argv[2] == "without":
    sys.modules["dplaunch"] = None
with open(sys.argv[1], "rb") as file:
    probe = pickle.load(file)
print(json.dumps(probe(["/", "/there/is/no/such/path"], ["PATH", "NOT_SET_ANYWHERE"])))
"""


@pytest.mark.parametrize("there", [True, False])
def test_the_probe_travels_by_value_and_runs_where_there_is_no_dplaunch(there: bool, tmp_path: Path) -> None:
    (tmp_path / "probe").write_bytes(cloudpickle.dumps(probe.make_probe()))
    done = subprocess.run(
        [sys.executable, "-c", PROBED, str(tmp_path / "probe"), "with" if there else "without"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    said = json.loads(done.stdout)
    assert said["python"] == platform.python_version()
    assert said["missing"] == ["/there/is/no/such/path"]
    assert list(said["env"]) == ["PATH"]
    if there:
        assert (said["dplaunch"], said["vllm"]) == (__version__, seam.installed_version())
        assert said["where"] == whereabouts()
        assert said["node"]["cores"]
    else:
        assert said["dplaunch"] is None
        with pytest.raises(BackendError, match=r"node n has no dplaunch \(.*dplaunch"):
            probe._check("n", said)


def test_without_ray_the_backend_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else find(name, *more))
    with pytest.raises(BackendError, match="Ray is not installed") as caught:
        RayBackend()
    assert caught.value.hint == "pip install 'dplaunch[ray]'"
    assert caught.value.exit_code == ExitCode.BACKEND


TWICE = """
import sys
from dplaunch.backends import cluster
from dplaunch.errors import UsageError
address = sys.argv[1]
first = cluster.hold(address, cluster.LocalSize(1, 0))
second = cluster.hold(None, cluster.LocalSize(1, 0))
assert first is second or first.node_id == second.node_id
assert first.gcs_address == address
try:
    cluster.hold("127.0.0.1:1", cluster.LocalSize(1, 0))
except UsageError as error:
    print("refused:", error.message)
cluster.release(first)
assert cluster.is_connected(), "the other group still uses it"
cluster.release(second)
assert not cluster.is_connected(), "the last one disconnects"
import os
print("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE"))
"""


def test_two_groups_of_a_process_share_its_connection_and_the_last_one_gives_it_up(ray_cluster: RayForTests) -> None:
    import ray

    done = subprocess.run(
        [sys.executable, "-c", TWICE, ray_cluster.address], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"refused: this process is connected to the Ray cluster at {ray_cluster.address}" in done.stdout
    assert any(node["Alive"] for node in ray.nodes()), "what was attached to goes on"
