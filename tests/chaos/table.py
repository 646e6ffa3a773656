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
        words=("rank 1 has not answered for", "rank 1 is back"),
        act=acts.freeze,
        test="tests/chaos/test_real.py::test_a_rank_that_stands_still",
    ),
    Row(
        name="stuck",
        fault="the engine's loop stands still, its process lives",
        when="serving",
        seen="As SIGSTOP: the probe is answered by the loop itself.",
        kept=ALL_KEPT,
        words=("rank 1 has not answered for", "rank 1 is back"),
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
        words=("rank 3 died while starting", "exit code 7", "exit code 8", "rank 3 is back"),
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
        name="scale",
        fault="`dplaunch scale` up and down again, not on a fault but on request",
        when="serving",
        seen="Ranks join when they are ready; those that leave drain, and what is left at the deadline moves.",
        kept=ALL_KEPT,
        words=("rank 4 is ready", "rank 5 stopped"),
        act=acts.scale_up_and_down,
    ),
    Row(
        name="roll",
        fault="ranks restarted one after the other (`dplaunch restart --rolling`), on request",
        when="serving",
        seen="One rank after the other is drained and restarted.",
        kept=ALL_KEPT,
        words=("rank 0 is asked to stop: restarted on request", "rank 2 is asked to stop: restarted on request"),
        act=acts.roll,
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
    Row(
        name="at start",
        fault="a rank dies before READY: exit code, signal or exception",
        when="at the launch",
        seen="The launch ends with one message: rank, exit, likely cause, last log lines, path of the log.",
        kept="nothing was taken yet; the other ranks are stopped, nothing is left",
        test="tests/contract/test_start_failures.py::test_a_rank_that_cannot_start_is_named_with_how_why_and_where",
    ),
    Row(
        name="every request",
        fault="a rank dies at every request",
        when="serving",
        seen="It is given up after `--max-restarts`; the group goes on without it and says so.",
        kept=ALL_KEPT,
        test="tests/chaos/test_own_groups.py::"
        "test_a_rank_that_dies_at_every_request_is_given_up_and_the_others_answer_all",
    ),
    Row(
        name="too few left",
        fault="more ranks are given up than `--min-ranks` allows",
        when="serving",
        seen="The group ends with the root cause; the command's exit code is 10.",
        kept="nothing: every request ends with that cause",
        test="tests/contract/test_group.py::test_a_group_with_too_few_ranks_left_is_dead_and_says_of_what",
    ),
    Row(
        name="late answer",
        fault="a rank that was replaced answers late",
        when="serving",
        seen="Nothing: each incarnation has sockets of its own, and the old ones are closed.",
        kept=ALL_KEPT,
        test="tests/contract/test_group.py::test_what_an_old_incarnation_says_never_reaches_a_live_request",
    ),
    Row(
        name="launcher",
        fault="SIGKILL of the launcher, one of its ranks stopped",
        when="serving",
        seen="Every rank and every worker is gone within seconds, device memory with them.",
        kept="no process is left; the next launch removes the sockets",
        backends=("mp",),
        test="tests/real/test_signals_and_deaths.py::"
        "test_all_is_gone_soon_after_the_launcher_was_killed_workers_and_stopped_ranks_too",
    ),
    Row(
        name="launcher on Ray",
        fault="SIGKILL of the launcher, one of its ranks stopped",
        when="serving",
        seen="As on `mp`; actors and placement groups go too.",
        kept="nothing is left in the cluster",
        backends=("ray",),
        test="tests/chaos/test_own_groups.py::test_nothing_is_left_soon_after_a_launcher_in_a_ray_cluster_was_killed",
    ),
    Row(
        name="frozen node",
        fault="every process of a node stands still",
        when="serving",
        seen="Its ranks are found by the probe or by Ray, named with the node, and placed where there is room.",
        kept=ALL_KEPT,
        backends=("ray",),
        test="tests/multinode/test_many_nodes.py::test_ranks_of_a_frozen_node_are_replaced_and_nothing_is_lost",
    ),
    Row(
        name="full log disk",
        fault="the disk of the log directory is full",
        when="serving",
        seen="Log lines and event lines are missing. A rank that dies then is replaced as ever.",
        kept=ALL_KEPT,
        test="tests/chaos/test_own_groups.py::test_a_full_log_disk_costs_log_lines_and_nothing_else",
    ),
    Row(
        name="bad bodies",
        fault="malformed and oversized bodies, bodies that never end",
        when="serving HTTP",
        seen="Whoever sends one gets a 4xx.",
        kept=ALL_KEPT,
        backends=("mp",),
        test="tests/chaos/test_abuse.py::test_malformed_and_oversized_bodies_are_their_senders_fault_alone",
    ),
    Row(
        name="clients leave",
        fault="clients go away in the middle of their streams: 300 in `make test`, 10,000 in `make soak`",
        when="serving HTTP",
        seen="Their requests are aborted, their slots are free again.",
        kept="everybody else's requests",
        backends=("mp",),
        test="tests/chaos/test_abuse.py::test_clients_that_go_away_free_their_slots",
    ),
    Row(
        name="overload",
        fault="more requests at once than `--max-queue`",
        when="serving HTTP",
        seen="Those beyond it get 503 with Retry-After at once.",
        kept="every request that was accepted",
        backends=("mp",),
        test="tests/chaos/test_abuse.py::test_beyond_the_queue_new_requests_are_refused_and_those_in_it_are_answered",
    ),
    Row(
        name="control socket",
        fault="garbage, and a thousand connections, at the control socket",
        when="serving HTTP",
        seen="Each gets an error or waits; the socket answers its user again afterwards.",
        kept=ALL_KEPT,
        backends=("mp",),
        test="tests/chaos/test_abuse.py::test_garbage_and_a_thousand_connections_at_the_control_socket_harm_nobody",
    ),
)
"""Those with an act in the order in which they are run: the zygote's last, as the spawn after it takes seconds."""
