"""How a stand-in engine misbehaves, as data."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class When(enum.StrEnum):
    """The moment at which a fault strikes."""

    BEFORE_HELLO = "before HELLO"  # the launcher has not heard of the rank yet
    BEFORE_READY = "before READY"  # while it loads
    AFTER_READY = "after READY"  # at once when it is ready
    REQUEST = "at a request"  # while it serves
    WEIGHTS = "at weights"  # when it is given a bucket; `error` then fails the call alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong in one incarnation of one rank; by default nothing.

    Args:
        when: the moment of `returncode`, `error` or `hang`.
        returncode: the process ends so: an exit code, or minus a signal's number.
        error: the engine raises a RuntimeError with this message.
        hang: the engine does nothing more; it still ends at SIGTERM.
        nth: for REQUEST, the request that the fault strikes at, counted from 1; 0 for every one.
        after_tokens: for REQUEST, the tokens of that request that are answered first.
        poison_token: for REQUEST, strikes only at (and counts only) requests with this token in the prompt.
        ignore_sigterm: the process does not end at SIGTERM.
        stderr_bytes: bytes that are written to stderr before HELLO.
        slow_start_s: seconds of loading.
        token_delay_s: seconds for one step; None for the plan's.
        grandchild: the engine has a worker process of its own, in its process group, and ends by an error with it.
        late_answer_s: seconds after SIGTERM at which every request in flight gets one more token.
        instance_id: the id that the engine claims to have; None for its own.
        deviates: the engine answers other tokens than those that are expected.
    """

    when: When = When.AFTER_READY
    returncode: int | None = None
    error: str | None = None
    hang: bool = False
    nth: int = 1
    after_tokens: int = 0
    poison_token: int | None = None
    ignore_sigterm: bool = False
    stderr_bytes: int = 0
    slow_start_s: float = 0.0
    token_delay_s: float | None = None
    grandchild: bool = False
    late_answer_s: float | None = None
    instance_id: str | None = None
    deviates: bool = False

    @property
    def strikes(self) -> bool:
        """Whether anything ends or stops the engine."""
        return self.returncode is not None or self.error is not None or self.hang


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInPlan:
    """The stand-in engine's argument, the same for all ranks.

    Args:
        faults: what goes wrong, by (rank, incarnation).
        default: what goes wrong in all others.
        token_delay_s: seconds for one step, which answers one token to each running request.
        max_num_seqs: requests that run at once; the others wait their turn.
        max_model_len: tokens of prompt and answer together, at which an answer ends.
        dtype: reported as the model's.
        report_finished: whether answers name the requests that they end. vLLM does so only where a
            coordinator balances the ranks; without one, a client goes by each output's finish reason.
        copies_weights: whether the engines copy what they are given, as a loader would, in place of a checksum over it.
        load_s: seconds that the engines take to load a bucket or a checkpoint.
        can_sleep: whether the engines were started so that they can be put to sleep.
        hosts: the number of the host that each rank pretends to be on, and 0 for the others; 0 is the launcher's.
        devices: the name of the device that each rank pretends to be on; see `dplaunch.testing.devices`.
        blind: the ranks that see no other process's memory there.
    """

    faults: Mapping[tuple[int, int], Fault] = field(default_factory=dict)
    default: Fault = Fault()
    token_delay_s: float = 0.0
    max_num_seqs: int = 256
    max_model_len: int = 2048
    dtype: str = "float32"
    report_finished: bool = False
    copies_weights: bool = False
    load_s: float = 0.0
    can_sleep: bool = True
    hosts: Mapping[int, int] = field(default_factory=dict)
    devices: Mapping[int, str] = field(default_factory=dict)
    blind: tuple[int, ...] = ()

    def fault_of(self, rank: int, incarnation: int) -> Fault:
        """What goes wrong in this incarnation of this rank."""
        return self.faults.get((rank, incarnation), self.default)

    def __post_init__(self) -> None:
        # A copy, so that it does not change with the caller's; a plain dict, since it travels by pickle.
        object.__setattr__(self, "faults", dict(self.faults))
        object.__setattr__(self, "hosts", dict(self.hosts))
        object.__setattr__(self, "devices", dict(self.devices))
