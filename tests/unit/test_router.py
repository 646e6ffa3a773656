"""Which rank takes the next request."""

from __future__ import annotations

import math
import random

import pytest

from dplaunch.router import Router


def _router(ranks: int, places: float = math.inf) -> Router:
    router = Router(places)
    for rank in range(ranks):
        router.open(rank)
    return router


def _send(router: Router) -> int:
    rank = router.choose()
    assert rank is not None
    router.begin(rank)
    return rank


def test_the_least_loaded_rank_is_chosen() -> None:
    router = _router(3)
    for rank in (0, 0, 1, 2, 2):
        router.begin(rank)
    assert _send(router) == 1
    assert {_send(router) for _ in range(3)} == {0, 1, 2}


def test_ties_go_round_in_a_quiet_group() -> None:
    router = _router(4)
    served = []
    for _ in range(12):
        rank = _send(router)
        router.end(rank)
        served.append(rank)
    assert [sorted(served[at : at + 4]) for at in (0, 4, 8)] == [[0, 1, 2, 3]] * 3


def test_a_burst_is_spread_evenly() -> None:
    router = _router(5)
    for _ in range(23):
        _send(router)
    assert sorted(router.load(rank) for rank in range(5)) == [4, 4, 5, 5, 5]


def test_a_request_that_ends_makes_its_rank_the_next() -> None:
    router = _router(3)
    for _ in range(6):
        _send(router)
    router.end(1)
    assert router.choose() == 1


def test_those_that_wait_for_the_place_of_one_that_is_about_to_end_weigh_nothing() -> None:
    router = _router(2, 2)
    for _ in range(6):
        _send(router)  # two of each rank run, one waits
    router.ends_soon(0)
    assert _send(router) == 0  # it waits behind the one that has a place in a moment
    assert {_send(router) for _ in range(2)} == {0, 1}
    assert (router.load(0), router.load(1)) == (5, 4)
    router.end(0, was_about_to=True)
    assert [_send(router) for _ in range(2)].count(0) == 1


def test_where_places_are_free_those_that_are_about_to_end_count() -> None:
    for places in (math.inf, 8):
        router = _router(2, places)
        for _ in range(8):
            _send(router)
        for _ in range(4):
            router.ends_soon(0)
        router.end(1)
        router.end(1)
        assert [_send(router), _send(router)] == [1, 1]
        assert {_send(router), _send(router)} == {0, 1}


def test_what_is_left_of_answers_of_one_length_is_shared_evenly_though_one_rank_ends_first() -> None:
    router = _router(2, 1024)
    for _ in range(2 * 1536):
        _send(router)
    for _ in range(1024):
        router.ends_soon(0)
        router.ends_soon(1)
    for _ in range(1024):
        router.end(1, was_about_to=True)
    assert [_send(router) for _ in range(1024)].count(0) == 512
    for _ in range(1024):
        router.end(0, was_about_to=True)
    assert router.load(0) == router.load(1) == 1024


def test_to_choose_counts_nothing() -> None:
    router = _router(2)
    assert router.choose() == router.choose()
    assert [router.load(rank) for rank in range(2)] == [0, 0]


def test_a_pinned_request_counts_like_any_other() -> None:
    router = _router(2)
    router.begin(1)
    router.begin(1)
    assert [_send(router), _send(router)] == [0, 0]


def test_a_closed_rank_is_never_chosen_and_keeps_its_count() -> None:
    router = _router(3)
    router.begin(1)
    router.close(1)
    assert {_send(router) for _ in range(10)} == {0, 2}
    router.begin(1)  # by name, as a pinned one
    router.end(1)
    assert (router.load(1), router.ranks) == (1, [0, 2])


def test_a_rank_that_is_opened_again_comes_with_what_it_has_in_flight() -> None:
    router = _router(2)
    router.close(0)
    router.begin(0)
    router.begin(1)
    router.begin(1)
    router.open(0)
    assert router.choose() == 0
    router.begin(0)
    router.begin(0)
    assert router.choose() == 1


def test_a_dead_rank_begins_again_with_nothing_in_flight() -> None:
    router = _router(2)
    for _ in range(4):
        _send(router)
    router.close(0)
    for _ in range(2):
        router.end(0)  # what it had goes elsewhere
    router.open(0)
    assert [_send(router), _send(router)] == [0, 0]


def test_no_rank_is_chosen_where_none_is_open() -> None:
    router = Router()
    assert router.choose() is None
    router.open(7)
    router.close(7)
    assert router.choose() is None
    router.open(7)
    assert router.choose() == 7


def test_to_open_or_close_twice_changes_nothing() -> None:
    router = _router(2)
    router.begin(0)
    router.open(0)
    assert router.load(0) == 1
    router.close(1)
    router.close(1)
    assert router.ranks == [0]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_an_open_rank_with_the_lowest_load_is_chosen(seed: int) -> None:
    random_ = random.Random(seed)
    places = random_.randrange(1, 80) if seed else 10**9
    router, load, open_ = Router(places), dict.fromkeys(range(8), 0), set[int]()
    ending = dict.fromkeys(range(8), 0)

    def weight(rank: int) -> int:
        return min(load[rank] + 1, places) + max(0, load[rank] + 1 - places - ending[rank])

    for _ in range(3000):
        rank = random_.randrange(8)
        match random_.choice(("open", "close", "begin", "begin", "begin", "soon", "end", "end")):
            case "open":
                router.open(rank)
                open_.add(rank)
            case "close":
                router.close(rank)
                open_.discard(rank)
            case "begin":
                router.begin(rank)
                load[rank] += 1
            case "soon" if load[rank] > ending[rank]:
                router.ends_soon(rank)
                ending[rank] += 1
            case "end" if load[rank]:
                was_about_to = ending[rank] == load[rank] or bool(ending[rank] and random_.randrange(2))
                router.end(rank, was_about_to)
                load[rank] -= 1
                ending[rank] -= was_about_to
        chosen = router.choose()
        assert router.ranks == sorted(open_)
        assert [router.load(one) for one in load] == list(load.values())
        if chosen is None:
            assert not open_
        else:
            assert chosen in open_
            assert weight(chosen) == min(weight(one) for one in open_)
