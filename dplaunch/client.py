"""The data path: which rank serves which request, and what becomes of a request whose rank dies.

One object a group, in the group's event loop. It knows ranks only as links that come up and go down.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dplaunch.calls import Calls
from dplaunch.counters import Counters, RankCounters
from dplaunch.errors import DplaunchError, GroupDeadError, UsageError
from dplaunch.events import Listener
from dplaunch.link import RankLink
from dplaunch.migrate import EngineTraits
from dplaunch.requests import Codec, Requests
from dplaunch.seam import wire
from dplaunch.seam.rank import PING
from dplaunch.settle import Settling
from dplaunch.spec import RequestPolicy
from dplaunch.waves import Apart, Waves

SETTLE_S = 0.1
"""Seconds from a rank's death until the others are asked whether they live: deaths by then are settled together."""


class GroupClient:
    """Routes requests to ranks and brings back their outputs.

    Args:
        codec: encodes and decodes messages.
        on_engine_error: called with a rank whose engine says that it is dead, before its process ends.
        policy: how many requests there may be, and how many dying ranks each may have been on.
        emit: told what became of the requests of ranks that died.
        settle_s: seconds from a rank's death until the others are asked whether they outlived it, which comes before
            the move of its requests; 0 moves them at once.
        lockstep: whether the ranks step together.
        places: see `Router`.
        gathers: see `Requests`.
    """

    def __init__(
        self,
        codec: Codec,
        on_engine_error: Callable[[int], None] = lambda rank: None,
        *,
        policy: RequestPolicy | None = None,
        emit: Listener = lambda event: None,
        settle_s: float = 0.0,
        lockstep: bool = False,
        places: float = math.inf,
        gathers: bool = False,
    ) -> None:
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()
        """What the frontend gets: EngineCoreOutputs with `engine_index` set to the rank, `Failed` for a request that
        ends with an error, or the GroupDeadError that ends the stream."""
        self.dead: DplaunchError | None = None
        self._codec = codec
        self._on_engine_error = on_engine_error
        self._calls = Calls(codec.encode)
        self._settling = Settling(
            settle_s, lambda: self._dispatch.links.values(), lambda link: self.call_link(link, PING)
        )
        self._waves = Apart()
        if lockstep:
            self._waves = Waves(lambda: self._dispatch.links, lambda: self._requests.are_awaited, codec.encode)
        self._requests = Requests(
            codec,
            self.outputs,
            policy=policy or RequestPolicy(),
            emit=emit,
            settle=self._settling.begin if settle_s else None,
            is_called=lambda link: self._calls.since(link) is not None,
            began=self._waves.began,
            places=places,
            gathers=gathers,
        )
        self._dispatch = self._requests.dispatch
        self._refusal: DplaunchError | None = None
        self._rank_up: asyncio.Event = asyncio.Event()

    # Membership: the only words between control and data path.

    def up(self, link: RankLink) -> None:
        """The rank behind this link takes requests from now on; those that waited for one are sent."""
        self._rank_up.set()
        self._waves.joined(link)
        self._dispatch.open(link)

    def down(self, link: RankLink, reason: str, blame: bool = True) -> None:
        """The rank behind this link is gone: its requests go on elsewhere, or end with an error that says why.

        Args:
            reason: what happened to the rank, in words.
            blame: whether its requests may be the cause; not when it was asked to end, or ended for others' sake.
        """
        self._waves.left()
        self._requests.rank_died(link, reason, blame)
        if not self._dispatch.links:
            self._rank_up.clear()
        self._calls.fail(GroupDeadError(f"rank {link.rank} went down during the call: {reason}"), link)

    def retire(self, rank: int) -> None:
        """The rank takes no new request from now on; those that are pinned to it wait for its next incarnation."""
        self._dispatch.router.close(rank)

    def gone(self, rank: int) -> None:
        """The rank does not come back: requests that are pinned to it end, now and from now on."""
        self._dispatch.give_up(rank)

    def forget(self, rank: int) -> None:
        """The rank was taken away on request: as `gone`, until a rank of that number comes up again."""
        self._dispatch.give_up(rank)

    def die(self, error: DplaunchError) -> None:
        """No rank is left and none comes back: everything in flight and everything after it fails with `error`."""
        if self.dead is not None:
            return  # The first failure is the root cause.
        self.dead = error
        self._rank_up.set()  # Calls that wait for a rank end too.
        self._settling.give_up()
        self._requests.clear()
        self._calls.fail(error)
        self.outputs.put_nowait(error)

    def refuse_new(self, error: DplaunchError) -> None:
        """Takes no new request from now on; what is in flight goes on."""
        self._refusal = error

    @property
    def ranks(self) -> list[int]:
        """The ranks that take requests, in order."""
        return self._dispatch.router.ranks

    @property
    def load(self) -> Mapping[int, int]:
        """Requests in flight for each rank that is up, those that take no more included."""
        return {rank: self._dispatch.router.load(rank) for rank in sorted(self._dispatch.links)}

    @property
    def unfinished(self) -> int:
        """Requests in flight, the waiting ones included."""
        return len(self._requests)

    @property
    def queued(self) -> int:
        """Requests that no rank has: they wait for one."""
        return self._requests.queued

    @property
    def counters(self) -> Counters:
        """What became of requests so far."""
        return self._requests.counters

    @property
    def rank_counters(self) -> Mapping[int, RankCounters]:
        """What each rank has done so far; a rank that has done nothing yet has zeros."""
        return self._requests.rank_counters

    # Standstill: while the group is paused, asleep or gets other weights, requests wait here.

    @property
    def is_held(self) -> bool:
        """Whether requests wait, whatever ranks there are."""
        return self._dispatch.held

    def hold(self, begun_go_on: bool = False) -> None:
        """No request is sent to a rank from now on, but, if told so, those that have begun to answer and must move."""
        self._dispatch.held, self._dispatch.begun_go_on = True, begun_go_on

    def release(self) -> None:
        """Requests are sent again, those that waited first."""
        self._dispatch.held = False
        self._waves.stirred()
        self._dispatch.send_waiting()

    async def until_quiet(self) -> None:
        """Returns when no rank has a request; meant for a group that is held."""
        await self._requests.until_quiet()

    def new_weights(self) -> None:
        """What has begun to answer until now began on other weights: it is not moved to another rank any more."""
        self._dispatch.epoch += 1

    def know_engines(self, traits: EngineTraits) -> None:
        """Tells what keeps requests of these engines from moving."""
        self._requests.traits = traits

    def heard(self, link: RankLink) -> float:
        """Monotonic time of the last message from the engine behind a link, its handshake included."""
        return link.heard

    async def idle(self, rank: int) -> None:
        """Returns when the rank has nothing in flight."""
        await self._dispatch.idle(rank)

    # Requests.

    def add(self, request: Any) -> None:
        """Sends a request (an EngineCoreRequest) to the least loaded rank, or to the one that it is pinned to.

        Raises:
            GroupDeadError: when the group is dead.
            RequestError: when the group is full.
            DplaunchError: what `refuse_new` was called with.
        """
        if self.dead is not None:
            raise self.dead
        if self._refusal is not None and not self._requests.has(request.request_id):
            self.counters.refused += 1
            raise self._refusal
        self._requests.add(request)

    def gathered(self, request_id: str) -> tuple[Sequence[int], str | None]:
        """All tokens so far of an answer that the frontend gets in pieces, and the version of the last ones' weights.

        Nothing for a request that is not in flight, or whose tokens the frontend gets as they come.
        """
        return self._requests.gathered(request_id)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stops requests; unknown ids are ignored, since a request may end while its abort is under way."""
        self._requests.abort(request_ids)

    # Utility calls.

    async def call(self, method: str, *args: Any, rank: int | None = None) -> list[Any]:
        """Calls an engine-core utility method on one rank, or on all; every rank acknowledges.

        Returns one result a rank, in rank order.

        Raises:
            UsageError: when `rank` takes no requests.
            GroupDeadError: when a rank dies during the call, or none is left.
            RuntimeError: when the method fails in a rank; the message names the rank and what it said.
        """
        if rank is None:
            while not self._dispatch.links and self.dead is None:
                await self._rank_up.wait()
        if self.dead is not None:
            raise self.dead
        links = self._dispatch.links
        if rank is not None and rank not in links:
            raise UsageError(f"rank {rank} is not up", hint=f"Ranks that are up: {sorted(links)}.")
        asked = [links[number] for number in (sorted(links) if rank is None else [rank])]
        return list(await asyncio.gather(*(self.call_link(link, method, *args) for link in asked)))

    async def call_for_one(self, method: str, *args: Any) -> Any:
        """Calls a method on all ranks for one result: that of the first of them, in rank order, that outlives the call.

        A rank that dies meanwhile is replaced by one that never had the call; where that matters, use `call`.

        Raises:
            GroupDeadError: when no rank is left that will come back.
            RuntimeError: when the method fails in a rank.
        """
        while True:
            while not self._dispatch.links and self.dead is None:
                await self._rank_up.wait()
            if self.dead is not None:
                raise self.dead
            links = [self._dispatch.links[rank] for rank in sorted(self._dispatch.links)]
            calls = (self.call_link(link, method, *args) for link in links)
            results = await asyncio.gather(*calls, return_exceptions=True)
            answers = [result for result in results if not isinstance(result, GroupDeadError)]
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
            if answers:
                return answers[0]
            # All that were asked have died: the next one that is up is asked.
            await asyncio.sleep(0)

    async def call_link(self, link: RankLink, method: str, *args: Any) -> Any:
        """Calls a utility method over one link, up or not yet: the last proof that a starting rank works.

        Raises: as `call`.
        """
        if self.dead is not None:
            raise self.dead
        return await self._calls.over(link, method, *args)

    def calling_since(self, link: RankLink) -> float | None:
        """See `Calls.since`."""
        return self._calls.since(link)

    # What comes back.

    def on_output(self, link: RankLink, frames: Sequence[Any]) -> None:
        """Takes one message of an engine; the callback of every link."""
        link.heard = time.monotonic()
        if len(frames) == 1 and frames[0].buffer == wire.ENGINE_DEAD:
            self._on_engine_error(link.rank)
            return
        outputs = self._codec.decode(frames)
        outputs.engine_index = link.rank
        if outputs.utility_output is not None:
            self._calls.answer(link, outputs.utility_output)
            return
        if outputs.wave_complete is not None:
            self._waves.ended(link, outputs.wave_complete)
        if outputs.outputs:
            outputs.outputs = self._requests.noted(link, outputs.outputs, wire.weights_of(outputs))
        if outputs.outputs or outputs.scheduler_stats:
            self.outputs.put_nowait(outputs)
