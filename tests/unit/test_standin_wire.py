"""The stand-in engine against vLLM's own classes: what it says is what they read, and the other way round."""

from __future__ import annotations

import msgspec
import pytest

from dplaunch.testing import Fault, StandInPlan, wire
from dplaunch.testing.sockets import ready_payload
from tests.contract.boots import make_boot

LATER = {"weight_version"}


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it is imported
def test_what_the_engine_sends_is_what_vllms_own_classes_read() -> None:
    pytest.importorskip("vllm")
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreReadyResponse, EngineCoreRequest

    from dplaunch.seam.wire import Codec

    codec = Codec()
    output = wire.Output("a", [5], finish_reason=1, prefill_stats=wire.PrefillStats(3, 3))
    read = codec.decode([wire.encode_outputs([output], finished={"a"})])
    assert (read.outputs[0].new_token_ids, str(read.outputs[0].finish_reason)) == ([5], "length")
    assert read.outputs[0].prefill_stats.num_prompt_tokens == 3
    assert (read.finished_requests, read.timestamp > 0) == ({"a"}, True)
    vector = wire.Output("e", [], pooling_output=wire.encode_tensor([1.0, 2.0]), finish_reason=0)
    assert codec.decode([wire.encode_outputs([vector])]).outputs[0].pooling_output.tolist() == [1.0, 2.0]
    called = codec.decode([wire.encode_outputs(utility=wire.UtilityOutput(3, None, (None, {"x": 1})))])
    assert called.utility_output.result.result == {"x": 1}

    request = EngineCoreRequest("a", [1, 2], None, SamplingParams(max_tokens=4), None, 0.0, None, None, None)
    request.client_index = 1
    heard = msgspec.msgpack.decode(codec.encode(request)[0], type=wire.Request)
    assert (heard.request_id, heard.prompt_token_ids, heard.client_index) == ("a", [1, 2], 1)
    assert heard.sampling_params is not None
    assert heard.sampling_params["max_tokens"] == 4

    ready = ready_payload(make_boot("ipc://x"), StandInPlan(), Fault())
    told = msgspec.msgpack.decode(ready, type=EngineCoreReadyResponse)
    # 0.26 does not read its name.
    assert getattr(told, "instance_id", "contract_dp3") == "contract_dp3"


@pytest.mark.filterwarnings("ignore")
def test_our_structs_are_the_heads_of_vllms() -> None:
    vllm = pytest.importorskip("vllm.v1.engine")
    for theirs, ours in (
        (vllm.EngineCoreRequest, wire.Request),
        (vllm.EngineCoreOutput, wire.Output),
        (vllm.EngineCoreOutputs, wire.Outputs),
        (vllm.UtilityOutput, wire.UtilityOutput),
    ):
        known = [field.name for field in msgspec.structs.fields(theirs)]
        # vLLM before 0.32 does not have it yet, and reads what is longer than it knows.
        names = [field.name for field in msgspec.structs.fields(ours) if field.name in known or field.name not in LATER]
        assert known[: len(names)] == names
