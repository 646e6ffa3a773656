"""Streams whose answers are known beforehand, all the time: what became of each, and whether it was exactly right."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from dplaunch.group import AsyncGroup
from dplaunch.testing import expected_tokens, poll_until_async

FLOW_S = 60.0
"""Seconds for further answers, on a machine that is busy with other tests."""

RETRY_S = 0.2
"""Seconds until a stream that failed is followed by another."""


class End(enum.StrEnum):
    """What became of a request that was accepted; each has exactly one."""

    EXACT = "exact"  # the undisturbed answer, each token once and in its place
    LEFT = "left"  # its client went away; what had come until then was right
    FAILED = "failed"  # it ended with an error that says so; what had come until then was right
    WRONG = "wrong"  # anything else: never


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Args:
        prompt: token ids.
        expected: the undisturbed answer.
        leave_after: the client goes away after so many tokens; None for one that stays.
        options: further sampling parameters.
    """

    prompt: Sequence[int]
    expected: Sequence[int]
    leave_after: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def ask(prompt: Sequence[int], tokens: int, leave_after: int | None = None) -> Ask:
    """A request to the stand-in engine, whose answers are a function of the prompt."""
    return Ask(prompt, expected_tokens(prompt, tokens), leave_after)


@dataclass(slots=True)
class Tally:
    """What became of all requests so far."""

    offered: int = 0
    refused: int = 0
    ends: Counter[End] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest_pause_s: float = 0.0
    tokens: int = 0

    @property
    def accepted(self) -> int:
        """Requests that the group took."""
        return self.offered - self.refused

    def add(self, other: Tally) -> None:
        """Takes over another's counts."""
        self.offered += other.offered
        self.refused += other.refused
        self.ends += other.ends
        self.errors += other.errors
        self.wrong += other.wrong
        self.longest_pause_s = max(self.longest_pause_s, other.longest_pause_s)
        self.tokens += other.tokens

    def count(self, end: End, why: str = "") -> None:
        """Takes note of one outcome."""
        self.ends[end] += 1
        if end is End.FAILED:
            self.errors[why] += 1
        if end is End.WRONG:
            self.wrong.append(why)


async def follow(group: AsyncGroup, asked: Ask, name: str, tally: Tally) -> None:
    """Sends one request, compares its stream token by token, and takes note of its end."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=len(asked.expected),
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        **asked.options,
    )
    tally.offered += 1
    got: list[int] = []
    last = time.monotonic()
    stream = group.engine.generate({"prompt_token_ids": list(asked.prompt)}, params, name)
    try:
        async with contextlib.aclosing(stream):
            async for output in stream:
                now = time.monotonic()
                if got:
                    tally.longest_pause_s = max(tally.longest_pause_s, now - last)
                last = now
                (choice,) = output.outputs
                got += choice.token_ids
                tally.tokens += len(choice.token_ids)
                if got != list(asked.expected[: len(got)]):
                    break
                if choice.finish_reason is not None:
                    _end(asked, got, choice.finish_reason, name, tally)
                    return
                if asked.leave_after is not None and len(got) >= asked.leave_after:
                    tally.count(End.LEFT)
                    return
    except Exception as error:
        _error(error, name, tally)
        return
    tally.count(End.WRONG, f"{name}: {list(asked.prompt)} gave {got}, not {list(asked.expected)}")


def _end(asked: Ask, got: list[int], reason: str, name: str, tally: Tally) -> None:
    if reason == "error":
        tally.count(End.FAILED, reason)
    elif reason == "length" and len(got) == len(asked.expected):
        tally.count(End.EXACT)
    else:
        tally.count(End.WRONG, f"{name}: ended with {reason!r} after {len(got)} of {len(asked.expected)} tokens")


def _error(error: Exception, name: str, tally: Tally) -> None:
    cause = error if error.__cause__ is None else error.__cause__
    tally.count(End.FAILED, f"{type(cause).__name__}: {cause}".splitlines()[0].replace(name, "REQUEST"))


class Load:
    """So many streams at a time, for as long as it is entered; at its end those under way run to their end.

    Args:
        group: answers them.
        next_ask: gives the next request.
        streams: how many at a time.
        tally: goes on from these counts; None starts at zero.
    """

    _numbers = itertools.count(1)

    def __init__(
        self, group: AsyncGroup, next_ask: Callable[[], Ask], streams: int = 12, tally: Tally | None = None
    ) -> None:
        self.tally = tally or Tally()
        self._group = group
        self._next_ask = next_ask
        self._streams = streams
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run()) for _ in range(self._streams)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            await self.give_up()
            return
        self._over = True
        await asyncio.gather(*self._tasks)

    async def give_up(self) -> None:
        """Cancels every stream where it is."""
        self._over = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self) -> None:
        while not self._over:
            failed = self.tally.ends[End.FAILED]
            await follow(self._group, self._next_ask(), f"load-{next(self._numbers)}", self.tally)
            if self.tally.ends[End.FAILED] > failed:
                # As a client does. A group that fails all at once would leave the loop no time for anything else.
                await asyncio.sleep(RETRY_S)

    async def flows(self, answers: int = 12) -> None:
        """Returns when so many further answers have come."""
        wanted = self.tally.ends[End.EXACT] + answers
        await poll_until_async(lambda: self.tally.ends[End.EXACT] >= wanted, FLOW_S, f"{answers} further answers")
