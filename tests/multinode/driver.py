"""A user's program on a node: launches groups and says what comes of it. Asked by tests through `dialogue`."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dplaunch.errors import RequestError
from dplaunch.events import Event
from dplaunch.spec import ClusterOptions, LaunchSpec, ProbePolicy
from dplaunch.sync import Group
from dplaunch.testing import Fault, StandInPlan, When, expected_tokens
from dplaunch.testing.weights import checksum_of
from tests.contract.groups import group_spec
from tests.multinode.dialogue import answer

SAME = "as expected"
RETRYABLE = "to be sent again"


class Driver:
    """Holds one group at a time. Each public method is a question."""

    def __init__(self) -> None:
        self._group: Group | None = None
        self._events: list[Event] = []
        self._load: _Load | None = None

    @property
    def group(self) -> Group:
        """The running one."""
        if self._group is None:
            raise RuntimeError("no group was launched")
        return self._group

    def launch(self, directory: str, dp: int, standin: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        """Launches stand-in ranks; the model and the logs are in `directory`. What `ranks` says."""
        faults = {(f.pop("rank"), 0): Fault(**{**f, "when": When(f["when"])}) for f in standin.pop("faults", [])}
        default = Fault(**standin.pop("default", {}))
        plan = StandInPlan(faults=faults, default=default, **standin)
        return self._open(group_spec(Path(directory), "ray", plan, dp, **_typed(options)))

    def launch_real(self, model: str, log_dir: str, dp: int, **engine_args: Any) -> list[dict[str, Any]]:
        """Launches ranks of vLLM's own engine. What `ranks` says."""
        spec = LaunchSpec(model=model, dp=dp, backend="ray", log_dir=Path(log_dir), engine_args=engine_args)
        return self._open(spec)

    def _open(self, spec: LaunchSpec) -> list[dict[str, Any]]:
        self._events = []
        self._group = Group(spec, progress=False, listeners=[self._events.append])
        return self.ranks()

    def ranks(self) -> list[dict[str, Any]]:
        """For each rank the node that its handle names and the one of the plan, and what it reports of itself."""
        group = self.group
        planned = {rank.identity.rank: rank.node for rank in group.plan.ranks}
        handles = {each.identity.rank: each.handle for each in group._group.supervisor.ranks}
        facts = []
        for number in group.ranks_up:
            (report,) = group.call("dplaunch_report", rank=number)
            handle = handles[number]
            node = None if handle is None else handle.node
            kept = {name: report.get(name) for name in ("pid", "instance_id", "data_parallel_index", "env")}
            facts.append({"rank": number, "node": node, "planned": planned[number], **kept})
        return facts

    def answers(self, count: int, tokens: int, rank: int | None = None) -> dict[str, int]:
        """How often each outcome came of so many prompts, on all ranks or on one."""
        return _outcomes(self.group, count, tokens, rank)

    def chat(self, text: str) -> list[str]:
        """What each rank answers to a user's words."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=16)
        prompt: Any = [{"role": "user", "content": text}]
        outputs = [self.group.generate([prompt], params, data_parallel_rank=rank)[0] for rank in self.group.ranks_up]
        return [output.outputs[0].text for output in outputs]

    def update_weights(self, seed: int) -> dict[str, Any]:
        """New weights for all ranks: the ranks that took a bucket from the network, and whether all have the same."""
        import torch

        tensors = {f"layers.{number}": torch.full((5, 7), float(seed + number)) for number in range(4)}
        done = self.group.update_weights(tensors)
        taken = [each for rank in done.ranks for each in self.group.call("taken_buckets", rank=rank)]
        sums = set(self.group.weight_checksums().values())
        return {"ranks": done.ranks, "taken": taken, "same": sums == {checksum_of(tensors.items())}}

    def begin_load(self, tokens: int) -> None:
        """Keeps all ranks busy until `end_load`."""
        self._load = _Load(self.group, tokens)

    def load(self) -> dict[str, int]:
        """How often each outcome came of the load so far."""
        return {} if self._load is None else dict(self._load.outcomes)

    def end_load(self) -> dict[str, int]:
        """Ends the load; how often each outcome came of it."""
        if self._load is not None:
            self._load.end()
        return self.load()

    def events(self) -> list[dict[str, Any]]:
        """All that has happened to the group."""
        return [asdict(event) for event in self._events]

    def close(self) -> None:
        """Closes the group."""
        group, self._group = self._group, None
        if group is not None:
            group.close()


class _Load:
    def __init__(self, group: Group, tokens: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(group, tokens), daemon=True)
        self._thread.start()

    def _run(self, group: Group, tokens: int) -> None:
        while not self._over.is_set():
            self.outcomes += Counter(_outcomes(group, 16, tokens, None))

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def _outcomes(group: Group, count: int, tokens: int, rank: int | None) -> dict[str, int]:
    from vllm import SamplingParams

    prompts: Any = [[7 + index, 5] for index in range(count)]
    params = SamplingParams(max_tokens=tokens, detokenize=False)
    outputs = group.generate(prompts, params, data_parallel_rank=rank, on_error="return")
    return Counter(_outcome(prompt, output, tokens) for prompt, output in zip(prompts, outputs, strict=True))


def _outcome(prompt: list[int], output: Any, tokens: int) -> str:
    if isinstance(output, RequestError):
        return RETRYABLE if output.retryable else str(output)
    said = list(output.outputs[0].token_ids)
    return SAME if said == expected_tokens(prompt, tokens) else f"{prompt} gave {said}"


def _typed(options: dict[str, Any]) -> dict[str, Any]:
    """LaunchSpec's arguments from what JSON can carry."""
    if "log_dir" in options:
        options["log_dir"] = Path(options["log_dir"])
    if "probe" in options:
        options["probe"] = ProbePolicy(**options["probe"])
    if "nodes" in options:
        options["cluster"] = ClusterOptions(nodes=tuple(options.pop("nodes")))
    return options


def main() -> None:
    driver = Driver()
    calls = ("launch", "launch_real", "ranks", "answers", "chat", "update_weights", "events", "close")
    names = (*calls, "begin_load", "load", "end_load")
    try:
        answer({name: getattr(driver, name) for name in names})
    finally:
        driver.close()


if __name__ == "__main__":
    main()
