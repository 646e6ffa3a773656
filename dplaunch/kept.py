"""Answers that nobody sees before their end: the frontend gets their tokens in larger pieces, which is less work.

Most of what vLLM's frontend does for an output is the same for one token and for many, and batches have millions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dplaunch.seam import wire
from dplaunch.seam.requests import has_tokens_alone

PIECE = 64
"""Tokens of an answer that the frontend gets together; more would hardly make it less work."""

LEAST = 4
"""Of them near the end of an answer.

Answers of one length that begin together end together, and until the frontend has seen them and asked for the next ones
their rank has little to do: not the moment for what could have been done before. So pieces halve what is left.
"""


@dataclass(slots=True)
class Kept:
    """What the frontend has of such an answer, and what is kept here.

    Args:
        most: how many tokens the answer has at most; None where there is no bound.
        full: with so many tokens of the answer the next piece is full.
        handed: how many of its tokens the frontend was given; those behind are kept.
        weights: the version of the weights that the last ones are of, as vLLM says it.
    """

    most: int | None
    full: int
    handed: int = 0
    weights: str | None = None

    @classmethod
    def beside(cls, others: int, most: int | None) -> Kept:
        """One of a new answer: of those that have begun together, not all have a piece together."""
        return cls(most, min(PIECE - others % PIECE, _piece(most, 0)))

    def takes(self, tokens: list[int], output: Any, weights: str | None) -> bool:
        """Keeps an output that has further tokens alone, and no piece is full with it: nearly all of a batch's.

        Args:
            tokens: the answer so far; it grows by what is taken.
            output: an EngineCoreOutput.
            weights: the version of the weights that it is of.
        """
        new = output.new_token_ids
        if self.weights != weights or len(tokens) + len(new) >= self.full or not has_tokens_alone(output):
            return False
        tokens += new
        return True

    def keeps(self, tokens: list[int], output: Any, weights: str | None, hand_over: Callable[[Any], None]) -> bool:
        """Whether an output is kept. One that makes a piece full, or says more than tokens, gets those before it.

        Args:
            tokens: the answer so far; it grows by those of the output.
            output: an EngineCoreOutput.
            weights: the version of the weights that it is of.
            hand_over: gets what the frontend has to see before it: it notes which tokens are of which weights.
        """
        if self.handed < len(tokens) and self.weights != weights:
            hand_over(wire.tokens_alone(output.request_id, tokens[self.handed :], self.weights))
            self.handed = len(tokens)
        self.weights = weights
        if self.takes(tokens, output, weights):
            return True
        tokens += output.new_token_ids
        output.new_token_ids, self.handed = tokens[self.handed :], len(tokens)
        self.full = self.handed + _piece(self.most, self.handed)
        return False


def _piece(most: int | None, handed: int) -> int:
    return PIECE if most is None else min(PIECE, max(LEAST, (most - handed) // 2))
