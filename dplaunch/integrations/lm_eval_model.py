"""The model that lm-evaluation-harness calls `dplaunch`: its own model for vLLM, over a group of ranks.

Importing this imports vLLM; `dplaunch.integrations.lm_eval` loads it when it is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import dplaunch
from dplaunch import demo
from dplaunch.errors import UsageError
from dplaunch.integrations.lm_eval_harness import constructor, vllm_model
from dplaunch.settings import parse_devices

HARNESS_ARGS = frozenset(
    {
        *("tokenizer", "tokenizer_mode", "tokenizer_revision", "trust_remote_code", "revision", "add_bos_token"),
        *("prefix_token_id", "max_gen_toks", "batch_size", "max_batch_size", "max_length", "device"),
        *("enable_thinking", "chat_template_args", "think_end_token", "truncation_side"),
    }
)
"""What the harness's model does with its arguments by itself: all that can be said beside a group that runs."""

_Harness: Any = vllm_model()


class DplaunchLM(_Harness):  # type: ignore[misc]
    """`--model dplaunch`. Its ranks stay for all tasks of a run, and end with it.

    Args:
        pretrained: a path or a hub name; None for the built-in model, or with `group` for that of the group.
        dp: number of data-parallel ranks.
        backend: "mp" or "ray".
        devices: those of each rank: [[0], [1]], or "0;1" as the command has it.
        group: a `dplaunch.Group` that runs; it is used with the weights that it has by then, and not closed.
        resume: the path of a results file: what is answered there is not asked again (see `Group.generate`).
        **options: all else of the harness's model for vLLM, of `dplaunch.launch`, and of vLLM's engine.

    Raises:
        UsageError: when an option cannot be.
        DplaunchError: when the group cannot be started; its subclasses say which kind.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        dp: int = 1,
        backend: str = "mp",
        devices: Sequence[Sequence[int | str]] | str | int | None = None,
        group: dplaunch.Group | None = None,
        resume: str | None = None,
        **options: Any,
    ) -> None:
        _check(options, group)
        self._own: dplaunch.Group | None = None
        launch: dict[str, Any] = {"dp": dp, "backend": backend, "devices": _devices(devices)}

        def make_engine(**engine_args: Any) -> _Engine:
            if group is not None:
                return _Engine(group, resume)
            given = {name: value for name, value in engine_args.items() if value is not None}
            self._own = dplaunch.launch(**launch, **given)
            return _Engine(self._own, resume)

        # All at once, whatever the harness's default of one at a time: how many a rank gets is for the group to say.
        options["batch_size"] = "auto"
        with self._closed_if_it_fails():
            constructor(_Harness, make_engine)(self, pretrained or _model_of(group), **options)

    @property
    def group(self) -> dplaunch.Group:
        """The ranks that answer."""
        engine: _Engine = self.model
        return engine.group

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes in its results beside the scores."""
        spec = self.group.plan.spec
        return {
            "dplaunch_version": dplaunch.__version__,
            "dp": len(self.group.plan.ranks),
            "backend": spec.backend,
            "weight_version": self.group.weight_version,
        }

    def close(self) -> None:
        """Ends the ranks, unless the group was handed over; idempotent."""
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _closed_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


class _Engine:
    """What the harness asks of a `vllm.LLM`, asked of a group."""

    def __init__(self, group: dplaunch.Group, resume: str | None) -> None:
        self.group = group
        self.llm_engine = SimpleNamespace(model_config=_config_of(group))
        self._resume = resume

    def generate(self, prompts: Sequence[Any], *, sampling_params: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
        return self.group.generate(
            prompts,
            sampling_params,
            lora_request=lora_request,
            progress=None if use_tqdm else False,
            resume=self._resume,
        )


def _config_of(group: dplaunch.Group) -> Any:
    return group._group.engine.model_config


def _model_of(group: dplaunch.Group | None) -> str:
    return str(demo.demo_model(print).path if group is None else _config_of(group).model)


def _check(options: Mapping[str, Any], group: dplaunch.Group | None) -> None:
    if "data_parallel_size" in options:
        raise UsageError("data_parallel_size is dplaunch's work", hint="Use dp=N.")
    if group is None:
        return
    if not isinstance(group, dplaunch.Group):
        raise UsageError(
            f"group is a {type(group).__name__}, not a dplaunch.Group",
            hint="lm-evaluation-harness is not asynchronous: hand over what dplaunch.launch returns.",
        )
    if unused := sorted(set(options) - HARNESS_ARGS):
        raise UsageError(
            f"{', '.join(unused)} cannot be changed in a group that runs", hint="Say it where the group is launched."
        )


def _devices(given: Sequence[Sequence[int | str]] | str | int | None) -> Sequence[Sequence[int | str]] | None:
    # From the command it comes as a word, or as a number.
    return parse_devices(str(given)) if isinstance(given, str | int) else given
