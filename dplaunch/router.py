"""Which rank takes the next request: the one with the fewest in flight, and among equals the one whose turn it is.

In a full rank those that wait for the place of one that is about to end weigh nothing. Of answers of one length, begun
together, those of one rank end a moment before the others', and it would get all that is left of a batch. Where a place
is free the next one begins at once, beside all that are there, and then all of them count.

A step costs the same for two ranks and for hundreds: ranks stand in queues by their weight, and where a request begins
or ends, its rank moves by one queue.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict


class Router:
    """Counts what each rank has in flight, and chooses among those that are open. Knows ranks by number only.

    Args:
        places: how many requests a rank runs at a time; endless where nobody knows.
    """

    def __init__(self, places: float = math.inf) -> None:
        self._load: Counter[int] = Counter()
        self._ending: Counter[int] = Counter()
        self._places = places
        self._open: set[int] = set()
        # Open ranks by weight; the first in a queue has stood there longest. There are no empty queues.
        self._queues: dict[float, OrderedDict[int, None]] = {}
        self._lowest: float = 0

    @property
    def ranks(self) -> list[int]:
        """The open ranks, in order."""
        return sorted(self._open)

    def is_open(self, rank: int) -> bool:
        """Whether the rank may be chosen."""
        return rank in self._open

    def load(self, rank: int) -> int:
        """Requests in flight on a rank, open or not."""
        return self._load[rank]

    def open(self, rank: int) -> None:
        """The rank may be chosen from now on."""
        if rank not in self._open:
            self._open.add(rank)
            self._enqueue(rank)

    def close(self, rank: int) -> None:
        """The rank is chosen no more. What it has in flight still counts, and more may be sent to it by name."""
        if rank in self._open:
            self._open.remove(rank)
            self._dequeue(rank)

    def choose(self) -> int | None:
        """The open rank with the least weight; ties go round, or one rank would get every request of a quiet group.

        Returns None where no rank is open. Counts nothing: `begin` does.
        """
        return next(iter(self._queues[self._lowest])) if self._open else None

    def begin(self, rank: int) -> None:
        """One request more is in flight on the rank."""
        self._change(rank, 1, 0)

    def ends_soon(self, rank: int) -> None:
        """One of those in flight on the rank is about to end."""
        self._change(rank, 0, 1)

    def end(self, rank: int, was_about_to: bool = False) -> None:
        """One request fewer is in flight on the rank; whether `ends_soon` was said of it."""
        self._change(rank, -1, -was_about_to)

    def _change(self, rank: int, load: int, ending: int) -> None:
        # One that is about to end where places are free changes nothing.
        stands = rank in self._open and (load != 0 or self._load[rank] >= self._places)
        if stands:
            self._dequeue(rank)
        self._load[rank] += load
        self._ending[rank] += ending
        if stands:
            self._enqueue(rank)

    def _weight(self, rank: int) -> float:
        load = self._load[rank] + 1  # The next one with it: what counts is whether that one would wait.
        return min(load, self._places) + max(0, load - self._places - self._ending[rank])

    def _enqueue(self, rank: int) -> None:
        weight = self._weight(rank)
        queue = self._queues.get(weight)
        if queue is None:
            queue = self._queues[weight] = OrderedDict()
        queue[rank] = None
        if weight < self._lowest or len(self._open) == 1:
            self._lowest = weight

    def _dequeue(self, rank: int) -> None:
        weight = self._weight(rank)
        queue = self._queues[weight]
        del queue[rank]
        if not queue:
            del self._queues[weight]
            if weight == self._lowest and self._queues:
                self._lowest = min(self._queues)
