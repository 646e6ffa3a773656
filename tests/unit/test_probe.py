"""Who is asked whether it is there, when, and who is taken for hung; on a clock that tests turn by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from dplaunch import probe
from dplaunch.client import GroupClient
from dplaunch.link import RankLink
from dplaunch.probe import Prober
from dplaunch.seam.rank import PING
from dplaunch.spec import ProbePolicy

BUSY_S = 3600.0


class Timer:
    """What `call_later` returns."""

    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at, self.callback, self.cancelled = at, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class HandClock:
    """Time, and the event loop's timers, which stand still until they are moved on."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[Timer] = []
        self.late_s = 0.0

    def monotonic(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + delay, callback))
        return self.timers[-1]

    @property
    def waiting(self) -> list[Timer]:
        return [timer for timer in self.timers if not timer.cancelled]

    async def advance(self, seconds: float) -> None:
        """Moves on, calling what falls due on the way."""
        end = self.now + seconds
        while due := [timer for timer in self.waiting if timer.at <= end]:
            timer = min(due, key=lambda timer: timer.at)
            self.timers.remove(timer)
            self.now = max(self.now, timer.at) + self.late_s
            timer.callback()
            await settle()
        self.now = max(self.now, end)


async def settle() -> None:
    """Lets tasks run until they wait."""
    for _ in range(5):
        await asyncio.sleep(0)


class FakeLink:
    """A rank, as the prober knows it."""

    def __init__(self, clock: HandClock) -> None:
        self.heard_at = clock.now
        self.answers = True
        self.called: float | None = None
        self.compiling = False
        self.pinged: list[float] = []


