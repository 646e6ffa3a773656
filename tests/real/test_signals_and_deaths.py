"""Signals, and the deaths of ranks, zygote and launcher: each ends what it should, and nothing is left."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from dplaunch import runtime_dir
from dplaunch.errors import ExitCode
from dplaunch.sync import Group
from dplaunch.testing import Fault, StandInPlan, poll_until
from tests.real.conftest import START_S, Command, run_command
from tests.real.families import ZYGOTE_TITLE, family, is_gone, ranks_of, socket_dirs, titled, wait_gone
from tests.real.standins import (
    READY,
    Screen,
    check_message,
    launch_flags,
    run_here,
    run_python,
    standin_group,
    standin_spec,
)

pytestmark = pytest.mark.usefixtures("no_socket_is_left", "vllm_is_imported")

SOON_S = 60.0
"""Seconds for the first process of a launch whose zygote may have to be made."""

DEAF = Fault(ignore_sigterm=True)

# Signals.

INTERRUPTED_S = 10.0
"""Seconds from Ctrl-C to the end; half a second is usual, but every import competes for the interpreter's lock."""


class Moment:
    """A launch that is interrupted at some time, with every process that it ever had."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.processes: set[psutil.Process] = set()

    def watch(self, seconds: float) -> None:
        """Takes note of its processes for so long after its first one came, or until it serves."""
        poll_until(lambda: self._look() or self.processes, 60, "the first process of the launch")
        deadline = time.monotonic() + seconds
        poll_until(lambda: self._look() or time.monotonic() > deadline or READY in self.command.output, seconds + 60)

    def ended(self, timeout_s: float) -> int:
        """Waits for its end; its exit code."""
        poll_until(lambda: self._look() or self.command.process.poll() is not None, timeout_s, "the launcher's end")
        return self.command.end()

    def _look(self) -> bool:
        self.processes.update(family(self.command.process.pid))
        return False


@pytest.mark.parametrize("seconds", [0.0, 0.3, 2.0, 5.0, 9.0])
def test_ctrl_c_ends_a_start_at_any_moment(seconds: float, smollm: str, tmp_path: Path) -> None:
    moment = Moment(run_command(*launch_flags(smollm, tmp_path)))
    moment.watch(seconds)
    moment.command.process.send_signal(signal.SIGINT)
    code = moment.ended(INTERRUPTED_S)
    output = moment.command.output
    # A machine so fast that it serves when the signal comes was not interrupted, but stopped.
    assert code == (ExitCode.OK if READY in output else ExitCode.INTERRUPTED), output
    assert "Traceback" not in output
    wait_gone(moment.processes, 1.0)
    assert socket_dirs(moment.command.process.pid) == set()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)]
)
def test_a_signal_while_ranks_load_ends_them_in_order(
    number: signal.Signals, code: ExitCode, smollm: str, tmp_path: Path
) -> None:
    def interrupt(_: Screen) -> None:
        poll_until(lambda: ranks_of(family(os.getpid()), "loads"), SOON_S)
        os.kill(os.getpid(), number)

    plan = StandInPlan(default=Fault(slow_start_s=60))
    outcome = run_here(*launch_flags(smollm, tmp_path, "--name", "loads"), plan=plan, meanwhile=interrupt)
    assert outcome.code == code
    assert "error" not in outcome.err
    assert ranks_of(family(os.getpid()), "loads") == []


def test_sigterm_while_serving_is_an_orderly_end(smollm: str, tmp_path: Path) -> None:
    def stop(screen: Screen) -> None:
        screen.wait_for(READY)
        os.kill(os.getpid(), signal.SIGTERM)

    outcome = run_here(*launch_flags(smollm, tmp_path), meanwhile=stop)
    assert outcome.code == ExitCode.OK, outcome.err
    assert "rank 0 is asked to stop: SIGTERM" in outcome.err
    assert "rank 1 stopped" in outcome.err


def test_a_second_ctrl_c_ends_at_once(smollm: str, tmp_path: Path) -> None:
    second: list[float] = []

    def stop(screen: Screen) -> None:
        screen.wait_for(READY)
        os.kill(os.getpid(), signal.SIGINT)
        screen.wait_for("asked to stop: SIGINT")
        second.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    outcome = run_here(*launch_flags(smollm, tmp_path), plan=StandInPlan(default=DEAF), meanwhile=stop)
    assert outcome.code == ExitCode.OK, outcome.err
    # Ranks that do not hear SIGTERM would have got ten seconds.
    assert time.monotonic() - second[0] < 5.0


# Deaths while serving.


def pids_of(group: Group) -> list[int]:
    """The ranks' own account of their processes."""
    return [report["pid"] for report in group.call("dplaunch_report")]


