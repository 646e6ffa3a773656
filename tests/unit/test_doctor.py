from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dplaunch import amx, doctor, ray_here, seam
from dplaunch.amx import check_amx
from dplaunch.builds import vllm_is_for_cpu
from dplaunch.doctor import Check, Status, examine, format_checks, run
from dplaunch.errors import ExitCode
from dplaunch.ray_here import check_ray, describe_cluster


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory at the front of the import path, for packages that are not there."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(site: Path, name: str, version: str, source: str) -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (site / name).mkdir()
    (site / name / "version.py").write_text(source)


def install_torch(site: Path, build: str, cuda: str | None) -> None:
    source = f"__version__ = '9.9.0+{build}'\ndebug = False\ncuda: Optional[str] = {cuda!r}\n"
    install(site, "torch", "9.9.0", source)


def test_this_machine_is_examined_without_heavy_imports() -> None:
    look = (
        "import sys\n"
        "from dplaunch.doctor import examine\n"
        "names = [check.name for check in examine()]\n"
        "assert {'python', 'cores', 'memory', 'open files', 'pidfd'} <= set(names), names\n"
        "assert not {'torch', 'vllm', 'ray'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", look], check=True, timeout=60)


def test_every_check_that_is_not_ok_gives_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "installed_version", lambda: None)
    assert all(check.advice for check in examine() if check.status is not Status.OK)


def test_a_missing_vllm_fails_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "installed_version", lambda: None)
    check = by_name(examine())["vllm"]
    assert check.status is Status.FAIL
    assert "pip install" in check.advice


def test_an_unsupported_vllm_fails_with_what_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "installed_version", lambda: "0.1.0")
    check = by_name(examine())["vllm"]
    assert check.status is Status.FAIL
    assert "0.1.0" in check.found
    assert seam.WINDOW in check.found


@pytest.mark.parametrize(
    ("build", "cuda", "found"),
    [("cpu", None, "9.9.0+cpu, built for CPU"), ("cu130", "13.0", "9.9.0+cu130, built for CUDA 13.0")],
)
def test_the_build_of_torch_is_read_from_its_files(site: Path, build: str, cuda: str | None, found: str) -> None:
    install_torch(site, build, cuda)
    assert by_name(examine())["torch"] == Check("torch", Status.OK, found)


