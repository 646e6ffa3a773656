"""transformers' Trainer: an evaluation every so many steps, by a group that has the weights of that step.

Importing this imports transformers and torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from dplaunch.errors import UsageError
from dplaunch.sync import Group
from dplaunch.weight_source import Keep

Evaluate = Callable[[Group], Mapping[str, float]]
"""Asks the group whatever it wants to know of the model, and returns numbers by name."""

PREFIX = "eval_"
"""What a metric's name begins with in the trainer's log, as those of the trainer's own evaluations do."""


class EvalCallback(TrainerCallback):  # type: ignore[misc]
    """Gives a group the current weights every so many steps, and at the end, and logs what `evaluate` finds.

        trainer.add_callback(EvalCallback(trainer, group, evaluate, every=100))

    Only the world's process zero does so; the others wait for it at their next collective.

    Args:
        trainer: what is trained; its `log` gets the metrics, and so does whatever it reports to.
        group: the ranks, launched from a checkpoint of the same model; None in processes that are not zero.
        evaluate: called with the group; its metrics' names get `eval_` in front unless they have it.
        every: steps of the optimizer from one evaluation to the next.
        at_start: whether the model is evaluated before the first step too.
        release_memory: whether the group sleeps while the trainer trains (CUDA, with `enable_sleep_mode`).
        keep: where a copy of the weights is kept, for a rank that dies after the training has gone on; without one it
            is stale until the next evaluation.

    Raises:
        UsageError: when `every` is below 1, or process zero has no group.
    """

    def __init__(
        self,
        trainer: Any,
        group: Group | None,
        evaluate: Evaluate,
        *,
        every: int,
        at_start: bool = False,
        release_memory: bool = False,
        keep: Keep | None = None,
    ) -> None:
        if every < 1:
            raise UsageError(f"every={every} is no number of steps", hint="Give 1 or more.")
        if group is None and trainer.is_world_process_zero():
            raise UsageError("process zero has no group", hint="It is the one that launches it.")
        self._trainer = trainer
        self._group = group
        self._evaluate = evaluate
        self._every = every
        self._at_start = at_start
        self._release = release_memory
        self._keep = keep
        self._last: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Has the group sleep, if asked, and evaluates what the training begins with, if asked."""
        self._last = None
        if self._group is None or not state.is_world_process_zero:
            return
        if self._release:
            self._group.release_memory()
        if self._at_start:
            self._run(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluates when it is time."""
        if state.is_world_process_zero and state.global_step % self._every == 0:
            self._run(state.global_step, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluates what the training ends with, unless that has just been done."""
        if state.is_world_process_zero and state.global_step != self._last:
            self._run(state.global_step, kwargs["model"])

    def _run(self, step: int, model: Any) -> None:
        if self._group is None:
            raise UsageError("process zero has no group", hint="It is the one that launches it.")
        _refuse_shards(model, self._trainer.args.world_size)
        self._last = step
        self._group.update_weights(model, version=step, keep=self._keep)
        with self._group.awake() if self._release else contextlib.nullcontext():
            found = self._evaluate(self._group)
        # Trainer.log notes that all is logged; the loss of this step may still have to be.
        wanted = self._trainer.control.should_log
        self._trainer.log({PREFIX + name.removeprefix(PREFIX): value for name, value in found.items()})
        self._trainer.control.should_log = wanted


def _refuse_shards(model: Any, world_size: int) -> None:
    """A sharded tensor is gathered by all processes together, and here is only one."""
    if world_size > 1 and any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise UsageError(
            "the model's parameters are spread over the trainer's processes",
            hint="Gather them in all processes, and call group.update_weights in process zero.",
        )
