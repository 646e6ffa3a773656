"""Inside a trainer: started by torchrun, beside its threads, and again and again in one process."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from dplaunch.testing import expected_tokens, poll_until
from tests.chaos.launches import Held, growth, launches
from tests.real.conftest import START_S
from tests.real.standins import run_python, standin_group, standin_spec

SHORT_LIVES = 7
"""Launches in one process; a hundred in `make soak`."""

# Two trainers that share a process group: first one of them has a group of two ranks, then each has a group of its own.
TRAINERS = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from vllm import SamplingParams
from dplaunch.sync import Group
from tests.real.standins import standin_spec

dist.init_process_group("gloo")
rank = dist.get_rank()

def summed():
    ones = torch.ones(3)
    dist.all_reduce(ones)
    return int(ones[0])

def ask(name, **options):
    spec = standin_spec(sys.argv[1], Path(sys.argv[2]) / name, base_id=name, **options)
    with Group(spec, progress=False, listeners=[]) as group:
        outputs = group.generate([[1, 2, 3]] * 8, SamplingParams(max_tokens=4, detokenize=False))
        reports = group.call("dplaunch_report")
    return {
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "ids": [report["instance_id"] for report in reports],
        "cpus": [report["cpus"] for report in reports],
        "env": [report["env"] for report in reports],
    }

before = dict(os.environ)
found = {"rank": rank, "before": summed()}
if rank == 0:
    found["shared"] = ask("shared")
found["between"] = summed()
cores = sorted(os.sched_getaffinity(0))
found["own"] = ask(f"own{rank}", dp=1, devices=((str(cores[rank % len(cores)]),),))
found["after"] = summed()
found["environ"] = before == dict(os.environ)
found["place"] = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
dist.destroy_process_group()
sys.stdout.write("\\n" + json.dumps(found) + "\\n")
"""

TORCHRUN = (
    *("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"),
    *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
)


@pytest.fixture(scope="module")
def trainers(smollm: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two trainers found."""
    with run_python(TRAINERS, smollm, str(tmp_path_factory.mktemp("torchrun")), launcher=TORCHRUN) as command:
        assert command.end(START_S) == 0, command.output
        found = [json.loads(line) for line in command.lines if line.startswith("{")]
    assert sorted(each["rank"] for each in found) == [0, 1], command.output
    return sorted(found, key=lambda each: int(each["rank"]))


def test_under_torchrun_the_first_trainer_has_a_group_and_the_others_wait_for_it(
    trainers: list[dict[str, Any]],
) -> None:
    shared = trainers[0]["shared"]
    assert shared["answers"] == [expected_tokens([1, 2, 3], 4)] * 8
    assert shared["ids"] == ["shared_dp0", "shared_dp1"]
    assert [(each["before"], each["between"], each["after"]) for each in trainers] == [(2, 2, 2)] * 2


def test_under_torchrun_each_trainer_has_a_group_of_its_own_on_its_own_cores(trainers: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(trainers):
        assert each["own"]["answers"] == [expected_tokens([1, 2, 3], 4)] * 8
        assert each["own"]["ids"] == [f"own{rank}"]
    if len(os.sched_getaffinity(0)) >= 2:
        first, second = (set(each["own"]["cpus"][0]) for each in trainers)
        assert len(first) == len(second) == 1
        assert first != second


def test_a_trainers_place_does_not_reach_its_ranks_and_stays_its_own(trainers: list[dict[str, Any]]) -> None:
    for each in trainers:
        assert each["environ"]
        for env in (*each["own"]["env"], *each.get("shared", {"env": []})["env"]):
            assert [name for name in env if name in each["place"] or name.startswith("TORCHELASTIC_")] == []
    # torchrun gives each trainer one thread; what a rank gets is the plan's to say.
    cpus = trainers[0]["shared"]["cpus"]
    assert [env["OMP_NUM_THREADS"] for env in trainers[0]["shared"]["env"]] == [str(len(each)) for each in cpus]


def test_a_process_that_trains_in_threads_goes_on_with_it_while_a_group_starts_and_serves(
    smollm: str, tmp_path: Path
) -> None:
    import torch
    from vllm import SamplingParams

    threads, losses, over = torch.get_num_threads(), list[float](), threading.Event()

    def train() -> None:
        chance = torch.Generator().manual_seed(0)
        inputs = torch.randn(512, 64, generator=chance)
        target = inputs @ torch.randn(64, 1, generator=chance)
        model = torch.nn.Linear(64, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        while not over.wait(0.01):
            loss = torch.nn.functional.mse_loss(model(inputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        poll_until(lambda: len(losses) > 3, 30, "the first steps")
        with standin_group(standin_spec(smollm, tmp_path)) as group:
            started = len(losses)
            (output,) = group.generate([1, 2, 3], SamplingParams(max_tokens=4, detokenize=False))
            assert list(output.outputs[0].token_ids) == expected_tokens([1, 2, 3], 4)
            poll_until(lambda: len(losses) > started + 3, 30, "steps beside the group")
    finally:
        over.set()
        trainer.join()
    assert losses[-1] < losses[0]
    assert torch.get_num_threads() == threads


def test_launched_and_closed_in_one_process_nothing_grows(smollm: str, tmp_path: Path) -> None:
    first, last = launches(SHORT_LIVES, smollm, tmp_path)
    assert growth(first, last, SHORT_LIVES) == []


def test_what_grows_is_named() -> None:
    first = Held(fds=10, threads=2, children=1, shm=0, rss=100 << 20)
    assert growth(first, Held(fds=11, threads=2, children=1, shm=0, rss=110 << 20), 3) == ["fds: 10, then 11"]
    assert growth(first, Held(fds=9, threads=3, children=1, shm=0, rss=150 << 20), 3) == [
        "threads: 2, then 3",
        "memory: 100 MB, then 150 MB",
    ]
