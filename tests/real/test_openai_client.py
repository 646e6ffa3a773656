"""The OpenAI client, as its package is, on the session's server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.real.conftest import Server

openai = pytest.importorskip("openai")

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_and_completions_are_what_the_client_expects(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["smollm"]
    answer = client.completions.create(model="smollm", prompt="The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_a_chat_and_its_stream_say_the_same(client: Any) -> None:
    options = {"model": "smollm", "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0]
    assert "Paris" in (whole.message.content or "")
    with client.chat.completions.create(**options, stream=True) as stream:
        parts = [part.choices[0] for part in stream]
    assert "".join(part.delta.content or "" for part in parts) == whole.message.content
    assert parts[-1].finish_reason == whole.finish_reason


def test_several_answers_come_with_their_logprobs(client: Any) -> None:
    answer = client.chat.completions.create(
        model="smollm", messages=QUESTION, n=3, max_tokens=4, temperature=0.9, seed=5, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        told = choice.logprobs.content
        assert told
        assert all(len(token.top_logprobs) >= 2 and token.logprob <= 0 for token in told)


def test_errors_are_of_the_clients_own_classes(client: Any, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="another", prompt="a", max_tokens=1)
    assert "another" in unknown.value.message
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="smollm", messages=QUESTION, max_tokens=-1)
    # Whoever did not ask for development endpoints has none.
    assert server.http.post("/start_weight_update").status_code == 404
