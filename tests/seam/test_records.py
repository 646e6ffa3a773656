"""Every recorded vLLM of the window has what the seam relies on, and the page says so."""

from __future__ import annotations

import configparser
import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dplaunch import seam
from dplaunch.seam.names import RELIED, modules_of
from dplaunch.seam.relied import NEWEST, OLDEST, numbers
from dplaunch.seam.steered import steer
from tests.seam.check import Record, problems, record, recorded
from tests.seam.document import PAGE, with_tables
from tests.seam.sources import Sources

RECORDS = recorded()


@pytest.mark.parametrize("found", RECORDS, ids=lambda found: found.vllm)
def test_a_recorded_vllm_has_what_we_rely_on(found: Record) -> None:
    assert problems(found) == []


@pytest.mark.parametrize("found", RECORDS, ids=lambda found: found.vllm)
def test_what_replaces_a_method_of_the_engine_takes_all_that_its_routes_may_pass(found: Record) -> None:
    engine, verbs = SimpleNamespace(collective_rpc=None), SimpleNamespace(transfers=None)
    steer(engine, cast(Any, verbs))
    replaced = {name: set(inspect.signature(method).parameters) for name, method in vars(engine).items()}
    theirs = {name: found.signatures.get(f"vllm.v1.engine.async_llm:AsyncLLM.{name}") for name in replaced}
    passed = {name: set(re.findall(r"\w+", signature)) - {"self"} for name, signature in theirs.items() if signature}
    assert len(passed) >= 14
    assert {name: names - replaced[name] for name, names in passed.items() if names - replaced[name]} == {}


async def test_the_older_switch_of_a_pause_is_its_mode() -> None:
    modes: list[str] = []

    async def pause(mode: str) -> None:
        modes.append(mode)

    engine = SimpleNamespace(collective_rpc=None)
    steer(engine, cast(Any, SimpleNamespace(transfers=None, pause=pause)))
    for switch in (True, False, None):
        await engine.pause_generation(mode="keep", wait_for_inflight_requests=switch)
    assert modes == ["wait", "keep", "keep"]


def test_every_version_of_the_window_is_recorded() -> None:
    minors = {numbers(found.vllm)[:2] for found in RECORDS}
    assert minors == {(0, minor) for minor in range(numbers(OLDEST)[1], numbers(NEWEST)[1] + 1)}


def test_the_record_of_the_installed_version_is_what_its_sources_say() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    version = ".".join(map(str, numbers(str(seam.installed_version()))))
    kept = next((found for found in RECORDS if found.vllm == version), None)
    if kept is None:
        pytest.skip(f"vLLM {version} is not recorded: make seam VERSION={version}")
    assert record(Sources.of_directory(Path(spec.origin).parent), version) == kept, "its files differ from the wheel"


def test_the_page_has_the_tables_that_are_tested() -> None:
    text = PAGE.read_text()
    assert text == with_tables(text), "run python -m tests.seam.document"


def test_what_moved_has_a_place_in_every_version() -> None:
    for name in ("make_arg_parser", "validate_parsed_serve_args", "build_app", "init_app_state"):
        places = [relied for relied in RELIED if relied.name.partition(":")[2] == name]
        assert len(modules_of(name)) == len(places) > 1
        for found in RECORDS:
            assert len([relied for relied in places if relied.is_in(found.vllm)]) == 1, (name, found.vllm)


def test_newest_places_are_tried_first() -> None:
    assert modules_of("make_arg_parser") == (
        "vllm.entrypoints.common.cli_args",
        "vllm.entrypoints.launchers.cli_args",
        "vllm.entrypoints.openai.cli_args",
    )


def changed(found: Record, name: str, signature: str | None) -> list[str]:
    return problems(Record(found.vllm, {**found.signatures, name: signature}, found.attributes))


RUN = "vllm.v1.engine.core:EngineCoreProc.run_engine_core"
ABORT = "vllm.v1.engine.output_processor:OutputProcessor.abort_requests"


@pytest.mark.parametrize(
    ("name", "signature", "words"),
    [
        (RUN, None, "is not there"),
        (RUN, "*args, local_dp_rank=", "it has no vllm_config"),
        (ABORT, "self, request_ids, mode, internal", "it needs mode too"),
        (ABORT, "self, ids, internal", "argument 2 is ids, not request_ids"),
        (ABORT, "self, request_ids", "it has no internal"),
        (ABORT, "self", "it has no argument 2, request_ids"),
    ],
)
def test_what_changes_in_vllm_is_told_by_name(name: str, signature: str | None, words: str) -> None:
    (line,) = changed(RECORDS[-1], name, signature)
    assert line.startswith(name)
    assert line.endswith(words)


def test_a_field_that_goes_is_told_by_name() -> None:
    newest, name = RECORDS[-1], "vllm.v1.engine:EngineCoreOutput"
    left = tuple(set(newest.attributes[name]) - {"events"})
    assert problems(Record(newest.vllm, newest.signatures, {**newest.attributes, name: left})) == [
        f"{name} has no events"
    ]


def test_a_name_that_is_there_earlier_than_we_say_is_told() -> None:
    name = "vllm.v1.engine.core:EngineCore.set_weight_version"
    assert changed(RECORDS[0], name, "self, weight_version") == [f"{name} is there already, not only from 0.27 on"]


def test_the_numbers_of_a_version_are_those_before_the_words() -> None:
    assert numbers("0.26.0rc1.dev3+cpu") == (0, 26, 0)
    assert numbers("0.33.1.dev4+g12ab") == (0, 33, 1)
    assert numbers("dev") == ()


def test_the_extra_for_cuda_asks_for_the_window() -> None:
    config = configparser.ConfigParser()
    config.read(PAGE.parents[1] / "setup.cfg")
    zero, newest = numbers(NEWEST)
    assert config["options.extras_require"]["cuda"].split() == [f"vllm>={OLDEST},<{zero}.{newest + 1}"]


def test_the_page_and_the_changelog_name_the_window() -> None:
    assert f"dplaunch works with vLLM {seam.WINDOW}." in PAGE.read_text()
    assert f"vLLM {seam.WINDOW}," in (PAGE.parents[1] / "CHANGELOG.md").read_text()
