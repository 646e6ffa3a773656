"""Policy, over processes that are no processes: what the supervisor waits for and what it does about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from dplaunch.backend import Backend, Exit, RankBoot
from dplaunch.client import GroupClient
from dplaunch.errors import BackendError, DplaunchError, GroupDeadError, RankFailedError, StartTimeoutError
from dplaunch.events import Event, Level, RankState
from dplaunch.identity import Identity
from dplaunch.link import Failure, RankLink
from dplaunch.plan import LaunchPlan, RankSpec
from dplaunch.rank import LEGAL, Rank
from dplaunch.seam.rank import REPORT
from dplaunch.spec import ExecutorKind, LaunchSpec, Mode, RestartPolicy
from dplaunch.supervisor import Supervisor
from dplaunch.testing import poll_until_async

KILLED = Exit(signal=9)


class FakeHandle:
    """A process that ends when it is told to, or, stubborn, only when it is killed."""

    def __init__(self, boot: RankBoot) -> None:
        self.boot = boot
        self.pid = 1000 + boot.rank
        self.node = "here"
        self.signals: list[str] = []
        self.stubborn = False
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    def describe(self) -> str:
        return f"pid {self.pid}"

    def poll(self) -> Exit | None:
        return self._exit.result() if self._exit.done() else None

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)

    def terminate(self) -> None:
        self.signals.append("SIGTERM")
        if not self.stubborn:
            self.end(Exit(code=0))

    def kill(self) -> None:
        if self.poll() is None:
            self.signals.append("SIGKILL")
            self.end(KILLED)

    def end(self, exit_: Exit) -> None:
        """Ends it from outside."""
        if not self._exit.done():
            self._exit.set_result(exit_)


class FakeLink:
    """The sockets of an incarnation."""

    def __init__(self, identity: Identity, on_phase: Callable[[str], None]) -> None:
        self.identity = identity
        self.rank = identity.rank
        self.on_phase = on_phase
        self.ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.failed = asyncio.Event()
        self.failure: Failure | None = None
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def say(self, kind: str, message: str) -> None:
        """The rank's last words."""
        self.failure = Failure(kind, message)
        self.failed.set()


class FakeClient:
    """Notes what the supervisor says, and answers its calls with what an honest rank would say."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.dead: list[DplaunchError] = []
        self.lie: dict[str, Any] = {}

    def up(self, link: FakeLink) -> None:
        self.said.append(("up", link.rank))

    def down(self, link: FakeLink, reason: str) -> None:
        self.said.append(("down", link.rank))

    def gone(self, rank: int) -> None:
        self.said.append(("gone", rank))

    def die(self, error: DplaunchError) -> None:
        self.dead.append(error)

    async def call_link(self, link: FakeLink, method: str) -> dict[str, Any]:
        assert method == REPORT
        identity = link.identity
        honest = {"instance_id": identity.instance_id, "engine_id": None, "data_parallel_index": identity.rank}
        return {**honest, **self.lie}


class Clock:
    """asyncio, but its sleeps take no time and are noted."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


def make_boot(spec: RankSpec, identity: Identity, link: RankLink) -> RankBoot:
    """As much of a boot as a supervisor looks at."""
    return RankBoot(
        name="",
        rank=identity.rank,
        incarnation=identity.incarnation,
        process_title="",
        instance_id=identity.instance_id,
        engine_id=None,
        handshake_address="",
        env={},
        cpus=(),
        log_file=None,
        engine="",
        payload=b"",
        sys_path=(),
    )


