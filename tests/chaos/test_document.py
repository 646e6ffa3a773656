"""docs/reliability.md says what the table says, and every row names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chaos.document import PAGE, with_table
from tests.chaos.row import Row
from tests.chaos.table import TABLE

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table_that_is_tested() -> None:
    text = PAGE.read_text()
    assert text == with_table(text), "run python -m tests.chaos.document"


def test_no_two_rows_have_the_same_name() -> None:
    names = [row.name for row in TABLE]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name.replace(" ", "-"))
def test_a_row_is_run_or_names_the_test_that_runs_it(row: Row) -> None:
    assert row.act is not None or row.test
    if row.test:
        file, _, name = row.test.partition("::")
        assert re.search(rf"^(?:async )?def {name}\b", (ROOT / file).read_text(), re.MULTILINE), row.test
