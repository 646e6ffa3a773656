"""What a launcher and its zygote say to each other, over one connection, pickled."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from dplaunch.backend import RankBoot
from dplaunch.errors import BackendError, DplaunchError


@dataclass(frozen=True, slots=True, kw_only=True)
class ZygoteBoot:
    """The launcher's first word, after its import path.

    Args:
        launcher_pid: whose end is the zygote's, and that of all it forked.
        start_method: "fork", or "spawn" for ranks in fresh interpreters.
        preload: "module:function" that imports what ranks need; None for nothing.
        stdout: file descriptor of the launcher's standard output, for ranks without a log file.
        stderr: the same of its standard error.
    """

    launcher_pid: int
    start_method: str
    preload: str | None
    stdout: int
    stderr: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankJob:
    """Become a rank, in the working directory `cwd`; end with the launcher, and with each of `keepers`."""

    boot: RankBoot
    cwd: str
    keepers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The process's name."""
        return self.boot.name

    @property
    def env(self) -> Mapping[str, str]:
        """The process's whole environment."""
        return self.boot.env


@dataclass(frozen=True, slots=True, kw_only=True)
class CallJob:
    """Run "module:function" on `payload`, leave an `Answer`, end."""

    function: str
    payload: bytes
    env: Mapping[str, str]
    sys_path: tuple[str, ...]
    cwd: str

    @property
    def name(self) -> str:
        """The process's name."""
        return f"dplaunch-call-{self.function}"


Job = RankJob | CallJob


@dataclass(frozen=True, slots=True)
class Fork:
    """To the zygote: make a process for a job; `number` names it in what follows."""

    number: int
    job: Job


@dataclass(frozen=True, slots=True)
class Ready:
    """From the zygote: it has imported all; `threads` are those beside its main one, which forks would lose."""

    threads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unfit:
    """From the zygote, its last word: it cannot serve."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Forked:
    """From the zygote: the process exists. Its pidfd follows, then for a call the files of answer and output."""

    number: int
    pid: int
    files: int


@dataclass(frozen=True, slots=True)
class NotForked:
    """From the zygote: the process could not be made."""

    number: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Ended:
    """From the zygote, which as the parent alone can know: the exit code, or minus the signal; None if lost."""

    number: int
    returncode: int | None


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception on its way to another process. Its class may not be importable there, so it goes as text;
    an error of dplaunch's own goes as itself too."""

    kind: str
    message: str
    trace: str
    original: bytes | None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What to send of an exception."""
        original = None
        if isinstance(error, DplaunchError):
            original = pickle.dumps(error)
        trace = "".join(traceback.format_exception(error))
        return cls(type(error).__name__, str(error), trace, original)

    def as_error(self, what: str) -> DplaunchError:
        """The error to raise: dplaunch's own as it was, any other as a `BackendError` that begins with `what`."""
        if self.original is not None:
            error: DplaunchError = pickle.loads(self.original)
            return error
        return BackendError(f"{what}: {self.kind}: {self.message}", detail=self.trace)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call came to: its bytes, or how it failed."""

    result: bytes | Failure
