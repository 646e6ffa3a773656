"""The rules for names that must be unique."""

from __future__ import annotations

import pytest

from dplaunch.identity import Identity, base_of, new_base_id


def test_every_rank_of_a_group_has_its_own_suffix() -> None:
    names = [Identity("base", rank).instance_id for rank in range(3)]
    assert names == ["base_dp0", "base_dp1", "base_dp2"]


def test_the_only_rank_of_a_group_keeps_its_plain_name() -> None:
    identity = Identity("base", 0, suffixed=False)
    assert identity.instance_id == "base"
    assert identity.engine_id("kv") == "kv"


def test_a_restarted_rank_keeps_its_rank_under_a_new_name() -> None:
    first = Identity("base", 3)
    again = first.restarted()
    assert again.rank == 3
    assert again.instance_id == "base-r1_dp3"
    assert again.restarted().instance_id == "base-r2_dp3"
    assert again.engine_id("kv") != first.engine_id("kv")


@pytest.mark.parametrize("carried", ["kv", "kv_dp3", "kv_dp1", "kv-r2_dp3"])
def test_an_engine_id_is_suffixed_once_whatever_it_carried_before(carried: str) -> None:
    assert Identity("base", 3).engine_id(carried) == "kv_dp3"


def test_no_connector_means_no_engine_id() -> None:
    assert Identity("base", 3).engine_id(None) is None


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("plain", "plain"),
        ("plain_dp0", "plain"),
        ("plain-r1_dp12", "plain"),
        ("a_dp1_dp2", "a_dp1"),
        ("with_dpx", "with_dpx"),
        ("", ""),
    ],
)
def test_the_base_is_found_within_any_name(name: str, base: str) -> None:
    assert base_of(name) == base


def test_the_base_of_every_name_that_is_made_is_the_base() -> None:
    base = new_base_id()
    for incarnation in (0, 1, 17):
        for suffixed in (True, False):
            assert base_of(Identity(base, 5, incarnation, suffixed).instance_id) == base


def test_two_groups_never_share_a_base() -> None:
    assert len({new_base_id() for _ in range(1000)}) == 1000


def test_the_process_title_names_the_rank() -> None:
    assert Identity("base", 1).process_title == "dplaunch::base_dp1"
