"""dplaunch over several machines: what reaches them, what comes back, and what happens when one is lost."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dplaunch.testing import poll_until
from tests.contract.groups import BASE_ID, tiny_model
from tests.multinode.cluster import LOSS_S, Cluster
from tests.multinode.dialogue import AskedError, Dialogue
from tests.multinode.driver import RETRYABLE, SAME
from tests.multinode.ray_cluster import RayCluster
from tests.real.conftest import ENGINE_ARGS

pytest.importorskip("ray")

LAUNCH_S = 180.0
"""Seconds for a launch while other tests run: each node imports vLLM, on two cores."""


def program(cluster: Cluster) -> Iterator[Dialogue]:
    """A user's program on node 0, for many launches: it imports vLLM once."""
    argv = [sys.executable, "-m", "tests.multinode.driver"]
    driver = cluster.converse(0, argv, cluster.directory / "driver.log")
    cluster.programs.append(driver)
    with driver:
        yield driver
    cluster.programs.remove(driver)


@pytest.fixture(scope="module")
def driver2(two_nodes: Cluster) -> Iterator[Dialogue]:
    yield from program(two_nodes)


@pytest.fixture(scope="module")
def driver3(three_nodes: Cluster) -> Iterator[Dialogue]:
    yield from program(three_nodes)


def launch(driver: Dialogue, cluster: Cluster, dp: int, standin: Any = None, **options: Any) -> list[dict[str, Any]]:
    asked = {"directory": str(cluster.directory), "dp": dp, "standin": standin or {}, "start_timeout_s": LAUNCH_S}
    ranks: list[dict[str, Any]] = driver.ask("launch", timeout_s=LAUNCH_S, **asked, **options)
    return ranks


def node_of_process(cluster: RayCluster, title: str) -> tuple[int, int]:
    """On which node the one process of that title is, and which pid it has there."""
    found = []
    for node in range(cluster.size):
        for process in cluster.network.processes(node):
            if title in process.cmdline():
                found.append((node, pid_inside(process)))
    (place,) = found
    return place


def pid_inside(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("NSpid:"))
    return int(line.split()[-1])


def await_event(driver: Dialogue, words: str, timeout_s: float = LOSS_S) -> dict[str, Any]:
    """The first event whose message has these words."""
    events: list[dict[str, Any]] = []

    def found() -> list[dict[str, Any]]:
        events[:] = driver.ask("events")
        return [event for event in events if words in event["message"]]

    try:
        return poll_until(found, timeout_s, f"an event with {words!r}")[0]
    except TimeoutError as error:
        said = "\n".join(event["message"] for event in events if event["level"] != "info")
        raise TimeoutError(f"{error}; there were:\n{said}") from None


