"""What we rely on of lm-evaluation-harness (checked with 0.4.13): its model for vLLM, with another engine in it.

`lm_eval.models.vllm_causallms.VLLM` tokenizes, truncates, applies chat templates, orders requests, reads logprobs, and
asks one object for answers: what its constructor makes as `LLM(**model_args)`. Of that it uses
`generate(prompts, sampling_params=, use_tqdm=, lora_request=)` and `llm_engine.model_config`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from dplaunch import seam
from dplaunch.errors import UsageError

_importing = threading.Lock()

_version = importlib.metadata.version


def vllm_model() -> Any:
    """The harness's class. Imports vLLM.

    Its module asks for the version of a distribution called `vllm`, and the CPU build of vLLM has another name. Only
    while that module is imported the question is answered for it; the module keeps that answer.
    """
    from dplaunch.seam import frontend

    # First, so that nothing but the harness's own module is imported below.
    frontend.import_vllm(quiet=True)
    import lm_eval.models.utils  # noqa: F401

    with _importing, _with_a_version_of_vllm():
        from lm_eval.models.vllm_causallms import VLLM
    return VLLM


@contextlib.contextmanager
def _with_a_version_of_vllm() -> Iterator[None]:
    try:
        _version("vllm")
    except importlib.metadata.PackageNotFoundError:
        with mock.patch.object(importlib.metadata, "version", version):
            yield
    else:
        yield


def version(name: str) -> str:
    """A distribution's version; for `vllm` that of whichever build of it is installed.

    Raises:
        PackageNotFoundError: when it is not installed.
    """
    found = seam.installed_version() if name == "vllm" else None
    return found or _version(name)


def constructor(harness: Any, make_engine: Callable[..., Any]) -> Callable[..., None]:
    """The harness's own constructor, in which `LLM(...)` is `make_engine(...)`.

    A function of its own with the same code: nothing of the harness's is changed, for stock models beside it.

    Raises:
        UsageError: when this version of the harness makes its engine in another way.
    """
    made: Any = harness.__init__
    if "LLM" not in made.__code__.co_names:
        found = importlib.metadata.version("lm-eval")
        raise UsageError(
            f"lm-eval {found} makes its vLLM engine in a way that this dplaunch does not know",
            hint="dplaunch was checked with lm-eval 0.4.13.",
        )
    names = {**made.__globals__, "LLM": make_engine}
    other = types.FunctionType(made.__code__, names, made.__name__, made.__defaults__, made.__closure__)
    other.__kwdefaults__ = made.__kwdefaults__
    return other
