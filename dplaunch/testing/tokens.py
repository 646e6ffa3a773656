"""The answers of the stand-in engine: a pure function, so that any test knows them beforehand."""

from __future__ import annotations

from collections.abc import Sequence

VOCAB_SIZE = 1000
"""Smaller than the vocabulary of any real tokenizer, so that every answer can be turned into text."""

RESERVED = 16
"""The first ids are special tokens (end of text, padding) in most vocabularies, and are never answered."""


def next_token(last: int, position: int) -> int:
    """The token at `position`, counted from the prompt's first, behind `last`.

    It depends on nothing else, not even on where the prompt ended: a prompt with the first tokens of its
    answer behind it continues with the rest of that answer, on any rank, as greedy decoding does.
    """
    return RESERVED + (last * 31 + position * 17 + 7) % (VOCAB_SIZE - RESERVED)


def expected_tokens(prompt: Sequence[int], n: int) -> list[int]:
    """The first `n` tokens that the stand-in engine answers to `prompt`."""
    tokens: list[int] = []
    last = prompt[-1] if prompt else 0
    for position in range(len(prompt), len(prompt) + n):
        last = next_token(last, position)
        tokens.append(last)
    return tokens
