"""Every name of a rank that must be unique, derived in one place, for every backend and every path.

vLLM names Ray actors, shared memory and KV-cache registrations after `VllmConfig.instance_id` and
`KVTransferConfig.engine_id`. Two engine cores of one data-parallel group that share either collide
(vLLM pull request 40398). Here both end in `_dp{global rank}`, exactly once, whoever starts the rank.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

_SUFFIX = re.compile(r"^(?P<base>.+?)(?:-r(?P<incarnation>[1-9]\d*))?(?:_dp(?P<rank>\d+))?$")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who one incarnation of one rank is.

    Args:
        base_id: the group's id, the same for all ranks; some KV connectors share by it on purpose.
        rank: the global data-parallel rank, never a node-local one: two nodes' rank 0 differ.
        incarnation: 0 at first, one more at each restart. What a peer cached by name (a NIXL agent, a
            Ray actor) must not be mistaken for the dead one, so a later incarnation has another name.
        suffixed: False for the only rank of a group started with dp=1, which keeps its plain name.
    """

    base_id: str
    rank: int
    incarnation: int = 0
    suffixed: bool = True

    @property
    def unsuffixed_id(self) -> str:
        """The id before the rank's suffix: the base, and the incarnation from the first restart on."""
        return self.base_id if self.incarnation == 0 else f"{self.base_id}-r{self.incarnation}"

    @property
    def instance_id(self) -> str:
        """For `VllmConfig.instance_id`: `BASE_dp3`, after a restart `BASE-r1_dp3`."""
        return f"{self.unsuffixed_id}_dp{self.rank}" if self.suffixed else self.unsuffixed_id

    def engine_id(self, base_engine_id: str | None) -> str | None:
        """For `KVTransferConfig.engine_id`: the same rule over the connector's own base id.

        A base that already carries a suffix (a config that went through another launcher) loses it
        first, so that the result is never `_dp3_dp3`. None, which means no connector, stays None.
        """
        if base_engine_id is None:
            return None
        return Identity(base_of(base_engine_id), self.rank, self.incarnation, self.suffixed).instance_id

    @property
    def process_title(self) -> str:
        """What `ps` shows for the rank's process."""
        return f"dplaunch::{self.instance_id}"

    def restarted(self) -> Identity:
        """The identity of this rank's next incarnation."""
        return Identity(self.base_id, self.rank, self.incarnation + 1, self.suffixed)


def base_of(name: str) -> str:
    """The base id within any name that `Identity` made; a plain name is its own base."""
    match = _SUFFIX.match(name)
    return match["base"] if match else name


def new_base_id() -> str:
    """A fresh base id: short, and unique among groups, hosts and times."""
    return f"dpl-{uuid.uuid4().hex[:12]}"
