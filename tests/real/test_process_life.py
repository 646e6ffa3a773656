"""From any kind of Python process: launched, used, ended, and nothing is left of it or changed by it."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest

import dplaunch
from dplaunch.backend import load_backend
from dplaunch.group import open_group
from dplaunch.planner import plan_launch
from dplaunch.recipes import config_request
from dplaunch.seam.preload import exec_environment
from dplaunch.spec import LaunchSpec
from dplaunch.testing import Fault, StandInPlan
from tests.real.conftest import ENGINE_ARGS, SERVER_FLAGS, START_S
from tests.real.families import is_gone, socket_dirs
from tests.real.standins import run_python, standin_group, standin_spec

GREEDY = {"max_tokens": 8, "temperature": 0.0}
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]

TWICE = f"""
import json, os, sys, time
import psutil
import dplaunch
from vllm import SamplingParams
for turn in range(2):
    began = time.monotonic()
    with dplaunch.launch(model=sys.argv[1], dp=2, **{ENGINE_ARGS!r}) as group:
        seconds = time.monotonic() - began
        outputs = group.generate([{CAPITAL!r}] * 4, SamplingParams(**{GREEDY!r}))
        family = [process.pid for process in psutil.Process().children(recursive=True)]
    ranks = [process.pid for process in psutil.Process().children(recursive=True) if "_dp" in process.name()]
    texts = [output.outputs[0].text for output in outputs]
    print(json.dumps(dict(seconds=seconds, texts=texts, family=family, ranks=ranks, pid=os.getpid())), flush=True)
"""


def reports(output: str) -> list[dict[str, Any]]:
    """The JSON lines in a script's output."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_a_script_on_standard_input_without_a_guard_launches_twice_and_leaves_nothing(smollm: str) -> None:
    with run_python(TWICE, smollm, by_stdin=True) as command:
        assert command.end(START_S) == 0, command.output
        turns = reports(command.output)
    assert len(turns) == 2, command.output
    for turn in turns:
        assert len(turn["texts"]) == 4
        assert all("Paris" in text for text in turn["texts"])
        assert turn["ranks"] == []
    # The second one finds vLLM imported, here and in the zygote.
    assert turns[1]["seconds"] < turns[0]["seconds"]
    everyone = {pid for turn in turns for pid in turn["family"]}
    assert len(everyone) >= 5
    assert [pid for pid in everyone if psutil.pid_exists(pid) and not is_gone(psutil.Process(pid))] == []
    assert socket_dirs(turns[0]["pid"]) == set()


# The user's own processes come before, between and after; the group is not closed.
CARELESS = """
import json, multiprocessing, os, sys
from pathlib import Path
import psutil
import torch
from torch.utils.data import DataLoader, TensorDataset
from vllm import SamplingParams
from dplaunch.sync import Group
from tests.real.standins import standin_spec

def load():
    loader = DataLoader(TensorDataset(torch.arange(8)), num_workers=2)
    return sorted(int(number) for batch in loader for number in batch[0])

def answers():
    outputs = group.generate([[1, 2, 3]] * 8, SamplingParams(max_tokens=4, detokenize=False))
    return [len(output.outputs[0].token_ids) for output in outputs]

found = {"before": load(), "methods": [multiprocessing.get_start_method(allow_none=True)]}
group = Group(standin_spec(sys.argv[1], Path(sys.argv[2])), progress=False, listeners=[])
found["first"] = answers()
found["between"] = load()
found["second"] = answers()
found["after"] = load()
found["methods"].append(multiprocessing.get_start_method(allow_none=True))
found["family"] = [process.pid for process in psutil.Process().children(recursive=True)]
found["pid"] = os.getpid()
print(json.dumps(found), flush=True)
"""


def test_a_script_without_a_guard_keeps_its_own_workers_and_may_forget_to_close(smollm: str, tmp_path: Path) -> None:
    with run_python(CARELESS, smollm, str(tmp_path)) as command:
        assert command.end(START_S) == 0, command.output
        (found,) = reports(command.output)
    assert found["before"] == found["between"] == found["after"] == list(range(8))
    assert found["first"] == found["second"] == [4] * 8
    assert found["methods"][0] == found["methods"][1]
    assert [pid for pid in found["family"] if psutil.pid_exists(pid) and not is_gone(psutil.Process(pid))] == []
    assert socket_dirs(found["pid"]) == set()


