"""LoRA on devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dplaunch
from benchmarks.gpu import looks
from tests.gpu.launchers import SMALL
from tests.lora import RANK, write_adapter

pytest.importorskip("safetensors")


def test_an_adapter_changes_the_answers_that_name_it_also_of_a_rank_that_has_come_back(
    path: str, engine_args: dict[str, Any], work: Path
) -> None:
    (work / "adapter").mkdir()
    adapter = write_adapter(work / "adapter", Path(path), seed=1)
    args = engine_args | SMALL | {"enable_lora": True, "max_lora_rank": RANK, "enable_sleep_mode": False}
    with dplaunch.launch(model=path, progress=False, **args) as group:
        plain = looks.answers(group, 0, 2)
        style = group.load_lora("style", adapter)
        styled = looks.answers(group, 0, 2, style)
        assert styled != plain == looks.answers(group, 0, 2)
        looks.kill_rank(group, 0)
        assert looks.answers(group, 0, 2, style) == styled
