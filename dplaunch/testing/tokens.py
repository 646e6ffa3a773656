"""The answers of the stand-in engine: a pure function, so that any test knows them beforehand."""

from __future__ import annotations

from collections.abc import Sequence

VOCAB_SIZE = 1000
"""Smaller than the vocabulary of any real tokenizer, so that every answer can be turned into text."""

RESERVED = 16
"""The first ids are special tokens (end of text, padding) in most vocabularies, and are never answered."""


def seed_of(checksum: str) -> int:
    """What weights add to each answer; those that an engine is started with, whose checksum is "", add nothing."""
    return 1 + int(checksum[:8], 16) % 900 if checksum else 0


def next_token(last: int, position: int, seed: int = 0) -> int:
    """The token at `position`, counted from the prompt's first, behind `last`, with the weights of that seed.

    It depends on nothing else, not even on where the prompt ended: a prompt with the first tokens of its
    answer behind it continues with the rest of that answer, on any rank, as greedy decoding does.
    """
    return RESERVED + (last * 31 + position * 17 + 7 + seed) % (VOCAB_SIZE - RESERVED)


def expected_tokens(prompt: Sequence[int], n: int, weights: str = "") -> list[int]:
    """The first `n` tokens that the stand-in engine answers to `prompt`, with the weights of that checksum."""
    seed = seed_of(weights)
    tokens: list[int] = []
    last = prompt[-1] if prompt else 0
    for position in range(len(prompt), len(prompt) + n):
        last = next_token(last, position, seed)
        tokens.append(last)
    return tokens
