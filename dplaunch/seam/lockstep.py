"""Ranks that step together: where they meet, and vLLM's engine core for one of them.

vLLM's ranks find each other through a store where there is one (`ParallelConfig._coord_store_port`): rank 0 binds a
port that the kernel chooses and says there which. The ports that vLLM looks for before a launch, and which somebody
else may have taken by the time that they are bound, are not needed then.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

WORLD_PORT = "dplaunch_world_port"
"""The store's key for the port of the workers' group."""

LOOPBACK = "127.0.0.1"
"""Where ranks meet that are all on the launcher's host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockstepPlace:
    """A rank's place among those that it steps with.

    Args:
        rank: the global data-parallel rank.
        local_rank: which of the rank's node it is, where it sees the devices of all of them; else 0.
        host: where rank 0 and the store are.
        port: the store's.
    """

    rank: int
    local_rank: int
    host: str
    port: int


class MeetingPoint:
    """The store of one life of a group in lockstep, in the launcher. Needs torch, which takes seconds to import.

    Each life has its own: what the ranks before have said in theirs is not true any more.
    """

    def __init__(self, host: str) -> None:
        from torch.distributed import TCPStore

        self.host = host
        with socket.create_server((host, 0), family=_family(host)) as listener:
            self.port: int = listener.getsockname()[1]
            # The descriptor is the store's from here on. Without one it would listen on every address of the host.
            self._store = TCPStore(
                host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )


class Meetings:
    """The meeting points of a group in lockstep, of one life after the other.

    Args:
        host: an address of the launcher's host that all ranks reach.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._last: tuple[int, MeetingPoint] | None = None

    def of(self, incarnation: int) -> MeetingPoint:
        """The one of the ranks' incarnation, which is the same for all of them; it closes the one before."""
        if self._last is None or self._last[0] != incarnation:
            self._last = incarnation, MeetingPoint(self._host)
        return self._last[1]


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def core_class(place: LockstepPlace) -> type[Any]:
    """vLLM's engine core for ranks that step together."""
    from vllm.v1.engine.core import DPEngineCoreProc

    class MeetingCore(DPEngineCoreProc):  # type: ignore[misc]
        def _init_data_parallel(self, vllm_config: Any) -> None:
            super()._init_data_parallel(vllm_config)
            vllm_config.parallel_config._data_parallel_master_port_list = [_world_port(place)]

    return MeetingCore


def take_place(parallel: Any, place: LockstepPlace) -> None:
    """Tells vLLM's ParallelConfig where the ranks meet."""
    parallel.data_parallel_master_ip = place.host
    parallel._coord_store_port = place.port


def _world_port(place: LockstepPlace) -> int:
    """Which port the workers' group is to use, as rank 0 finds it; vLLM asks the store itself in later versions."""
    from torch.distributed import TCPStore

    store = TCPStore(place.host, place.port, is_master=False, wait_for_workers=False)
    if place.rank == 0:
        with socket.create_server((place.host, 0), family=_family(place.host)) as probe:
            store.set(WORLD_PORT, str(probe.getsockname()[1]))
    return int(store.get(WORLD_PORT))
