"""The recorded vLLM versions as Markdown: `python -m tests.seam.document` writes them into docs/vllm-versions.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dplaunch.seam.names import RELIED
from dplaunch.seam.relied import numbers
from tests.seam.check import Record, problems, recorded

PAGE = Path(__file__).parents[2] / "docs" / "vllm-versions.md"

BEGIN = "<!-- made by python -m tests.seam.document -->"
END = "<!-- end of what is made -->"


def table(records: Sequence[Record]) -> str:
    """A row for each version."""
    lines = ["| vLLM | names that we count on | done otherwise | not as we need it |", "| --- | --- | --- | --- |"]
    for record in records:
        names = {relied.name for relied in RELIED if relied.is_in(record.vllm)}
        wrong = "<br>".join(problems(record)) or "none"
        lines.append(f"| {record.vllm} | {len(names)} | {len(_otherwise(record.vllm))} | {wrong} |")
    return "\n".join(lines)


def differences() -> str:
    """A row for each name that not every version of the window has."""
    lines = ["| name | from | before that |", "| --- | --- | --- |"]
    for relied in sorted((each for each in RELIED if each.instead), key=lambda each: numbers(each.since)):
        module, _, name = relied.name.partition(":")
        if sum(each.name == relied.name for each in RELIED) > 1:  # It is a field that is new, not its class.
            name += f".{', '.join(relied.has)}"
        lines.append(f"| `{name}` of `{module}` | {relied.since} | {relied.instead} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The page with these tables in place of those that it has."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(recorded())}\n\n{differences()}\n{END}{after}"


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text()))


def _otherwise(version: str) -> list[str]:
    return [each.name for each in RELIED if each.instead and numbers(version) < numbers(each.since)]


if __name__ == "__main__":
    main()
