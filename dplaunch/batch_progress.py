"""How far a batch is, for those who watch it: drawn, written or handed to a function."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from dplaunch.bars import Bar

MIN_WORK_S = 1.0
"""Seconds of work before a batch's bar appears: a flicker for less tells nobody anything."""

CALL_INTERVAL_S = 0.25
"""Seconds between two calls of a function that watches, as between two drawings of a bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchState:
    """How far a batch is.

    Args:
        total: prompts.
        done: prompts that are answered or have failed, those from a results file included.
        resumed: prompts whose answers came from a results file.
        tokens: of the answers that this call got.
        seconds: since the call began.
        left_s: seconds until the end, if the prompts that are left are like those that are done; None when not known.
        shares: each rank's part of the tokens that the group has answered since, from 0 to 1; empty before the first.
    """

    total: int
    done: int
    resumed: int
    tokens: int
    seconds: float
    left_s: float | None
    shares: Mapping[int, float]

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, of this call's answers."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


Progress = bool | Callable[[BatchState], None] | None
"""None: shown on a terminal and in a notebook. True: as lines elsewhere too. False: never. Or a function: called in
the group's event loop, four times a second at most and once at the end; what it raises ends the batch."""


class BatchProgress:
    """Counts what a batch has done, and shows it on stderr or to a function. A context manager around the work.

    A bar is drawn from the first advance after `MIN_WORK_S`.

    Args:
        total: prompts in the batch.
        progress: how it is shown.
        resumed: prompts that were answered before.
        rank_tokens: the tokens that each rank has answered so far, in all its life.
    """

    def __init__(
        self,
        total: int,
        progress: Progress = None,
        *,
        resumed: int = 0,
        rank_tokens: Callable[[], Mapping[int, int]] = dict,
    ) -> None:
        self._total = total
        self._tell = progress if callable(progress) else None
        self._may_draw = progress is not False and self._tell is None and total > resumed
        self._lines_too = progress is True
        self._done = self._resumed = resumed
        self._tokens = 0
        self._rank_tokens = rank_tokens
        self._before = dict(rank_tokens())
        self._began = self._shown = time.monotonic()
        self._bar: Bar | None = None

    @property
    def state(self) -> BatchState:
        """How far it is."""
        seconds, fresh = time.monotonic() - self._began, self._done - self._resumed
        gained = {rank: count - self._before.get(rank, 0) for rank, count in sorted(self._rank_tokens().items())}
        together = sum(gained.values())
        return BatchState(
            total=self._total,
            done=self._done,
            resumed=self._resumed,
            tokens=self._tokens,
            seconds=seconds,
            left_s=seconds / fresh * (self._total - self._done) if fresh else None,
            shares={rank: count / together for rank, count in gained.items()} if together else {},
        )

    def advance(self, tokens: int = 0, *, prompts: int = 1) -> None:
        """Counts finished prompts and new tokens, and shows that where it is time to."""
        self._done += prompts
        self._tokens += tokens
        now, is_last = time.monotonic(), self._done >= self._total
        if self._tell is not None:
            if is_last or now - self._shown >= CALL_INTERVAL_S:
                self._shown = now
                self._tell(self.state)
        elif self._may_draw and now - self._began >= MIN_WORK_S:
            self._draw(now, is_last)

    def __enter__(self) -> Self:
        self._began = self._shown = time.monotonic()
        self._before = dict(self._rank_tokens())
        if self._tell is not None and self._done >= self._total:
            self._tell(self.state)  # There is nothing to do, so there will be no other end.
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()

    def _draw(self, now: float, is_last: bool) -> None:
        from dplaunch.bars import choose_bar

        try:
            if self._bar is None:
                self._bar = choose_bar(self._total, lines_too=self._lines_too)
                self._may_draw = self._bar is not None
            if self._bar is not None and (is_last or now - self._shown >= self._bar.interval_s):
                self._shown = now
                self._bar.draw(self.state)
        except (OSError, ValueError):
            self._may_draw = False  # the terminal is gone; the work goes on
