"""The requests in flight: taken, answered, moved when their rank dies, and ended. Each gets exactly one outcome."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from dplaunch.counters import Counters, RankCounters
from dplaunch.dispatch import Dispatcher
from dplaunch.errors import RequestError
from dplaunch.events import Listener
from dplaunch.inflight import Death, Failed, InFlight
from dplaunch.kept import Kept
from dplaunch.link import RankLink
from dplaunch.migrate import EngineTraits, Move, decide
from dplaunch.router import Router
from dplaunch.seam import wire
from dplaunch.seam.requests import is_seen_at_its_end, most_tokens
from dplaunch.second_run import AnsweredDifferently, SecondRun
from dplaunch.spec import RequestPolicy
from dplaunch.suspects import Suspects, poisoned
from dplaunch.tell import Teller

ABORT_S = 30.0
"""Seconds that a rank which aborts its requests unasked has to end, and its requests to move: a long shutdown."""


class Codec(Protocol):
    """Turns requests into frames and frames into outputs; `dplaunch.seam.wire.Codec` is the real one."""

    def encode(self, message: Any) -> Sequence[Any]:
        """The frames of a message to an engine."""

    def decode(self, frames: Sequence[Any]) -> Any:
        """The EngineCoreOutputs in the frames of a message from an engine."""


class Requests:
    """All requests of a group.

    Args:
        codec: encodes and decodes messages.
        outputs: gets a `Failed` for each request that ends with an error.
        policy: how many there may be, and how many dying ranks each may have been on.
        emit: told what became of the requests of ranks that died.
        settle: called at a rank's death; its requests move when the task is done. None moves them at once.
        is_called: whether a utility call is under way on a link.
        began: called when something was sent to a rank.
        places: see `Router`.
        gathers: whether answers that nobody sees before their end are handed to the frontend in larger pieces, and
            not token by token, which is most of its work. Its metrics would take what was gathered for one step.
    """

    def __init__(
        self,
        codec: Codec,
        outputs: asyncio.Queue[Any],
        *,
        policy: RequestPolicy,
        emit: Listener,
        settle: Callable[[], asyncio.Task[None]] | None,
        is_called: Callable[[RankLink], bool],
        began: Callable[[], None] = lambda: None,
        places: float = math.inf,
        gathers: bool = False,
    ) -> None:
        self.counters = Counters()
        self.rank_counters: defaultdict[int, RankCounters] = defaultdict(RankCounters)
        self.traits = EngineTraits()
        self._codec = codec
        self._outputs = outputs
        self._policy = policy
        self._settle = settle
        self._is_called = is_called
        self._gathers = gathers
        self._in_flight: dict[str, InFlight] = {}
        self._broken: set[str] = set()  # sessions that were lost while more of their input was to come
        self._suspects = Suspects(policy.max_failures)
        self.dispatch = Dispatcher(codec.encode, self._suspects, self._lose, Router(places), began)
        self._tell = Teller(emit, policy.poison_file)
        self._stirred = asyncio.Event()

    def __len__(self) -> int:
        return len(self._in_flight)

    @property
    def queued(self) -> int:
        """Those that no rank has."""
        return sum(entry.link is None for entry in self._in_flight.values())

    @property
    def are_awaited(self) -> bool:
        """Whether a rank has one that it has not answered; a session that waits for its user is none."""
        return any(entry.link is not None and entry.unanswered for entry in self._in_flight.values())

    @property
    def is_quiet(self) -> bool:
        """Whether no rank has a request, and none that has begun to answer waits to go on."""
        waiting = self.dispatch.waiting
        return len(waiting) == len(self._in_flight) and not any(entry.shown for entry in waiting.values())

    async def until_quiet(self) -> None:
        """Returns when that is so. Call it while new requests are held, or it may never be."""
        while not self.is_quiet:
            self._stirred.clear()
            await self._stirred.wait()

    def add(self, request: Any) -> None:
        """Takes a request, or a further part of one.

        Raises:
            RequestError: when the group is full.
        """
        entry = self._in_flight.get(request.request_id)
        if entry is not None:
            self._add_part(entry, request)
            return
        self._check_room()
        entry = InFlight([request])
        if self._gathers and is_seen_at_its_end(request):
            entry.kept = Kept.beside(len(self._in_flight), most_tokens(request))
        self._in_flight[request.request_id] = entry
        self.counters.accepted += 1
        if request.request_id in self._broken:
            # Without the parts before it, it would be answered as something else.
            self._lose(entry, "an earlier part of its session was lost")
            return
        self.dispatch.send(entry)
        if request.abort_immediately and entry.link is not None:
            # Sent for what a KV connector does at a request's end; no rank answers it.
            self._end(entry)

    def has(self, request_id: str) -> bool:
        """Whether a request is in flight."""
        return request_id in self._in_flight

    def gathered(self, request_id: str) -> tuple[Sequence[int], str | None]:
        """See `GroupClient.gathered`."""
        entry = self._in_flight.get(request_id)
        return ((), None) if entry is None or entry.kept is None else (entry.tokens, entry.kept.weights)

    def _check_room(self) -> None:
        bound = self._policy.max_queue
        if bound and len(self._in_flight) >= bound:
            self.counters.refused += 1
            why = f"the group is full: {len(self._in_flight)} requests are in it, and max_queue is {bound}"
            self._tell.refused(why, self.counters.refused)
            raise RequestError(why, retryable=True)

    def _add_part(self, entry: InFlight, request: Any) -> None:
        # A further part of a session goes where the session is. The last one only says that no more follow.
        entry.parts.append(request)
        entry.unanswered += request.resumable
        if entry.link is not None:
            self.dispatch.hand_over(entry.link, request)
        if not entry.unanswered:
            self._end(entry)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stops requests; unknown ids are ignored, since a request may end while its abort is under way."""
        by_link: dict[RankLink, list[str]] = {}
        for request_id in request_ids:
            self._broken.discard(request_id)
            entry = self._in_flight.get(request_id)
            if entry is None:
                continue
            self.counters.aborted += 1
            if entry.link is not None:
                by_link.setdefault(entry.link, []).append(request_id)
            self._end(entry)  # An engine says nothing of a request that was aborted.
        for link, ids in by_link.items():
            link.send(wire.ABORT, self._codec.encode(ids))

    def rank_died(self, link: RankLink, reason: str, blame: bool) -> None:
        """Moves what a rank had, or ends it; see `GroupClient.down`."""
        entries = [entry for entry in self._in_flight.values() if entry.link is link]
        self.dispatch.close(link, entries)
        death = Death(link.rank, link.incarnation, reason)
        guilty = self._suspects.blame(entries, death, self.traits.slots) if blame else []
        for entry in guilty:
            self.counters.poisoned += 1
            error = poisoned(entry)
            self._tell.poisoned(entry, error)
            self._fail(entry, error)
        if self._settle is None:
            self._move(entries, death, len(guilty), blame)
            return

        def settled(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                self._move(entries, death, len(guilty), blame)

        self._settle().add_done_callback(settled)

    def clear(self) -> None:
        """The group is dead: all are lost."""
        self.counters.lost += len(self._in_flight)
        self._in_flight.clear()
        self.dispatch.clear()
        self._stirred.set()

    def _end(self, entry: InFlight) -> None:
        del self._in_flight[entry.request_id]
        self.dispatch.take_back(entry)
        self._stirred.set()

    def _lose(self, entry: InFlight, why: str) -> None:
        self.counters.lost += 1
        self._tell.lost(entry, why)
        self._fail(entry, RequestError(f"the request was lost: {why}", retryable=True))

    def _fail(self, entry: InFlight, error: RequestError) -> None:
        self._end(entry)
        last = entry.parts[-1]
        self._broken.discard(entry.request_id)
        if last.resumable:
            self._broken.add(entry.request_id)
        self._outputs.put_nowait(Failed(entry.request_id, error))

    def _move(self, entries: Sequence[InFlight], death: Death, poisoned: int, blame: bool) -> None:
        """Sends on what a dead rank had, as far as it is still wanted."""
        left = [entry for entry in entries if self._in_flight.get(entry.request_id) is entry]
        decisions = {}
        for entry in left:
            decision = decide(
                entry.parts,
                shown=entry.shown,
                tokens=len(entry.tokens),
                traits=self.traits,
                same_weights=entry.epoch == self.dispatch.epoch,
            )
            decisions[entry.request_id] = decision
            if decision.move is Move.FAIL:
                self.counters.lost += 1
                words = f"the request was lost when rank {death.rank} died: {decision.reason}; send it again"
                self._fail(entry, RequestError(words, retryable=True))
                continue
            self.counters.moved += 1
            self.rank_counters[death.rank].moved_away += 1
            self.counters.replayed += decision.move is not Move.CONTINUE
            if decision.move is not Move.REPLAY:
                entry.second = SecondRun(entry.tokens, continues=decision.move is Move.CONTINUE)
        self._tell.moved(death, decisions, poisoned, blame)
        for entry in left:
            if decisions[entry.request_id].move is not Move.FAIL:
                self.dispatch.send(entry)
        self._stirred.set()

    def noted(self, link: RankLink, outputs: Iterable[Any], weights: str | None = None) -> list[Any]:
        """Takes note of what a rank answered; what of it is for the frontend, and now.

        Args:
            link: whose answers they are.
            outputs: EngineCoreOutputs, which may be changed.
            weights: the version of the weights that answered, where vLLM says it.
        """
        left, more = [], 0
        for output in outputs:
            entry = self._in_flight.get(output.request_id)
            if entry is None or entry.link is not link:
                continue  # It was aborted a moment ago.
            plain = entry.shown and entry.second is None and not entry.suspicion
            if plain and entry.kept is not None and entry.kept.takes(entry.tokens, output, weights):
                more += len(output.new_token_ids)
            elif self._note(entry, link, output, weights):
                left.append(output)
        self.rank_counters[link.rank].tokens += more
        return left

    def _note(self, entry: InFlight, link: RankLink, output: Any, weights: str | None) -> bool:
        """Whether an output is for the frontend, and now."""
        if output.finish_reason is not None and str(output.finish_reason) == "abort" and self._hold(entry, link):
            return False
        if entry.second is not None and not self._is_new(entry, output):
            return False
        if not entry.shown:
            entry.shown, entry.epoch = True, self.dispatch.epoch
        counters = self.rank_counters[link.rank]
        counters.tokens += len(output.new_token_ids)
        is_kept = False
        if entry.kept is None:
            entry.tokens += output.new_token_ids
        else:
            is_kept = entry.kept.keeps(entry.tokens, output, weights, self._outputs.put_nowait)
        if entry.soon is not None and len(entry.tokens) >= entry.soon:
            self.dispatch.ends_soon(entry)
        if entry.suspicion and self._suspects.stepped(entry, link):
            self.dispatch.send_waiting()
        if is_kept:
            return False
        # Engines list what they finished (`finished_requests`) for a coordinator only, and here is none.
        if output.finish_reason is not None:
            entry.unanswered -= 1
            if not (entry.unanswered or entry.parts[-1].resumable):
                counters.finished += 1
                self.counters.finished += 1
                self._end(entry)
        return True

    def _hold(self, entry: InFlight, link: RankLink) -> bool:
        """Whether to wait with the end of a request that nobody here aborted: its engine may be about to end."""
        if self._is_called(link):
            return False  # As pausing does, or putting to sleep.

        def end() -> None:
            if self._in_flight.get(entry.request_id) is entry and entry.link is link:
                self._lose(entry, f"rank {link.rank} aborted it")

        asyncio.get_running_loop().call_later(ABORT_S, end)
        return True

    def _is_new(self, entry: InFlight, output: Any) -> bool:
        try:
            return entry.second is None or entry.second.take(output)
        except AnsweredDifferently as different:
            link = entry.link
            rank = "another rank" if link is None else f"rank {link.rank}"
            if link is not None:
                link.send(wire.ABORT, self._codec.encode([entry.request_id]))
            self._lose(entry, f"it was answered differently on {rank} at {different.what}; send it again")
            return False
