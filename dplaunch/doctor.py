"""What this machine has, and what would go wrong: `dplaunch doctor`."""

from __future__ import annotations

import enum
import json as json_format
import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from dplaunch import seam
from dplaunch.builds import NO_DEVICE_HINT, build_of, in_need_of_device
from dplaunch.errors import DplaunchError, ExitCode

MIN_PYTHON = (3, 11)

FILES_BASE = 64
"""File descriptors of a launcher without ranks: imports, logs, the event loop."""

FILES_PER_RANK = 32
"""File descriptors of a launcher for each rank: sockets, pipes, the pidfd, and HTTP clients on top."""

MIN_SHM_BYTES = 64 * 2**20
"""Free shared memory below which a rank's queue to its workers does not fit; a container's default is all of it."""

LOW_SHM_BYTES = 512 * 2**20
"""Free shared memory below which a few ranks with workers fill it."""

LOW_MEMORY_BYTES = 4 * 2**30
"""Free host memory below which importing torch and vLLM in two ranks gets tight."""

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Packages with native code built against one build of torch: beside another they fail when imported."""

GIB = 2**30


class Status(enum.StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"  # works, but not as well as it could
    FAIL = "fail"  # a launch would fail


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Args:
        name: what was looked at.
        status: how it came out.
        found: what there is.
        advice: what to do; "" when nothing is to be done.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def run(*, json: bool) -> int:
    """Prints the checks, a verdict last (or a JSON list), and returns the exit code: 0 when none failed."""
    import click

    checks = examine()
    click.echo(json_format.dumps([asdict(check) for check in checks], indent=2) if json else format_checks(checks))
    return ExitCode.RESOURCES if any(check.status is Status.FAIL for check in checks) else ExitCode.OK


def format_checks(checks: list[Check]) -> str:
    """The checks as aligned lines, each advice under its check, and the verdict in one line."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.found}")
        if check.advice:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.advice}")
    failed = [check.name for check in checks if check.status is Status.FAIL]
    warned = [check.name for check in checks if check.status is Status.WARN]
    if failed:
        verdict = f"A launch would fail: {', '.join(failed)}."
    elif warned:
        verdict = f"Ready to launch; worth a look: {', '.join(warned)}."
    else:
        verdict = "Ready to launch."
    return "\n".join([*lines, "", verdict])


def examine() -> list[Check]:
    """Looks at the machine and the environment. Starts nothing that stays, and changes nothing."""
    from dplaunch.amx import check_amx
    from dplaunch.ray_here import check_ray

    looks: tuple[Callable[[], Iterator[Check]], ...] = (
        _python,
        _vllm,
        _torch,
        _companions,
        _node,
        check_ray,
        _files,
        _shared_memory,
        _state_dir,
        _pidfd,
        check_amx,
    )
    return [check for look in looks for check in look()]


def _python() -> Iterator[Check]:
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro} ({sys.executable})"
    if sys.version_info[:2] < MIN_PYTHON:
        yield Check("python", Status.FAIL, found, "Use Python 3.11 or later.")
    else:
        yield Check("python", Status.OK, found)


def _vllm() -> Iterator[Check]:
    found = seam.installed_version()
    install = "Install one: pip install 'dplaunch[cuda]', or 'dplaunch[cpu]' where there is no NVIDIA device."
    if found is None:
        yield Check("vllm", Status.FAIL, "not installed", install)
    elif not seam.is_supported(found):
        yield Check("vllm", Status.FAIL, f"{found}, but dplaunch works with {seam.WINDOW}", install)
    else:
        yield Check("vllm", Status.OK, f"{found} (supported: {seam.WINDOW})")


def _torch() -> Iterator[Check]:
    found = build_of("torch")
    if found is None:
        yield Check("torch", Status.FAIL, "not installed", "It comes with vLLM: install that again.")
    else:
        version, build = found
        yield Check("torch", Status.OK, f"{version}, built for {build or 'an unknown device'}")


