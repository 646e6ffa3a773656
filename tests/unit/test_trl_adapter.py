"""TRL's client with weights through memory: what it posts, and what it never does to the trainer's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dplaunch.bucket import tensors_in
from dplaunch.errors import UsageError
from dplaunch.posted import take
from dplaunch.seam import frontend
from dplaunch.transfers import BUCKET, GIVE_UP

pytest.importorskip("trl")

from dplaunch.integrations import trl as adapter


@pytest.fixture(scope="module", autouse=True)
def _trl_is_imported() -> None:
    """It imports vLLM, which sets variables that later tests look for."""
    with frontend.preserved_environ():
        import trl.generation.vllm_generation  # noqa: F401


class Server:
    """Takes what is posted, as the launcher does."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.told: list[dict[str, Any]] = []
        self.weights: dict[str, list[float]] = {}

    def post(self, url: str, json: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(url.rpartition("/")[2])
        if info := json.get("update_info"):
            self.told.append(info)
            if BUCKET in info:
                taken = take(info[BUCKET])
                for name, tensor in tensors_in(taken.path, taken.entries):
                    self.weights[name] = tensor.flatten().tolist()
                taken.free()
        return {}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def client(server: Server) -> Any:
    """A client that has found its server."""
    kind = adapter.client_class()
    client: Any = object.__new__(kind)
    client.base_url, client._updating_weights, client._post = "http://here", False, server.post
    return client


METADATA = [("a", "float32", [3]), ("b", "float32", [2]), ("c", "float32", [1])]


def merged(log: list[str]) -> Iterator[tuple[str, Any]]:
    """Tensors that are what they are to be only until the next is asked for, as PEFT's and ZeRO's are."""
    import torch

    for name, _, (size,) in METADATA:
        tensor = torch.full((size,), float(size))
        yield name, tensor
        tensor.zero_()
    log.append("put back")


def test_each_tensor_is_written_before_the_next_is_asked_for(
    client: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "BUCKET_BYTES", 20)
    log: list[str] = []
    client.update_named_params(METADATA, merged(log))
    assert server.weights == {"a": [3.0] * 3, "b": [2.0] * 2, "c": [1.0]}
    assert server.calls == ["start_weight_update", "update_weights", "update_weights", "finish_weight_update"]
    assert log == ["put back"]
    assert all(told["keep"] and told["verify"] and told["mode"] == "wait" for told in server.told)


def test_several_calls_in_one_block_are_one_update(client: Any, server: Server) -> None:
    import torch

    with client.weight_update():
        client.update_named_param("a", torch.ones(1))
        client.update_named_param("b", torch.ones(1))
    assert server.calls == ["start_weight_update", "update_weights", "update_weights", "finish_weight_update"]


@pytest.mark.parametrize("wrong", ["name", "shape", "more", "less"])
def test_what_was_not_announced_is_given_up_and_never_finished(client: Any, server: Server, wrong: str) -> None:
    import torch

    tensors = {
        "name": [("a", torch.ones(1)), ("x", torch.ones(2))],
        "shape": [("a", torch.ones(1)), ("b", torch.ones(3))],
        "more": [("a", torch.ones(1)), ("b", torch.ones(2)), ("c", torch.ones(1))],
        "less": [("a", torch.ones(1))],
    }
    words = {"name": "x float32", "shape": r"\(3,\) came", "more": "and more came", "less": "and fewer came"}
    with pytest.raises(UsageError, match=words[wrong]):
        client.update_named_params([("a", "float32", [1]), ("b", "float32", [2])], iter(tensors[wrong]))
    assert "finish_weight_update" not in server.calls
    assert GIVE_UP in server.told[-1]


def test_use_changes_trl_inside_its_block_alone() -> None:
    from trl.generation import vllm_client, vllm_generation

    theirs = vllm_client.VLLMClient
    with adapter.use(keep=False, mode="abort") as ours:
        assert vllm_generation.VLLMClient is vllm_client.VLLMClient is ours
        assert issubclass(ours, theirs)
        assert ours.options == {"keep": False, "verify": True, "mode": "abort"}
    assert vllm_generation.VLLMClient is vllm_client.VLLMClient is theirs
