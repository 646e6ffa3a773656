"""A rank dies under streaming clients of the command: none of them sees more than a pause."""

from __future__ import annotations

import concurrent.futures
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from dplaunch.testing import poll_until
from tests.real.conftest import Server
from tests.real.families import family, titled

STREAMS = 8
TOKENS = 48


@dataclass
class Answer:
    """What a client has got of one stream."""

    text: str = ""
    logprobs: list[tuple[str, float]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)

    def take(self, event: dict[str, Any]) -> None:
        """Takes one event of the stream."""
        for choice in event["choices"]:
            self.text += choice["delta"].get("content") or ""
            for one in (choice.get("logprobs") or {}).get("content") or ():
                self.logprobs.append((one["token"], one["logprob"]))
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        if event.get("usage"):
            self.usage = {name: event["usage"][name] for name in ("prompt_tokens", "completion_tokens")}


def ask(server: Server, number: int, begun: threading.Semaphore | None = None) -> Answer:
    """One streamed chat; `begun` is released when some of it is there."""
    body = {
        "messages": [{"role": "user", "content": f"Tell me about the number {number}."}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
    }
    answer = Answer()
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                answer.take(json.loads(line[6:]))
                if begun is not None and len(answer.logprobs) >= 3:
                    begun.release()
                    begun = None
    return answer


def total(server: Server, metric: str) -> float:
    """A counter, over all its labels."""
    found = re.findall(rf"^{metric}\{{[^}}]*\}} (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


@pytest.mark.leaves("the rank that came back, which is the server's")
def test_streams_of_a_killed_rank_go_on_as_if_nothing_had_been(server: Server) -> None:
    undisturbed = [ask(server, number) for number in range(STREAMS)]
    counters = ("dplaunch_requests_moved_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    before = [total(server, name) for name in counters]
    begun = threading.Semaphore(0)
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        asked = [pool.submit(ask, server, number, begun) for number in range(STREAMS)]
        for _ in asked:
            assert begun.acquire(timeout=120)
        (rank,) = [one for one in titled(family(server.command.process.pid), "dplaunch::") if ends_with_rank(one, 1)]
        rank.kill()
        answers = [one.result() for one in asked]
    for answer, wanted in zip(answers, undisturbed, strict=True):
        assert answer.text == wanted.text
        assert (answer.finish_reason, answer.usage) == (wanted.finish_reason, wanted.usage)
        assert [token for token, _ in answer.logprobs] == [token for token, _ in wanted.logprobs]
    moved, prompts, generated = (total(server, name) - old for name, old in zip(counters, before, strict=True))
    assert moved >= 1
    # Each request is counted once, whoever answered it.
    assert prompts == sum(answer.usage["prompt_tokens"] for answer in answers)
    assert generated == sum(answer.usage["completion_tokens"] for answer in answers)
    poll_until(lambda: server.http.get("/ready").json()["ranks"] == {"ready": 2}, 120, "both ranks")


def ends_with_rank(process: Any, rank: int) -> bool:
    """Whether a process is the engine core of a rank, by its title."""
    return " ".join(process.cmdline()).strip().endswith(f"_dp{rank}")
