"""What the model for lm-evaluation-harness relies on of it, without engines."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from typing import Any

import pytest

from dplaunch.errors import UsageError
from dplaunch.integrations import lm_eval_harness

pytest.importorskip("lm_eval")


class Harness:
    """Makes its engine as the harness's model does."""

    def __init__(self, pretrained: str, *, dtype: str = "auto", **kwargs: Any) -> None:
        super().__init__()
        self.model = LLM(model=pretrained, dtype=dtype, **kwargs)


def LLM(**options: Any) -> Any:
    raise AssertionError("the stock engine was made")


def test_the_harnesss_constructor_makes_our_engine_and_its_own_is_as_it_was() -> None:
    ours = object.__new__(Harness)
    lm_eval_harness.constructor(Harness, lambda **options: options)(ours, "M", seed=1)
    assert ours.model == {"model": "M", "dtype": "auto", "seed": 1}
    with pytest.raises(AssertionError, match="the stock engine was made"):
        Harness("M")


def test_a_harness_that_makes_its_engine_in_another_way_is_refused() -> None:
    class Other:
        def __init__(self) -> None:
            self.model = None

    with pytest.raises(UsageError, match=r"lm-eval .* makes its vLLM engine in a way"):
        lm_eval_harness.constructor(Other, dict)


def test_the_version_of_vllm_is_that_of_whichever_build_is_installed() -> None:
    assert lm_eval_harness.version("vllm").startswith("0.")
    assert lm_eval_harness.version("pytest") == importlib.metadata.version("pytest")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        lm_eval_harness.version("no-such-package-anywhere")


def test_one_import_registers_the_model_beside_the_harnesss_own_and_loads_no_engine() -> None:
    code = (
        "import sys, dplaunch.integrations.lm_eval as ours\n"
        "from lm_eval.api.registry import model_registry\n"
        "ours.register()\n"
        "from lm_eval.api.registry import get_model\n"
        "print('dplaunch' in model_registry, 'vllm' in sys.modules, get_model('dummy').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "DummyLM"]


def test_without_the_harness_the_line_that_installs_it_is_named() -> None:
    code = (
        "import importlib.util as u\n"
        "u.find_spec = lambda name, package=None: None\n"
        "import dplaunch.integrations.lm_eval"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'dplaunch[lm-eval]'" in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--model", "dplaunch", "--tasks", "a,b"], ["ls", "tasks"]])
def test_the_command_hands_everything_to_the_harness(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dplaunch import cli
    from dplaunch.integrations import lm_eval

    given: list[str] = []
    monkeypatch.setattr(lm_eval, "main", given.extend)
    assert cli.main(["lm-eval", *words]) == 0
    assert given == words
