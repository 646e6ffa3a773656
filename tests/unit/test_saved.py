"""What a results file keeps of an answer comes back as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest

from dplaunch import seam
from dplaunch.seam import frontend, saved
from dplaunch.seam.relied import numbers


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """Imported with os.environ left as it was."""
    frontend.import_vllm(quiet=True)


def answered() -> Any:
    """An output with all that a file keeps."""
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

    logprobs = [{5: Logprob(-0.25, 1, "é"), 7: Logprob(-math.inf, None, None)}, {6: Logprob(-1.5, 3, "\ud800")}]
    versions = saved._weight_versions([("v1", 0, 2)])
    assert bool(versions) == (numbers(str(seam.installed_version())) >= (0, 32))
    choices = [
        CompletionOutput(0, "é?", [5, 6], -1.75, logprobs, finish_reason="stop", stop_reason="?", **versions),
        CompletionOutput(1, "", [], None, None, finish_reason="length", stop_reason=None),
    ]
    return RequestOutput("r-3", "Wie?", [1, 2], [None, {2: Logprob(-3.0, 1, "x")}], choices, True, num_cached_tokens=1)


def there_and_back(output: Any, lora: Any = None) -> Any:
    return saved.unpack(json.loads(json.dumps(saved.pack(output))), lora)


def test_a_resumed_answer_has_prompt_tokens_text_reasons_and_logprobs_of_the_first_one() -> None:
    output = answered()
    again = there_and_back(output, "lora")
    assert again.finished
    for name in ("request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "num_cached_tokens"):
        assert getattr(again, name) == getattr(output, name)
    assert again.lora_request == again.outputs[0].lora_request == "lora"
    for choice in (*output.outputs, *again.outputs):
        choice.lora_request = None
    assert again.outputs == output.outputs


def test_flat_logprobs_come_back_as_a_list_of_dicts() -> None:
    from vllm.logprobs import FlatLogprobs

    output = answered()
    usual = output.outputs[0].logprobs
    flat = FlatLogprobs()
    for position in usual:
        flat.append(position)
    output.outputs[0].logprobs = flat
    assert there_and_back(output).outputs[0].logprobs == usual


def test_a_pooling_answer_comes_back_with_its_numbers_and_their_type() -> None:
    import torch
    from vllm.outputs import PoolingOutput, PoolingRequestOutput

    for dtype in (torch.float32, torch.bfloat16):
        data = torch.tensor([[0.1, -math.inf], [3.0, 1e-7]], dtype=dtype)
        again = there_and_back(PoolingRequestOutput("r", PoolingOutput(data), [1], 0, True))
        assert again.outputs.data.dtype is dtype
        assert torch.equal(again.outputs.data, data)
        assert (again.request_id, again.prompt_token_ids, again.finished) == ("r", [1], True)


def test_params_are_structs_that_can_be_made_without_arguments() -> None:
    from vllm import PoolingParams, SamplingParams

    for kind in (SamplingParams, PoolingParams):
        assert isinstance(kind(), msgspec.Struct)