def test_a_torch_for_cuda_where_there_is_no_device_fails(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dplaunch.inventory._nvml_devices", list)
    install_torch(site, "cu130", "13.0")
    monkeypatch.setattr("dplaunch.builds.vllm_is_for_cpu", lambda: False)
    check = by_name(examine())["devices"]
    assert check.status is Status.FAIL
    assert check.found == "no NVIDIA device, but torch is built for CUDA 13.0"


def test_a_vllm_for_the_cpu_needs_no_device_whatever_its_torch_is_built_for(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dplaunch.inventory._nvml_devices", list)
    install_torch(site, "cu130", "13.0")
    assert by_name(examine())["devices"].status is Status.OK


@pytest.mark.parametrize(("version", "for_cpu"), [("0.33.0", False), ("0.33.0+cpu", True)])
def test_a_vllm_says_by_its_version_whether_it_is_for_the_cpu(site: Path, version: str, for_cpu: bool) -> None:
    install(site, "vllm", version, "")
    assert vllm_is_for_cpu() is for_cpu


def test_a_cuda_torchvision_beside_a_cpu_torch_fails(site: Path) -> None:
    install_torch(site, "cpu", None)
    # As on the package index: the distribution's version does not tell, only the code's does.
    install(site, "torchvision", "0.99.0", "__version__ = '0.99.0+cu132'\nif True:\n    cuda = check()\n")
    check = by_name(examine())["torch companions"]
    assert check.status is Status.FAIL
    assert "torchvision 0.99.0+cu132 is built for CUDA 13.2" in check.found
    assert "pip uninstall torchvision" in check.advice


def test_a_torchvision_of_the_same_kind_is_fine(site: Path) -> None:
    install_torch(site, "cu130", "13.0")
    install(site, "torchvision", "0.99.0", "__version__ = '0.99.0+cu130'\n")
    assert "torch companions" not in by_name(examine())


def test_without_ray_the_line_that_installs_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    (check,) = check_ray()
    assert check.status is Status.OK
    assert "pip install 'dplaunch[ray]'" in check.found


def test_rays_version_is_shown_with_what_a_launch_would_attach_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.99")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (check,) = check_ray()
    assert check == Check("ray", Status.OK, "2.99; RAY_ADDRESS=10.0.0.1:6379 is what --backend ray attaches to")


def test_a_cluster_on_this_machine_comes_with_the_flag_that_attaches_to_it(tmp_path: Path) -> None:
    environ = {"RAY_TMPDIR": str(tmp_path)}
    assert describe_cluster(environ, running=True) == (
        "a cluster runs on this machine: --ray-address auto attaches to it"
    )
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert "(10.0.0.1:6379): --ray-address auto" in describe_cluster(environ, running=True)
    # A cluster that was killed leaves its address behind.
    assert "no cluster runs" in describe_cluster(environ, running=False)
    assert "RAY_ADDRESS=auto" in describe_cluster({**environ, "RAY_ADDRESS": "auto"}, running=True)


def test_a_node_of_a_cluster_is_known_by_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "dpl-raylet"
    monkeypatch.setattr(ray_here, "NODE_PROCESS", name)
    assert not ray_here._is_running()
    (tmp_path / name).symlink_to(shutil.which("cat") or "")
    with subprocess.Popen([tmp_path / name], stdin=subprocess.PIPE):
        # The child has its name from the moment of exec, which Popen waits for; leaving the block ends its input.
        assert ray_here._is_running()


@pytest.mark.parametrize(("limit", "status"), [(64 + 31, Status.FAIL), (64 + 2 * 32, Status.WARN), (65536, Status.OK)])
def test_the_limit_of_open_files_is_counted_in_ranks(
    monkeypatch: pytest.MonkeyPatch, limit: int, status: Status
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, 1048576))
    check = by_name(examine())["open files"]
    assert check.status is status
    assert f"limit {limit}, enough for {max(0, (limit - 64) // 32)} ranks" in check.found
    assert ("ulimit -n 1048576" in check.advice) is (status is not Status.OK)


@pytest.mark.parametrize(("free", "status"), [(16 << 20, Status.FAIL), (64 << 20, Status.WARN), (1 << 30, Status.OK)])
def test_a_small_dev_shm_is_reported(monkeypatch: pytest.MonkeyPatch, free: int, status: Status) -> None:
    real = os.statvfs

    def statvfs(path: str) -> os.statvfs_result:
        fields = list(real(path))
        fields[0:5] = [4096, 4096, (2 << 30) // 4096, free // 4096, free // 4096]
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert by_name(examine())["/dev/shm"].status is status


def test_a_state_directory_that_cannot_be_written_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/state")
    check = by_name(examine())["state directory"]
    assert check.status is Status.WARN
    assert "--log-dir" in check.advice


def test_looking_at_the_state_directory_does_not_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert by_name(examine())["state directory"].status is Status.OK
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_without_pidfd_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError("not allowed")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert by_name(examine())["pidfd"].status is Status.FAIL


def test_core_numbers_are_written_as_ranges() -> None:
    assert doctor._ranges((0, 1, 2, 4, 6, 7)) == "0-2,4,6-7"


CHECKS = [Check("python", Status.OK, "3.11"), Check("a longer name", Status.WARN, "small", "Enlarge it.")]


def test_the_text_is_aligned_and_ends_with_the_verdict() -> None:
    assert format_checks(CHECKS).splitlines() == [
        "ok    python         3.11",
        "warn  a longer name  small",
        "                     -> Enlarge it.",
        "",
        "Ready to launch; worth a look: a longer name.",
    ]
    failed = [*CHECKS, Check("vllm", Status.FAIL, "not installed")]
    assert format_checks(failed).splitlines()[-1] == "A launch would fail: vllm."
    assert format_checks(CHECKS[:1]).splitlines()[-1] == "Ready to launch."


def test_warnings_do_not_fail_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: CHECKS)
    assert run(json=False) == ExitCode.OK
    assert capsys.readouterr().out == format_checks(CHECKS) + "\n"


def test_a_failed_check_fails_the_command_and_json_is_a_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Check("vllm", Status.FAIL, "none", "Install it.")])
    assert run(json=True) != ExitCode.OK
    printed = json.loads(capsys.readouterr().out)
    assert printed == [{"name": "vllm", "status": "fail", "found": "none", "advice": "Install it."}]


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile amx_int8\n")
    return path


def test_a_cpu_without_amx_is_not_tried(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx512f\n")
    assert list(check_amx(tmp_path / "cpuinfo", ("/dev/null",))) == []
    assert list(check_amx(tmp_path / "none", ("/dev/null",))) == []


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("pass", Status.OK, "works"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", Status.FAIL, "SIGILL(-4)"),
        (f"raise SystemExit({amx.REFUSED})", Status.FAIL, "refuses"),
        ("raise ValueError('no torch')", Status.WARN, "no torch"),
    ],
)
def test_the_trial_of_amx_tells_how_it_ended(cpuinfo: Path, script: str, status: Status, words: str) -> None:
    (check,) = check_amx(cpuinfo, (sys.executable, "-c", script))
    assert check.status is status
    assert words in check.found
    assert ("float32" in check.advice) is (status is Status.FAIL)


def test_a_trial_that_hangs_is_given_up(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "PROBE_TIMEOUT_S", 0.2)
    (check,) = check_amx(cpuinfo, (sys.executable, "-c", "import signal; signal.pause()"))
    assert check.status is Status.WARN
    assert "longer than" in check.found


def test_the_probe_itself_is_valid_python() -> None:
    compile(amx.PROBE, "probe", "exec")
