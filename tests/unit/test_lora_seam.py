"""The operations that vLLM's CPU workers apply adapters with."""

from __future__ import annotations

from typing import Any

import pytest

from dplaunch.seam import lora

ADAPTER, NONE = 0, -1


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those of vLLM, mended in this process for one test."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for module in (lora_ops, punica_cpu):
        for name in lora.OPERATIONS:
            monkeypatch.setattr(module, name, getattr(module, name))
    lora.tell_apart(None)
    return punica_cpu


@pytest.mark.parametrize("kind", ["decode", "decode slice", "prompt", "prompt slice"])
def test_a_token_without_an_adapter_gets_nothing_of_the_last_slots(operations: Any, kind: str) -> None:
    import torch

    inputs = torch.tensor([[1.0, 2.0], [float("inf"), 2.0], [3.0, 4.0]])
    weights = torch.ones(1, 1, 4, 2)  # slots, 1, outputs, rank
    output = torch.zeros(3, 4)
    indices = torch.tensor([ADAPTER, NONE, ADAPTER])
    lengths = torch.ones(3, dtype=torch.long)
    where = (0, 4) if "slice" in kind else ()
    if "decode" in kind:
        name = "bgmv_expand_slice" if where else "bgmv_expand"
        getattr(operations, name)(inputs, weights, output, indices, *where, True)
    else:
        name = "sgmv_expand_slice" if where else "sgmv_expand"
        about = (lengths.cumsum(0) - 1, lengths, indices, 3, 1, 3)
        getattr(operations, name)(inputs, weights, output, *about, *where, True)
    assert output.tolist() == [[3.0] * 4, [0.0] * 4, [7.0] * 4]


def test_operations_that_are_mended_twice_are_mended_once(operations: Any) -> None:
    once = operations.bgmv_expand
    lora.tell_apart(None)
    assert operations.bgmv_expand is once


class _Config:
    def __init__(self, adapters: bool, device: str) -> None:
        self.lora_config = object() if adapters else None
        self.device_config = type("Device", (), {"device_type": device})


def test_only_engines_with_adapters_on_a_cpu_need_it() -> None:
    cases = [(True, "cpu"), (True, "cuda"), (False, "cpu")]
    assert [lora.needs_care(_Config(*case)) for case in cases] == [True, False, False]