def _companions() -> Iterator[Check]:
    torch = build_of("torch")
    if torch is None:
        return
    wrong = []
    for name in COMPANIONS:
        found = build_of(name)
        # One of an unknown build cannot be judged without importing it.
        if found is not None and found[1] and torch[1] and found[1].split()[0] != torch[1].split()[0]:
            wrong.append(f"{name} {found[0]} is built for {found[1]}, torch for {torch[1]}")
    if wrong:
        names = " ".join(text.split()[0] for text in wrong)
        yield Check(
            "torch companions",
            Status.FAIL,
            "; ".join(wrong),
            f"Text models need none of them: pip uninstall {names}",
        )


def _node() -> Iterator[Check]:
    from dplaunch.inventory import local_node

    try:
        node = local_node()
    except (DplaunchError, OSError) as error:
        yield Check("devices", Status.FAIL, f"could not be listed: {error}")
        return
    cores = f"{len(node.cores)}: {_ranges(node.cores)}"
    if len(node.cores) < 2:
        yield Check("cores", Status.WARN, cores, "The launcher and a rank share a core: expect slow starts.")
    else:
        yield Check("cores", Status.OK, cores)
    memory = f"{node.memory_free / GIB:.1f} of {node.memory_total / GIB:.1f} GiB free"
    if node.memory_free < LOW_MEMORY_BYTES:
        yield Check("memory", Status.WARN, memory, "A rank needs about 2 GiB beside its weights: use few ranks.")
    else:
        yield Check("memory", Status.OK, memory)
    yield from _devices([(d.id, d.name, d.memory_free, d.memory_total) for d in node.devices])


def _devices(devices: list[tuple[str, str, int, int]]) -> Iterator[Check]:
    torch = build_of("torch")
    if not devices and (useless := in_need_of_device()) is not None:
        yield Check("devices", Status.FAIL, f"no NVIDIA device, but torch is built for {useless[1]}", NO_DEVICE_HINT)
    elif not devices:
        yield Check("devices", Status.OK, "no NVIDIA device: the cores are the devices")
    for index, name, free, total in devices:
        found = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if torch is not None and torch[1] == "CPU":
            advice = "This torch cannot use it: install dplaunch[cuda] for ranks on it."
            yield Check(f"device {index}", Status.WARN, found, advice)
        elif free < total / 2:
            advice = "Something else holds its memory (`nvidia-smi` lists it): end that or lower "
            yield Check(f"device {index}", Status.WARN, found, f"{advice}--gpu-memory-utilization.")
        else:
            yield Check(f"device {index}", Status.OK, found)


def _ranges(numbers: tuple[int, ...]) -> str:
    """Core numbers as the kernel writes them: "0-3,8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        yield Check("open files", Status.OK, "no limit")
        return
    ranks = max(0, (soft - FILES_BASE) // FILES_PER_RANK)
    found = f"limit {soft}, enough for {ranks} ranks ({FILES_BASE} + {FILES_PER_RANK} a rank)"
    wanted = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    status = Status.FAIL if ranks < 1 else Status.WARN if ranks < 16 else Status.OK
    yield Check("open files", status, found, "" if status is Status.OK else f"Raise it: ulimit -n {wanted}")


def _shared_memory() -> Iterator[Check]:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError as error:
        yield Check("/dev/shm", Status.FAIL, error.strerror or str(error), "Mount a tmpfs there.")
        return
    free, total = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    status = Status.FAIL if free < MIN_SHM_BYTES // 2 else Status.WARN if free < LOW_SHM_BYTES else Status.OK
    advice = "Remove what dead processes left in it, or enlarge it (docker run --shm-size=8g)."
    found = f"{free / GIB:.2f} of {total / GIB:.2f} GiB free"
    yield Check("/dev/shm", status, found, "" if status is Status.OK else advice)


def _state_dir() -> Iterator[Check]:
    import platformdirs

    path = platformdirs.user_state_path("dplaunch")
    # The nearest directory that exists is what a launch would write to; looking must not create it.
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        yield Check("state directory", Status.OK, str(path))
    else:
        advice = "Pass --log-dir DIR, or set XDG_STATE_HOME to a directory that you can write."
        yield Check("state directory", Status.WARN, f"{path} cannot be written", advice)


def _pidfd() -> Iterator[Check]:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        advice = "Ranks need it to see the launcher die: use Linux 5.3 or later, and let the container allow it."
        yield Check("pidfd", Status.FAIL, f"pidfd_open does not work: {error}", advice)
    else:
        yield Check("pidfd", Status.OK, "available")
