"""Who gets a token at a step of the stand-in engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from dplaunch.testing import wire
from dplaunch.testing.tokens import next_token


@dataclass(slots=True)
class Sequence:
    """One request on its way.

    Args:
        request_id: the client's name for it.
        client: the client's index, which is that of the socket that the answer goes to.
        position: tokens so far, the prompt's included.
        last: the last of them.
        left: tokens still to answer.
        answered: tokens answered.
        pooling: whether it asks for an embedding and no tokens.
    """

    request_id: str
    client: int
    position: int
    last: int
    left: int
    answered: int = 0
    pooling: bool = False

    def step(self, seed: int = 0) -> wire.Output:
        """Its next token, with the reason where that is the last one."""
        if self.pooling:
            self.left = 0
            tensor = wire.encode_tensor([float(self.position), float(self.last)])
            return wire.Output(self.request_id, [], pooling_output=tensor, finish_reason=wire.FINISH_STOP)
        prompt = wire.PrefillStats(self.position, self.position) if self.answered == 0 else None
        self.last = next_token(self.last, self.position, seed)
        self.position += 1
        self.answered += 1
        self.left -= 1
        reason = wire.FINISH_LENGTH if self.left <= 0 else None
        return wire.Output(self.request_id, [self.last], finish_reason=reason, prefill_stats=prompt)


class Scheduler:
    """First come, first served; at most `max_num_seqs` at a time."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._running: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    def add(self, request: wire.Request) -> None:
        """Takes a request, which runs from the next step on or waits for its turn."""
        prompt = request.prompt_token_ids or []
        wanted = (request.sampling_params or {}).get("max_tokens", wire.DEFAULT_MAX_TOKENS)
        room = max(1, self._max_model_len - len(prompt))
        self._waiting.append(
            Sequence(
                request_id=request.request_id,
                client=request.client_index,
                position=len(prompt),
                last=prompt[-1] if prompt else 0,
                left=room if wanted is None else min(wanted, room),
                pooling=request.sampling_params is None,
            )
        )

    def remove(self, request_ids: Iterable[str] | None = None) -> list[Sequence]:
        """Forgets these requests, or all; returns those that it had, with what they have so far."""
        everything = {sequence.request_id: sequence for sequence in (*self._running.values(), *self._waiting)}
        names = set(everything if request_ids is None else request_ids)
        self._running = {name: sequence for name, sequence in self._running.items() if name not in names}
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request_id not in names)
        return [everything[name] for name in everything if name in names]

    def step(self, seed: int = 0) -> dict[int, list[wire.Output]]:
        """One token for every running request, by client; those that are done are forgotten."""
        while self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting.popleft()
            self._running[sequence.request_id] = sequence
        outputs: dict[int, list[wire.Output]] = {}
        for sequence in list(self._running.values()):
            outputs.setdefault(sequence.client, []).append(sequence.step(seed))
            if sequence.left <= 0:
                del self._running[sequence.request_id]
        return outputs
