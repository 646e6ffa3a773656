"""The command: vLLM's own OpenAI endpoints over two real ranks."""

from __future__ import annotations

import concurrent.futures
import json

from tests.real.conftest import Server


def test_the_capital_of_france_is_paris(server: Server) -> None:
    answer = server.chat("What is the capital of France?")
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["model"] == "smollm"


def test_both_ranks_serve_and_metrics_tell_them_apart(server: Server) -> None:
    before = server.served_by_rank()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(server.chat, [f"Count to {n}." for n in range(8)]))
    after = server.served_by_rank()
    served = {rank: after[rank] - before.get(rank, 0.0) for rank in after}
    assert set(served) == {0, 1}
    assert all(count >= 2 for count in served.values()), served
    assert sum(served.values()) == 8


def test_a_streamed_answer_is_the_same_text_in_pieces(server: Server) -> None:
    whole = server.chat("Name three colours.")["choices"][0]["message"]["content"]
    body = {
        "messages": [{"role": "user", "content": "Name three colours."}],
        "temperature": 0,
        "max_tokens": 16,
        "stream": True,
    }
    pieces = []
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == whole


def test_n_choices_with_logprobs_come_back_together(server: Server) -> None:
    answer = server.chat("Say a word.", n=3, temperature=0.9, seed=7, logprobs=True, top_logprobs=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert all(choice["logprobs"]["content"][0]["top_logprobs"] for choice in answer["choices"])


def test_guided_decoding_keeps_to_the_grammar(server: Server) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "enum": [1, 2]}}, "required": ["n"]}
    answer = server.chat(
        "Give me a number.",
        max_tokens=32,
        response_format={"type": "json_schema", "json_schema": {"name": "number", "schema": schema}},
    )
    assert json.loads(answer["choices"][0]["message"]["content"])["n"] in (1, 2)


def test_a_request_may_be_pinned_to_a_rank(server: Server) -> None:
    before = server.served_by_rank()
    body = {"model": "smollm", "prompt": "One, two,", "max_tokens": 4, "temperature": 0}
    for _ in range(3):
        response = server.http.post("/v1/completions", json=body, headers={"X-data-parallel-rank": "1"})
        response.raise_for_status()
    after = server.served_by_rank()
    assert after[1] - before.get(1, 0.0) == 3
    assert after.get(0, 0.0) == before.get(0, 0.0)


def test_a_client_that_leaves_frees_its_slot(server: Server) -> None:
    body = {"model": "smollm", "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    from dplaunch.testing import poll_until

    def running() -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))

    poll_until(lambda: running() == 0, 20, "the end of the request whose client left")


def test_health_models_and_tokenize_are_vllms_own(server: Server) -> None:
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "smollm"
    assert server.http.post("/tokenize", json={"model": "smollm", "prompt": "Hello"}).json()["count"] > 0


def test_a_bad_request_is_the_clients_error_and_the_server_goes_on(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": -1}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 400
    assert "Paris" in server.chat("What is the capital of France?")["choices"][0]["message"]["content"]
