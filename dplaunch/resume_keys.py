"""Which saved result belongs to which prompt of a batch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dplaunch.errors import UsageError

Keys = Callable[[Any], str] | Sequence[str]
"""What names the prompts: a function of the prompt, or one name for each."""


class ResultId(NamedTuple):
    """What a saved result is found by.

    Args:
        key: names the prompt.
        params: a hash of everything else that an answer hangs on: parameters, adapter, version of the weights.
        copy: tells prompts of a batch apart that have the first two in common, in their order; from 0.
    """

    key: str
    params: str
    copy: int


def result_ids(
    prompts: Sequence[Any], params: Sequence[Any], loras: Sequence[Any], *, keys: Keys | None, weights: str | None
) -> list[ResultId]:
    """One for each prompt of a batch, all different.

    Args:
        prompts: the prompts.
        params: the parameters of each, as plain values.
        loras: the LoRARequest of each, or None.
        keys: the user's names for the prompts; None for a hash of each prompt.
        weights: the version of the weights that answer.

    Raises:
        UsageError: when the names do not match the prompts in number or are no strings, or a prompt without a name of
            the user's holds something that has no plain form, such as an image.
    """
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for index, (key, asked, lora) in enumerate(zip(_keys(prompts, keys), params, loras, strict=True)):
        # An adapter by its name alone: its number and path may be others in another process.
        facts = {"params": asked, "lora": getattr(lora, "lora_name", None), "weights": weights}
        pair = key, _hash(facts, f"the parameters of prompt {index}")
        found.append(ResultId(*pair, seen[pair]))
        seen[pair] += 1
    return found


def _keys(prompts: Sequence[Any], keys: Keys | None) -> list[str]:
    if keys is None:
        return [_hash(prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]
    if isinstance(keys, str):
        raise UsageError("key is one string for all prompts", hint="Give a function, or one string for each prompt.")
    if callable(keys):
        names = [keys(prompt) for prompt in prompts]
    else:
        names = list(keys)
        if len(names) != len(prompts):
            raise UsageError(f"key has {len(names)} entries for {len(prompts)} prompts", hint="Give one for each.")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise UsageError(f"the key of prompt {index} is no string but {type(name).__name__}")
    return names


def _hash(value: Any, what: str) -> str:
    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return dict(part)
        if isinstance(part, bytes):
            return {"bytes": part.hex()}
        if isinstance(part, Sequence):
            return list(part)
        raise UsageError(
            f"{what} holds a {type(part).__name__}, which no key can be made of",
            hint="Give key=, a function that names each prompt, or a list of names.",
        )

    text = json.dumps(value, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
