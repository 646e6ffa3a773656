"""What `test_seam` runs in a process of its own: making vLLM's config sets the environment, a rank takes it over.

`python -m tests.unit.seam_probe MODEL` prints one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import cloudpickle

from dplaunch.backend import RankBoot
from dplaunch.channel import RankChannel
from dplaunch.errors import DplaunchError
from dplaunch.identity import Identity
from dplaunch.seam import rank as seam_rank
from dplaunch.seam.config import ConfigRequest, ConfigResult, make

GOOD = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True, "max_num_seqs": 7}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "engine_id": "peer-name"}

CASES: dict[str, dict[str, Any]] = {
    "misspelt argument": {"engine_args": {"max_modell_len": 3}},
    "argument like no other": {"engine_args": {"zzzzzzzz": 3}},
    "bad value": {"engine_args": {"max_model_len": -5}},
    "value of the wrong type": {"engine_args": {"dtype": "float31"}},
    "longer than the model": {"engine_args": {"max_model_len": 10**7}},
    "misspelt flag": {"argv": ("--max-modle-len", "5"), "server": True},
    "flag of the wrong type": {"argv": ("--max-model-len", "abc"), "server": True},
    "tool choice without a parser": {"argv": ("--enable-auto-tool-choice",), "server": True},
    "no such model": {"model": "/there/is/no/such/model"},
}


def request(model: str, **options: Any) -> bytes:
    """A pickled ConfigRequest."""
    defaults: dict[str, Any] = {"model": model, "executor": "uni", "server": False, "env": dict(os.environ)}
    encoded: bytes = cloudpickle.dumps(ConfigRequest(**{**defaults, **options}))
    return encoded


def error(options: dict[str, Any]) -> dict[str, str]:
    """What making such a config is refused with."""
    try:
        make(request(**options))
    except DplaunchError as refused:
        return {"type": type(refused).__name__, "message": refused.message, "hint": refused.hint}
    return {"type": "none", "message": "", "hint": ""}


def result(model: str, **options: Any) -> ConfigResult:
    """What comes of a good one."""
    made: ConfigResult = cloudpickle.loads(make(request(model, **options)))
    return made


def report_of(made: ConfigResult, identity: Identity) -> dict[str, Any]:
    """What a rank says of itself that vLLM's own run_engine_core made, with all but the names left out."""
    from vllm.v1.engine import core

    class Core(core.EngineCoreProc):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            self.seen_index = vllm_config.parallel_config.data_parallel_index
            self.vllm_config = vllm_config
            vllm_config.instance_id = "drawn anew"
            self.model_executor = object()
            self.input_queue = None

        def run_busy_loop(self) -> None:
            reports.append({**self.dplaunch_report(), "seen_index": self.seen_index})
            raise SystemExit

        def shutdown(self) -> None:
            """Nothing was made."""

        def has_work(self) -> bool:
            return False

        shutdown_state = None

    reports: list[dict[str, Any]] = []
    original, core.EngineCoreProc = core.EngineCoreProc, Core
    payload = seam_rank.RankPayload(config=made.config, executor="uni", log_stats=False)
    boot = RankBoot(
        name="EngineCore_DP3",
        rank=identity.rank,
        incarnation=identity.incarnation,
        process_title=identity.process_title,
        instance_id=identity.instance_id,
        engine_id=identity.engine_id(made.kv_engine_id),
        handshake_address="",
        env={},
        cpus=(),
        log_file=None,
        engine="",
        payload=cloudpickle.dumps(payload),
        sys_path=(),
    )
    try:
        with RankChannel("inproc://nobody", identity.rank, 0) as channel:
            seam_rank.run_engine(boot, channel)
    except SystemExit:
        pass
    finally:
        core.EngineCoreProc = original
        signal.signal(signal.SIGINT, signal.default_int_handler)
    kept = ("rank", "instance_id", "engine_id", "data_parallel_index", "seen_index", "dtype")
    return {name: reports[0][name] for name in kept}


def on_a_cpu() -> None:
    """Lets a vLLM for CUDA make configs where there is no device: its platform for CPUs is in the wheel too."""
    from vllm import platforms

    if not platforms.current_platform.device_type:
        from vllm.platforms.cpu import CpuPlatform

        platforms._current_platform = CpuPlatform()


def main(model: str) -> None:
    """Prints all that the tests want to know."""
    before = dict(os.environ)
    on_a_cpu()
    plain = result(model, engine_args=GOOD, env={**before, "CALLER": "yes"})
    config = cloudpickle.loads(plain.config)
    connected = result(model, engine_args={**GOOD, "kv_transfer_config": CONNECTOR})
    defaulted = result(
        model, argv=("--max-num-seqs", "9", "--dtype", "float32"), server=True, defaults={"max_model_len": 64}
    )
    restarted = Identity("base", 3).restarted()
    told = {
        "plain": {
            "kv_engine_id": plain.kv_engine_id,
            "max_num_seqs": plain.max_num_seqs,
            "log_requests": plain.log_requests,
            "environ": dict(plain.environ),
            "executor": config.parallel_config.distributed_executor_backend,
            "max_model_len": config.model_config.max_model_len,
            "server_args": plain.server_args is not None,
        },
        "served": {
            "max_num_seqs": defaulted.max_num_seqs,
            "model_len": cloudpickle.loads(defaulted.config).model_config.max_model_len,
            "flag": None if defaulted.server_args is None else defaulted.server_args.max_num_seqs,
        },
        "kv_engine_id": connected.kv_engine_id,
        "reports": [
            report_of(plain, Identity("base", 3)),
            report_of(connected, Identity("base", 3)),
            report_of(connected, restarted),
            report_of(connected, Identity("base", 0, suffixed=False)),
        ],
        "errors": {name: error({"model": model, **options}) for name, options in CASES.items()},
    }
    sys.stdout.flush()
    # Not through sys.stdout: vLLM before 0.31 puts a name before each line that is written there.
    os.write(1, f"\n{json.dumps(told)}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1])
