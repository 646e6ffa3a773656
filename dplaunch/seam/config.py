"""From flags or keyword arguments to vLLM's config, in a throw-away process.

Making the config sets environment variables and, for a new model class, runs code of the model's; in a child of
the zygote neither reaches the user's process, and what the zygote has imported is there already.
"""

from __future__ import annotations

import argparse
import difflib
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dplaunch.errors import DplaunchError, ModelError, UsageError, VllmError
from dplaunch.known_flags import unknown_flag
from dplaunch.seam import older

LINE_CHARS = 300
"""How much of what vLLM said goes into a message: the reason, without its lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigRequest:
    """What to make a config from.

    Args:
        model: path or hub name.
        engine_args: keyword arguments of vLLM's engine; used when `server` is False.
        argv: engine and server flags; used when `server` is True.
        defaults: engine arguments that the user left to the plan.
        executor: "uni", "mp", "ray", or a class path that the user gave.
        server: whether there will be an HTTP server.
        env: the environment to make the config in.
    """

    model: str
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    argv: Sequence[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    executor: str
    server: bool
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigResult:
    """What came of it. Holds plain values only: it is read while another thread still imports vLLM.

    Args:
        config: the pickled VllmConfig of a single rank.
        pickled_args: the parsed server flags, pickled; None without a server.
        kv_engine_id: the KV connector's base id; None without a connector.
        max_num_seqs: how many sequences one rank runs at a time.
        known_flags: every flag that vLLM's parser knows; empty without a server.
        log_requests: whether AsyncLLM logs each request.
        environ: what importing vLLM and making the config set in the environment, which ranks need too.
    """

    config: bytes
    pickled_args: bytes | None
    kv_engine_id: str | None
    max_num_seqs: int
    known_flags: frozenset[str]
    log_requests: bool
    environ: Mapping[str, str]

    @property
    def server_args(self) -> argparse.Namespace | None:
        """The parsed server flags; None without a server. They hold vLLM's objects, so reading them imports vLLM."""
        if self.pickled_args is None:
            return None
        import cloudpickle

        args: argparse.Namespace = cloudpickle.loads(self.pickled_args)
        return args


def make(payload: bytes) -> bytes:
    """Makes the config: a pickled ConfigRequest in, a pickled ConfigResult out.

    Raises:
        UsageError: when vLLM refuses the arguments.
        ModelError: when vLLM cannot read the model.
    """
    import cloudpickle

    request: ConfigRequest = cloudpickle.loads(payload)
    # Over what this process was given, which has in it what vLLM sets while it is imported.
    os.environ.update(request.env)
    try:
        result = _make(request)
    except DplaunchError:
        raise
    except OSError as error:
        raise ModelError(f"vLLM cannot read the model {request.model}: {_first_line(error)}") from error
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        if not _has_code_for(request.model):
            raise ModelError(f"vLLM cannot run the model {request.model}: {_first_line(error)}") from error
        raise UsageError(f"vLLM refuses this configuration: {_first_line(error)}") from error
    encoded: bytes = cloudpickle.dumps(result)
    return encoded


def _make(request: ConfigRequest) -> ConfigResult:
    import cloudpickle
    from vllm.transformers_utils.config import maybe_register_config_serialize_by_value
    from vllm.usage.usage_lib import UsageContext

    known: frozenset[str] = frozenset()
    server_args = None
    if request.server:
        args, server_args, known = _server_args(request)
    else:
        args = _engine_args(request)
    usage = UsageContext.OPENAI_API_SERVER if request.server else UsageContext.LLM_CLASS
    config = args.create_engine_config(usage_context=usage)
    changed = {name: value for name, value in os.environ.items() if request.env.get(name) != value}
    # The CPU platform turns "uni" into "mp" because it cannot set OpenMP up in a process that already runs;
    # a rank's cores are set before OpenMP starts, so here it can.
    config.parallel_config.distributed_executor_backend = request.executor
    maybe_register_config_serialize_by_value()
    transfer = config.kv_transfer_config
    return ConfigResult(
        config=cloudpickle.dumps(config),
        pickled_args=None if server_args is None else cloudpickle.dumps(server_args),
        kv_engine_id=None if transfer is None else transfer.engine_id,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        known_flags=known,
        log_requests=args.enable_log_requests,
        environ={name: value for name, value in changed.items() if name != _ZYGOTE_ONLY},
    )


_ZYGOTE_ONLY = "OPENBLAS_NUM_THREADS"
"""Set for the zygote so that it has one thread; numpy in a process that is executed anew is free of that."""


def _engine_args(request: ConfigRequest) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    values = {**request.defaults, **request.engine_args, "model": request.model}
    known = set(AsyncEngineArgs.__dataclass_fields__)
    for name in values:
        if name not in known:
            raise UsageError(f"unknown argument {name!r}", hint=_did_you_mean(name, known))
    values.setdefault("enable_log_requests", False)
    return AsyncEngineArgs(**values)


def _server_args(request: ConfigRequest) -> tuple[Any, argparse.Namespace, frozenset[str]]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    parser = make_parser()
    args, unknown = parser.parse_known_args(["--model", request.model, *request.argv])
    known = frozenset(option for action in parser._actions for option in action.option_strings)
    if unknown:
        raise unknown_flag(unknown[0].partition("=")[0], known)
    for name, value in request.defaults.items():
        setattr(args, name, value)
    older.moved("validate_parsed_serve_args")(args)
    return AsyncEngineArgs.from_cli_args(args), args, known


def make_parser() -> Any:
    """vLLM's own parser of server flags; it raises UsageError where argparse would end the process."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise UsageError(f"vLLM refuses a flag: {message}", hint="`vllm serve --help=all` lists them all.")

    return older.moved("make_arg_parser")(Parser(prog="dplaunch"))


def _did_you_mean(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else "`vllm serve --help=all` lists what vLLM knows."


def _has_code_for(model: str) -> bool:
    """Whether vLLM has code of its own for what the model's config.json names."""
    from transformers import PretrainedConfig
    from vllm.model_executor.models import ModelRegistry

    try:
        names = PretrainedConfig.get_config_dict(model)[0].get("architectures") or ()
    except OSError:
        return False  # There is nothing to read.
    return not set(names).isdisjoint(ModelRegistry.get_supported_archs())


def _first_line(error: BaseException) -> str:
    text = str(error)
    if type(error).__name__ == "ValidationError":
        # pydantic wraps the reason in a count of errors, the whole input and a link.
        first = error.errors()[0]  # type: ignore[attr-defined]
        text = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    # vLLM may list all that it knows in one line.
    return textwrap.shorten(line, LINE_CHARS, placeholder=" ...")


def check_version(found: str | None, *, override: bool = False) -> str:
    """The installed version, if dplaunch works with it.

    Raises:
        VllmError: when there is none, or one that the seam was not checked with.
    """
    from dplaunch.seam import OVERRIDE, WINDOW, is_supported
    from dplaunch.seam.relied import NEWEST

    if found is None:
        raise VllmError(
            "vLLM is not installed",
            hint="Install it: pip install 'dplaunch[cuda]' where there is an NVIDIA GPU, else 'dplaunch[cpu]'.",
        )
    if not override and not is_supported(found):
        raise VllmError(
            f"vLLM {found} is installed, but this dplaunch works with {WINDOW}",
            hint=f"pip install 'vllm=={NEWEST}.*', or try it as it is: --any-vllm, any_vllm=True or {OVERRIDE}=1.",
        )
    return found
