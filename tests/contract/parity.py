"""One launch as it is seen from inside its ranks and from outside, so that two backends can be compared."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dplaunch.errors import DplaunchError
from dplaunch.event_log import FILE_NAME as EVENT_LOG
from dplaunch.plan import LaunchPlan
from dplaunch.testing import StandInPlan, expected_tokens, poll_until_async
from tests.contract.groups import Watched, group_spec

BASE, CONNECTOR = "twin", "kv"

PROMPTS = 200
TOKENS = 8

RETURN_S = 60.0

OWN_VARIABLES: frozenset[str] = frozenset()
"""The variables that a rank has on one backend and not, or otherwise, on the other."""


@dataclass(frozen=True)
class Observed:
    """What one launch of two stand-in ranks showed."""

    plan: LaunchPlan
    reports: Sequence[Mapping[str, Any]]
    restarted: Mapping[str, Any]
    handles: Sequence[str]
    nodes: Sequence[str]
    addresses: Sequence[str]
    outputs: Sequence[Sequence[int]]
    unfinished: Sequence[str]
    metrics: Sequence[str]
    states: Mapping[int, Sequence[tuple[str, int]]]
    phases: Mapping[int, Sequence[str]]
    messages: Sequence[str]
    logs: Mapping[str, Sequence[str]]
    event_log: Sequence[str]

    def of_ranks(self, name: str) -> list[Any]:
        """A field of the ranks' own reports: both ranks, and the second one after its restart."""
        return [report[name] for report in (*self.reports, self.restarted)]


async def observe(backend: str, directory: Path) -> Observed:
    """Launches, asks, kills a rank, waits for its return, closes with requests in flight; all of it recorded."""
    directory.mkdir()
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "engine_id": CONNECTOR}
    options: dict[str, Any] = {"base_id": BASE, "log_stats": True, "engine_args": {"kv_transfer_config": connector}}
    watched = Watched(group_spec(directory, backend, StandInPlan(token_delay_s=0.01), 2, **options))
    group = watched.group
    try:
        await group.open()
        ranks = group.supervisor.ranks
        reports = await group.call("dplaunch_report")
        links = [rank.link for rank in ranks]
        handles = [rank.handle for rank in ranks]
        seen: dict[str, Any] = {
            "plan": group.plan,
            "reports": reports,
            "handles": [handle.describe() for handle in handles if handle],
            "nodes": [handle.node for handle in handles if handle],
            "addresses": [link.handshake_address for link in links if link],
            "outputs": [tokens(output) for output in await group.generate(prompts(), params(TOKENS))],
            "metrics": metric_names(),
        }
        os.kill(reports[1]["pid"], signal.SIGKILL)
        await poll_until_async(lambda: ("ready", 1) in watched.states(1), RETURN_S, "the return of rank 1")
        restarted = (await group.call("dplaunch_report", rank=1))[0]
        batch = asyncio.create_task(group.generate(prompts()[:4], params(400), on_error="return"))
        await poll_until_async(lambda: group.client.unfinished == 4)
        await group.close()
        unfinished = [f"{type(result).__name__}: {result}" for result in await batch]
    finally:
        await group.close()
    return Observed(
        **seen,
        restarted=restarted,
        unfinished=unfinished,
        states={rank: watched.states(rank) for rank in (0, 1)},
        phases={rank: watched.phases(rank) for rank in (0, 1)},
        messages=[without_accidents(event.message, directory) for event in watched.events if not event.phase],
        logs={file.name: lines_of(file, directory) for file in sorted((directory / "logs").glob("*.log"))},
        event_log=logged_events(directory / "logs" / EVENT_LOG, directory),
    )


def prompts() -> list[list[int]]:
    """As many as are asked, all different."""
    return [[index + 1, 7, index % 13] for index in range(PROMPTS)]


def params(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, temperature=0, detokenize=False)


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def metric_names() -> list[str]:
    """Every metric of vLLM's that this process offers, with its labels' names and the ranks that it is of."""
    import prometheus_client

    names = set()
    for metric in prometheus_client.REGISTRY.collect():
        for sample in metric.samples:
            if sample.name.startswith("vllm"):
                names.add(f"{sample.name} {sorted(sample.labels)} {sample.labels.get('engine')}")
    return sorted(names)


def lines_of(file: Path, directory: Path) -> list[str]:
    """A log without what differs from one launch to the next."""
    return [without_accidents(line, directory) for line in file.read_text().splitlines()]


def logged_events(file: Path, directory: Path) -> list[str]:
    """The event log without notes and what differs between launches; sorted, since ranks do not wait for each other."""
    events = map(json.loads, file.read_text().splitlines())
    what = ("kind", "level", "rank", "incarnation", "state", "phase", "group")
    return sorted(
        " ".join((*(f"{event[name]}" for name in what), without_accidents(event["message"], directory)))
        for event in events
        if event["kind"] != "note"
    )


_ACCIDENTS = [
    (re.compile(r"\bpid \d+( on node [^,]+, Ray actor \w+)?"), "PROCESS"),
    (re.compile(r"\bpid=\d+"), "PROCESS"),
    (re.compile(r"\b\d\d-\d\d \d\d:\d\d:\d\d\b"), "TIME"),
    (re.compile(r"\b0x[0-9a-f]+"), "ADDRESS"),
    (re.compile(r"\b\d+\.\d+\b"), "N"),
]
"""What differs from one launch to the next, and how a handle names its process."""


def without_accidents(text: str, directory: Path) -> str:
    """The text with the same word for what is another each time: process, time, directory, seconds."""
    text = text.replace(str(directory), "DIRECTORY")
    for pattern, word in _ACCIDENTS:
        text = pattern.sub(word, text)
    return text