class Rig:
    """A supervisor, and all that it sees."""

    def __init__(self, directory: Path, data_path: asyncio.Future[None] | None = None, **options: Any) -> None:
        self.spec = LaunchSpec(**{"dp": 2, "shutdown_timeout_s": 5.0, "restart": RestartPolicy(limit=0), **options})
        self.events: list[Event] = []
        self.client = FakeClient()
        self.handles: list[FakeHandle] = []
        self.links: list[FakeLink] = []
        self.gone: list[DplaunchError] = []
        self.on_spawn: Callable[[FakeHandle, FakeLink], None] = lambda handle, link: link.ready.set_result({"n": 1})
        self.data_path = data_path or asyncio.get_running_loop().create_future()
        if data_path is None:
            self.data_path.set_result(None)
        self.supervisor = self._supervisor(directory)

    def _supervisor(self, directory: Path) -> Supervisor:
        ranks = tuple(
            RankSpec(
                identity=Identity("base", rank),
                node="here",
                device_type="cpu",
                devices=(),
                env={},
                cpus=(),
                log_file=directory / f"{rank}.log",
            )
            for rank in range(self.spec.dp)
        )
        plan = LaunchPlan(
            spec=self.spec,
            base_id="base",
            model="m",
            model_note="",
            mode=Mode.INDEPENDENT,
            mode_reason="",
            executor=ExecutorKind.UNI,
            executor_reason="",
            engine_defaults={},
            log_dir=directory,
            ranks=ranks,
        )
        return Supervisor(
            plan,
            cast(Backend, self),
            cast(GroupClient, self.client),
            make_boot=make_boot,
            make_link=self._link,
            data_path=cast(Awaitable[None], self.data_path),
            emit=self.events.append,
            on_dead=self.gone.append,
        )

    def _link(self, identity: Identity, on_phase: Callable[[str], None]) -> RankLink:
        self.links.append(FakeLink(identity, on_phase))
        return cast(RankLink, self.links[-1])

    async def spawn(self, boot: RankBoot) -> FakeHandle:
        """The one verb of a backend that a supervisor uses."""
        handle = FakeHandle(boot)
        self.handles.append(handle)
        link = next(link for link in self.links if link.identity.instance_id == boot.instance_id)
        self.on_spawn(handle, link)
        return handle

    @property
    def ranks(self) -> list[Rank]:
        return self.supervisor.ranks

    def states(self, rank: int) -> list[str]:
        """What a rank went through."""
        return [event.state for event in self.events if event.rank == rank and event.state and not event.phase]

    async def until(self, rank: int, state: RankState) -> None:
        """Waits until a rank is there."""
        await poll_until_async(lambda: self.ranks[rank].state is state, 5, f"rank {rank} {state}")

    async def dies(self, rank: int, incarnation: int = 0, exit_: Exit = KILLED) -> None:
        """Waits for an incarnation to be ready, and ends it."""
        await poll_until_async(
            lambda: self.ranks[rank].state is RankState.READY and self.ranks[rank].identity.incarnation == incarnation
        )
        handle = self.ranks[rank].handle
        assert isinstance(handle, FakeHandle)
        handle.end(exit_)


Make = Callable[..., Rig]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    rigs: list[Rig] = []

    def build(**options: Any) -> Rig:
        rigs.append(Rig(tmp_path, **options))
        return rigs[-1]

    yield build
    for rig in rigs:
        await rig.supervisor.stop("the test is over")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dplaunch.keeper.asyncio", clock)
    return clock


# The start.


async def test_a_start_returns_when_every_rank_has_proved_itself(make: Make) -> None:
    rig = make(dp=3)
    await rig.supervisor.start()
    assert [rank.state for rank in rig.ranks] == [RankState.READY] * 3
    assert sorted(rig.client.said) == [("up", 0), ("up", 1), ("up", 2)]
    assert rig.states(1) == ["starting", "ready"]
    assert [rank.ready_response for rank in rig.ranks] == [{"n": 1}] * 3
    assert rig.ranks[2].report["instance_id"] == "base_dp2"


async def test_a_rank_takes_no_requests_before_the_launcher_can_talk_to_it(make: Make) -> None:
    rig = make(data_path=asyncio.get_running_loop().create_future())
    starting = asyncio.create_task(rig.supervisor.start())
    await poll_until_async(lambda: len(rig.handles) == 2)
    await asyncio.sleep(0)
    assert rig.client.said == []
    rig.data_path.set_result(None)
    await starting
    assert len(rig.client.said) == 2


async def test_phases_are_passed_on_as_they_come(make: Make) -> None:
    rig = make(dp=1)

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        link.on_phase("loading")
        link.ready.set_result({})

    rig.on_spawn = on_spawn
    await rig.supervisor.start()
    (phase,) = [event for event in rig.events if event.phase]
    assert (phase.rank, phase.phase, phase.state) == (0, "loading", RankState.STARTING)


async def test_the_first_failure_is_the_root_cause_and_the_others_are_stopped(make: Make) -> None:
    rig = make(dp=3)

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        if link.rank == 1:
            link.say("ValueError", "no such model")
            handle.end(Exit(code=1))

    rig.on_spawn = on_spawn
    with pytest.raises(RankFailedError) as caught:
        await rig.supervisor.start()
    assert "rank 1 died while starting: ValueError: no such model" in caught.value.message
    await rig.supervisor.stop("the start failed")
    assert [handle.poll() for handle in rig.handles] == [KILLED, Exit(code=1), KILLED]
    assert [rank.state for rank in rig.ranks] == [RankState.STOPPED] * 3
    assert all(link.closed for link in rig.links)


