"""Python's collector while the command serves."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from dplaunch.collector import RARELY, collected_rarely


@pytest.fixture(autouse=True)
def _own_threshold() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 9, 11)
    yield
    gc.set_threshold(*before)


def test_the_collector_looks_rarely_and_then_as_before() -> None:
    with collected_rarely():
        assert gc.get_threshold() == (RARELY, 9, 11)
    assert gc.get_threshold() == (700, 9, 11)


def test_it_is_put_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="broken"), collected_rarely():
        raise ValueError("broken")
    assert gc.get_threshold() == (700, 9, 11)


@pytest.mark.parametrize("threshold", [0, RARELY, 5 * RARELY])
def test_a_collector_that_looks_more_rarely_or_never_is_left_alone(threshold: int) -> None:
    gc.set_threshold(threshold, 9, 11)
    with collected_rarely():
        assert gc.get_threshold()[0] == threshold
    assert gc.get_threshold()[0] == threshold
