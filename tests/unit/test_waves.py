"""Waves over engines that behave as vLLM's in lockstep do, in every order that chance finds."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import pytest

from dplaunch.link import RankLink
from dplaunch.seam import wire
from dplaunch.waves import Waves

SYNC = 3
"""Steps between two times at which the engines ask each other whether anything is left."""


class Engine:
    """One rank: it steps only with all others, and reads its messages only between steps."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.inbox: deque[tuple[str, int]] = deque()
        self.outbox: deque[tuple[str, int]] = deque()
        self.left: list[int] = []  # tokens that each of its requests still wants
        self.wave, self.running, self.deaf = 0, False, False

    def send(self, kind: bytes, frames: Sequence[Any]) -> None:
        """What the frontend sends beside requests."""
        assert kind == wire.START_WAVE
        self.inbox.append(("start", frames[0][0]))

    @property
    def in_step(self) -> bool:
        """Whether it waits for the others in a step."""
        return not self.deaf and (self.running or bool(self.left))

    def read(self) -> None:
        what, value = self.inbox.popleft()
        if what == "add":
            self.left.append(value)
        elif value >= self.wave and not self.deaf:
            self.wave, self.running = value, True

    def step(self) -> None:
        self.left = [tokens - 1 for tokens in self.left]
        self.outbox.extend(("done", 1) for tokens in self.left if not tokens)
        self.left = [tokens for tokens in self.left if tokens]
        self.running = True


class Rig:
    """Engines, and the frontend's end of the protocol."""

    def __init__(self, ranks: int, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.engines = [Engine(rank) for rank in range(ranks)]
        self.up = {engine.rank: cast(RankLink, engine) for engine in self.engines}
        self.load = [0] * ranks
        self.steps = 0
        self.waves = Waves(lambda: self.up, lambda: any(self.load), lambda message: [message])

    def add(self, rank: int, tokens: int) -> None:
        self.load[rank] += 1
        self.engines[rank].inbox.append(("add", tokens))
        self.waves.began()

    def _step(self) -> None:
        self.steps += 1
        for engine in self.engines:
            engine.step()
        if self.steps % SYNC == 0 and not any(engine.left for engine in self.engines):
            for engine in self.engines:
                engine.outbox.append(("wave", engine.wave))
                engine.wave, engine.running = engine.wave + 1, False

    def _hear(self, engine: Engine) -> None:
        what, value = engine.outbox.popleft()
        if what == "done":
            self.load[engine.rank] -= value
        else:
            self.waves.ended(cast(RankLink, engine), value)

    def once(self) -> bool:
        """One thing that can happen next; False when nothing can."""
        can: list[Any] = [engine.read for engine in self.engines if engine.inbox and not engine.in_step]
        can += [lambda engine=engine: self._hear(engine) for engine in self.engines if engine.outbox]
        if all(engine.in_step for engine in self.engines):
            # Between two steps each may read what has come.
            can += [self._step, *(engine.read for engine in self.engines if engine.inbox)]
        if can:
            self.random.choice(can)()
        return bool(can)

    def run(self) -> None:
        while self.once():
            pass


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_request_is_answered_whenever_it_comes(ranks: int) -> None:
    for seed in range(300):
        rig = Rig(ranks, seed)
        left = 12
        while rig.once() or left:
            if left and rig.random.random() < 0.2:
                rig.add(rig.random.randrange(ranks), rig.random.randint(1, 7))
                left -= 1
        assert rig.load == [0] * ranks, f"seed {seed}: ranks wait for each other for ever"


def test_a_request_for_one_rank_sets_all_going() -> None:
    rig = Rig(3)
    rig.add(1, 4)
    rig.run()
    assert rig.load == [0, 0, 0]
    assert [engine.wave for engine in rig.engines] == [1, 1, 1]
    assert rig.waves.wave == 1


def test_ranks_that_have_nothing_to_do_stand_still() -> None:
    rig = Rig(2)
    rig.add(0, 2)
    rig.run()
    steps = rig.steps
    rig.run()
    assert rig.steps == steps == SYNC


def test_a_wave_is_over_when_the_last_rank_has_said_so() -> None:
    rig = Rig(2)
    for life in range(2):
        rig.waves.ended(rig.up[0], 0)
        assert rig.waves.wave == 0, life
        rig.waves.ended(rig.up[1], 0)
        assert rig.waves.wave == 1, life
        rig.waves.left()


def test_requests_that_waited_for_a_standstill_to_end_are_told_of() -> None:
    rig = Rig(2)
    for engine in rig.engines:
        engine.deaf = True
    rig.add(0, 3)
    rig.run()
    assert rig.load == [1, 0]
    for engine in rig.engines:
        engine.deaf = False
    rig.waves.stirred()
    rig.run()
    assert rig.load == [0, 0]


def test_a_rank_that_joins_late_goes_with_those_before_it() -> None:
    rig = Rig(2)
    late = rig.up.pop(1)
    rig.add(0, 3)
    rig.run()
    assert rig.load == [1, 0]
    rig.waves.joined(late)
    rig.up[1] = late
    rig.run()
    assert rig.load == [0, 0]


def test_ranks_that_were_through_with_a_wave_before_they_were_up_are_told_of_the_next() -> None:
    rig = Rig(2)
    links, rig.up = rig.up, {}
    for engine in rig.engines:
        engine.wave = 1
        rig.waves.ended(links[engine.rank], 0)
    for rank, link in links.items():
        rig.waves.joined(link)
        rig.up[rank] = link
        if not rank:
            rig.add(0, 3)
    rig.run()
    assert (rig.load, rig.waves.wave) == ([0, 0], 2)


def test_what_is_heard_late_of_a_life_before_does_not_count() -> None:
    rig = Rig(2)
    before = [cast(RankLink, Engine(rank)) for rank in range(2)]
    rig.waves.left()
    for link in before:
        rig.waves.ended(link, 5)
    rig.add(1, 2)
    rig.run()
    assert (rig.load, rig.waves.wave) == ([0, 0], 1)


def test_the_next_life_of_a_group_begins_with_wave_0() -> None:
    rig = Rig(2)
    for _ in range(3):
        rig.add(0, 1)
        rig.run()
    assert rig.waves.wave == 3
    rig.waves.left()
    for engine in rig.engines:
        engine.wave = 0
    rig.add(1, 2)
    rig.run()
    assert (rig.load, rig.waves.wave) == ([0, 0], 1)