async def test_a_rank_that_dies_ready_while_another_still_starts_ends_the_start_too(make: Make) -> None:
    rig = make(dp=2)
    rig.on_spawn = lambda handle, link: link.ready.set_result({}) if link.rank == 0 else None
    starting = asyncio.create_task(rig.supervisor.start())
    await poll_until_async(lambda: rig.ranks[0].state is RankState.READY)
    rig.handles[0].end(KILLED)
    with pytest.raises(RankFailedError, match=r"rank 0 .*SIGKILL\(-9\)"):
        await starting
    await rig.supervisor.stop("the start failed")
    assert [handle.poll() for handle in rig.handles] == [KILLED, KILLED]


async def test_last_words_that_come_after_the_exit_are_waited_for(make: Make) -> None:
    rig = make(dp=1)

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        handle.end(Exit(code=1))
        asyncio.get_running_loop().call_later(0.02, link.say, "OSError", "a late word")

    rig.on_spawn = on_spawn
    with pytest.raises(RankFailedError, match="a late word"):
        await rig.supervisor.start()


async def test_the_rank_that_ended_first_is_named_though_its_last_words_come_later(make: Make) -> None:
    # An exit by code may be explained by words that are still on the way; one by signal has none to wait for.
    rig = make(dp=2)

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        if link.rank == 1:
            handle.end(Exit(code=17))
            # The other follows while these words are waited for.
            later = asyncio.get_running_loop().call_later
            later(0.02, rig.handles[0].end, Exit(signal=6))
            later(0.1, link.say, "OSError", "the root cause")

    rig.on_spawn = on_spawn
    with pytest.raises(RankFailedError, match="rank 1 died while starting: OSError: the root cause"):
        await rig.supervisor.start()


async def test_an_exit_by_signal_names_it_with_its_number_and_the_log(make: Make, tmp_path: Path) -> None:
    (tmp_path / "0.log").write_text("the last line of the log\n")
    rig = make(dp=1)
    rig.on_spawn = lambda handle, link: handle.end(Exit(signal=4))
    with pytest.raises(RankFailedError) as caught:
        await rig.supervisor.start()
    assert "SIGILL(-4)" in caught.value.message
    assert "the last line of the log" in caught.value.detail
    assert str(tmp_path / "0.log") in caught.value.detail


async def test_a_rank_that_is_never_ready_ends_the_start_at_the_deadline(make: Make) -> None:
    rig = make(start_timeout_s=0.05)
    rig.on_spawn = lambda handle, link: link.ready.set_result({}) if link.rank == 0 else None
    with pytest.raises(StartTimeoutError, match="rank 1 was not ready after"):
        await rig.supervisor.start()
    assert rig.states(1) == ["starting", "failed"]


async def test_the_deadline_is_for_making_the_process_too(make: Make) -> None:
    async def never(boot: RankBoot) -> FakeHandle:
        await asyncio.Event().wait()
        raise AssertionError

    rig = make(dp=1, start_timeout_s=0.05)
    rig.spawn = never  # type: ignore[method-assign]
    with pytest.raises(StartTimeoutError, match="rank 0 was not ready after"):
        await rig.supervisor.start()


@pytest.mark.parametrize(
    "lie", [{"instance_id": "base_dp0_dp0"}, {"engine_id": "kv_dp0_dp0"}, {"data_parallel_index": 7}]
)
async def test_a_rank_that_is_not_who_it_should_be_is_refused(make: Make, lie: dict[str, Any]) -> None:
    rig = make(dp=1)
    rig.client.lie = lie
    (name, value), *_ = lie.items()
    with pytest.raises(DplaunchError, match=f"{name} is {value!r}"):
        await rig.supervisor.start()
    assert rig.client.said == []


async def test_a_backend_that_cannot_spawn_fails_the_start_with_its_own_error(make: Make) -> None:
    rig = make()

    def refuse(handle: FakeHandle, link: FakeLink) -> None:
        raise BackendError("no process could be made")

    rig.on_spawn = refuse
    with pytest.raises(BackendError, match="no process"):
        await rig.supervisor.start()


# A rank that dies while it serves.


