"""The error tree and the exit codes. Every message says what happened and what to do next."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What the `dplaunch` command exits with."""

    OK = 0
    INTERNAL = 1  # a bug in dplaunch: please report it
    USAGE = 2  # a flag or a value that cannot be
    MODEL = 3  # the model path is unknown or holds no model
    RESOURCES = 4  # too few devices or too little memory
    ADDRESS = 5  # the HTTP address cannot be bound
    VLLM = 6  # vLLM is missing or of an unsupported version
    LOG_DIR = 7  # logs cannot be written
    RANK_FAILED = 8  # a rank died while starting
    START_TIMEOUT = 9  # a rank did not become ready in time
    GROUP_DEAD = 10  # the group lost more ranks than it can do without
    BACKEND = 11  # the backend is unknown or not installed
    NO_GROUP = 12  # no running group is meant, or it does not answer
    INTERRUPTED = 130  # Ctrl-C
    TERMINATED = 143  # SIGTERM


class DplaunchError(Exception):
    """Base of all errors that dplaunch raises on purpose.

    Args:
        message: one line that says what happened, with the numbers.
        hint: one line that says what to do next.
        detail: further lines (a log's tail), shown after the message.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str, *, hint: str = "", detail: str = "") -> None:
        # Not super(): in an error that is one of vLLM's too, that is vLLM's, which takes other arguments.
        Exception.__init__(self, message)
        self.message = message
        self.hint = hint
        self.detail = detail

    def __str__(self) -> str:
        return "\n".join(part for part in (self.message, self.hint, self.detail) if part)


class UsageError(DplaunchError):
    """Raised when an option or argument has a value that it cannot have."""

    exit_code = ExitCode.USAGE


class ModelError(DplaunchError):
    """Raised when the model path is unknown, or what is there is no model that vLLM can run."""

    exit_code = ExitCode.MODEL


class ResourceError(DplaunchError):
    """Raised when the ranks need more devices or memory than there is."""

    exit_code = ExitCode.RESOURCES


class AddressError(DplaunchError):
    """Raised when the HTTP address cannot be bound."""

    exit_code = ExitCode.ADDRESS


class VllmError(DplaunchError):
    """Raised when vLLM is missing or its version is not one that dplaunch was checked with."""

    exit_code = ExitCode.VLLM


class LogDirError(DplaunchError):
    """Raised when the log directory cannot be written."""

    exit_code = ExitCode.LOG_DIR


class RankFailedError(DplaunchError):
    """Raised when a rank dies before it is ready; names rank, exit, likely cause and log."""

    exit_code = ExitCode.RANK_FAILED


class StartTimeoutError(DplaunchError):
    """Raised when a rank is not ready at `start_timeout_s`."""

    exit_code = ExitCode.START_TIMEOUT


class GroupDeadError(DplaunchError):
    """Raised when no rank is left that can serve; carries the root cause."""

    exit_code = ExitCode.GROUP_DEAD


class WeightsError(DplaunchError):
    """Raised when weights or an adapter could not be changed; says which ranks it was due to and what they have now."""

    exit_code = ExitCode.INTERNAL


class StandstillError(DplaunchError):
    """Raised when requests were still running at the deadline of a pause; the group serves on."""

    exit_code = ExitCode.INTERNAL


class BackendError(DplaunchError):
    """Raised when the backend is unknown, not installed, or cannot do what was asked of it."""

    exit_code = ExitCode.BACKEND


class NoGroupError(DplaunchError):
    """Raised when no running group is meant, or several may be, or the one that is meant does not answer."""

    exit_code = ExitCode.NO_GROUP


class GroupClosedError(DplaunchError):
    """Raised when a closed group is used."""

    exit_code = ExitCode.USAGE


class ResultsFileError(DplaunchError):
    """Raised when a results file (`resume=`) cannot be read or written, or belongs to something else."""

    exit_code = ExitCode.USAGE


class RequestError(DplaunchError):
    """Raised when one request fails; `index` is its place in the batch, `retryable` says whether to try again."""

    exit_code = ExitCode.INTERNAL

    def __init__(self, message: str, *, index: int | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.index = index
        self.retryable = retryable
