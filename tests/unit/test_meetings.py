"""Where ranks in lockstep meet, and what each is told of its place there."""

from __future__ import annotations

import os

import cloudpickle
import psutil
import pytest

from dplaunch.recipes import make_boot
from dplaunch.seam.config import ConfigResult
from dplaunch.seam.lockstep import LOOPBACK, LockstepPlace, MeetingPoint, Meetings
from dplaunch.spec import Mode
from tests.unit.test_planner import MOE, gpu, plan_for

CONFIG = ConfigResult(
    config=b"",
    pickled_args=None,
    kv_engine_id=None,
    max_num_seqs=1,
    known_flags=frozenset(),
    log_requests=False,
    environ={},
)


def listening() -> dict[int, str]:
    """The addresses that this process listens at, by port."""
    found = psutil.Process(os.getpid()).net_connections("tcp")
    return {each.laddr.port: each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}


def test_each_life_of_a_group_has_a_meeting_point_of_its_own_and_only_the_last_one_is_open() -> None:
    meetings = Meetings(LOOPBACK)
    first = meetings.of(0).port
    assert meetings.of(0).port == first
    second = meetings.of(1).port
    assert second != first
    assert set(listening()) & {first, second} == {second}


def test_a_meeting_point_is_at_its_address_and_at_no_other() -> None:
    meeting = MeetingPoint(LOOPBACK)
    assert listening()[meeting.port] == LOOPBACK


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_rank_is_told_where_the_others_are_and_which_of_the_devices_are_its_own(tensor: int) -> None:
    plan = plan_for(gpu(4), model=MOE, argv=f"-ep -tp {tensor}", dp=2)
    assert plan.mode is Mode.LOCKSTEP
    meeting = MeetingPoint(LOOPBACK)
    places = []
    for spec in plan.ranks:
        boot = make_boot(plan, CONFIG, spec, spec.identity, "ipc://x", meeting)
        places.append(cloudpickle.loads(boot.payload).place)
        # All see the same ones, and vLLM counts from the rank's own number among them.
        assert boot.env["CUDA_VISIBLE_DEVICES"].split(",") == [str(n) for n in range(2 * tensor)]
    assert places == [LockstepPlace(rank=rank, local_rank=rank, host=LOOPBACK, port=meeting.port) for rank in range(2)]


def test_an_independent_rank_has_no_place_among_others() -> None:
    plan = plan_for(gpu(2), dp=2)
    boot = make_boot(plan, CONFIG, plan.ranks[0], plan.ranks[0].identity, "ipc://x")
    assert cloudpickle.loads(boot.payload).place is None
