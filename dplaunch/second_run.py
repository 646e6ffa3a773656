"""What a request answers on the rank that took it over, made to fit what the first one has shown already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dplaunch.seam.requests import cut_front, forget_prompt


class AnsweredDifferently(Exception):
    """Raised when the second answer to a request is another one than the first; `at` counts tokens from 1."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(what)
        self.at = at
        self.what = what


class SecondRun:
    """Lets through what is new.

    Args:
        shown: the tokens that were shown before.
        continues: whether they were given to the rank behind the prompt; else they come again, and are compared.
    """

    __slots__ = ("_seen", "_shown", "continues")

    def __init__(self, shown: Sequence[int], *, continues: bool) -> None:
        self.continues = continues
        self._shown = tuple(shown)
        self._seen = len(self._shown) if continues else 0

    def take(self, output: Any) -> bool:
        """Takes everything out of an EngineCoreOutput that was shown before; False when nothing is left of it.

        Raises:
            AnsweredDifferently: when a token differs, or the answer ends where it had gone on.
        """
        forget_prompt(output)
        missing = len(self._shown) - self._seen
        if not missing:
            return True
        tokens = output.new_token_ids
        for offset, token in enumerate(tokens[:missing]):
            if token != self._shown[self._seen + offset]:
                raise AnsweredDifferently(self._seen + offset + 1, f"token {self._seen + offset + 1}")
        known = min(missing, len(tokens))
        self._seen += known
        if known < len(tokens):
            cut_front(output, known)
            return True
        if output.finish_reason is None:
            return False
        if str(output.finish_reason) in ("abort", "error"):
            cut_front(output, known)
            return True  # It is no answer at all.
        raise AnsweredDifferently(self._seen, f"token {self._seen}, where it ended")
