"""What a spec accepts and refuses."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from dplaunch.errors import ExitCode, UsageError
from dplaunch.spec import ClusterOptions, LaunchSpec


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dp": 0}, "at least 1, not 0"),
        ({"dp": -1}, "at least 1, not -1"),
        ({"dp": "two"}, "whole number of ranks, not 'two'"),
        ({"dp": 2.0}, "whole number of ranks, not 2.0"),
        ({"dp": True}, "whole number of ranks, not True"),
        ({"dp": 2, "min_ranks": 3}, "between 1 and dp=2, not 3"),
        ({"dp": 2, "min_ranks": 0}, "between 1 and dp=2, not 0"),
        ({"start_timeout_s": 0}, "start_timeout_s must be positive"),
        ({"shutdown_timeout_s": -1}, "shutdown_timeout_s must not be negative"),
        ({"dp": 2, "devices": (("0",),)}, "names 1 ranks, but dp=2"),
        ({"engine_args": {"data_parallel_size": 2}}, "data_parallel_size is not for dplaunch"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        LaunchSpec(**options)
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": ""}, "ray_address is empty"),
        ({"num_gpus": 0}, "above 0 and at most 1, not 0"),
        ({"num_gpus": 1.5}, "above 0 and at most 1, not 1.5"),
        ({"num_gpus": True}, "above 0 and at most 1, not True"),
        ({"num_gpus": "half"}, "above 0 and at most 1, not 'half'"),
        ({"bundle_indices": ((0,),)}, "bundle_indices needs placement_groups"),
    ],
)
def test_a_cluster_option_that_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ClusterOptions(**options)


@pytest.mark.parametrize(
    ("groups", "bundles", "words"),
    [
        (2, None, "placement_groups has 2 groups, but dp=3"),
        (4, None, "placement_groups has 4 groups, but dp=3"),
        (1, ((0,), (1,)), "bundle_indices names 2 ranks, but dp=3"),
        (3, ((0,), (), (0,)), "rank 1 was given bundle_indices []"),
        (1, ((0,), (1,), (-1,)), "rank 2 was given bundle_indices [-1]"),
        (1, ((0,), ("1",), (2,)), "rank 1 was given bundle_indices ['1']"),
    ],
)
def test_what_is_given_for_each_rank_must_be_there_for_each(groups: int, bundles: Any, words: str) -> None:
    cluster = ClusterOptions(placement_groups=tuple(range(groups)), bundle_indices=bundles)
    with pytest.raises(UsageError, match=re.escape(words)):
        LaunchSpec(dp=3, cluster=cluster)


@pytest.mark.parametrize(
    ("groups", "bundles"), [(1, None), (3, None), (1, ((0,), (1,), (2,))), (3, ((0,), (0,), (0,)))]
)
def test_groups_and_bundles_for_all_ranks_or_for_each_are_taken(groups: int, bundles: Any) -> None:
    cluster = ClusterOptions(placement_groups=tuple(range(groups)), bundle_indices=bundles)
    assert LaunchSpec(dp=3, cluster=cluster).cluster is cluster


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "auto"}, "ray_address (--ray-address) is not for backend mp"),
        ({"nodes": ("a",)}, "nodes (--nodes) is not for backend mp"),
        ({"num_gpus": 0.5}, "num_gpus (--num-gpus) is not for backend mp"),
        ({"placement_groups": (object(),)}, "placement_groups is not for backend mp"),
    ],
)
def test_a_backend_without_a_cluster_refuses_its_options_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        ClusterOptions(**options).refuse("mp")
    assert "backend ray" in caught.value.hint
    ClusterOptions().refuse("mp")


def test_a_spec_does_not_change_with_the_callers_dict() -> None:
    arguments = {"max_model_len": 1024}
    spec = LaunchSpec(engine_args=arguments)
    arguments["max_model_len"] = 1
    assert spec.engine_args["max_model_len"] == 1024


def test_a_spec_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LaunchSpec().dp = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        LaunchSpec().engine_args["seed"] = 1  # type: ignore[index]
