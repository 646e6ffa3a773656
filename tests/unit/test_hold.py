"""The data path of a group that stands still, or whose weights have changed: what waits, what goes on, what ends."""

from __future__ import annotations

import asyncio

import pytest

from dplaunch.seam import frontend
from tests.unit.test_client import output
from tests.unit.test_moves import Moves


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """Imported with os.environ left as it was."""
    frontend.import_vllm(quiet=True)


async def test_a_group_that_is_held_sends_nothing_until_it_is_released_and_then_in_order() -> None:
    rig = Moves(1)
    rig.client.hold()
    rig.add("a", "b")
    assert rig.links[0].added == []
    assert (rig.client.unfinished, rig.client.queued, rig.client.is_held) == (2, 2, True)
    rig.client.release()
    assert rig.links[0].added == ["a", "b"]


async def test_what_has_begun_moves_while_it_is_waited_for_and_nothing_else_does() -> None:
    rig = Moves(2)
    rig.ask("begun", temperature=0.0)
    rank = rig.holder("begun")
    rig.answer(rank, output("begun"))
    rig.ask("new", temperature=0.0)
    assert rig.holder("new") != rank
    rig.client.hold(begun_go_on=True)
    quiet = asyncio.ensure_future(rig.client.until_quiet())
    rig.down(rank, blame=False)
    other = rig.links[1 - rank]
    assert other.added == ["new", "begun"]
    rig.down(1 - rank, blame=False)
    rig.up(0, 1)
    # What had shown nothing is answered after the change, as what comes now.
    assert rig.links[0].added == ["begun"]
    await asyncio.sleep(0)
    assert not quiet.done()
    rig.answer(0, output("begun", ends=True))
    await asyncio.wait_for(quiet, 1)
    rig.client.release()
    assert rig.links[0].added == ["begun", "new"]


async def test_an_answer_that_began_on_other_weights_does_not_move_and_one_that_did_not_begin_does() -> None:
    rig = Moves(2)
    rig.ask("begun", temperature=0.0)
    rank = rig.holder("begun")
    rig.answer(rank, output("begun"))
    rig.client.new_weights()
    rig.ask("x", temperature=0.0)
    rig.ask("later", temperature=0.0)
    assert rig.holder("later") == rank
    rig.outcomes()
    rig.kill(rank)
    (reason,) = rig.reasons()
    assert "it began on weights that have been replaced since" in reason
    assert rig.holder("later") in rig.links


async def test_what_waits_with_an_answer_begun_ends_when_the_weights_change_meanwhile() -> None:
    rig = Moves(1)
    rig.ask("begun", temperature=0.0)
    rig.answer(0, output("begun"))
    rig.client.hold()
    rig.kill(0)
    rig.outcomes()
    rig.client.new_weights()
    rig.client.release()
    (reason,) = rig.reasons()
    assert "weights" in reason
    assert rig.client.unfinished == 0


async def test_a_group_without_requests_is_quiet_at_once() -> None:
    rig = Moves(1)
    await asyncio.wait_for(rig.client.until_quiet(), 1)
