"""The first call on a machine: is all there, does it run, is it right (`python -m benchmarks.gpu.first`).

Versions and devices; stock vLLM's greedy answers; then one group in a process that has used CUDA before: the devices of
its ranks, answers, sleep, new weights, a rank's death, and what is left on the devices.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

import dplaunch
from benchmarks.gpu import devices, looks
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.steps import Script, Step
from benchmarks.servers import dplaunch_server
from dplaunch.testing import poll_until

STOCK_FILE = "stock-answers.json"

MIB = 2**20

FREED = 2**30
"""Bytes that a sleeping rank gives back at least; its KV cache has dozens of GiB."""


def unpacked(setup: Setup, notes: Notes) -> None:
    """Whether what is needed can be imported, and what the machine is."""
    for name in ("torch", "vllm", "ray", "transformers"):
        module: Any = __import__(name)
        notes.check(f"{name} is there", True, module.__version__)
    import torch

    notes.check("torch sees as many devices as the driver", torch.cuda.device_count() == setup.devices)
    for index, uuid in enumerate(devices.uuids()):
        notes.check(f"device {index}", True, f"{torch.cuda.get_device_properties(index).name} {uuid}")
    for command in (["doctor"], ["plan", "--dp", str(setup.dp), "--model", str(setup.with_weights().model)]):
        done = subprocess.run([sys.executable, "-m", "dplaunch", *command], stdin=subprocess.DEVNULL)
        notes.check(f"dplaunch {command[0]} ends with 0", done.returncode == 0, done.returncode)


def stock(setup: Setup, notes: Notes) -> None:
    """Stock vLLM's answers on one device, for `group` to compare with."""
    settings = setup.with_weights(dp=1)
    with looks.timed(notes.value, "stock LLM: answered after"):
        answers = looks.stock_answers(_without_extension(settings.engine_args), str(settings.model))
    Path(setup.directory, STOCK_FILE).write_text(json.dumps(answers))


def _without_extension(args: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name != "worker_extension_cls"}


def group(setup: Setup, notes: Notes) -> None:
    """One group from launch to close; the order is that of what each part needs."""
    settings = setup.with_weights(gpu_memory_utilization=0.1 if setup.cpu else 0.5, enable_sleep_mode=not setup.cpu)
    module = looks.trainer(str(settings.model), "cpu" if setup.cpu else "cuda:0")
    if not setup.cpu:
        notes.check("this process has used CUDA before", devices.has_cuda(os.getpid()))
    called = time.monotonic()
    with dplaunch.launch(model=str(settings.model), dp=settings.dp, **settings.engine_args) as ranks:
        notes.value("dplaunch.launch: ready after", time.monotonic() - called)
        pids = looks.worker_pids(ranks)
        if not setup.cpu:
            notes.attempt("each rank has its own device", lambda: _own_devices(ranks, notes))
            notes.attempt("the zygote", lambda: _zygote(notes))
        notes.attempt("answers", lambda: _same_as_stock(setup, ranks, notes))
        # Their order matters: a sleep of level 2 needs weights that can be had again.
        notes.attempt("sleep 1", lambda: _sleep(ranks, notes, 1))
        notes.attempt("new weights", lambda: _new_weights(ranks, module, notes))
        notes.attempt("sleep 2", lambda: _sleep(ranks, notes, 2))
        notes.attempt("a death", lambda: _death(ranks, notes))
        notes.attempt("weights from disk", lambda: _from_disk(setup, ranks, module, notes))
        pids += looks.worker_pids(ranks)
        closing = time.monotonic()
    notes.value("close took", time.monotonic() - closing)
    seconds, left = devices.wait_until_free(pids)
    notes.check("after close no rank holds device memory", not left, left or f"after {seconds:.1f} s")


def _own_devices(ranks: dplaunch.Group, notes: Notes) -> None:
    inside = [[worker["uuid"] for worker in workers] for workers in looks.facts(ranks)]
    notes.check("each rank is on a device of its own, by UUID from inside", _distinct(inside), inside)
    known = {str(index): devices.plain(uuid) for index, uuid in enumerate(devices.uuids())}
    planned = [[known.get(name, name) for name in rank.devices] for rank in ranks.plan.ranks]
    notes.check("and it is the one that the plan names", inside == planned, planned)
    now = devices.held()
    outside = [[devices.plain(uuid) for uuid in now.get(pid, {})] for pid in looks.worker_pids(ranks)]
    notes.check("the driver says the same", outside == inside, outside)


def _distinct(groups: list[list[str]]) -> bool:
    names = [name for group in groups for name in group]
    return all(names) and len(set(names)) == len(names)


def _zygote(notes: Notes) -> None:
    found = looks.zygotes()
    notes.check("the zygote has no CUDA context", bool(found) and not any(map(devices.has_cuda, found)), found)