class Ranks:
    """A client of fake links."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock

    def heard(self, link: FakeLink) -> float:
        return link.heard_at

    def calling_since(self, link: FakeLink) -> float | None:
        return link.called

    async def call_link(self, link: FakeLink, method: str) -> None:
        assert method == PING
        link.pinged.append(self._clock.now)
        if not link.answers:
            await asyncio.Event().wait()
        link.heard_at = self._clock.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    clock = HandClock()

    class Loop:
        def __init__(self) -> None:
            self.real = asyncio.get_running_loop()

        def __getattr__(self, name: str) -> Any:
            return getattr(clock if name == "call_later" else self.real, name)

    class Asyncio:
        def __getattr__(self, name: str) -> Any:
            return Loop if name == "get_running_loop" else getattr(asyncio, name)

    monkeypatch.setattr(probe, "time", clock)
    monkeypatch.setattr(probe, "asyncio", Asyncio())
    return clock


class Rig:
    """A prober with ranks to watch."""

    def __init__(self, clock: HandClock, ranks: int = 1, interval_s: float = 5, timeout_s: float = 60) -> None:
        policy = ProbePolicy(interval_s=interval_s, timeout_s=timeout_s, busy_timeout_s=BUSY_S)
        self.prober = Prober(policy, cast(GroupClient, Ranks(clock)))
        self.links = [FakeLink(clock) for _ in range(ranks)]
        self.hung = [self.prober.watch(cast(RankLink, link)) for link in self.links]

    def end(self) -> None:
        for link in self.links:
            self.prober.unwatch(cast(RankLink, link))


async def test_a_rank_is_asked_after_each_interval_of_silence_and_lives_as_long_as_it_answers(clock: HandClock) -> None:
    rig = Rig(clock)
    await clock.advance(4.9)
    assert rig.links[0].pinged == []
    await clock.advance(600)
    assert 100 < len(rig.links[0].pinged) <= 121
    assert not rig.hung[0].done()
    rig.end()


async def test_a_rank_that_is_heard_anyway_is_never_asked(clock: HandClock) -> None:
    rig = Rig(clock)
    for _ in range(100):
        await clock.advance(1)
        rig.links[0].heard_at = clock.now
    assert rig.links[0].pinged == []
    rig.end()


async def test_a_rank_that_does_not_answer_in_time_is_hung_and_is_asked_once(clock: HandClock) -> None:
    rig = Rig(clock)
    rig.links[0].answers = False
    await clock.advance(64)
    assert not rig.hung[0].done()
    await clock.advance(2)
    assert rig.hung[0].result() == 60
    assert len(rig.links[0].pinged) == 1
    rig.end()


async def test_any_message_counts_as_life(clock: HandClock) -> None:
    rig = Rig(clock)
    rig.links[0].answers = False
    for _ in range(10):
        await clock.advance(50)
        rig.links[0].heard_at = clock.now
    assert not rig.hung[0].done()
    await clock.advance(180)
    assert rig.hung[0].done()
    rig.end()


async def test_the_deadline_waits_while_a_call_of_the_users_is_under_way(clock: HandClock) -> None:
    rig = Rig(clock)
    rig.links[0].answers, rig.links[0].called = False, clock.now
    await clock.advance(BUSY_S - 61)
    assert not rig.hung[0].done()
    # The call has ended, and still there is no word.
    rig.links[0].called = None
    await clock.advance(61)
    assert rig.hung[0].result() == 60
    rig.end()


async def test_a_call_that_takes_too_long_is_no_excuse_any_more(clock: HandClock) -> None:
    rig = Rig(clock)
    rig.links[0].answers, rig.links[0].called = False, clock.now
    await clock.advance(BUSY_S + 61)
    assert rig.hung[0].result() == BUSY_S
    rig.end()


async def test_a_call_that_was_sent_behind_the_question_is_no_excuse(clock: HandClock) -> None:
    rig = Rig(clock)
    rig.links[0].answers = False
    await clock.advance(6)
    rig.links[0].called = clock.now
    await clock.advance(60)
    assert rig.hung[0].result() == 60
    rig.end()


async def test_nor_is_it_when_the_launcher_stood_still_meanwhile(clock: HandClock) -> None:
    rig = Rig(clock, timeout_s=10)
    rig.links[0].answers = False
    await clock.advance(6)
    rig.links[0].called = clock.now
    clock.late_s = 30
    await clock.advance(10)
    clock.late_s = 0
    await clock.advance(11)
    assert rig.hung[0].done()
    rig.end()


async def test_the_deadline_waits_while_the_engine_compiles(clock: HandClock) -> None:
    rig = Rig(clock, timeout_s=60)
    rig.links[0].answers, rig.links[0].compiling = False, True
    await clock.advance(BUSY_S - 61)
    assert not rig.hung[0].done()
    rig.links[0].compiling = False
    await clock.advance(61)
    assert rig.hung[0].done()
    rig.end()


async def test_a_launcher_that_stood_still_gives_its_ranks_the_time_again(clock: HandClock) -> None:
    rig = Rig(clock, timeout_s=10)
    rig.links[0].answers = False
    await clock.advance(6)
    clock.late_s = 30  # stopped, or starved: the answer may be in the socket
    await clock.advance(10)
    clock.late_s = 0
    assert not rig.hung[0].done()
    await clock.advance(11)
    assert rig.hung[0].done()
    rig.end()


async def test_an_answer_that_is_an_error_is_an_answer(clock: HandClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(self: Ranks, link: FakeLink, method: str) -> None:
        link.heard_at = clock.now
        raise RuntimeError("Call to dplaunch_ping method failed")

    monkeypatch.setattr(Ranks, "call_link", fails)
    rig = Rig(clock)
    await clock.advance(200)
    assert not rig.hung[0].done()
    rig.end()


async def test_one_timer_serves_all_ranks_and_goes_with_the_last(clock: HandClock) -> None:
    rig = Rig(clock, ranks=256)
    await clock.advance(100)
    assert len(clock.waiting) == 1
    assert all(len(link.pinged) >= 18 for link in rig.links)
    rig.end()
    assert clock.waiting == []


async def test_a_rank_that_is_not_watched_any_more_is_not_asked_and_never_hung(clock: HandClock) -> None:
    rig = Rig(clock, ranks=2)
    for link in rig.links:
        link.answers = False
    rig.prober.unwatch(cast(RankLink, rig.links[0]))
    await clock.advance(100)
    assert rig.links[0].pinged == []
    assert rig.hung[0].cancelled()
    assert rig.hung[1].done()
    rig.end()


async def test_a_deadline_of_nothing_turns_the_probes_off(clock: HandClock) -> None:
    rig = Rig(clock, timeout_s=0)
    rig.links[0].answers = False
    await clock.advance(3600)
    assert rig.links[0].pinged == []
    assert not rig.hung[0].done()
    rig.hung[0].cancel()
