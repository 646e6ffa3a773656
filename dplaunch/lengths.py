"""How long a prompt's answer was the last time: what is known to be long is begun first."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 200_000
"""Prompts that are remembered, some 40 MB; those that were not asked for longest are forgotten."""


class AnswerLengths:
    """The lengths of the answers that a group has given, by prompt.

    A batch is over when its longest answers are, and ranks idle meanwhile if these were begun late. Nobody knows the
    lengths of answers that were never given; but an evaluation asks the same prompts after each phase of a training,
    and answers that were long tend to be long again.
    """

    def __init__(self) -> None:
        self._tokens: OrderedDict[int, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    def longest_first(self, prompts: Sequence[Any], numbers: Sequence[int]) -> list[int]:
        """Puts the numbers of prompts into the order in which they should be begun.

        Args:
            prompts: all of the batch.
            numbers: which of them, in the order that holds where nothing is known.

        Returns:
            First those that are not known, in their order: each may be long. Then the others, the longest first.
        """
        if not self._tokens:
            return list(numbers)
        expected = {number: self._expected(prompts[number]) for number in numbers}
        return sorted(numbers, key=expected.__getitem__, reverse=True)

    def note(self, prompt: Any, tokens: int) -> None:
        """Takes note of an answer's length; several answers of one prompt are averaged, the newest counting half."""
        name = _name(prompt)
        if name is None:
            return
        before = self._tokens.pop(name, tokens)
        self._tokens[name] = (before + tokens) / 2
        if len(self._tokens) > MOST:
            self._tokens.popitem(last=False)

    def _expected(self, prompt: Any) -> float:
        name = _name(prompt)
        return float("inf") if name is None else self._tokens.get(name, float("inf"))


def _name(prompt: Any) -> int | None:
    """A prompt's hash in this process; None for one that holds an image or another object."""
    if isinstance(prompt, str):
        return hash(prompt)
    if not isinstance(prompt, Mapping) and prompt and isinstance(prompt[0], int):
        return hash(tuple(prompt))
    try:
        return hash(json.dumps(prompt, sort_keys=True, default=_plain))
    except TypeError:
        return None


def _plain(part: Any) -> Any:
    if isinstance(part, Mapping):
        return dict(part)
    if isinstance(part, Sequence) and not isinstance(part, bytes):
        return list(part)
    raise TypeError
