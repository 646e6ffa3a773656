"""The chaos table, as data: what is done, when, on which backends, what comes of it, and the words that say so.

A row with an act is run by `test_table`, under load. One without is a test of its own, which it names. The table in
docs/reliability.md is made of this one (`python -m tests.chaos.document`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.chaos import acts
from tests.chaos.rig import Rig

BOTH = ("mp", "ray")

GOES_ON = "Its requests go on elsewhere from the tokens that they have; a stream pauses. The rank is replaced."
ALL_KEPT = "every request, every token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that goes wrong.

    Args:
        name: a word or two, for the test's id.
        fault: what is done.
        when: in which situation.
        seen: what the user sees.
        kept: what is not lost.
        words: found in the messages of the events, or of the error.
        backends: where it is run.
        act: does it to a group of stand-ins under load; None where `test` is the whole row.
        test: the test that is this row, or that runs it in another way too: with real engines, as a command.
    """

    name: str
    fault: str
    when: str
    seen: str
    kept: str
    words: tuple[str, ...] = ()
    backends: tuple[str, ...] = BOTH
    act: Callable[[Rig], Awaitable[None]] | None = None
    test: str = ""


TABLE = (
    Row(
        name="sigkill",
        fault="SIGKILL of a rank",
        when="serving",
        seen=GOES_ON,
        kept=ALL_KEPT,
        words=("rank 1 died while serving: SIGKILL(-9)", "rank 1 is back"),
        act=acts.kill,
        test="tests/chaos/test_real.py::test_a_killed_rank",
    ),
    Row(
        name="sigsegv",
        fault="SIGSEGV of a rank",
        when="serving",
        seen=GOES_ON,
        kept=ALL_KEPT,
        words=("rank 1 died while serving: SIGSEGV(-11)", "rank 1 is back"),
        act=acts.segfault,
    ),
    Row(
        name="sigterm",
        fault="SIGTERM of a rank, not by dplaunch",
        when="serving",
        seen="The engine ends in order and aborts its requests; they go on elsewhere. The rank is replaced.",
        kept=ALL_KEPT,
        words=("rank 1 died while serving: exit code 0", "rank 1 is back"),
        act=acts.terminate,
        test="tests/chaos/test_real.py::test_a_rank_that_is_asked_to_end_by_somebody_else",
    ),
    Row(
        name="sigstop",
        fault="SIGSTOP of a rank",
        when="serving",
        seen="Found by the probe at its deadline (`--probe-timeout`), ended, then as SIGKILL.",
        kept=ALL_KEPT,
        words=("rank 1 did not answer", "rank 1 is back"),
        act=acts.freeze,
        test="tests/chaos/test_real.py::test_a_rank_that_stands_still",
    ),
    Row(
        name="stuck",
        fault="the engine's loop stands still, its process lives",
        when="serving",
        seen="As SIGSTOP: the probe is answered by the loop itself.",
        kept=ALL_KEPT,
        words=("rank 1 did not answer", "rank 1 is back"),
        act=acts.get_stuck,
    ),
    Row(
        name="error",
        fault="the engine's loop raises",
        when="at a request",
        seen=GOES_ON,
        kept=ALL_KEPT,
        words=("rank 1 died while serving: exit code 1", "rank 1 is back"),
        act=acts.raise_error,
    ),
    Row(
        name="worker",
        fault="SIGKILL of a rank's worker process",
        when="serving",
        seen="The engine ends by an error, then as SIGKILL of the rank.",
        kept=ALL_KEPT,
        words=("rank 1 died while serving", "rank 1 is back"),
        act=acts.kill_worker,
        test="tests/chaos/test_real.py::test_a_killed_worker",
    ),
    Row(
        name="first request",
        fault="a rank dies before the first token",
        when="at a request",
        seen=GOES_ON,
        kept=ALL_KEPT,
        words=("rank 1 died while serving: exit code 3", "rank 1 is back"),
        act=acts.die_at_next_request,
    ),
    Row(
        name="mid-answer",
        fault="a rank dies in the middle of an answer",
        when="at a request",
        seen=GOES_ON,
        kept=ALL_KEPT,
        words=("rank 1 died while serving: SIGABRT(-6)", "rank 1 is back"),
        act=acts.die_in_an_answer,
    ),
    Row(
        name="slow start",
        fault="SIGKILL of a rank whose restart takes its time",
        when="serving",
        seen="The others serve meanwhile.",
        kept=ALL_KEPT,
        words=("rank 2 died while serving: SIGKILL(-9)", "rank 2 is back"),
        act=acts.kill_the_slow_one,
    ),
    Row(
        name="fails to restart",
        fault="a rank dies before READY, then just behind it",
        when="at its restarts",
        seen="It is tried again, with a growing wait, up to `--max-restarts` in `--restart-window`.",
        kept=ALL_KEPT,
        words=("rank 3 could not be started again", "exit code 7", "exit code 8", "rank 3 is back"),
        act=acts.kill_the_unlucky_one,
    ),
    Row(
        name="two at once",
        fault="SIGKILL of two ranks at once",
        when="serving",
        seen=GOES_ON,
        kept=ALL_KEPT,
        words=("rank 0 died while serving", "rank 1 died while serving", "rank 0 is back", "rank 1 is back"),
        act=acts.kill_two,
    ),
    Row(
        name="all at once",
        fault="SIGKILL of every rank at once",
        when="serving",
        seen="Requests wait for the first rank that is back; new ones over HTTP get 503 with Retry-After meanwhile.",
        kept=ALL_KEPT,
        words=tuple(f"rank {rank} is back" for rank in range(4)),
        act=acts.kill_all,
    ),
    Row(
        name="poison",
        fault="a request that kills the rank that it is on",
        when="serving",
        seen="It fails by name after `--max-request-failures` (2) ranks, with what they died of. No third rank dies.",
        kept="every other request that was not on both ranks",
        words=("died while serving: SIGSEGV(-11)",),
        act=acts.send_poison,
    ),
    Row(
        name="zygote",
        fault="SIGKILL of the zygote, then of a rank",
        when="serving",
        seen="Serving goes on. The next spawn starts a new zygote first, which takes as long as importing vLLM.",
        kept=ALL_KEPT,
        words=("rank 1 died while serving: SIGKILL(-9)", "rank 1 is back"),
        act=acts.kill_zygote,
    ),
)
"""In the order in which they are run: the zygote's is last, since the spawn after it takes seconds."""
