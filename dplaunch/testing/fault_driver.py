"""Makes the fault of one incarnation happen at its moment."""

from __future__ import annotations

from dplaunch.testing import wire
from dplaunch.testing.faults import Fault, When
from dplaunch.testing.host import Host


class FaultDriver:
    """Makes one incarnation's fault happen."""

    def __init__(self, fault: Fault, host: Host) -> None:
        self.fault = fault
        self._host = host
        self._requests = 0

    def begin(self) -> int | None:
        """What happens before HELLO; returns the grandchild's pid."""
        if self.fault.ignore_sigterm:
            self._host.ignore_sigterm()
        line = "x" * 99
        for _ in range(self.fault.stderr_bytes // 100):
            self._host.say(line)
        grandchild = self._host.spawn_sleeper() if self.fault.grandchild else None
        self.strike(When.BEFORE_HELLO)
        return grandchild

    def change(self, fault: Fault) -> None:
        """From now on this is what goes wrong; requests are counted from here."""
        self.fault = fault
        self._requests = 0

    def load(self) -> None:
        """Takes the time of a slow start; SIGTERM ends it early."""
        self._host.stop.wait(self.fault.slow_start_s)

    def strike(self, when: When) -> None:
        """Does what the fault says, where this is its moment."""
        if self.fault.when is when:
            self.strike_now()

    def hits(self, request: wire.Request) -> bool:
        """Whether the fault is to strike at this request."""
        fault = self.fault
        if fault.when is not When.REQUEST or not fault.strikes:
            return False
        if fault.poison_token is not None and fault.poison_token not in (request.prompt_token_ids or ()):
            return False
        self._requests += 1
        return fault.nth in (0, self._requests)

    def strike_now(self) -> None:
        """Dies, raises or hangs."""
        fault = self.fault
        if fault.returncode is not None:
            self._host.say(f"stand-in engine ends on purpose: {fault.returncode}")
            self._host.die(fault.returncode)
        if fault.error is not None:
            raise RuntimeError(fault.error)
        if fault.hang:
            self._host.stop.wait(None)
            self._host.stopped()
            raise SystemExit(0)