def _same_as_stock(setup: Setup, ranks: dplaunch.Group, notes: Notes) -> None:
    wanted = json.loads(Path(setup.directory, STOCK_FILE).read_text())
    for rank in ranks.ranks_up:
        ours = looks.answers(ranks, rank)
        equal = sum(a == b for a, b in zip(ours, wanted, strict=True))
        different = len({tuple(answer) for answer in ours})
        notes.check(
            f"rank {rank} answers as stock", equal == len(wanted), f"{equal} of {len(wanted)}, {different} different"
        )


def _sleep(ranks: dplaunch.Group, notes: Notes, level: int) -> None:
    sums, before, own = ranks.weight_checksums(), devices.used(), _devices_of(ranks)
    with looks.timed(notes.value, f"sleep {level} took"):
        ranks.sleep(level)
    asleep = devices.used()
    with looks.timed(notes.value, f"wake up from {level} took"):
        ranks.wake_up()
    awake = devices.used()
    for uuid in own:
        notes.value(f"sleep {level}: in use before", before[uuid] / MIB, "MiB")
        notes.value(f"sleep {level}: in use asleep", asleep[uuid] / MIB, "MiB")
        freed, taken = before[uuid] - asleep[uuid], awake[uuid] - asleep[uuid]
        notes.check(f"sleep {level} frees its device", freed > FREED, f"{freed / MIB:.0f} MiB")
        notes.check(f"wake up from {level} takes it back", taken > 0.9 * freed, f"{taken / MIB:.0f} MiB")
    notes.check(f"the weights are the same after sleep {level}", ranks.weight_checksums() == sums)


def _devices_of(ranks: dplaunch.Group) -> list[str]:
    inside = {worker["uuid"] for workers in looks.facts(ranks) for worker in workers}
    return [uuid for uuid in devices.uuids() if devices.plain(uuid) in inside]


def _new_weights(ranks: dplaunch.Group, module: Any, notes: Notes) -> None:
    before = looks.answers(ranks, 0, 2)
    looks.shift(module, 1)
    done = ranks.update_weights(module, "first")
    notes.value("new weights from the trainer's module took", done.seconds)
    notes.check("all ranks have them", list(done.ranks) == ranks.ranks_up, done.ranks)
    sums = ranks.weight_checksums()
    notes.check("with one checksum", len(set(sums.values())) == 1, sorted({each[:12] for each in sums.values()}))
    after = looks.answers(ranks, 0, 2)
    notes.check("the answers are others", after != before, after[0][:4])
    again = ranks.update_weights(module, "second", verify=False)
    notes.value("the same without checksums took", again.seconds)


def _death(ranks: dplaunch.Group, notes: Notes) -> None:
    rank = ranks.ranks_up[-1]
    sums, version, pids = ranks.weight_checksums(), ranks.weight_version, looks.worker_pids(ranks, rank)
    (report,) = ranks.call("dplaunch_report", rank=rank)
    os.kill(report["pid"], signal.SIGKILL)
    poll_until(lambda: rank not in ranks.ranks_up, looks.BACK_S, "the rank to be gone")
    seconds, left = devices.wait_until_free(pids)
    notes.check("a killed rank holds no device memory", not left, left or f"after {seconds:.1f} s")
    with looks.timed(notes.value, "it is back after another"):
        poll_until(lambda: rank in ranks.ranks_up, looks.BACK_S, "the rank to be back")
    notes.check("with the current weights", ranks.weight_checksums() == sums, f"version {version}")
    notes.check("and their version", ranks.weight_version == version == "second", version)


def _from_disk(setup: Setup, ranks: dplaunch.Group, module: Any, notes: Notes) -> None:
    directory = Path(setup.directory, "saved")
    sums, answers = ranks.weight_checksums(), looks.answers(ranks, 0, 2)
    module.save_pretrained(directory)
    ranks.update_weights(directory, "disk")
    notes.check("the same weights from disk give the same answers", looks.answers(ranks, 0, 2) == answers)
    if not setup.cpu:  # There a checksum is also over how they came.
        notes.check("and have the same checksum", ranks.weight_checksums() == sums)


def http(setup: Setup, notes: Notes) -> None:
    """The command: an answer over HTTP; the launcher is killed, and nothing stays on the devices."""
    settings = setup.settings("small")
    with dplaunch_server(settings) as (server, seconds):
        notes.value("dplaunch command: first answer after", seconds)
        pids = [process.pid for process in psutil.Process(server.process.pid).children(recursive=True)]
        holders = [pid for pid in pids if pid in devices.held()]
        if not setup.cpu:
            notes.check("as many processes as ranks hold devices", len(holders) == setup.dp, holders)
        os.kill(server.process.pid, signal.SIGKILL)
        seconds, left = devices.wait_until_free(holders)
        notes.check("after SIGKILL of the launcher no rank holds memory", not left, left or f"after {seconds:.1f} s")


SCRIPT = Script(
    "first",
    __doc__,
    [
        Step(name="unpacked", run=unpacked, limit_s=120, about_s=40),
        Step(name="stock", run=stock, limit_s=180, about_s=70),
        Step(name="group", run=group, limit_s=300, about_s=150),
        Step(name="http", run=http, limit_s=180, about_s=60),
    ],
)

if __name__ == "__main__":
    SCRIPT.main()
