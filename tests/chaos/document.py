"""The chaos table as Markdown: `python -m tests.chaos.document` writes it into docs/reliability.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.chaos.row import Row
from tests.chaos.table import TABLE

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"

BEGIN = "<!-- made by python -m tests.chaos.document -->"
END = "<!-- end of what is made -->"


def table(rows: Sequence[Row] = TABLE) -> str:
    """All rows, in Markdown."""
    lines = ["| what is done | when | backends | what you see | what is kept |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {row.fault} | {row.when} | {', '.join(row.backends)} | {row.seen} | {row.kept} |" for row in rows]
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The page with this table in place of the one that it has."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    PAGE.write_text(with_table(PAGE.read_text()))


if __name__ == "__main__":
    main()
