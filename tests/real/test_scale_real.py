"""A group of real engines that grows and shrinks while it answers."""

from __future__ import annotations

import threading
from typing import Any

import dplaunch
from dplaunch.testing import poll_until
from tests.real.conftest import ENGINE_ARGS, START_S

PROMPTS = [f"Count from {first} to twenty in words:" for first in range(1, 9)]


def greedy() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def test_a_group_grows_and_shrinks_under_load_and_its_greedy_answers_are_the_same(smollm: str) -> None:
    rounds: list[list[list[int]]] = []
    ending = threading.Event()

    with dplaunch.launch(model=smollm, dp=1, progress=False, **ENGINE_ARGS) as group:

        def answer() -> None:
            while not ending.is_set():
                outputs = group.generate(PROMPTS, greedy(), progress=False)
                rounds.append([list(output.outputs[0].token_ids) for output in outputs])

        def more(count: int) -> None:
            goal = len(rounds) + count
            poll_until(lambda: len(rounds) >= goal or not load.is_alive(), START_S, "more answers")

        load = threading.Thread(target=answer)
        load.start()
        try:
            more(1)
            group.scale(2)
            assert [report["instance_id"] for report in group.call("dplaunch_report")][1].endswith("_dp1")
            # The second round began with both ranks.
            more(2)
            assert len(group.generate(PROMPTS[:2], greedy(), data_parallel_rank=1, progress=False)) == 2
            group.scale(1, drain_s=0.2)
            more(2)
        finally:
            ending.set()
            load.join()
        assert group.ranks_up == [0]
    assert len(rounds) >= 5
    assert all(answers == rounds[0] for answers in rounds)
