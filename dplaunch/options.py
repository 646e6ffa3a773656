"""The command's options, each declared once: on the command line, as a variable, and in the config file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from dplaunch.spec import ExecutorKind, LaunchSpec, Mode, StartMethod
from dplaunch.ui import UiOptions

ENV_PREFIX = "DPLAUNCH_"

RESTART_CHOICES = ("on-failure", "never")

_SPEC = LaunchSpec()
_UI = UiOptions()


def rank_count(value: Any) -> Any:
    """A number of ranks as an int. Anything else is left as it is for `LaunchSpec` to refuse in its words."""
    try:
        return int(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of `serve` and `plan`, on the command line, as a variable and in the file.

    Args:
        name: as in the config file: "log_dir".
        help: what it does.
        type: how click reads it.
        default: what holds when nobody sets it; None is not shown.
        metavar: what stands for the value in the help text; "" for the type's own.
        switch: True for an option without a value.
        multiple: True for one that may be given several times; it has no variable.
    """

    name: str
    help: str
    type: Any = str
    default: Any = None
    metavar: str = ""
    switch: bool = False
    multiple: bool = False

    @property
    def flag(self) -> str:
        """As typed: "--log-dir"."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str | None:
        """The environment variable: "DPLAUNCH_LOG_DIR"."""
        return None if self.multiple else ENV_PREFIX + self.name.upper()


def _choice(values: Any) -> click.Choice[str]:
    return click.Choice([str(value) for value in values])


OPTIONS = (
    Option(name="model", help="Path or hub name. Without it, a built-in model is served.", metavar="M"),
    Option(name="dp", help="Data-parallel ranks.", type=rank_count, default=_SPEC.dp, metavar="N"),
    Option(
        name="backend",
        help="What runs the ranks: mp for processes of this machine, ray for actors of a Ray cluster.",
        default=_SPEC.backend,
    ),
    Option(name="host", help="HTTP address to bind.", default=_UI.host),
    Option(name="port", help="HTTP port; 0 for a free one.", type=click.IntRange(0, 65535), default=_UI.port),
    Option(
        name="devices",
        help="Devices of each rank, ranks apart by semicolons; cores where there is no accelerator.",
        metavar='"0,1;2,3"',
    ),
    Option(
        name="executor",
        help="How a rank drives its devices.",
        type=_choice(ExecutorKind),
        default=_SPEC.executor.value,
    ),
    Option(
        name="mode",
        help="Whether ranks are replaced one by one (independent) or share one fate (lockstep).",
        type=_choice(Mode),
        default=_SPEC.mode.value,
    ),
    Option(
        name="start_method",
        help="Fork ranks from a process that has imported vLLM, or spawn them.",
        type=_choice(StartMethod),
        default=_SPEC.start_method.value,
    ),
    Option(
        name="start_timeout",
        help="Seconds until a rank that is not ready fails the launch.",
        type=float,
        default=_SPEC.start_timeout_s,
        metavar="SECONDS",
    ),
    Option(
        name="restart",
        help="Whether a rank that dies while serving comes back.",
        type=click.Choice(RESTART_CHOICES),
        default=RESTART_CHOICES[0],
    ),
    Option(
        name="max_restarts",
        help="Restarts of one rank within --restart-window; 0 for never.",
        type=click.IntRange(min=0),
        default=_SPEC.restart.limit,
    ),
    Option(
        name="restart_window",
        help="Seconds after which a restart no longer counts.",
        type=float,
        default=_SPEC.restart.window_s,
        metavar="SECONDS",
    ),
    Option(name="min_ranks", help="Stop when fewer ranks than this are left.", type=int, default=_SPEC.min_ranks),
    Option(
        name="probe_timeout",
        help="Seconds that a rank's engine has to answer before it is taken for hung and replaced; 0 for never.",
        type=float,
        default=_SPEC.probe.timeout_s,
        metavar="SECONDS",
    ),
    Option(
        name="probe_busy_timeout",
        help="The same for one that is at a long call, as loading weights is, or compiles.",
        type=float,
        default=_SPEC.probe.busy_timeout_s,
        metavar="SECONDS",
    ),
    Option(
        name="max_request_failures",
        help="Dying ranks that one request may have been on before it fails by name.",
        type=int,
        default=_SPEC.requests.max_failures,
    ),
    Option(
        name="max_queue",
        help="Requests in the group at once before new ones are refused with 503; 0 for no bound.",
        type=int,
        default=_SPEC.requests.max_queue,
    ),
    Option(
        name="poison_file",
        help="Where the text of requests that failed by name is kept; nowhere if left out.",
        metavar="FILE",
    ),
    Option(
        name="ray_address",
        help="Ray cluster to attach to: auto, or HOST:PORT. By default RAY_ADDRESS, else a local one for this launch.",
    ),
    Option(name="nodes", help="Machines of the Ray cluster to use, by name or address; by default all.", metavar="A,B"),
    Option(
        name="num_gpus",
        help="Share of a device that each worker holds on Ray; below 1 leaves room for others.",
        type=float,
        default=_SPEC.cluster.num_gpus,
    ),
    Option(name="env", help="A variable for every rank; may be repeated.", metavar="KEY=VALUE", multiple=True),
    Option(name="name", help="The group's id, the stem of every rank's names. A fresh one if left out."),
    Option(name="log_dir", help="Where each rank's log goes; by default under the user's state directory."),
    Option(name="any_vllm", help="Try a vLLM that dplaunch was not checked with.", switch=True),
    Option(name="tee", help="Show the ranks' output too, with the rank in front.", switch=True),
    Option(name="quiet", help="Show the address, warnings and errors only.", switch=True),
    Option(name="json_logs", help="Write events as one JSON object a line.", switch=True),
)
"""Every option but `--config` and `--debug`."""
