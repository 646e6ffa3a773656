"""What the user holds: a group of ranks behind one engine. `AsyncGroup` is the real thing, `Group` its sync face."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from dplaunch.batch import OnError, Prompt, iter_batch, run_batch, stream_one
from dplaunch.batch_progress import Progress
from dplaunch.events import Listener
from dplaunch.model_control import ModelControl
from dplaunch.progress import ReportKind, make_reporter
from dplaunch.resume_keys import Keys
from dplaunch.saved_batch import Resume
from dplaunch.spec import LaunchSpec
from dplaunch.supervisor import Supervisor


class AsyncGroup(ModelControl):
    """A group of data-parallel ranks, used from one event loop.

    Made by `dplaunch.launch_async`; use it as an async context manager, or call `close`.
    """

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Any = None,
        *,
        data_parallel_rank: int | None = None,
        lora_request: Any = None,
        on_error: OnError = "raise",
        progress: Progress = None,
        resume: Resume = None,
        key: Keys | None = None,
    ) -> list[Any]:
        """Answers a batch; the results are in the order of the prompts.

        Every rank is kept just full, and the rest is handed out as ranks free up: in the order of the prompts, or, for
        prompts that this group has answered before, those first whose answers were the longest.

        Args:
            prompts: strings, lists of token ids, lists of chat messages, or vLLM prompt dicts; or one of them.
            params: one SamplingParams (or PoolingParams) for all, or one for each prompt; None for the model's own.
            data_parallel_rank: pins the whole batch to a rank.
            lora_request: one LoRARequest for all, or one (or None) for each prompt.
            on_error: "raise" the first failed prompt's error after the others have finished, or "return" each
                failed prompt's RequestError in its place.
            progress: whether a bar is shown: None shows it on a terminal and in a notebook, True writes lines elsewhere
                too. Or a function, which gets a `BatchState` a few times a second.
            resume: the path of a results file. What is there already is not asked again; what is answered is written
                there at once, one line of JSON each. See docs/embedding.md.
            key: what names the prompts in that file: a function of the prompt, or one string for each; None for a
                hash of the prompt. Other parameters, another adapter or other weights make it another name always.

        Returns:
            vLLM's RequestOutput (or PoolingRequestOutput) for each prompt.

        Raises:
            RequestError: with on_error="raise", for the first prompt that failed; it names the index.
            GroupDeadError: when the group died meanwhile.
            UsageError: when params, LoRA requests or keys do not match the prompts in number.
            ResultsFileError: when the results file cannot be used, or takes no more.
        """
        return await run_batch(
            self.engine,
            prompts,
            params,
            data_parallel_rank=data_parallel_rank,
            lora_request=lora_request,
            on_error=on_error,
            progress=progress,
            resume=resume,
            key=key,
            **self._facts(),
        )

    async def generate_iter(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Any = None,
        *,
        data_parallel_rank: int | None = None,
        lora_request: Any = None,
        on_error: OnError = "raise",
        progress: Progress = None,
        resume: Resume = None,
        key: Keys | None = None,
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """Answers a batch and yields (index, output) as each is finished; all else is as for `generate`.

        With `resume`, what the file has comes first, in order. The ranks do not wait for the reader. Leaving the loop
        early aborts what is in flight: close the generator (`contextlib.aclosing`), or it happens when it is collected.
        With on_error="raise", failed prompts are left out, and the first one's error is raised at the end.
        """
        outputs = iter_batch(
            self.engine,
            prompts,
            params,
            data_parallel_rank=data_parallel_rank,
            lora_request=lora_request,
            on_error=on_error,
            progress=progress,
            resume=resume,
            key=key,
            **self._facts(),
        )
        async with contextlib.aclosing(outputs):
            async for index, output in outputs:
                yield index, output

    def _facts(self) -> dict[str, Any]:
        """What a batch has to know of its group."""
        counters, weights = self.client.rank_counters, self._crew.weights
        return {
            "slots": lambda: self.config.max_num_seqs * len(self.plan.ranks),
            "rank_tokens": lambda: {rank: counted.tokens for rank, counted in counters.items()},
            # An answer of other weights is another answer; those of the start have no say in what they are called.
            "weights": weights.version if weights.number else None,
            "lengths": self._lengths,
        }

    async def stream(
        self,
        prompt: Prompt,
        params: Any = None,
        *,
        data_parallel_rank: int | None = None,
        lora_request: Any = None,
    ) -> AsyncGenerator[str, None]:
        """Yields the pieces of one answer's text as they come."""
        deltas = stream_one(
            self.engine, prompt, params, data_parallel_rank=data_parallel_rank, lora_request=lora_request
        )
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                yield delta

    async def scale(self, dp: int, drain_s: float | None = None) -> None:
        """Changes the number of ranks while the group serves on; no request fails of it.

        Ranks that join take requests when all of them are ready; when one does not start, none joins. Ranks leave
        from the highest number down: they take no new request, and what is still in flight at the deadline moves to
        the ranks that stay. Requests that are pinned to a rank that leaves end with a RequestError.

        Args:
            dp: the number of ranks from now on.
            drain_s: seconds for the requests of ranks that leave to end where they are; None for 30.

        Raises:
            UsageError: when it is below min_ranks, or another change is under way.
            ResourceError: when the ranks do not fit; nothing has been started then.
            RankFailedError: when a rank does not start; the group is as it was.
            GroupClosedError: when the group is closed meanwhile.
        """
        await self._running().scale(dp, drain_s)

    async def restart(
        self, ranks: Sequence[int] | None = None, rolling: bool = False, drain_s: float | None = None
    ) -> None:
        """Restarts ranks while the group serves on; no request fails of it, and none counts as a rank's failure.

        A rank that restarts takes no new request; what is in flight at the deadline moves to other ranks, or waits.
        One that does not come back is tried again as one that died is.

        Args:
            ranks: which; None for all.
            rolling: one after the other, each when the one before is ready again; else all of them at once.
            drain_s: seconds for requests to end where they are; None for 30.

        Raises:
            UsageError: when there is no such rank, or another change is under way.
            RankFailedError: when a rank does not come back at once; a rolling restart ends there.
            GroupClosedError: when the group is closed meanwhile.
        """
        await self._running().restart(ranks, rolling, drain_s)

    def _running(self) -> Supervisor:
        """The ranks, of a group that is neither closed nor dead."""
        _ = self.engine
        return self.supervisor

    async def call(self, method: str, *args: Any, rank: int | None = None) -> list[Any]:
        """Calls an engine-core utility method on all ranks, or on one; one result a rank, in rank order."""
        return await self.client.call(method, *args, rank=rank)


async def open_group(spec: LaunchSpec, *, progress: bool | None, listeners: Sequence[Listener]) -> AsyncGroup:
    """Starts a group and shows it.

    Args:
        progress: whether the start is shown; None shows it on a terminal. What goes wrong is always shown.
    """
    shown = sys.stderr.isatty() if progress is None else progress
    with make_reporter(ReportKind.AUTO if shown else ReportKind.QUIET, ranks=spec.dp, quiet_after=True) as reporter:
        return await AsyncGroup(spec, listeners=[reporter, *listeners]).open()