async def test_a_rank_that_dies_leaves_routing_and_comes_back_under_a_new_name(make: Make) -> None:
    rig = make(restart=RestartPolicy())
    await rig.supervisor.start()
    await rig.dies(1)
    await poll_until_async(lambda: rig.client.said[2:] == [("down", 1), ("up", 1)])
    await rig.until(1, RankState.READY)
    assert rig.states(1) == ["starting", "ready", "down", "starting", "ready"]
    assert rig.ranks[1].identity.instance_id == "base-r1_dp1"
    assert rig.ranks[1].last_exit == KILLED
    assert rig.states(0) == ["starting", "ready"]
    old, new = [link for link in rig.links if link.rank == 1]
    assert old.closed
    assert not new.closed
    news = [event for event in rig.events if event.level is Level.WARNING]
    assert "SIGKILL(-9)" in news[0].message
    assert "is back" in news[1].message


async def test_restarts_back_off_and_end_at_the_limit(make: Make, clock: Clock) -> None:
    rig = make(restart=RestartPolicy(limit=4, backoff_s=1.5))
    await rig.supervisor.start()
    for incarnation in range(5):
        await rig.dies(1, incarnation)
    await rig.until(1, RankState.FAILED)
    assert clock.slept == [1.5, 3.0, 6.0]  # the first is at once
    assert "4 restarts in 300 s" in rig.events[-1].message
    assert rig.client.said[-1] == ("gone", 1)
    assert rig.ranks[0].state is RankState.READY
    assert rig.gone == []


async def test_restarts_outside_the_window_no_longer_count(make: Make, clock: Clock) -> None:
    rig = make(restart=RestartPolicy(limit=1, window_s=0.0))
    await rig.supervisor.start()
    for incarnation in range(4):
        await rig.dies(1, incarnation)
    await poll_until_async(lambda: rig.ranks[1].identity.incarnation == 4)
    assert clock.slept == []


async def test_a_restart_that_fails_counts_against_the_limit(make: Make, clock: Clock) -> None:
    rig = make(restart=RestartPolicy(limit=3))
    await rig.supervisor.start()
    rig.on_spawn = lambda handle, link: handle.end(Exit(signal=11))
    await rig.dies(1)
    await rig.until(1, RankState.FAILED)
    assert rig.ranks[1].identity.incarnation == 3
    assert rig.states(1) == ["starting", "ready", *["down", "starting"] * 3, "down", "failed"]
    assert clock.slept == [1.0, 2.0]


@pytest.mark.parametrize("error", [BackendError("the zygote is gone"), OSError(24, "Too many open files")])
async def test_a_restart_that_cannot_even_begin_is_tried_again(make: Make, clock: Clock, error: Exception) -> None:
    rig = make(restart=RestartPolicy())
    await rig.supervisor.start()
    honest, failures = rig.on_spawn, [error]

    def on_spawn(handle: FakeHandle, link: FakeLink) -> None:
        if failures:
            raise failures.pop()
        honest(handle, link)

    rig.on_spawn = on_spawn
    await rig.dies(1)
    await poll_until_async(lambda: rig.client.said[2:] == [("down", 1), ("up", 1)])
    assert rig.ranks[1].identity.incarnation == 2
    (news,) = [event.message for event in rig.events if "could not be started again" in event.message]
    assert str(error) in news


async def test_a_hung_restart_is_killed_at_the_deadline(make: Make, clock: Clock) -> None:
    rig = make(restart=RestartPolicy(limit=1), start_timeout_s=0.05)
    await rig.supervisor.start()
    rig.on_spawn = lambda handle, link: None
    await rig.dies(1)
    await rig.until(1, RankState.FAILED)
    assert rig.handles[-1].signals == ["SIGKILL"]


# The end of a group.


async def test_the_group_is_dead_below_min_ranks_and_says_why(make: Make, tmp_path: Path) -> None:
    (tmp_path / "1.log").write_text("what it died of\n")
    rig = make(min_ranks=2)
    await rig.supervisor.start()
    await rig.dies(1)
    await rig.until(1, RankState.FAILED)
    (error,) = rig.gone
    assert isinstance(error, GroupDeadError)
    assert error.message == "1 of 2 ranks are left, 2 are needed: rank 1 died while serving: SIGKILL(-9)"
    assert "Restarts are off" in error.hint
    assert "what it died of" in error.detail
    assert rig.client.dead == [error]


