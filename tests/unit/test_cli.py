"""The command: what it takes, what it prints and what it exits with."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dplaunch import backend as backends
from dplaunch import demo, seam
from dplaunch._version import __version__
from dplaunch.cli import main
from dplaunch.errors import AddressError, ExitCode, ModelError
from dplaunch.inventory import Inventory, Node
from dplaunch.spec import ClusterOptions, LaunchSpec
from dplaunch.ui import UiOptions

HELP_BOUND_S = 1.5
"""Seconds of CPU, generous for slow machines; 0.3 s is usual."""

Served = tuple[LaunchSpec, UiOptions]


@pytest.fixture(autouse=True)
def _clean_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("DPLAUNCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Served]:
    """Runs the command with a stand-in for the server; returns what the server was called with."""

    def run(*argv: str, expect: int = 0) -> Served:
        calls: list[Served] = []

        def record(spec: LaunchSpec, ui: UiOptions) -> ExitCode:
            calls.append((spec, ui))
            return ExitCode.OK

        _replace_serve(monkeypatch, record)
        assert main(argv) == expect
        return calls[0]

    return run


def _replace_serve(monkeypatch: pytest.MonkeyPatch, function: Callable[[LaunchSpec, UiOptions], Any]) -> None:
    module = types.ModuleType("dplaunch.serve")
    module.serve = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dplaunch.serve", module)


class StubBackend:
    """Two cores and nothing else."""

    def __init__(self) -> None:
        self.closed = 0

    async def close(self) -> None:
        self.closed += 1

    async def inventory(self, spec: LaunchSpec, more: int = 0) -> Inventory:
        node = Node(name="host", cores=(0, 1), memory_total=32 * 2**30, memory_free=30 * 2**30)
        return Inventory(nodes=(node,))


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "load_backend", lambda name: StubBackend())
    monkeypatch.setattr(demo, "describe", lambda: "a tiny model")


# What reaches the server.


def test_without_a_command_it_serves_with_the_defaults(serve: Callable[..., Served]) -> None:
    assert serve() == (LaunchSpec(), UiOptions())


def test_own_options_are_taken_and_the_rest_is_vllms(serve: Callable[..., Served]) -> None:
    spec, ui = serve("--dp", "2", "-tp", "2", "--port=0", "--a=b", "--seed", "-1", "--hf-overrides", '{"x": "--y"}')
    assert spec.dp == 2
    assert ui.port == 0
    assert spec.vllm_argv == ("-tp", "2", "--a=b", "--seed", "-1", "--hf-overrides", '{"x": "--y"}')
    assert ui.server_argv == spec.vllm_argv


@pytest.mark.parametrize(
    "argv", ["M --dp 2", "--dp 2 M", "serve M --dp 2", "--dp 2 --enforce-eager M", "--model M --dp 2"]
)
def test_the_model_may_be_a_bare_word(serve: Callable[..., Served], argv: str) -> None:
    spec, _ = serve(*argv.split())
    assert (spec.model, spec.dp) == ("M", 2)


def test_where_in_a_cluster_is_told_by_flags_variables_and_the_file(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('nodes = ["a", "b"]\nnum-gpus = 0.5\nray_address = "file:1"\n')
    monkeypatch.setenv("DPLAUNCH_RAY_ADDRESS", "10.0.0.1:6379")
    spec, _ = serve("--backend", "ray", "--config", str(file), "--num-gpus", "0.25")
    assert spec.cluster == ClusterOptions(address="10.0.0.1:6379", nodes=("a", "b"), num_gpus=0.25)
    assert spec.vllm_argv == ()
    monkeypatch.setenv("DPLAUNCH_NODES", "c")
    assert serve("--config", str(file))[0].cluster.nodes == ("c",)


def test_variables_may_be_repeated(serve: Callable[..., Served]) -> None:
    spec, _ = serve("--env", "A=1", "--env", "B=2")
    assert spec.env == {"A": "1", "B": "2"}


def test_the_command_line_beats_variables_and_these_the_file(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('dp = 2\nport = 1\nhost = "file"\nlog_dir = "/file"\nquiet = true\n[vllm]\nseed = 1\n')
    monkeypatch.setenv("DPLAUNCH_DP", "3")
    monkeypatch.setenv("DPLAUNCH_PORT", "2")
    monkeypatch.setenv("DPLAUNCH_TEE", "1")
    monkeypatch.setenv("DPLAUNCH_CONFIG", str(file))
    spec, ui = serve("--dp", "4", "--no-quiet", "--seed", "2")
    assert (spec.dp, ui.port, ui.host, spec.log_dir) == (4, 2, "file", Path("/file"))
    assert (ui.tee, ui.quiet, ui.json_logs) == (True, False, False)
    assert spec.vllm_argv == ("--seed=1", "--seed", "2")


def test_any_vllm_is_a_flag_and_a_variable(serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not serve()[0].any_vllm
    assert serve("--any-vllm")[0].any_vllm
    monkeypatch.setenv(seam.OVERRIDE, "1")
    assert serve()[0].any_vllm


def test_the_servers_exit_code_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_serve(monkeypatch, lambda spec, ui: ExitCode.TERMINATED)
    assert main([]) == 143


# What goes wrong.


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ("--dp two", 2, "dp must be a whole number of ranks, not 'two'"),
        ("--dp 0", 2, "dp must be at least 1, not 0"),
        ("--dp -1", 2, "dp must be at least 1, not -1"),
        ("--dp", 2, "requires an argument"),
        ("--port 99999", 2, "99999 is not in the range"),
        ("--mode sideways", 2, "'sideways' is not one of"),
        ("--data-parallel-size 2", 2, "--data-parallel-size is not for dplaunch"),
        ("-dp 2", 2, "-dp is not for dplaunch"),
        ("--api-server-count 3", 2, "one frontend"),
        ("--config /nowhere.toml", 2, "/nowhere.toml cannot be read"),
        ("--env A", 2, "KEY=VALUE"),
        ("A B", 2, "one model is served"),
        ("--dp 2 plan", 2, "the command plan must come first"),
        ("plan --backend rai", 11, "unknown backend 'rai'"),
        ("plan --backend mp --ray-address auto", 2, "ray_address (--ray-address) is not for backend mp"),
        ("plan --backend mp --nodes a", 2, "nodes (--nodes) is not for backend mp"),
        ("plan --backend mp --num-gpus 0.5", 2, "num_gpus (--num-gpus) is not for backend mp"),
        ("--num-gpus 0", 2, "num_gpus must be above 0"),
        ("--nodes ,", 2, "--nodes names no machine"),
        ("plan --model /nowhere/m", 3, "model path /nowhere/m does not exist"),
        ("plan --dp 2 --gpu-memory-utilization 0.9 --model s3://m", 4, "rank 1 does not fit"),
    ],
)
def test_a_mistake_ends_in_one_clear_line_and_its_exit_code(
    argv: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--backend" not in argv:
        monkeypatch.setattr(backends, "load_backend", lambda name: StubBackend())
    assert main(argv.split()) == code
    out, err = capsys.readouterr()
    first = err.splitlines()[0]
    assert first.startswith("dplaunch: error: ")
    assert words in first
    assert out == ""
    assert "Traceback" not in err


def test_a_domain_error_shows_its_hint_and_detail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(spec: LaunchSpec, ui: UiOptions) -> None:
        raise AddressError("the port is taken", hint="Use --port 0.", detail="line 1\nline 2")

    _replace_serve(monkeypatch, fail)
    assert main([]) == ExitCode.ADDRESS
    assert capsys.readouterr().err == "dplaunch: error: the port is taken\nUse --port 0.\nline 1\nline 2\n"


def _break(spec: LaunchSpec, ui: UiOptions) -> None:
    raise ValueError("not\nforeseen")


def test_an_unforeseen_error_is_one_line_and_its_traceback_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _replace_serve(monkeypatch, _break)
    assert main([]) == ExitCode.INTERNAL
    (line,) = capsys.readouterr().err.splitlines()
    (file,) = (tmp_path / "state" / "dplaunch").glob("traceback-*.txt")
    assert line.startswith("dplaunch: error: unexpected ValueError: not")
    assert str(file) in line
    assert "foreseen" in file.read_text()


@pytest.mark.parametrize(("argv", "variable"), [(["--debug"], ""), ([], "1")])
def test_an_unforeseen_errors_traceback_is_shown_on_request(
    argv: list[str], variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPLAUNCH_DEBUG", variable)
    _replace_serve(monkeypatch, _break)
    assert main(argv) == ExitCode.INTERNAL
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_traceback_with_nowhere_to_go_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/dev/null")
    _replace_serve(monkeypatch, _break)
    assert main([]) == ExitCode.INTERNAL
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(spec: LaunchSpec, ui: UiOptions) -> None:
        raise KeyboardInterrupt

    _replace_serve(monkeypatch, interrupt)
    assert main([]) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "dplaunch: error: interrupted\n"


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        done = subprocess.run([sys.executable, "-m", "dplaunch", "--help"], stdout=closed, stderr=subprocess.PIPE)
    assert done.returncode == 141
    assert done.stderr == b""


def test_a_pipe_that_broke_elsewhere_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(spec: LaunchSpec, ui: UiOptions) -> None:
        raise BrokenPipeError("to a rank")

    _replace_serve(monkeypatch, fail)
    assert main([]) == ExitCode.INTERNAL
    assert "unexpected BrokenPipeError" in capsys.readouterr().err


# Plan and doctor.


def test_plan_prints_what_would_happen(two_cores: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--dp", "2", "--name", "g", "--log-dir", "/logs"]) == 0
    out = capsys.readouterr().out
    for words in (
        "g: 2 ranks, backend mp",
        "model     a tiny model",
        "independent: the model is dense: the ranks share nothing",
        "uni: one process a rank",
        "gpu_memory_utilization=0.4",
        "/logs",
        "1     host  cpu 1    g_dp1     1      rank1.log",
    ):
        assert words in out


def test_plan_shows_its_warnings(two_cores: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--dp", "3"]) == 0
    assert "warning: 3 ranks share 2 cores" in capsys.readouterr().out


def test_plan_as_json_says_the_same(
    two_cores: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(["plan", "--dp", "2", "--name", "g", "--log-dir", "/logs", "--json", "--show-env"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["name"], plan["dp"], plan["mode"], plan["executor"]) == ("g", 2, "independent", "uni")
    second = plan["ranks"][1]
    env = second.pop("env")
    assert second == {
        "rank": 1,
        "node": "host",
        "device_type": "cpu",
        "devices": ["1"],
        "instance_id": "g_dp1",
        "cores": [1],
        "log_file": "/logs/rank1.log",
    }
    assert env["RANK"] is None
    assert env["OMP_NUM_THREADS"] == "1"
    assert "PATH" not in env


def test_plan_shows_how_a_ranks_environment_differs(
    two_cores: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(["plan", "--env", "A=1", "--show-env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  A=1" in lines
    assert "  without MASTER_PORT" in lines


def test_plan_makes_and_starts_nothing(two_cores: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("the model was made")

    monkeypatch.setattr(demo, "demo_model", refuse)
    assert main(["plan", "--dp", "2"]) == 0
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("argv", "code"), [("plan", 0), ("plan --dp 2 --devices 0;9", ExitCode.RESOURCES)])
def test_plan_closes_the_backend_that_it_asked(
    argv: str, code: int, two_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = StubBackend()
    monkeypatch.setattr(backends, "load_backend", lambda name: backend)
    assert main(argv.split()) == code
    assert backend.closed == 1


@pytest.mark.parametrize(("argv", "as_json"), [(["doctor"], False), (["doctor", "--json"], True)])
def test_doctor_exits_with_what_it_finds(argv: list[str], as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def record(*, json: bool) -> int:
        calls.append(json)
        return 6

    module = types.ModuleType("dplaunch.doctor")
    module.run = record  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dplaunch.doctor", module)
    assert main(argv) == 6
    assert calls == [as_json]


# Help.


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["serve", "--help"], ["--dp", "2", "--help"]])
def test_help_explains_flags_examples_and_exit_codes(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    for words in ("--dp N", "--start-timeout", "Examples:", "Exit codes:", "130"):
        assert words in out
    if argv in (["--help"], ["-h"]):
        assert "Every flag of `vllm serve` works" in " ".join(out.split())


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dplaunch {__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_answer_at_once(flag: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "dplaunch", flag], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Its own time, not the clock's: what else this machine does is no fault of the command.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < HELP_BOUND_S


@pytest.mark.parametrize("argv", ["--help", "plan --backend nowhere"])
def test_nothing_heavy_is_imported_for_it(argv: str) -> None:
    code = (
        f"import sys; from dplaunch.cli import main; main({argv.split()!r});"
        "print([m for m in ('torch', 'vllm', 'ray', 'rich', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
