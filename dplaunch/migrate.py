"""How a request moves when its rank has died: exactly, or not at all. docs/migration.md has it as a table."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dplaunch.seam.requests import departures


class Move(enum.StrEnum):
    """What becomes of a request whose rank died."""

    REPLAY = "replay"  # sent again as it was: it had answered nothing yet
    CONTINUE = "continue"  # its tokens so far become prompt, and it gives the rest
    VERIFY = "verified replay"  # sent again as it was; what comes back is compared with what was shown, and left out
    FAIL = "fail"  # ends with an error that says why


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a request, and why."""

    move: Move
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTraits:
    """What of a group's engines is to be known when requests move; "" is nothing.

    Args:
        no_continue: why none can be continued.
        no_repeat: why none can be repeated either.
        slots: requests that a rank runs at a time, first come first served; None when not known.
    """

    no_continue: str = ""
    no_repeat: str = ""
    slots: int | None = None


SAFE = frozenset(
    {
        # What a token is chosen by, given the tokens before it, whoever wrote them.
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "allowed_token_ids"),
        # Where an answer ends: by what a token is, by its number, or by the text, which the frontend has.
        *("stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "include_stop_str_in_output"),
        *("_eos_token_id", "_all_stop_token_ids"),
        # What is reported of each token, or once of the prompt.
        *("logprobs", "logprob_token_ids", "flat_logprobs"),
        *("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "skip_reading_prefix_cache"),
        # What the frontend does with the tokens. It makes one request of each of `n` answers.
        *("n", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind"),
        *("stream_interval", "output_text_buffer_length", "skip_clone"),
        # Without a watermark in the engine these mean nothing, and with one nothing is continued.
        *("watermarking", "_watermarking_skipped"),
    }
)
"""The fields of SamplingParams with which the rest of an answer has the same distribution, wherever it is computed.

Every other that is not as by default keeps a request from being continued: those that vLLM gets tomorrow too.
"""

IN_WORDS = {
    "seed": "a seed",
    "presence_penalty": "a penalty over its own output",
    "frequency_penalty": "a penalty over its own output",
    "structured_outputs": "a grammar",
    "bad_words": "bad words of several tokens",
    "thinking_token_budget": "a thinking budget",
    "repetition_detection": "repetition detection",
    "extra_args": "arguments for a plugin",
    "trace_decode_token_ids": "tokens that it is made to answer",
}

GREEDY_BELOW = 1e-5
"""The temperature below which vLLM takes the most likely token, and no seed matters (`_SAMPLING_EPS`)."""


OTHER_WEIGHTS = "it began on weights that have been replaced since"
"""Why an answer that has begun goes nowhere after an update: the rest would be another model's."""


def decide(
    parts: Sequence[Any],
    *,
    shown: bool,
    tokens: int,
    traits: EngineTraits | None = None,
    same_weights: bool = True,
) -> Decision:
    """What becomes of a request whose rank has died. Pure.

    Args:
        parts: the EngineCoreRequest, or all parts of a session so far.
        shown: whether anything of an answer has reached the frontend.
        tokens: the output tokens that have.
        traits: what is true for all requests of these engines.
        same_weights: whether the group still has the weights that its answer began on.
    """
    request, traits = parts[0], traits or EngineTraits()
    handed = _handed_over(request.sampling_params)
    if handed:
        return Decision(Move.FAIL, handed)
    if any(feature.data is None for part in parts for feature in part.mm_features or ()):
        return Decision(Move.FAIL, "its images or sounds were only in the dead rank's cache")
    if not shown:
        return Decision(Move.REPLAY, "it had answered nothing yet")
    if not same_weights:
        return Decision(Move.FAIL, OTHER_WEIGHTS)
    if request.sampling_params is None:
        return Decision(Move.FAIL, "it was half answered, and asks for no tokens")
    if len(parts) > 1 or request.resumable:
        return Decision(Move.FAIL, "it is a session whose input comes in parts, and the rank held what it had read")
    if traits.no_repeat:
        return Decision(Move.FAIL, traits.no_repeat)
    return _decide_begun(request, tokens, traits)


def _decide_begun(request: Any, tokens: int, traits: EngineTraits) -> Decision:
    params = request.sampling_params
    greedy = params.temperature < GREEDY_BELOW
    kept = departures(params) - SAFE
    if greedy:
        kept.discard("seed")
    if "bad_words" in kept and all(len(word) == 1 for word in params._bad_words_token_ids or ()):
        kept.discard("bad_words")
    kept.discard("_bad_words_token_ids")
    why = list(dict.fromkeys(IN_WORDS.get(name, name) for name in sorted(kept)))
    if request.prompt_embeds is not None:
        why.append("a prompt that is embeddings")
    if not why and not traits.no_continue:
        return Decision(Move.CONTINUE, f"it goes on behind the {tokens} tokens that it has")
    because = " and ".join([*([f"it has {_listed(why)}"] if why else []), *filter(None, [traits.no_continue])])
    if greedy or params.seed is not None:
        return Decision(Move.VERIFY, f"it is repeated and compared, since {because}")
    return Decision(Move.FAIL, f"{because}, so it cannot be continued exactly, nor repeated without a seed")


def _handed_over(params: Any) -> str:
    """Why a request that takes over another engine's work can be sent to one rank only."""
    extra = getattr(params, "extra_args", None) or {}
    if (extra.get("kv_transfer_params") or {}).get("do_remote_prefill"):
        # The engine that prefilled frees the blocks once they are read, or after a while: a second reader may find
        # another request's.
        return "its KV cache was handed to the rank that died"
    if extra.get("ec_transfer_params"):
        return "its encoder outputs were handed to the rank that died"
    return ""


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
