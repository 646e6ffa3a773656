"""A batch and its results file: which prompts are answered already, and where new answers go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from dplaunch.errors import RequestError, ResultsFileError, UsageError
from dplaunch.resume import ResultsFile
from dplaunch.resume_keys import Keys, ResultId, result_ids
from dplaunch.seam import prompts as seam_prompts
from dplaunch.seam import saved as seam_saved

Resume = str | os.PathLike[str] | None
"""The path of a results file; None for none."""


class SavedBatch:
    """Finds and keeps the answers of one batch; without a file it finds and keeps nothing. A context manager.

    Raises:
        UsageError: when `key` is given without a file, or there is no key for a prompt.
        ResultsFileError: see `ResultsFile`.
    """

    def __init__(
        self,
        engine: Any,
        prompts: Sequence[Any],
        params: Sequence[Any],
        loras: Sequence[Any],
        *,
        resume: Resume,
        key: Keys | None,
        weights: str | None,
    ) -> None:
        self._file: ResultsFile | None = None
        self._loras = loras
        self._ids: list[ResultId] = []
        if resume is None:
            if key is not None:
                raise UsageError("key is given without resume", hint="Say with resume= which file it is for.")
            return
        facts = _facts(engine, params)
        self._ids = result_ids(prompts, facts, loras, keys=key, weights=weights)
        self._file = ResultsFile(resume, seam_prompts.model_name(engine))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def has(self, index: int) -> bool:
        """Whether the prompt is answered already."""
        return self._file is not None and self._ids[index] in self._file

    def output(self, index: int) -> Any:
        """The prompt's saved answer.

        Raises:
            ResultsFileError: when it is no answer.
        """
        if self._file is None:
            raise KeyError(index)
        try:
            return seam_saved.unpack(self._file.output(self._ids[index]), self._loras[index])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ResultsFileError(
                f"{self._file.path} holds no whole result for prompt {index}: {error!r}",
                hint="Delete its line: the prompt is then asked again.",
            ) from error

    async def keep(self, index: int, result: Any) -> None:
        """Writes a prompt's answer; not an error, nor an answer that was broken off: those are tried again.

        Raises:
            ResultsFileError: when the disk does not take it.
        """
        if self._file is None or isinstance(result, RequestError) or _is_broken_off(result):
            return
        self._file.add(self._ids[index], seam_saved.pack(result))
        await self._file.sync()


def _facts(engine: Any, params: Sequence[Any]) -> list[dict[str, Any]]:
    # Nearly always one object for all prompts.
    known: dict[int, dict[str, Any]] = {}
    for index, one in enumerate(params):
        if id(one) not in known:
            try:
                asked = seam_prompts.default_params(engine) if one is None else one
                known[id(one)] = seam_saved.params_facts(asked)
            except TypeError as error:
                raise UsageError(
                    f"no key can be made of the params of prompt {index}: {error}",
                    hint="Leave resume out, or what has no plain form.",
                ) from error
    return [known[id(one)] for one in params]


def _is_broken_off(output: Any) -> bool:
    choices = output.outputs
    return isinstance(choices, list) and any(choice.finish_reason == "abort" for choice in choices)