def test_the_plan_names_the_node_of_each_rank_and_starts_nothing(cluster3: Cluster) -> None:
    model = tiny_model(cluster3.directory / "model")
    argv = [sys.executable, "-m", "dplaunch", "plan", "--backend", "ray", "--dp", "4", "--model", str(model)]
    with cluster3.run(0, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as plan:
        out, errors = plan.communicate(timeout=60)
    assert plan.returncode == 0, errors
    rows = [line.split() for line in out.splitlines() if "_dp" in line]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert {row[1] for row in rows} == {cluster3.name(node) for node in range(3)}
    assert cluster3.left() == []


def test_ranks_run_on_the_nodes_that_the_plan_names(machines: RayCluster, driver3: Dialogue) -> None:
    log_dir = Path(tempfile.mkdtemp(dir=machines.network.launcher_only)) / "logs"
    noisy = {"default": {"stderr_bytes": 300}}
    ranks = launch(driver3, machines, 4, noisy, env={"MULTINODE_MARK": "set"}, log_dir=str(log_dir))
    try:
        assert [rank["node"] for rank in ranks] == [rank["planned"] for rank in ranks]
        assert {rank["node"] for rank in ranks} == {machines.name(node) for node in range(3)}
        for rank in ranks:
            assert rank["instance_id"] == f"{BASE_ID}_dp{rank['rank']}"
            node, pid = node_of_process(machines, f"dplaunch::{rank['instance_id']}")
            assert (machines.name(node), pid) == (rank["node"], rank["pid"])
        check_environments(ranks, machines)
        assert driver3.ask("answers", count=200, tokens=12) == {SAME: 200}
        for number in range(4):
            assert driver3.ask("answers", count=3, tokens=5, rank=number) == {SAME: 3}
        check_logs(log_dir)
    finally:
        driver3.ask("close")


def check_environments(ranks: list[dict[str, Any]], cluster: RayCluster) -> None:
    for rank in ranks:
        assert rank["env"]["MULTINODE_MARK"] == "set"
        assert rank["env"]["PATH"]
        assert "RAY_ADDRESS" in rank["env"] or rank["env"]["TMPDIR"] == str(cluster.network.own)


def check_logs(log_dir: Path) -> None:
    """Each rank's lines are in the launcher's file, though no other node can see that directory."""

    def noise(rank: int) -> list[str]:
        lines = (log_dir / f"rank{rank}.log").read_text().splitlines()
        return [line for line in lines if line.startswith("xxxx")]

    # They come by themselves, beside the answers.
    poll_until(lambda: all(len(noise(rank)) >= 3 for rank in range(4)), what="the lines of all ranks")
    assert [len(noise(rank)) for rank in range(4)] == [3] * 4


def test_a_lost_node_is_named_and_the_others_serve_on(machines: RayCluster, driver3: Dialogue) -> None:
    ranks = launch(driver3, machines, 4, {"token_delay_s": 0.01})
    lost = [rank["rank"] for rank in ranks if rank["node"] == machines.name(1)]
    left = [rank["rank"] for rank in ranks if rank["rank"] not in lost]
    try:
        driver3.ask("begin_load", tokens=20)
        poll_until(lambda: driver3.ask("load").get(SAME, 0) >= 16, what="the load")
        machines.lose(1)
        event = await_event(driver3, f"node {machines.name(1)} was lost")
        assert (event["rank"], event["state"]) == (lost[0], "down")
        served = driver3.ask("load")[SAME]
        poll_until(lambda: driver3.ask("load")[SAME] >= served + 32, what="further answers")
        outcomes = driver3.ask("end_load")
        assert set(outcomes) <= {SAME, RETRYABLE}
        for number in left:
            assert driver3.ask("answers", count=3, tokens=5, rank=number) == {SAME: 3}
        down = {event["rank"] for event in driver3.ask("events") if event["state"] == "down"}
        assert down == set(lost)
    finally:
        driver3.ask("close")


def test_a_rank_of_a_node_off_the_network_starts_again_where_there_is_room(
    machines: RayCluster, driver3: Dialogue
) -> None:
    ranks = launch(driver3, machines, 2)
    names = [machines.name(node) for node in range(3)]
    (moved,) = (rank for rank in ranks if rank["node"] != names[0])
    (spare,) = set(names) - {rank["node"] for rank in ranks}
    place = names.index(moved["node"])
    try:
        machines.cut(place)
        await_event(driver3, f"node {moved['node']} was lost")
        await_event(driver3, f"rank {moved['rank']} is back", LAUNCH_S)
        now = driver3.ask("ranks")[moved["rank"]]
        assert now["node"] == spare
        # Ray may take the lost node for alive at first, and the restart policy has more than one try.
        assert now["instance_id"] in {f"{BASE_ID}-r{again}_dp{moved['rank']}" for again in (1, 2, 3)}
        assert driver3.ask("answers", count=5, tokens=5, rank=moved["rank"]) == {SAME: 5}
    finally:
        driver3.ask("close")
        # Cut off, it goes on for as long as Ray there hopes for its head.
        machines.lose(place)


def test_ranks_of_a_frozen_node_are_replaced_and_nothing_is_lost(machines: RayCluster, driver3: Dialogue) -> None:
    probe = {"interval_s": 0.5, "timeout_s": 3.0}
    ranks = launch(driver3, machines, 2, {"token_delay_s": 0.02}, probe=probe)
    names = [machines.name(node) for node in range(3)]
    (frozen,) = (rank for rank in ranks if rank["node"] != names[0])
    place = names.index(frozen["node"])
    try:
        driver3.ask("begin_load", tokens=40)
        poll_until(lambda: driver3.ask("load").get(SAME, 0) >= 16, what="the load")
        for process in machines.network.processes(place):
            process.suspend()
        machines.lost.add(place)
        await_event(driver3, f"rank {frozen['rank']} is back", LAUNCH_S)
        served = driver3.ask("load")[SAME]
        poll_until(lambda: driver3.ask("load")[SAME] >= served + 32, LAUNCH_S, "further answers")
        assert set(driver3.ask("end_load")) == {SAME}
        assert driver3.ask("ranks")[frozen["rank"]]["node"] != frozen["node"]
    finally:
        driver3.ask("close")
        machines.lose(place)


def test_a_model_that_a_node_does_not_have_is_refused_before_anything_loads(
    machines: RayCluster, driver3: Dialogue
) -> None:
    only_here = str(machines.network.launcher_only)
    with pytest.raises(AskedError) as refused:
        driver3.ask("launch", timeout_s=LAUNCH_S, directory=only_here, dp=4, standin={})
    assert refused.value.kind == "BackendError"
    others = "|".join(re.escape(machines.name(node)) for node in (1, 2))
    assert re.match(f"node ({others}) does not have {only_here}/model", refused.value.text)
    assert driver3.ask("events") == []


@pytest.mark.real
def test_real_ranks_on_two_nodes_answer(cluster2: Cluster, driver2: Dialogue, smollm: str) -> None:
    log_dir = str(cluster2.directory / "real-logs")
    ranks = driver2.ask("launch_real", timeout_s=LAUNCH_S, model=smollm, log_dir=log_dir, dp=2, **ENGINE_ARGS)
    try:
        assert {rank["node"] for rank in ranks} == {cluster2.name(0), cluster2.name(1)}
        answers = driver2.ask("chat", text="What is the capital of France?")
        assert len(answers) == 2
        assert all("Paris" in answer for answer in answers)
    finally:
        driver2.ask("close")


def test_four_ranks_share_two_nodes(cluster2: Cluster, driver2: Dialogue) -> None:
    ranks = launch(driver2, cluster2, 4)
    try:
        assert sorted(rank["node"] for rank in ranks) == sorted([cluster2.name(0), cluster2.name(1)] * 2)
        assert [rank["instance_id"] for rank in ranks] == [f"{BASE_ID}_dp{number}" for number in range(4)]
        assert driver2.ask("answers", count=50, tokens=10) == {SAME: 50}
        # Each node that is a machine of its own gets new weights once, whatever ranks it has.
        done = driver2.ask("update_weights", seed=3)
        assert (done["ranks"], done["same"]) == ([0, 1, 2, 3], True)
        assert sum(done["taken"]) == (1 if isinstance(cluster2, RayCluster) else 0)
        (far,) = {rank["rank"] for rank in ranks if done["taken"][rank["rank"]]} or {None}
        assert far is None or ranks[far]["node"] == cluster2.name(1)
    finally:
        driver2.ask("close")


def test_a_death_at_start_on_an_allowed_node_is_told_with_its_last_lines(cluster2: Cluster, driver2: Dialogue) -> None:
    log_dir = cluster2.directory / "death-logs"
    death = {"faults": [{"rank": 1, "when": "before READY", "returncode": 3}]}
    with pytest.raises(AskedError) as failed:
        launch(driver2, cluster2, 2, death, nodes=[cluster2.name(1)], log_dir=str(log_dir))
    assert failed.value.kind == "RankFailedError"
    for words in ("rank 1", "exit code 3", "stand-in engine ends on purpose: 3", str(log_dir / "rank1.log")):
        assert words in failed.value.text
    waits = [event["message"] for event in driver2.ask("events") if "waits for" in event["message"]]
    assert len(waits) == 2
    # Nodes of one host are told apart only where several of them may be used.
    address = cluster2.name(1).partition("/")[0]
    assert all(f"goes to node {address}" in message for message in waits)