def test_the_users_own_fork_server_is_neither_used_nor_disturbed(smollm: str, tmp_path: Path) -> None:
    server: Any = forkserver._forkserver

    def square(number: int) -> int:
        with multiprocessing.get_context("forkserver").Pool(1) as pool:
            return pool.apply(pow, (number, 2))

    try:
        assert square(3) == 9
        pid = server._forkserver_pid
        with standin_group(standin_spec(smollm, tmp_path)) as group:
            assert pid not in [psutil.Process(report["pid"]).ppid() for report in group.call("dplaunch_report")]
            assert square(4) == 16
        assert square(5) == 25
        assert server._forkserver_pid == pid
    finally:
        server._stop()


def test_a_spawned_rank_serves_as_forked_ones_do(smollm: str) -> None:
    from vllm import SamplingParams

    with dplaunch.launch(model=smollm, dp=1, start_method="spawn", name="spawned", **ENGINE_ARGS) as group:
        outputs = group.generate([CAPITAL] * 4, SamplingParams(**GREEDY))
        assert all("Paris" in output.outputs[0].text for output in outputs)
        ids = [report["instance_id"] for report in group.call("dplaunch_report")]
    assert ids == ["spawned"]


async def test_the_async_launch_leaves_a_running_loop_to_others(smollm: str, tmp_path: Path) -> None:
    from vllm import SamplingParams

    ticks: list[float] = []

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.05)

    ticking = asyncio.create_task(tick())
    # Long enough for others to have their turn, however quick the machine is.
    plan = StandInPlan(default=Fault(slow_start_s=1.0))
    group = await open_group(standin_spec(smollm, tmp_path, plan), progress=False, listeners=[])
    async with group:
        params = SamplingParams(max_tokens=4, detokenize=False)
        outputs = await group.generate([[1, 2, 3]] * 8, params)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [4] * 8
    ticking.cancel()
    assert len(ticks) > 10


async def test_the_sync_launch_works_inside_a_running_loop_too(smollm: str, tmp_path: Path) -> None:
    from vllm import SamplingParams

    with standin_group(standin_spec(smollm, tmp_path)) as group:
        (output,) = group.generate([1, 2, 3], SamplingParams(max_tokens=4, detokenize=False))
        assert len(output.outputs[0].token_ids) == 4
    # The loop that was running still is the one.
    assert asyncio.get_running_loop().is_running()


@pytest.mark.parametrize("turn", range(3))
def test_launched_again_and_again_a_group_is_quick(turn: int, smollm: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with standin_group(standin_spec(smollm, tmp_path, base_id=f"again{turn}")) as group:
        assert group.ranks_up == [0, 1]
        opened = time.monotonic() - began
    if turn:
        assert opened < 20.0
    assert [p for p in multiprocessing.active_children() if p.name.startswith("EngineCore")] == []


READ = """
import sys
from pathlib import Path
import cloudpickle
import dplaunch.serve
from dplaunch.seam.wire import Codec
result = cloudpickle.loads(Path(sys.argv[1]).read_bytes())
Codec()
print(result.max_num_seqs, [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "vllm")])
"""


async def test_what_a_start_reads_while_vllm_is_being_imported_imports_nothing_of_it(
    smollm: str, tmp_path: Path
) -> None:
    # Two threads that import the same package at once may see halves of modules.
    backend, spec = load_backend("mp"), LaunchSpec(model=smollm, vllm_argv=(*SERVER_FLAGS, "--max-num-seqs", "7"))
    plan = await plan_launch(spec, backend)
    await backend.open(spec, exec_environment(plan.ranks[0].env, plan.ranks[0].device_type))
    (tmp_path / "config").write_bytes(
        await backend.call("dplaunch.seam.config:make", config_request(plan, server=True))
    )
    await backend.close()
    with run_python(READ, str(tmp_path / "config")) as command:
        assert command.end() == 0, command.output
    assert command.lines == ["7 []"]
