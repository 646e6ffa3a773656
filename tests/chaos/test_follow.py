"""The comparison itself: whatever is not exactly the foretold answer is seen."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from dplaunch.errors import RequestError
from tests.chaos.load import Ask, End, Tally, follow

EXPECTED = (20, 21, 22, 23)

Step = tuple[Sequence[int], str | None]


class Engine:
    """Answers by rote."""

    def __init__(self, *steps: Step | Exception) -> None:
        self._steps = steps

    async def generate(self, prompt: Any, params: Any, name: str) -> AsyncIterator[Any]:
        for step in self._steps:
            if isinstance(step, Exception):
                raise step
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(step[0]), finish_reason=step[1])])


async def ended(*steps: Step | Exception, leave_after: int | None = None) -> Tally:
    tally = Tally()
    group: Any = SimpleNamespace(engine=Engine(*steps))
    await follow(group, Ask([1], EXPECTED, leave_after), "name", tally)
    assert tally.ends.total() == tally.accepted == 1
    return tally


@pytest.mark.parametrize(
    ("steps", "end"),
    [
        ([([20], None), ([21, 22], None), ([23], "length")], End.EXACT),
        ([([20, 21, 22, 23], None), ([], "length")], End.EXACT),
        ([([20], None), ([20, 21, 22], "length")], End.WRONG),
        ([([20], None), ([22, 23], "length")], End.WRONG),
        ([([20, 21, 22], "length")], End.WRONG),
        ([([20, 21, 22, 23, 24], "length")], End.WRONG),
        ([([20, 21], "abort")], End.WRONG),
        ([([20, 21], "stop")], End.WRONG),
        ([([20, 21, 22, 23], None)], End.WRONG),
        ([], End.WRONG),
        ([([20], "error")], End.FAILED),
        ([([20], None), RequestError("it was lost")], End.FAILED),
        ([([21], None), RequestError("it was lost")], End.WRONG),
    ],
)
async def test_a_stream_has_exactly_one_end(vllm_imported: None, steps: list[Any], end: End) -> None:
    tally = await ended(*steps)
    assert dict(tally.ends) == {end: 1}
    assert (tally.wrong != []) is (end is End.WRONG)


async def test_a_client_that_leaves_has_seen_the_right_beginning(vllm_imported: None) -> None:
    assert dict((await ended(([20], None), ([21], None), leave_after=2)).ends) == {End.LEFT: 1}
    assert dict((await ended(([20], None), ([9], None), leave_after=2)).ends) == {End.WRONG: 1}


async def test_an_error_is_counted_by_its_words(vllm_imported: None) -> None:
    tally = await ended(RequestError("request name was lost"))
    assert dict(tally.errors) == {"RequestError: request REQUEST was lost": 1}