def answers(group: Group, count: int = 20) -> int:
    """How many of so many prompts were answered."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=4, temperature=0, detokenize=False)
    return sum(len(output.outputs[0].token_ids) == 4 for output in group.generate([[1, 2, 3]] * count, params))


def test_a_rank_that_is_killed_comes_back_under_its_next_name_while_the_other_serves(
    smollm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first restart takes a while, so that there is an outage to look at.
    plan = StandInPlan(faults={(1, 1): Fault(slow_start_s=1.0)})
    with standin_group(standin_spec(smollm, tmp_path, plan, base_id="mortal")) as group:
        zygote = psutil.Process(pids_of(group)[1]).parent()
        assert zygote is not None
        os.kill(pids_of(group)[1], signal.SIGKILL)
        poll_until(lambda: group.ranks_up == [0])
        assert answers(group) == 20
        poll_until(lambda: group.ranks_up == [0, 1], what="rank 1 to be back")
        reports = group.call("dplaunch_report")
        assert [report["instance_id"] for report in reports] == ["mortal_dp0", "mortal-r1_dp1"]
        assert answers(group) == 20
        said = capsys.readouterr().err
        words = rf"rank 1 died while serving: SIGKILL\(-9\), likely because .*; log: {tmp_path}/rank1.log"
        assert re.search(words, said), said
        assert re.search(r"rank 1 is back after \d+\.\d s, pid \d+", said), said

        # Nobody needs the zygote but for the next spawn, which starts a new one.
        zygote.kill()
        poll_until(lambda: is_gone(zygote))
        assert answers(group) == 20
        os.kill(pids_of(group)[0], signal.SIGKILL)
        poll_until(lambda: group.ranks_up == [1])
        assert answers(group) == 20
        poll_until(lambda: group.ranks_up == [0, 1], START_S, "rank 0 to be back")
        reports = group.call("dplaunch_report")
        assert [report["instance_id"] for report in reports] == ["mortal-r1_dp0", "mortal-r1_dp1"]
        parent = psutil.Process(reports[0]["pid"]).parent()
        assert parent != zygote
        assert titled([parent] if parent else [], ZYGOTE_TITLE)
        said = capsys.readouterr().err
        assert "rank 0 died while serving" in said
        assert "rank 0 is back" in said


def test_a_rank_that_does_not_come_back_is_given_up_and_with_the_last_one_the_command_ends(
    smollm: str, tmp_path: Path
) -> None:
    def kill(screen: Screen) -> None:
        screen.wait_for(READY)
        first, last = ranks_of(family(os.getpid()), "doomed")
        first.kill()
        screen.wait_for("rank 0 does not come back")
        last.kill()

    flags = launch_flags(smollm, tmp_path, "--name", "doomed", "--max-restarts", "0")
    outcome = run_here(*flags, meanwhile=kill)
    check_message(outcome, ExitCode.GROUP_DEAD, "0 of 2 ranks are left, 1 are needed", "SIGKILL(-9)", "rank1.log")


# SIGKILL of the launcher.


def test_all_is_gone_soon_after_the_launcher_was_killed_workers_and_stopped_ranks_too(
    smollm: str, tmp_path: Path
) -> None:
    command = run_command(*launch_flags(smollm, tmp_path, "--executor", "mp", "--name", "orphan"))
    command.wait_for(READY)
    processes = family(command.process.pid)
    ranks = ranks_of(processes, "orphan")
    workers = [worker for rank in ranks for worker in rank.children(recursive=True)]
    assert len(ranks) == 2
    assert len(workers) >= 2
    ranks[0].suspend()
    workers[-1].suspend()
    command.process.kill()
    wait_gone(processes)
    command.end()
    # The next launch tidies up what only the dead one could have.
    assert socket_dirs(command.process.pid)
    runtime_dir.make_runtime_dir().rmdir()
    assert socket_dirs(command.process.pid) == set()


EMBEDDING = """
import sys, time
from pathlib import Path
import psutil
from dplaunch.testing import Fault, StandInPlan
from tests.real.standins import standin_group, standin_spec
plan = StandInPlan(default=Fault(grandchild=True, ignore_sigterm=True))
with standin_group(standin_spec(sys.argv[1], Path(sys.argv[2]), plan, base_id="embedded")) as group:
    print("ready", flush=True)
    time.sleep(600)
"""


def test_all_is_gone_soon_after_the_embedding_process_was_killed_even_without_its_zygote(
    smollm: str, tmp_path: Path
) -> None:
    with run_python(EMBEDDING, smollm, str(tmp_path)) as command:
        command.wait_for("ready")
        processes = family(command.process.pid)
        assert len(ranks_of(processes, "embedded")) == 2
        assert len([process for process in processes if process.name() == "sleep"]) == 2
        (zygote,) = titled(processes, ZYGOTE_TITLE)
        zygote.kill()
        poll_until(lambda: is_gone(zygote))
        command.process.kill()
        wait_gone(processes)
