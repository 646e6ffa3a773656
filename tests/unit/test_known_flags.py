from __future__ import annotations

from pathlib import Path

import pytest

from dplaunch import known_flags
from dplaunch.errors import UsageError

KNOWN = {"--max-model-len", "--enforce-eager", "--no-enforce-eager", "--compilation-config", "-tp"}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_nothing_is_refused_before_the_parser_was_asked_once() -> None:
    known_flags.check("9.9", ["--no-such-flag"])


@pytest.mark.parametrize(
    "argv",
    [
        ["--max-model-len", "8"],
        ["--max_model_len=8"],
        ["--max-model", "8"],
        ["--no-enforce-eager"],
        ["--compilation-config.mode", "3"],
        ["-tp", "2"],
        ["--compilation-config", '{"--odd": 1}'],
    ],
)
def test_a_flag_that_the_parser_takes_passes(argv: list[str]) -> None:
    known_flags.remember("9.9", KNOWN)
    known_flags.check("9.9", argv)


def test_a_misspelt_flag_is_refused_with_the_nearest() -> None:
    known_flags.remember("9.9", KNOWN)
    with pytest.raises(UsageError, match="unknown flag --max-modl-len") as caught:
        known_flags.check("9.9", ["--max-modl-len", "8"])
    assert caught.value.hint == "Did you mean --max-model-len?"


def test_another_version_has_a_record_of_its_own() -> None:
    known_flags.remember("9.9", KNOWN)
    known_flags.check("9.8", ["--max-modl-len", "8"])


def test_a_spoilt_record_refuses_nothing(tmp_path: Path) -> None:
    known_flags.remember("9.9", KNOWN)
    (record,) = tmp_path.rglob("vllm-flags-*.json")
    record.write_text("{")
    known_flags.check("9.9", ["--max-modl-len", "8"])
