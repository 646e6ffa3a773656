"""lm-evaluation-harness over stock models and over groups of ranks: the same scores (`make compare-lm-eval`).

The tasks are those of examples/lm_eval_task, the model is the built-in one in float32. Every one is run in a process of
its own; one of them loses a rank in the middle. No network is used.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dplaunch
from benchmarks.common import machine, print_table

ROOT = Path(__file__).resolve().parents[1]

TASK_DIR = "examples/lm_eval_task"

CAPITALS, OPPOSITES, SENTENCES = TASKS = ("dplaunch_capitals", "dplaunch_opposites", "dplaunch_sentences")

ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 128 * 2**20,
    "gpu_memory_utilization": 0.3,
}

KILLED = "dplaunch mp, a rank killed"

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf": ("hf", {"dtype": "float32", "device": "cpu", "batch_size": 8}),
    "vllm": ("vllm", {**ENGINE_ARGS, "batch_size": "auto"}),
    **{
        f"dplaunch {backend}, dp={dp}": ("dplaunch", {**ENGINE_ARGS, "dp": dp, "backend": backend})
        for backend in ("mp", "ray")
        for dp in (1, 2)
    },
    KILLED: ("dplaunch", {**ENGINE_ARGS, "dp": 2}),
}
"""By the name in the table: what the harness calls the model, and its arguments."""

Answers = dict[str, list[list[Any]]]
"""For each task, for each of its samples, what the model said: (log-likelihood, whether it is the likeliest) for each
choice, a text, or a log-likelihood."""


def evaluate(model: Any, model_args: Mapping[str, Any] | None = None, limit: int | None = None) -> dict[str, Any]:
    """Runs the harness; the working directory is to be the repository's.

    Args:
        model: a name, or a model that is there.
        limit: samples of each task; None for all.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        model_args=dict(model_args) if model_args else None,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=TASK_DIR, include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    return found


def scores(found: Mapping[str, Any]) -> dict[str, float]:
    """The four numbers of the table."""
    results = found["results"]
    return {
        "acc": results[CAPITALS]["acc,none"],
        "acc_norm": results[CAPITALS]["acc_norm,none"],
        "exact match": results[OPPOSITES]["exact_match,none"],
        "byte ppl": results[SENTENCES]["byte_perplexity,none"],
    }


def answers(found: Mapping[str, Any]) -> Answers:
    """What the model said to each sample."""
    return {
        task: [[answer for (answer,) in each["resps"]] for each in sorted(found["samples"][task], key=_number)]
        for task in TASKS
    }


def _number(sample: Mapping[str, Any]) -> int:
    number: int = sample["doc_id"]
    return number


def difference(ours: Answers, theirs: Answers) -> tuple[int, float]:
    """How many samples have another text or another likeliest choice, and how far log-likelihoods are apart at most."""
    other, most = 0, 0.0
    for task in TASKS:
        for mine, its in zip(ours[task], theirs[task], strict=True):
            if task == OPPOSITES:
                other += mine != its
                continue
            pairs = zip(mine, its, strict=True)
            apart = [abs(a - b) for a, b in pairs] if task == SENTENCES else [abs(a[0] - b[0]) for a, b in pairs]
            most = max(most, *apart)
            other += task == CAPITALS and [each[1] for each in mine] != [each[1] for each in its]
    return other, most


def kill_amid(group: dplaunch.Group, rank: int) -> threading.Thread:
    """Kills a rank once it has answered something from now on, from a thread that ends then."""
    (report,) = group.call("dplaunch_report", rank=rank)
    counted = group._group.client.rank_counters[rank]
    before = counted.tokens

    def kill() -> None:
        while counted.tokens == before:
            time.sleep(0.001)
        os.kill(report["pid"], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def run_one(name: str, model: str) -> dict[str, Any]:
    """One model's scores, answers, and seconds."""
    import dplaunch.integrations.lm_eval
    from dplaunch.integrations.lm_eval_harness import vllm_model

    kind, arguments = MODELS[name]
    if kind == "vllm":
        vllm_model()  # On a CPU the harness's own needs help to be imported.
    started = time.monotonic()
    if name == KILLED:
        with dplaunch.integrations.lm_eval.DplaunchLM(model, **arguments) as lm:
            killer = kill_amid(lm.group, 1)
            found = evaluate(lm)
            killer.join()
    else:
        found = evaluate(kind, {"pretrained": model, **arguments})
    return {"scores": scores(found), "answers": answers(found), "seconds": time.monotonic() - started}


def table(found: Mapping[str, Mapping[str, Any]], first: str) -> list[tuple[str, ...]]:
    """The table; each row is compared with that of `first`."""
    rows = [("model", *found[first]["scores"], "other answers", "log-likelihoods apart", "seconds")]
    for name, one in found.items():
        other, most = difference(one["answers"], found[first]["answers"])
        numbers = [f"{number:.4f}" for number in one["scores"].values()]
        rows.append((name, *numbers, str(other), f"{most:.1e}", f"{one['seconds']:.0f}"))
    return rows


def _in_a_child(name: str, model: str, place: Path) -> dict[str, Any]:
    out = place / "found.json"
    command = [sys.executable, "-m", "benchmarks.compare_lm_eval", "--one", name, "--model", model, "--out", str(out)]
    environ = os.environ | {
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(place / "datasets"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with (place / "log").open("w+") as log:
        done = subprocess.run(command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            log.seek(0)
            raise SystemExit(f"{name} ended with {done.returncode}:\n{log.read()[-4000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main(run: Callable[[str, str, Path], dict[str, Any]] = _in_a_child, arguments: Sequence[str] | None = None) -> int:
    """Compares; the exit code is 1 where a group's answers are others than those of stock vLLM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(MODELS), help="this model; may be repeated")
    parser.add_argument("--one", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        options.out.write_text(json.dumps(run_one(options.one, options.model)))
        return 0
    from dplaunch import demo

    model = str(demo.demo_model(print).path)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in options.only or MODELS:
            found[name] = run(name, model, Path(directory))
            print(f"{name}: {found[name]['seconds']:.0f} s", flush=True)
    first = "vllm" if "vllm" in found else next(iter(found))
    print("\n" + ", ".join(machine().values()))
    print_table(table(found, first))
    same = all(difference(one["answers"], found[first]["answers"])[0] == 0 for one in found.values())
    print(json.dumps({"comparison": "lm-eval", "same": same, "scores": {n: one["scores"] for n, one in found.items()}}))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
