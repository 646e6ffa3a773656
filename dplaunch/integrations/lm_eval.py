"""lm-evaluation-harness: importing this makes `dplaunch` one of its models.

The harness (0.4.13) finds models by name in a registry of its own and has no way for an installed package to add to it.
So there is one import for Python, and a command for the shell that does the import and then runs the harness's own:

    dplaunch lm-eval --model dplaunch --model_args pretrained=M,dp=2,backend=mp --tasks T

`python -m dplaunch.integrations.lm_eval` is the same. The model's class is in `dplaunch.integrations.lm_eval_model`; it
imports vLLM, and is loaded when it is needed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dplaunch.errors import UsageError

if TYPE_CHECKING:
    from dplaunch.integrations.lm_eval_model import DplaunchLM

__all__ = ["DplaunchLM", "main", "register"]

NAME = "dplaunch"
"""What the harness calls it: `--model dplaunch`."""

INSTALL = "pip install 'dplaunch[lm-eval]'"

_TARGET = "dplaunch.integrations.lm_eval_model:DplaunchLM"


def register() -> None:
    """Adds the model to the harness's registry; idempotent.

    Raises:
        UsageError: when the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-evaluation-harness is not installed", hint=f"Install it: {INSTALL}")
    # The harness fills its registry when it finds it empty: one that has our model alone would have no other.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=_TARGET)


def main(arguments: Sequence[str]) -> None:
    """Runs the harness's command, with `dplaunch` among its models.

    Raises:
        UsageError: when the harness is not installed.
        SystemExit: as the harness ends.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    # The harness reads the process's arguments and takes no others.
    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()


def __getattr__(name: str) -> Any:
    if name != "DplaunchLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dplaunch.integrations import lm_eval_model

    return lm_eval_model.DplaunchLM


if __name__ == "__main__":
    main(sys.argv[1:])
else:
    register()