async def test_the_group_goes_on_degraded_as_long_as_min_ranks_are_left(make: Make) -> None:
    rig = make(dp=3, min_ranks=1)
    await rig.supervisor.start()
    for rank in (0, 1):
        await rig.dies(rank)
        await rig.until(rank, RankState.FAILED)
    assert rig.gone == []
    await rig.dies(2)
    await rig.until(2, RankState.FAILED)
    assert len(rig.gone) == 1


# Stopping.


async def test_a_stop_asks_all_before_it_waits_for_any(make: Make) -> None:
    rig = make()
    await rig.supervisor.start()
    for handle in rig.handles:
        handle.stubborn = True
    stopping = asyncio.create_task(rig.supervisor.stop("enough"))
    await poll_until_async(lambda: all(handle.signals == ["SIGTERM"] for handle in rig.handles))
    assert not stopping.done()
    for handle in rig.handles:
        handle.end(Exit(code=0))
    await stopping
    assert [rank.state for rank in rig.ranks] == [RankState.STOPPED] * 2
    assert "enough" in next(event.message for event in rig.events if event.state is RankState.STOPPING)


async def test_a_rank_that_does_not_serve_yet_is_killed_at_once_because_it_would_not_listen(make: Make) -> None:
    rig = make(shutdown_timeout_s=60)
    rig.on_spawn = lambda handle, link: link.ready.set_result({}) if link.rank == 0 else None
    starting = asyncio.create_task(rig.supervisor.start())
    await rig.until(0, RankState.READY)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    for handle in rig.handles:
        handle.stubborn = handle.boot.rank == 1
    await asyncio.wait_for(rig.supervisor.stop("Ctrl-C"), 5)
    assert {handle.boot.rank: handle.signals for handle in rig.handles} == {0: ["SIGTERM"], 1: ["SIGKILL"]}


async def test_what_does_not_end_by_the_deadline_is_killed(make: Make) -> None:
    rig = make(shutdown_timeout_s=0.05)
    await rig.supervisor.start()
    rig.handles[1].stubborn = True
    await rig.supervisor.stop("enough")
    assert rig.handles[0].signals == ["SIGTERM"]
    assert rig.handles[1].signals == ["SIGTERM", "SIGKILL"]


async def test_a_stop_that_is_cancelled_kills_at_once(make: Make) -> None:
    rig = make(shutdown_timeout_s=60)
    await rig.supervisor.start()
    for handle in rig.handles:
        handle.stubborn = True
    stopping = asyncio.create_task(rig.supervisor.stop("enough"))
    await poll_until_async(lambda: rig.handles[1].signals)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    assert [handle.signals for handle in rig.handles] == [["SIGTERM", "SIGKILL"]] * 2
    assert [rank.state for rank in rig.ranks] == [RankState.STOPPED] * 2


async def test_a_second_stop_does_nothing(make: Make) -> None:
    rig = make()
    await rig.supervisor.start()
    await rig.supervisor.stop("first")
    seen = len(rig.events)
    await rig.supervisor.stop("second")
    assert len(rig.events) == seen


async def test_a_stop_before_anything_was_started_is_fine(make: Make) -> None:
    rig = make()
    await rig.supervisor.stop("changed my mind")
    assert rig.events == []


async def test_a_stop_ends_a_restart_that_is_waiting_for_its_turn(make: Make) -> None:
    rig = make(restart=RestartPolicy(backoff_s=3600))
    await rig.supervisor.start()
    await rig.dies(1)
    await rig.dies(1, incarnation=1)
    await rig.until(1, RankState.DOWN)
    await asyncio.wait_for(rig.supervisor.stop("enough"), 5)
    assert rig.ranks[1].state is RankState.STOPPED


async def test_an_exit_that_was_asked_for_is_no_death(make: Make) -> None:
    rig = make(restart=RestartPolicy())
    await rig.supervisor.start()
    await rig.supervisor.stop("enough")
    assert [event for event in rig.events if event.level is not Level.INFO] == []
    assert ("down", 0) not in rig.client.said


# States.


def a_rank_in(state: RankState | None) -> Rank:
    return Rank(cast(RankSpec, None), Identity("base", 5), state)


def test_every_state_has_its_legal_successors_and_stopped_is_the_end() -> None:
    assert set(LEGAL) == {None, *RankState}
    assert LEGAL[RankState.STOPPED] == set()


def test_no_rank_takes_an_illegal_step() -> None:
    for state, legal in LEGAL.items():
        for following in set(RankState) - legal:
            rank = a_rank_in(state)
            with pytest.raises(RuntimeError, match="rank 5 cannot go from"):
                rank.enter(following)
            assert rank.state is state
