"""The callback for transformers' Trainer: a real trainer, and a group that only notes what is asked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dplaunch.errors import UsageError

pytestmark = pytest.mark.leaves("torch's training starts threads that it keeps")

pytest.importorskip("accelerate")


class NotedGroup:
    """Notes what is asked of it, and the weights that it is given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.seen: list[float] = []

    def update_weights(self, model: Any, version: int, keep: str | None) -> None:
        self.calls.append(("weights", version, keep))
        self.seen.append(float(model.w.detach().sum()))

    def release_memory(self) -> None:
        self.calls.append("sleep")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        self.calls.append("awake")
        yield
        self.calls.append("sleep")


def make_trainer(directory: Path, steps: int, logging_steps: int = 1) -> Any:
    """A trainer of a model with a single weight, from 0 towards 1."""
    import torch
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: Any, labels: Any = None) -> Any:
            return {"loss": ((self.w * x - labels) ** 2).mean()}

    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        logging_steps=logging_steps,
        learning_rate=0.1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lessons = [{"x": torch.ones(1), "labels": torch.ones(1)} for _ in range(64)]
    return Trainer(model=Model(), args=arguments, train_dataset=lessons)


def callback(trainer: Any, group: Any, **options: Any) -> Any:
    from dplaunch.integrations.transformers import EvalCallback

    def evaluate(group: Any) -> dict[str, float]:
        group.calls.append("evaluate")
        return {"score": group.seen[-1]}

    return EvalCallback(trainer, group, evaluate, **options)


def test_the_current_weights_are_evaluated_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    trainer, group = make_trainer(tmp_path, steps=5), NotedGroup()
    trainer.add_callback(callback(trainer, group, every=2))
    trainer.train()
    weights = [("weights", step, None) for step in (2, 4, 5)]
    assert group.calls == [call for each in weights for call in (each, "evaluate")]
    assert group.seen == sorted(set(group.seen))
    assert group.seen[-1] == float(trainer.model.w.detach())


def test_a_last_step_that_was_evaluated_is_not_evaluated_again(tmp_path: Path) -> None:
    trainer, group = make_trainer(tmp_path, steps=4), NotedGroup()
    trainer.add_callback(callback(trainer, group, every=2, at_start=True, keep="memory"))
    trainer.train()
    assert [call for call in group.calls if call != "evaluate"] == [("weights", step, "memory") for step in (0, 2, 4)]
    assert group.seen[0] == 0.0


def test_the_metrics_are_in_the_trainers_log_and_the_loss_is_still_there(tmp_path: Path) -> None:
    trainer, group = make_trainer(tmp_path, steps=4, logging_steps=2), NotedGroup()
    trainer.add_callback(callback(trainer, group, every=2))
    trainer.train()
    history = trainer.state.log_history
    assert {each["step"]: each["eval_score"] for each in history if "eval_score" in each} == dict(
        zip((2, 4), group.seen, strict=True)
    )
    assert [each["step"] for each in history if "loss" in each] == [2, 4]


def test_between_evaluations_the_group_sleeps_when_asked(tmp_path: Path) -> None:
    trainer, group = make_trainer(tmp_path, steps=2), NotedGroup()
    trainer.add_callback(callback(trainer, group, every=2, release_memory=True))
    trainer.train()
    assert group.calls == ["sleep", ("weights", 2, None), "awake", "evaluate", "sleep"]


def test_only_process_zero_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerState

    trainer, group = make_trainer(tmp_path, steps=2), NotedGroup()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.add_callback(callback(trainer, group, every=1, at_start=True, release_memory=True))
    trainer.add_callback(callback(trainer, None, every=1))
    # A state is made anew by `train`, which asks accelerate which process it is.
    monkeypatch.setattr(TrainerState, "is_world_process_zero", property(lambda self: False, lambda self, value: None))
    trainer.train()
    assert group.calls == []


def test_process_zero_without_a_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="process zero has no group"):
        callback(make_trainer(tmp_path, steps=2), None, every=1)


def test_no_number_of_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="every=0 is no number of steps"):
        callback(make_trainer(tmp_path, steps=2), NotedGroup(), every=0)


def test_a_model_that_is_spread_over_processes_is_refused() -> None:
    from types import SimpleNamespace

    from dplaunch.integrations.transformers import _refuse_shards

    shard = SimpleNamespace(full_tensor=lambda: None)
    model = SimpleNamespace(parameters=lambda: iter([shard]))
    _refuse_shards(model, world_size=1)
    with pytest.raises(UsageError, match="spread over the trainer's processes"):
        _refuse_shards(model, world_size=2)
