"""The states of a rank, and which may follow which."""

from __future__ import annotations

from typing import cast

import pytest

from dplaunch.events import RankState
from dplaunch.identity import Identity
from dplaunch.plan import RankSpec
from dplaunch.rank import LEGAL, Rank


def a_rank_in(state: RankState | None) -> Rank:
    return Rank(cast(RankSpec, None), Identity("base", 5), state)


def test_every_state_has_its_legal_successors_and_what_stopped_serves_again_only_after_a_start() -> None:
    assert set(LEGAL) == {None, *RankState}
    assert RankState.READY not in LEGAL[RankState.STOPPED]


def test_no_rank_takes_an_illegal_step() -> None:
    for state, legal in LEGAL.items():
        for following in set(RankState) - legal:
            rank = a_rank_in(state)
            with pytest.raises(RuntimeError, match="rank 5 cannot go from"):
                rank.enter(following)
            assert rank.state is state
