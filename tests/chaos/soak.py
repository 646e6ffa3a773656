"""A long run in which chance does harm under load, and nothing may be lost: `python -m tests.chaos.soak --help`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dplaunch.events import RankState
from tests.chaos.engines import Engines, Options, real_engines, standin_engines
from tests.chaos.hands import Hands
from tests.chaos.load import Load, Tally
from tests.chaos.report import Report
from tests.chaos.resources import Resources
from tests.chaos.rig import WHOLE_S, Rig

SAMPLE_S = 1.0

REST_S = (0.2, 2.0)
"""Between two faults."""

OFTEN_WHOLE = 0.7
"""How often a fault waits until the ranks of the one before are back."""

KEPT_EVENTS = 400


class Soak:
    """One run."""

    def __init__(self, options: Options, engines: Engines) -> None:
        self._options = options
        self._engines = engines
        self._tally = Tally()
        self._resources = Resources()
        self._rig = Rig(engines.spec)
        self._source = random.Random(options.seed)
        self._hands = Hands(self._rig, self._source, self._tally, real=options.real)
        self._deaths = 0
        self._log: list[str] = []
        self._begun = time.monotonic()

    async def run(self) -> Report:
        """Starts the group, harms it, ends it; what came of it."""
        group = self._rig.group
        group._listeners.append(self._note)
        counters: dict[str, int] = {}
        try:
            await group.open()
            await self._engines.prepare(group)
            watching = asyncio.create_task(self._watch())
            try:
                async with Load(group, self._engines.next_ask, self._options.streams, self._tally) as load:
                    await load.flows()
                    await self._harm(load)
                    await self._rig.whole()
                    await load.flows()
            finally:
                watching.cancel()
            counters = asdict(group.client.counters)
            violations = self._account(counters)
        except Exception as error:
            violations = [f"{type(error).__name__}: {error}"]
        finally:
            self._resources.look()
            await group.close()
        return self._report(counters, [*violations, *await self._after()])

    async def _harm(self, load: Load) -> None:
        end = time.monotonic() + self._options.minutes * 60
        while time.monotonic() < end and not self._tally.wrong:
            async with asyncio.timeout(WHOLE_S):
                name = await self._hands.strike()
            self._say(f"--- {name}")
            await asyncio.sleep(self._source.uniform(*REST_S))
            if self._source.random() < OFTEN_WHOLE:
                await self._rig.whole()
            else:
                await load.flows()

    async def _watch(self) -> None:
        while True:
            self._resources.look()
            del self._rig.events[:-KEPT_EVENTS]
            await asyncio.sleep(SAMPLE_S)

    def _account(self, counters: dict[str, int]) -> list[str]:
        """Every accepted request has exactly one outcome, by our count and by the data path's."""
        tally, poisoned = self._tally, self._hands.poisoned
        found = [*tally.wrong, *poisoned.wrong]
        if tally.ends.total() != tally.accepted:
            found.append(f"{tally.accepted} requests were accepted, and {tally.ends.total()} have an outcome")
        found += [f"{count} requests failed: {words}" for words, count in tally.errors.items()]
        if left := self._rig.group.client.unfinished:
            found.append(f"{left} requests are still in flight")
        ended = sum(counters[name] for name in ("finished", "aborted", "lost", "poisoned"))
        if counters["accepted"] != ended:
            found.append(f"the data path took {counters['accepted']} requests and ended {ended}: {counters}")
        return found

    async def _after(self) -> list[str]:
        """What is left when the group is closed, and what grew."""
        deadline = time.monotonic() + 10.0
        while (orphans := self._resources.orphans(self._engines.kept())) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return [*(f"still there after the end: {words}" for words in orphans), *self._resources.growth()]

    def _report(self, counters: dict[str, int], violations: Sequence[str]) -> Report:
        options, tally, resources = self._options, self._tally, self._resources
        rss = resources.first_and_last(lambda sample: sample.rss)
        return Report(
            seed=options.seed,
            backend=options.backend,
            engine="vLLM" if options.real else "stand-in",
            ranks=options.ranks,
            minutes=options.minutes,
            faults=dict(sorted(self._hands.done.items())),
            deaths=self._deaths,
            accepted=tally.accepted + self._hands.poisoned.accepted,
            outcomes={
                **{end.value: count for end, count in sorted(tally.ends.items())},
                "poisonous and failed by name": self._hands.poisoned.ends.total(),
            },
            errors={str(words): count for words, count in (tally.errors + self._hands.poisoned.errors).items()},
            tokens=tally.tokens,
            counters=counters,
            longest_pause_s=round(tally.longest_pause_s, 2),
            rss_mb=(rss[0] >> 20, rss[1] >> 20),
            rss_mb_per_minute=round(resources.per_minute(lambda sample: sample.rss) / 2**20, 2),
            fds=resources.first_and_last(lambda sample: sample.fds),
            shm=resources.first_and_last(lambda sample: sample.shm),
            violations=list(violations),
            last_events=self._log[-60:] if violations else [],
        )

    def _note(self, event: Any) -> None:
        self._deaths += event.state is RankState.DOWN and not event.phase
        self._say(event.message)

    def _say(self, words: str) -> None:
        self._log.append(f"{time.monotonic() - self._begun:8.2f} {words}")
        del self._log[:-KEPT_EVENTS]


async def soak(options: Options, directory: Path) -> Report:
    """One run; `directory` holds its logs. In a Ray cluster where the backend is ray: this process is connected."""
    engines = await real_engines(options, directory) if options.real else standin_engines(options, directory)
    return await Soak(options, engines).run()


@contextlib.contextmanager
def _cluster(backend: str, directory: Path) -> Iterator[None]:
    if backend != "ray":
        yield
        return
    from tests import conftest
    from tests.ray_for_tests import ray_for_tests

    with ray_for_tests(str(directory)) as cluster:
        conftest._clusters.append(cluster)
        yield


def main() -> int:
    """Runs it; 1 where something was violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="what chance begins with; by default a new one")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--backend", choices=("mp", "ray"), default="mp")
    parser.add_argument("--ranks", type=int, default=None, help="6 stand-ins, or 2 of vLLM's")
    parser.add_argument("--streams", type=int, default=None, help="requests at a time: 24, or 8")
    parser.add_argument("--real", action="store_true", help="vLLM's own engines and the built-in model")
    parser.add_argument("--json", type=Path, help="the report goes here too")
    given = parser.parse_args()
    options = Options(
        seed=int.from_bytes(os.urandom(3)) if given.seed is None else given.seed,
        minutes=given.minutes,
        backend=given.backend,
        ranks=given.ranks or (2 if given.real else 6),
        streams=given.streams or (8 if given.real else 24),
        real=given.real,
        workers=given.real,
    )
    with tempfile.TemporaryDirectory(prefix="dplsoak") as name, _cluster(options.backend, Path(name)):
        report = asyncio.run(soak(options, Path(name)))
    if given.json is not None:
        given.json.write_text(report.json() + "\n")
    sys.stdout.write(report.text() + "\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
