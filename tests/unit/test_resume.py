"""Results files: what is found again, what is repaired, what is refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dplaunch import resume
from dplaunch.errors import ResultsFileError, UsageError
from dplaunch.resume import ResultsFile
from dplaunch.resume_keys import ResultId, result_ids
from dplaunch.seam import frontend, saved

ONE, TWO = ResultId("one", "p", 0), ResultId("two", "p", 0)
OUTPUT = {"request_id": "r", "text": "hello"}


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """Imported with os.environ left as it was."""
    frontend.import_vllm(quiet=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def write(path: Path, *found: ResultId, model: str = "m") -> None:
    """Adds results to a file."""
    with ResultsFile(path, model) as file:
        for result_id in found:
            file.add(result_id, OUTPUT)


# The file.


def test_what_was_written_is_found_by_the_next_one_and_each_result_is_a_line_of_json(path: Path) -> None:
    write(path, ONE)
    write(path, TWO)
    with ResultsFile(path, "m") as file:
        assert (ONE in file, TWO in file, ResultId("one", "p", 1) in file) == (True, True, False)
        assert file.output(TWO) == OUTPUT
    header, first, _ = map(json.loads, path.read_text().splitlines())
    assert header == {"dplaunch": "results", "format": 1, "model": "m"}
    assert first == {"key": "one", "params": "p", "copy": 0, "output": OUTPUT}


def test_a_result_is_in_the_file_before_it_is_closed(path: Path) -> None:
    with ResultsFile(path, "m") as file:
        file.add(ONE, OUTPUT)
        assert len(path.read_bytes().splitlines()) == 2


def test_a_last_line_that_is_torn_anywhere_is_cut_off_and_the_file_goes_on(path: Path) -> None:
    write(path, ONE, TWO)
    whole = path.read_bytes()
    begin = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(begin, len(whole)):
        path.write_bytes(whole[:cut])
        with ResultsFile(path, "m") as file:
            assert (ONE in file, TWO in file) == (True, False)
            assert path.read_bytes() == whole[:begin]
            file.add(TWO, OUTPUT)
        assert path.read_bytes() == whole


def test_a_torn_first_line_is_written_anew(path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        write(path)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "text",
    ["my prompts", '{"dplaunch": 3', "a\nb\n", '{"a": 1}\n', "[]\n"],
    ids=["words", "half", "two", "json", "list"],
)
def test_a_file_of_anything_else_is_refused_and_stays_as_it_is(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ResultsFileError, match="is no results file"):
        ResultsFile(path, "m")
    assert path.read_text() == text


def test_a_file_of_another_model_or_format_is_refused_by_name(path: Path) -> None:
    write(path, ONE, model="theirs")
    with pytest.raises(ResultsFileError, match=r"holds results of 'theirs', and this group's model is 'ours'"):
        ResultsFile(path, "ours")
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ResultsFileError, match=r"has format 2, and this dplaunch reads 1"):
        ResultsFile(path, "theirs")


def test_a_broken_line_in_the_middle_is_named_by_its_number(path: Path) -> None:
    write(path, ONE, TWO)
    lines = path.read_text().splitlines(keepends=True)
    for broken in ("x\n", '{"key": "k"}\n', '{"key": "k", "params": "p", "copy": 0, "output": 3}\n'):
        path.write_text(lines[0] + broken + lines[2])
        with pytest.raises(ResultsFileError, match="has no result in line 2"):
            ResultsFile(path, "m")


def test_two_batches_cannot_have_one_file(path: Path) -> None:
    with ResultsFile(path, "m"), pytest.raises(ResultsFileError, match="is open for another batch"):
        ResultsFile(path, "m")
    write(path, ONE)


def test_a_file_that_cannot_be_there_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ResultsFileError, match="cannot be opened: No such file or directory"):
        ResultsFile(tmp_path / "nowhere" / "run.jsonl", "m")
    with pytest.raises(ResultsFileError, match="cannot be opened: Is a directory"):
        ResultsFile(tmp_path, "m")


def test_a_disk_that_is_full_leaves_whole_lines_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., int] = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if len(data) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:30], offset)

    with ResultsFile(path, "m") as file:
        file.add(ONE, OUTPUT)
        before = path.read_bytes()
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(ResultsFileError, match="takes no more: No space left on device"):
            file.add(TWO, OUTPUT)
        assert path.read_bytes() == before
        monkeypatch.setattr(os, "pwrite", real)
        file.add(TWO, OUTPUT)
    with ResultsFile(path, "m") as file:
        assert len(file) == 2


async def test_the_disk_is_asked_to_keep_it_every_few_seconds_and_at_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    file = ResultsFile(path, "m")
    await file.sync()
    assert synced == []
    monkeypatch.setattr(resume, "SYNC_S", 0.0)
    await file.sync()
    assert len(synced) == 1
    file.close()
    file.close()
    assert len(synced) == 2


async def test_a_disk_that_does_not_keep_it_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    file = ResultsFile(path, "m")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        patch.setattr(resume, "SYNC_S", 0.0)
        with pytest.raises(ResultsFileError, match="is not kept by its disk: Input/output error"):
            await file.sync()
    file.close()


# Keys.


def keys_of(prompts: list[Any], params: Any = None, keys: Any = None, weights: str | None = None) -> list[ResultId]:
    from vllm import SamplingParams

    facts = saved.params_facts(params or SamplingParams(max_tokens=3))
    return result_ids(prompts, [facts] * len(prompts), [None] * len(prompts), keys=keys, weights=weights)


def test_the_same_prompt_has_the_same_key_and_its_copies_are_told_apart() -> None:
    first, second, other = keys_of(["a", "a", "b"])
    assert (first.key, first.params) == (second.key, second.params)
    assert (first.copy, second.copy, other.copy) == (0, 1, 0)
    assert other.key != first.key
    assert keys_of(["b", "a"]) == [other, first]


@pytest.mark.parametrize(
    "prompts",
    [["1", [1]], [[1, 2], [12]], ["a", {"prompt": "a"}], [[{"role": "user", "content": "a"}], "a"]],
    ids=["text", "tokens", "dict", "chat"],
)
def test_prompts_of_other_kinds_are_other_prompts(prompts: list[Any]) -> None:
    assert len({result_id.key for result_id in keys_of(prompts)}) == len(prompts)


def test_params_that_differ_make_another_key_and_how_it_is_handed_over_does_not() -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    def key(**options: Any) -> ResultId:
        return keys_of(["a"], SamplingParams(**options))[0]

    plain = key(max_tokens=3)
    assert key(max_tokens=3, output_kind=RequestOutputKind.DELTA) == plain
    others = [
        key(max_tokens=4),
        key(max_tokens=3, seed=1),
        key(max_tokens=3, stop=["x"]),
        key(max_tokens=3, structured_outputs=StructuredOutputsParams(choice=["yes"])),
        key(max_tokens=3, structured_outputs=StructuredOutputsParams(choice=["no"])),
    ]
    assert len({plain, *others}) == 6


def test_a_field_at_its_default_is_not_in_the_key_so_that_later_versions_may_add_some() -> None:
    from vllm import PoolingParams, SamplingParams

    assert saved.params_facts(SamplingParams()) == {"kind": "SamplingParams"}
    assert saved.params_facts(SamplingParams(max_tokens=3))["max_tokens"] == 3
    assert saved.params_facts(PoolingParams(task="embed")) == {"kind": "PoolingParams", "task": "embed"}


def test_other_weights_and_another_adapter_make_another_key() -> None:
    from vllm.lora.request import LoRARequest

    facts: list[dict[str, Any]] = [{}]
    lora = LoRARequest("sql", 1, "/here")
    moved = LoRARequest("sql", 2, "/there")
    plain = result_ids(["a"], facts, [None], keys=None, weights=None)
    assert result_ids(["a"], facts, [lora], keys=None, weights=None) != plain
    assert result_ids(["a"], facts, [lora], keys=None, weights=None) == result_ids(
        ["a"], facts, [moved], keys=None, weights=None
    )
    assert result_ids(["a"], facts, [None], keys=None, weights="step-2") != plain


def test_a_key_may_be_given_by_a_function_or_for_each_prompt() -> None:
    assert [one.key for one in keys_of(["a", "b"], keys=str.upper)] == ["A", "B"]
    assert [one.key for one in keys_of([object(), object()], keys=["A", "B"])] == ["A", "B"]
    assert [one.copy for one in keys_of(["a", "b"], keys=lambda prompt: "same")] == [0, 1]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["A"], "key has 1 entries for 2 prompts"),
        ("AB", "key is one string for all prompts"),
        (len, "the key of prompt 0 is no string but int"),
    ],
    ids=["too few", "one string", "no string"],
)
def test_keys_that_cannot_be_are_refused(keys: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        keys_of(["a", "b"], keys=keys)


def test_a_prompt_that_no_key_can_be_made_of_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"prompt 1 holds a object, which no key can be made of\nGive key="):
        keys_of(["a", {"prompt": "b", "multi_modal_data": {"image": object()}}])
    assert keys_of([{"multi_modal_data": {"image": b"x"}}]) != keys_of([{"multi_modal_data": {"image": b"y"}}])