# What has to be the same, in the order of the table in docs/backends.md.


@dataclass(frozen=True)
class Field:
    """Something that is compared between backends.

    Args:
        of: what is compared.
        shown: what the table says of it.
    """

    of: Callable[[Observed], Any]
    shown: Callable[[Observed], str]


def report_field(name: str, shown: Callable[[Observed], str] | None = None) -> Field:
    """A field of what the ranks say of themselves."""
    return Field(lambda seen: seen.of_ranks(name), shown or (lambda seen: as_words(seen.of_ranks(name))))


def as_words(values: Sequence[Any]) -> str:
    """ "`a`, `b`"; a value that all have is written once."""
    words = [f"`{value}`" for value in values]
    return words[0] if len(set(words)) == 1 else ", ".join(words)


async def failure(backend: str, directory: Path, plan: StandInPlan, **options: Any) -> tuple[str, int, str, list[str]]:
    """A start that cannot succeed: the error's type, its exit code, its text, and what rank 1 was reported to do."""
    directory.mkdir()
    watched = Watched(group_spec(directory, backend, plan, 2, shutdown_timeout_s=0.5, **options))
    try:
        await watched.group.open()
    except DplaunchError as error:
        events = [event for event in watched.events if event.rank == 1 and not event.phase]
        said = [without_accidents(event.message, directory) for event in events]
        return type(error).__name__, int(error.exit_code), without_accidents(str(error), directory), said
    finally:
        await watched.group.close()
    raise AssertionError("the start succeeded")


def _planned(seen: Observed) -> str:
    planned = [list(seen.plan.ranks[rank].cpus) for rank in (0, 1, 1)]
    return "those of the plan, of one process for each rank" if seen.of_ranks("cpus") == planned else "others"


def _devices(seen: Observed) -> str:
    planned = [list(seen.plan.ranks[rank].devices) for rank in (0, 1, 1)]
    return "those of the plan (cores, on a CPU host)" if seen.of_ranks("devices") == planned else "others"


def _environment(seen: Observed) -> str:
    """What of the plan's environment reaches the engine."""
    missing = [name for name, value in seen.plan.ranks[0].env.items() if seen.reports[0]["env"].get(name) != value]
    return f"all but {missing}" if missing else "the plan's, every variable"


def _answers(seen: Observed) -> str:
    right = [expected_tokens(prompt, TOKENS) for prompt in prompts()] == list(seen.outputs)
    return f"{len(seen.outputs)} answers, in order, each as foretold" if right else "wrong"


def _metrics(seen: Observed) -> str:
    return "vLLM's own, by rank" if any("request_success" in name for name in seen.metrics) else "none"


FIELDS: Mapping[str, Field] = {
    "`instance_id`": report_field("instance_id"),
    "KV `engine_id`": report_field("engine_id"),
    "`data_parallel_index`": report_field("data_parallel_index"),
    "process title": report_field("process_title"),
    "devices": report_field("devices", _devices),
    "cores": report_field("cpus", _planned),
    "dtype": report_field("dtype"),
    "executor": report_field("executor"),
    "environment": Field(
        lambda seen: [
            {name: value for name, value in env.items() if name not in OWN_VARIABLES} for env in seen.of_ranks("env")
        ],
        _environment,
    ),
    "log files and their lines": Field(lambda seen: seen.logs, lambda seen: as_words(list(seen.logs))),
    f"lines of `{EVENT_LOG}`": Field(lambda seen: seen.event_log, lambda seen: "a line an event, in the same words"),
    "states of the rank that dies": Field(
        lambda seen: [seen.states[1], seen.states[0]],
        lambda seen: " → ".join(state for state, _ in seen.states[1]),
    ),
    "phases of a start": Field(
        lambda seen: [seen.phases[rank] for rank in (0, 1)], lambda seen: " → ".join(seen.phases[0])
    ),
    "messages": Field(lambda seen: sorted(seen.messages), lambda seen: "word for word, but for pid and seconds"),
    "answers": Field(lambda seen: seen.outputs, _answers),
    "metrics": Field(lambda seen: seen.metrics, _metrics),
    "requests in flight at the end": Field(
        lambda seen: seen.unfinished,
        lambda seen: as_words(sorted({re.sub(r"prompt \d+", "prompt N", text) for text in seen.unfinished})),
    ),
}
"""By its name in the table."""


# What differs by nature.


def _scheme(seen: Observed) -> str:
    (scheme,) = {address.partition(":")[0] for address in seen.addresses}
    return {"ipc": "files in a directory of its own (`ipc`)", "tcp": "the launcher's own address (`tcp`)"}[scheme]


def _handle(seen: Observed) -> str:
    return (
        "`"
        + re.sub(r"Ray actor \w+", "Ray actor A", re.sub(r"pid \d+", "pid P", seen.handles[0])).replace(
            seen.nodes[0], "NODE"
        )
        + "`"
    )


def _node(seen: Observed) -> str:
    return "its address in the cluster" if re.fullmatch(r"[\d.]+(/\w+)?", seen.nodes[0]) else "the host's name"


def _who_gives(seen: Observed) -> str:
    return f"{seen.plan.scheduler}: a placement group for each rank" if seen.plan.scheduler else "the plan"


BY_NATURE: Mapping[str, Callable[[Observed], str]] = {
    "who gives out devices": _who_gives,
    "a node's name": _node,
    "sockets between launcher and ranks": _scheme,
    "a rank in messages": _handle,
}
"""What the table says of each, which is not the same for both."""
