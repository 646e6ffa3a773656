"""Which zygotes this process has, who holds them, and how long an unused one stays."""

from __future__ import annotations

import atexit
import os
import threading
from collections import Counter
from collections.abc import Mapping

from dplaunch.errors import BackendError, UsageError

from .nursery import Nursery, ZygoteKey

LINGER_VARIABLE = "DPLAUNCH_ZYGOTE_LINGER_S"

DEFAULT_LINGER_S = 300.0
"""Seconds that an unused zygote stays: longer than people think between two launches in a notebook, and not so
long that its memory (half a gigabyte, mostly shared with nobody) is missed."""


class Registry:
    """The zygotes of this process, one for each key. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._current: dict[ZygoteKey, Nursery] = {}
        self._all: set[Nursery] = set()
        self._holders: Counter[ZygoteKey] = Counter()
        self._timers: dict[Nursery, threading.Timer] = {}
        self._unwanted: set[Nursery] = set()
        self._linger_s = DEFAULT_LINGER_S

    def hold(self, key: ZygoteKey) -> None:
        """Keeps the key's zygote, present or future, from ending for want of use.

        Raises:
            UsageError: when `LINGER_VARIABLE` is no number of seconds.
        """
        linger_s = _read_linger()
        with self._lock:
            self._linger_s = linger_s
            self._holders[key] += 1

    def release(self, key: ZygoteKey) -> None:
        """Undoes one `hold`."""
        with self._lock:
            self._holders[key] -= 1
            nursery = self._current.get(key)
        if nursery is not None:
            self._consider(nursery)

    def nursery(self, key: ZygoteKey, env: Mapping[str, str]) -> Nursery:
        """The key's zygote; a new one when there is none or it has ended. Does not wait for it to be ready.

        Raises:
            BackendError: when its process cannot be made.
        """
        with self._lock:
            nursery = self._current.get(key)
            if nursery is None or not nursery.usable:
                try:
                    nursery = Nursery(key, env, self._consider)
                except OSError as error:
                    raise BackendError(
                        f"the helper process that makes ranks could not be started: {error}",
                        hint="Check the limits on processes (ulimit -u), open files (ulimit -n) and memory.",
                    ) from error
                self._current[key] = nursery
                self._all.add(nursery)
            self._keep(nursery)
        return nursery

    def shut_down(self) -> None:
        """Ends every zygote that has no children; one that has some ends after the last of them."""
        with self._lock:
            idle = [nursery for nursery in self._all if not nursery.busy]
            self._unwanted |= self._all - set(idle)
            for nursery in idle:
                self._drop(nursery)
        for nursery in idle:
            nursery.end()

    def end_all(self) -> None:
        """Ends every zygote and every child."""
        with self._lock:
            everyone = list(self._all)
            for nursery in everyone:
                self._drop(nursery)
        for nursery in everyone:
            nursery.end()

    def disown(self) -> None:
        """In a forked copy of this process: these zygotes are the original's."""
        for nursery in self._all:
            nursery.disown()

    def _consider(self, nursery: Nursery) -> None:
        """Lets a nursery's time run when nobody uses it."""
        with self._lock:
            if nursery not in self._all or nursery.busy:
                return
            unwanted = not nursery.usable or nursery in self._unwanted
            if not unwanted and self._holders[nursery.key] > 0:
                return
            self._keep(nursery)
            # A thread in any case: this may be the nursery's own, which ending it waits for.
            timer = threading.Timer(0.0 if unwanted else self._linger_s, self._expire, (nursery,))
            timer.daemon = True
            timer.name = "dplaunch::zygote linger"
            self._timers[nursery] = timer
            timer.start()

    def _expire(self, nursery: Nursery) -> None:
        with self._lock:
            late = self._timers.get(nursery) is not threading.current_thread()
            if late or nursery.busy or nursery not in self._all:
                return
            self._drop(nursery)
        nursery.end()

    def _keep(self, nursery: Nursery) -> None:
        timer = self._timers.pop(nursery, None)
        if timer is not None:
            timer.cancel()

    def _drop(self, nursery: Nursery) -> None:
        self._keep(nursery)
        self._all.discard(nursery)
        self._unwanted.discard(nursery)
        if self._current.get(nursery.key) is nursery:
            del self._current[nursery.key]


def _read_linger() -> float:
    text = os.environ.get(LINGER_VARIABLE)
    if text is None:
        return DEFAULT_LINGER_S
    try:
        return max(0.0, float(text))
    except ValueError:
        raise UsageError(
            f"{LINGER_VARIABLE} must be a number of seconds, not {text!r}",
            hint=f"Unset it for the default of {DEFAULT_LINGER_S:g} s.",
        ) from None


_registry = Registry()
_inherited: list[Registry] = []


def registry() -> Registry:
    """This process's registry."""
    return _registry


def shutdown_zygotes() -> None:
    """Ends every zygote of this process that has no ranks, and each other one after its last rank.

    For who wants their memory back before they end by themselves, after `DPLAUNCH_ZYGOTE_LINGER_S` seconds
    without use. The next launch starts a new one.
    """
    _registry.shut_down()


def _start_anew() -> None:
    global _registry
    _registry.disown()
    # Kept: the destructors of what is in it would act on processes that are not this one's.
    _inherited.append(_registry)
    _registry = Registry()


os.register_at_fork(after_in_child=_start_anew)
atexit.register(lambda: _registry.end_all())
