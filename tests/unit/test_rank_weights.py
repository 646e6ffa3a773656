"""What our engine core does with weights, around the workers: buckets from here and elsewhere, and the checksum."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dplaunch import bucket
from dplaunch.seam import weights as seam

TENSORS = [("a", torch.arange(6.0)), ("b", torch.ones(2, 2))]


class Engine(seam.RankWeights):
    """As much of an engine core as is needed."""

    def __init__(self, device: str, rank: int = 0) -> None:
        self.vllm_config = SimpleNamespace(device_config=SimpleNamespace(device_type=device))
        self.loaded: list[dict[str, Any]] = []
        self.steps: list[str] = []
        self._rank = rank

    def collective_rpc(self, work: Any, args: Any) -> None:
        self.steps.append(work.__name__)
        if work is seam.load:
            path, entries, handle = args
            assert not handle
            self.loaded.append({name: tensor.clone() for name, tensor in bucket.tensors_in(path, entries)})

    def compute_weight_checksums(self) -> list[dict[str, str]]:
        return [{f"dp{self._rank}:pp0:pcp0:tp0:a": "d1"}]


@pytest.fixture
def made() -> Iterator[bucket.Bucket]:
    (made,) = bucket.in_buckets(TENSORS)
    yield made
    made.free()


def put(engine: Engine, made: bucket.Bucket, *, path: str = "", verify: bool = True) -> str:
    """Loads a bucket as the launcher has it done; the checksum."""
    engine.dplaunch_begin_weights(verify)
    engine.dplaunch_load_bucket(path or made.path, made.entries)
    engine.dplaunch_end_weights()
    return engine.dplaunch_weight_checksum()


def test_a_bucket_is_loaded_alike_from_shared_memory_and_from_the_network(made: bucket.Bucket) -> None:
    near, far, beside = (Engine("cpu", rank) for rank in range(3))
    assert beside.dplaunch_sees(*far.dplaunch_landmark())
    path = far.dplaunch_take_bucket(made.read())
    assert put(near, made) == put(beside, made, path=path) == put(far, made, path=path)
    assert not Path(path).exists()
    for engine in (near, far, beside):
        assert engine.steps == ["begin", "load", "end"]
        (loaded,) = engine.loaded
        assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS)


def test_on_a_cpu_the_checksum_takes_in_what_was_loaded_if_anyone_will_ask(made: bucket.Bucket) -> None:
    initial = Engine("cpu").dplaunch_weight_checksum()
    assert put(Engine("cpu"), made) != initial
    assert put(Engine("cpu"), made, verify=False) == initial
    # A device's memory is seen by vLLM's own.
    assert put(Engine("cuda"), made) == initial


def test_what_was_loaded_before_does_not_count(made: bucket.Bucket, tmp_path: Path) -> None:
    engine = Engine("cpu")
    once = put(engine, made)
    assert put(engine, made) == once
    (tmp_path / "model.safetensors").write_bytes(b"1")
    engine.dplaunch_reload_weights(str(tmp_path))
    reloaded = engine.dplaunch_weight_checksum()
    assert reloaded != once
    (tmp_path / "model.safetensors").write_bytes(b"2")
    engine.dplaunch_reload_weights(str(tmp_path))
    assert engine.dplaunch_weight_checksum() != reloaded
    engine.dplaunch_reload_weights(None)
    assert engine.dplaunch_weight_checksum() == Engine("cpu").dplaunch_weight_checksum()
