"""One compile cache for all ranks: who shares it, who does not, and that one compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dplaunch.backend import RankBoot
from dplaunch.channel import RankChannel
from dplaunch.seam import compiled, frontend

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """vLLM's cache, and vLLM imported with os.environ left as it was; making a config sets variables too."""
    frontend.import_vllm(quiet=True)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with frontend.preserved_environ():
        yield tmp_path


def a_config(number: int, **parallel: Any) -> Any:
    """A VllmConfig of a rank on a device: vLLM's own, as far as a machine without one lets it be made."""
    from vllm.config import CompilationMode, VllmConfig

    config = VllmConfig()
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.instance_id = f"base_dp{number}"
    for name, value in {"data_parallel_index": number, "distributed_executor_backend": "mp", **parallel}.items():
        setattr(config.parallel_config, name, value)
    return config


class Executor:
    """vLLM's, with as many workers, each of which has a config of its own as in a process of its own."""

    def __init__(self, number: int, workers: int = 1, **parallel: Any) -> None:
        import torch

        configs = [a_config(number, **parallel) for _ in range(workers)]
        self.vllm_config = configs[0]
        self.workers = [
            SimpleNamespace(vllm_config=config, device=torch.device("cpu"), rank=rank)
            for rank, config in enumerate(configs)
        ]
        self.calls = 0

    def collective_rpc(self, method: Callable[..., Any], args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls += 1
        return [method(worker, *args) for worker in self.workers]

    def numbers(self) -> list[int]:
        return [worker.vllm_config.parallel_config.data_parallel_index for worker in self.workers]


class Channel:
    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)


def shared(executor: Executor, number: int, channel: Channel | None = None) -> Any:
    boot = cast(RankBoot, SimpleNamespace(rank=number))
    return compiled.shared(executor, boot, cast(RankChannel, channel or Channel()))


def key(number: int = 0, **parallel: Any) -> Any:
    return compiled.key_of(Executor(number, **parallel).workers[0])


def marks(cache: Path) -> list[Path]:
    return sorted((cache / compiled.FOLDER).glob("*.json"))


def test_workers_have_the_number_0_while_they_compile_and_their_own_afterwards(cache: Path) -> None:
    executor = Executor(3, workers=2)
    with shared(executor, 3):
        assert executor.numbers() == [0, 0]
    assert executor.numbers() == [3, 3]
    assert len(marks(cache)) == 1


def test_what_a_rank_reports_of_itself_is_its_own_number_also_where_it_is_the_worker() -> None:
    executor = Executor(2, distributed_executor_backend="uni")
    with shared(executor, 2):
        pass
    assert executor.vllm_config.parallel_config.data_parallel_index == 2


def test_ranks_of_a_group_have_one_key_and_what_compiles_otherwise_has_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert key(0) == key(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert key(2) == key(0)
    others = [key(tensor_parallel_size=2)]
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,1")
    others.append(key())
    monkeypatch.delenv("VLLM_PP_LAYER_PARTITION")
    monkeypatch.setattr("torch.__version__", "9.9")
    others.append(key())
    monkeypatch.undo()
    elsewhere = Executor(0)
    elsewhere.vllm_config.compilation_config.cache_dir = "/elsewhere"
    others.append(compiled.key_of(elsewhere.workers[0]))
    assert None not in others
    assert len({key(), *others}) == 5


@pytest.mark.parametrize(
    "parallel", [{"data_parallel_size": 2}, {"distributed_executor_backend": "ray"}], ids=["lockstep", "ray"]
)
def test_ranks_that_step_together_or_have_workers_elsewhere_compile_as_vllm_has_it(
    cache: Path, parallel: dict[str, Any]
) -> None:
    executor = Executor(1, **parallel)
    with shared(executor, 1):
        assert executor.numbers() == [1]
    assert executor.calls == 0
    assert marks(cache) == []


def test_nothing_is_asked_or_changed_where_vllm_does_not_compile_with_its_own_backend() -> None:
    from vllm.config import CompilationMode

    executor = Executor(1)
    for mode in set(CompilationMode) - {CompilationMode.VLLM_COMPILE}:
        executor.vllm_config.compilation_config.mode = mode
        with shared(executor, 1):
            assert executor.numbers() == [1]
    assert executor.calls == 0


def test_a_worker_on_a_device_with_another_number_compiles_for_itself() -> None:
    import torch

    executor = Executor(1, workers=2)
    executor.workers[1].device = torch.device("meta", 0)
    with shared(executor, 1):
        assert executor.numbers() == [1, 1], "its code names device 0, that of the others device 1"
    executor.workers[1].device = torch.device("meta", 1)
    with shared(executor, 1):
        assert executor.numbers() == [0, 0]


def test_without_vllms_cache_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    executor = Executor(1)
    with shared(executor, 1):
        assert executor.numbers() == [1]


def test_a_rank_that_fails_leaves_no_mark(cache: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), shared(Executor(0), 0):
        raise RuntimeError("out of memory")
    assert marks(cache) == []


def test_where_no_lock_can_be_had_a_rank_compiles_for_itself_and_says_why(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (cache / compiled.FOLDER.parts[0]).touch()
    executor = Executor(1)
    with shared(executor, 1):
        assert executor.numbers() == [1]
    assert "rank 1 compiles for itself: there can be no lock beside vLLM's compile cache" in capfd.readouterr().err


def test_kernels_are_kept_where_triton_keeps_them_so_that_the_next_start_finds_them(tmp_path: Path) -> None:
    knobs = pytest.importorskip("triton.knobs")
    environ = {"TRITON_HOME": str(tmp_path / "home")}
    compiled.keep_kernels("cuda", environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_CACHE_DIR", raising=False)
        patch.setenv("TRITON_HOME", environ["TRITON_HOME"])
        assert environ["TRITON_CACHE_DIR"] == knobs.cache.dir
    assert Path(environ["TRITON_CACHE_DIR"]).is_dir()


def test_a_folder_for_kernels_that_is_set_or_cannot_be_had_and_a_cpus_ranks_are_left_as_they_are(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    untouched = [
        ("cuda", {"TRITON_CACHE_DIR": "/elsewhere", "TRITON_HOME": str(tmp_path)}),
        ("cuda", {"TRITON_HOME": str(tmp_path / "file")}),
        ("cpu", {"TRITON_HOME": str(tmp_path)}),
    ]
    for device_type, environ in untouched:
        before = dict(environ)
        compiled.keep_kernels(device_type, environ)
        assert environ == before
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_of_two_cold_ranks_one_compiles_and_the_other_loads_the_same_code(tmp_path: Path) -> None:
    """With vLLM's own backend, on this machine's CPU; a third rank, that comes later, waits for nobody."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.compile_probe", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["exits"] == [0, 0, 0], done.stderr[-4000:]
    first, second, third = told["ranks"]
    assert [each["loaded"] for each in (first, second, third)] == [False, True, True]
    assert [each["phases"] for each in (first, second, third)] == [[], ["waits for rank 0"], []]
    assert [each["number"] for each in (first, second, third)] == [0, 1, 2]
    assert first["answer"] == second["answer"] == third["answer"]
    assert told["kept"] == ["rank_0_0"]
    assert "rank 1 waits for rank 0 (pid" in done.stderr
