"""Every row of the table that is done to a running group: under load, on both backends, and nothing is lost."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.chaos.load import Ask, End, Load, ask
from tests.chaos.rig import Rig
from tests.chaos.row import Row
from tests.chaos.table import TABLE

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaves("the group, which all rows share; its fixture looks for what is left"),
]

ROWS = [row for row in TABLE if row.act is not None]


def asks(seed: int) -> itertools.chain[Ask]:
    """Requests of all lengths, without end."""
    source = random.Random(seed)
    return itertools.chain.from_iterable(
        [ask([source.randrange(20, 900) for _ in range(source.randrange(1, 9))], source.randrange(5, 60))]
        for _ in itertools.count()
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
async def test_under_load_every_answer_is_exact_and_the_events_say_what_happened(row: Row, rig: Rig) -> None:
    if rig.backend not in row.backends or row.act is None:
        pytest.skip(f"not for {rig.backend}")
    await rig.whole()
    before = len(rig.events)
    source = asks(len(row.name))
    async with Load(rig.group, lambda: next(source)) as load:
        await load.flows()
        await row.act(rig)
        await load.flows()
        await rig.whole()
        await load.flows()
    said = "\n".join(event.message for event in rig.events[before:])
    assert load.tally.wrong == [], said
    assert set(load.tally.ends) == {End.EXACT}, f"{load.tally}\n{said}"
    assert [word for word in row.words if word not in said] == [], said
    assert rig.group.client.unfinished == 0
