"""The data path: which rank serves which request, and what becomes of a request whose rank dies.

One object a group, in the group's event loop. It knows ranks only as links that come up and go down.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dplaunch.errors import DplaunchError, GroupDeadError, UsageError
from dplaunch.link import RankLink
from dplaunch.seam import wire


class Codec(Protocol):
    """Turns requests into frames and frames into outputs; `dplaunch.seam.wire.Codec` is the real one."""

    def encode(self, message: Any) -> Sequence[Any]:
        """The frames of a message to an engine."""

    def decode(self, frames: Sequence[Any]) -> Any:
        """The EngineCoreOutputs in the frames of a message from an engine."""


@dataclass(slots=True)
class _InFlight:
    """One request that a rank has, or that waits for one."""

    parts: list[Any]  # one, or more of a session whose input comes in parts
    link: RankLink | None = None
    shown: bool = False  # whether any output of it has reached the frontend
    unanswered: int = 1  # parts whose answer has not ended


class GroupClient:
    """Routes requests to ranks and brings back their outputs.

    Args:
        codec: encodes and decodes messages.
        on_engine_error: called with a rank whose engine says that it is dead, before its process ends.
    """

    def __init__(self, codec: Codec, on_engine_error: Callable[[int], None] = lambda rank: None) -> None:
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()
        """EngineCoreOutputs with `engine_index` set to the rank, or the GroupDeadError that ends the stream."""
        self.dead: DplaunchError | None = None
        self._codec = codec
        self._on_engine_error = on_engine_error
        self._links: dict[int, RankLink] = {}
        self._gone: set[int] = set()
        self._in_flight: dict[str, _InFlight] = {}
        self._broken: set[str] = set()  # sessions that were lost while more of their input was to come
        self._load: Counter[int] = Counter()
        self._calls: dict[int, tuple[RankLink, asyncio.Future[Any]]] = {}
        self._call_ids = itertools.count(1)
        self._refusal: DplaunchError | None = None
        self._turn = 0
        self._rank_up: asyncio.Event = asyncio.Event()

    # Membership: the only words between control and data path.

    def up(self, link: RankLink) -> None:
        """The rank behind this link takes requests from now on; those that waited for one are sent."""
        self._links[link.rank] = link
        self._rank_up.set()
        for entry in [entry for entry in self._in_flight.values() if entry.link is None]:
            self._send(entry)

    def down(self, link: RankLink, reason: str) -> None:
        """The rank behind this link is gone: its requests move, or end with a retryable error.

        A request that has shown no output yet is sent again elsewhere, which gives what it would have given.
        """
        if self._links.get(link.rank) is link:
            del self._links[link.rank]
        if not self._links:
            self._rank_up.clear()
        self._load[link.rank] = 0
        for call_id, (owner, future) in list(self._calls.items()):
            if owner is link:
                del self._calls[call_id]
                if not future.done():
                    future.set_exception(GroupDeadError(f"rank {link.rank} went down during the call: {reason}"))
        lost = [(request_id, entry) for request_id, entry in self._in_flight.items() if entry.link is link]
        for _, entry in lost:
            entry.link = None
            if not entry.shown:
                self._send(entry)
        self._fail([request_id for request_id, entry in lost if entry.shown], link.rank)

    def gone(self, rank: int) -> None:
        """The rank does not come back: requests that are pinned to it end, now and from now on."""
        self._gone.add(rank)
        for entry in [entry for entry in self._in_flight.values() if entry.link is None]:
            self._send(entry)

    def die(self, error: DplaunchError) -> None:
        """No rank is left and none comes back: everything in flight and everything after it fails with `error`."""
        if self.dead is not None:
            return  # The first failure is the root cause.
        self.dead = error
        self._rank_up.set()  # Calls that wait for a rank end too.
        self._in_flight.clear()
        for _, future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        self._calls.clear()
        self.outputs.put_nowait(error)

    def refuse_new(self, error: DplaunchError) -> None:
        """Takes no new request from now on; what is in flight goes on."""
        self._refusal = error

    @property
    def ranks(self) -> list[int]:
        """The ranks that take requests, in order."""
        return sorted(self._links)

    @property
    def load(self) -> Mapping[int, int]:
        """Requests in flight for each rank that takes requests."""
        return {rank: self._load[rank] for rank in self.ranks}

    @property
    def unfinished(self) -> int:
        """Requests in flight, the waiting ones included."""
        return len(self._in_flight)

    # Requests.

    def add(self, request: Any) -> None:
        """Sends a request (an EngineCoreRequest) to the least loaded rank, or to the one that it is pinned to.

        Raises:
            GroupDeadError: when the group is dead.
            DplaunchError: what `refuse_new` was called with.
        """
        if self.dead is not None:
            raise self.dead
        entry = self._in_flight.get(request.request_id)
        if entry is not None:
            self._add_part(entry, request)
            return
        if self._refusal is not None:
            raise self._refusal
        entry = _InFlight([request])
        self._in_flight[request.request_id] = entry
        if request.request_id in self._broken:
            # Without the parts before it, it would be answered as something else.
            self._fail([request.request_id], request.data_parallel_rank or 0)
            return
        self._send(entry)

    def _add_part(self, entry: _InFlight, request: Any) -> None:
        # A further part of a session goes where the session is. The last one only says that no more follow.
        entry.parts.append(request)
        entry.unanswered += request.resumable
        if entry.link is not None:
            entry.link.send(wire.ADD, self._codec.encode(request))
        if not entry.unanswered:
            self._forget(request.request_id)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stops requests; unknown ids are ignored, since a request may end while its abort is under way."""
        by_link: dict[RankLink, list[str]] = {}
        for request_id in request_ids:
            self._broken.discard(request_id)
            entry = self._in_flight.get(request_id)
            if entry is not None and entry.link is not None:
                by_link.setdefault(entry.link, []).append(request_id)
            elif entry is not None:
                del self._in_flight[request_id]
        for link, ids in by_link.items():
            link.send(wire.ABORT, self._codec.encode(ids))
            # An engine says nothing of a request that was aborted.
            for request_id in ids:
                self._forget(request_id)

    def _send(self, entry: _InFlight) -> None:
        request = entry.parts[0]
        link = self._route(request)
        if link is None:
            # It waits until a rank comes up, unless it is pinned to one that never will.
            if request.data_parallel_rank in self._gone:
                self._fail([request.request_id], request.data_parallel_rank)
            return
        entry.link = link
        self._load[link.rank] += 1
        for part in entry.parts:
            link.send(wire.ADD, self._codec.encode(part))
        if entry.parts[0].abort_immediately:
            # Sent for what a KV connector does at a request's end; no rank answers it.
            self._forget(entry.parts[0].request_id)

    def _route(self, request: Any) -> RankLink | None:
        ranks = self.ranks
        if not ranks:
            return None
        pinned = wire.pinned_engine(request, len(ranks))
        if pinned is not None:
            if request.data_parallel_rank is None:
                pinned = ranks[pinned]
            return self._links.get(pinned)  # None: the pinned rank is down, the request waits for it.
        # Ties go round, or rank 0 would get every request of a quiet group.
        self._turn += 1
        offset = self._turn % len(ranks)
        return self._links[min(ranks[offset:] + ranks[:offset], key=self._load.__getitem__)]

    def _fail(self, request_ids: Sequence[str], rank: int) -> None:
        if not request_ids:
            return
        lost = [self._in_flight.pop(request_id).parts[-1] for request_id in request_ids]
        self._broken.difference_update(request_ids)
        self._broken.update(request.request_id for request in lost if request.resumable)
        outputs = wire.failed_outputs(lost)
        outputs.engine_index = rank
        self.outputs.put_nowait(outputs)

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
            while not self._links and self.dead is None:
                await self._rank_up.wait()
        if self.dead is not None:
            raise self.dead
        if rank is not None and rank not in self._links:
            raise UsageError(f"rank {rank} is not up", hint=f"Ranks that are up: {self.ranks}.")
        links = [self._links[r] for r in (self.ranks if rank is None else [rank])]
        return list(await asyncio.gather(*(self.call_link(link, method, *args) for link in links)))

    async def call_link(self, link: RankLink, method: str, *args: Any) -> Any:
        """Calls a utility method over one link, up or not yet: the last proof that a starting rank works.

        Raises: as `call`.
        """
        if self.dead is not None:
            raise self.dead
        if link.closed:
            raise GroupDeadError(f"rank {link.rank} went down before the call")
        call_id = next(self._call_ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = (link, future)
        try:
            link.send(wire.UTILITY, self._codec.encode((0, call_id, method, args)))
            return await future
        finally:
            self._calls.pop(call_id, None)

    # What comes back.

    def on_output(self, link: RankLink, frames: Sequence[Any]) -> None:
        """Takes one message of an engine; the callback of every link."""
        if len(frames) == 1 and frames[0].buffer == wire.ENGINE_DEAD:
            self._on_engine_error(link.rank)
            return
        outputs = self._codec.decode(frames)
        outputs.engine_index = link.rank
        if outputs.utility_output is not None:
            self._answer(link, outputs.utility_output)
            return
        for output in outputs.outputs:
            self._note(output)
        if outputs.outputs or outputs.scheduler_stats:
            self.outputs.put_nowait(outputs)

    def _note(self, output: Any) -> None:
        entry = self._in_flight.get(output.request_id)
        if entry is None:
            return  # It was aborted a moment ago.
        entry.shown = True
        # Engines list what they finished (`finished_requests`) for a coordinator only, and here is none.
        if output.finish_reason is not None:
            entry.unanswered -= 1
            if not (entry.unanswered or entry.parts[-1].resumable):
                self._forget(output.request_id)

    def _forget(self, request_id: str) -> None:
        entry = self._in_flight.pop(request_id, None)
        if entry is not None and entry.link is not None:
            self._load[entry.link.rank] -= 1

    def _answer(self, link: RankLink, answer: Any) -> None:
        _, future = self._calls.get(answer.call_id, (link, None))
        if future is None or future.done():
            return  # The caller has gone.
        if answer.failure_message is not None:
            future.set_exception(RuntimeError(f"rank {link.rank}: {answer.failure_message}"))
        else:
            future.set_result(answer.result.result if answer.result is not None else None)
