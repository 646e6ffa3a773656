"""What comes in over HTTP and through the control socket, and is not as it should be, while the server serves."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable

import pytest
import pytest_asyncio

from dplaunch import demo
from dplaunch.control_wire import SOCKET_NAME
from dplaunch.testing import expected_tokens
from tests.chaos.served import MAX_QUEUE, Served, body, served, token_ids
from tests.conftest import shared_pids
from tests.leaks import Snapshot, left_of_a_shared_group
from tests.real.families import socket_dirs

pytestmark = [
    pytest.mark.real,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaves("the server, which all tests here share; its fixture looks for what is left"),
]

LEAVING = 300
"""Clients that go away; ten thousand in `make soak`."""

CONNECTIONS = 1000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(vllm_imported: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    before = Snapshot.take()
    async with served(str(demo.demo_model().path), tmp_path_factory.mktemp("served")) as server:
        yield server
    if left := left_of_a_shared_group(before, shared_pids):
        pytest.fail("left behind by the server:\n  " + "\n  ".join(left), pytrace=False)


async def unharmed(server: Served, harm: Awaitable[None]) -> None:
    """Has answers go on while the harm is done, and compares each."""
    over = asyncio.Event()
    numbers = itertools.count()

    async def ask() -> int:
        while not over.is_set():
            prompt = [20 + next(numbers) % 900, 5]
            assert await server.is_exact(prompt, 20)
        return 1

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    try:
        await harm
    finally:
        over.set()
        answered = await asyncio.gather(*asking)
    assert answered == [1] * 4


async def all_slots_are_free(server: Served) -> None:
    async with asyncio.timeout(60):
        while await server.running():
            await asyncio.sleep(0.05)


def post(data: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: test",
        "Connection: close",
        *(headers or ("Content-Type: application/json",)),
        f"Content-Length: {len(data) if length is None else length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + data


GOOD = body([1, 2], 4)

MALFORMED = {
    "no JSON": post(b"{"),
    "no object": post(b"[1, 2]"),
    "nothing": post(b""),
    "no UTF-8": post(b'{"model": "\xff\xfe"}'),
    "nested without end": post(b"[" * 100_000),
    "a prompt of booleans": post(json.dumps(GOOD | {"prompt": [True, None]}).encode()),
    "a token that there is not": post(json.dumps(GOOD | {"prompt": [10**12]}).encode()),
    "a token below zero": post(json.dumps(GOOD | {"prompt": [-1]}).encode()),
    "no number of tokens": post(json.dumps(GOOD | {"max_tokens": "many"}).encode()),
    "tokens without end": post(json.dumps(GOOD | {"max_tokens": 10**30}).encode()),
    "no model of ours": post(json.dumps(GOOD | {"model": "../../etc/passwd"}).encode()),
    "another kind": post(b"<xml/>", "Content-Type: text/xml"),
    "a length below zero": post(b"{}", length=-1),
    "not HTTP": b"\x16\x03\x01\x02\x00\x01" * 50 + b"\r\n\r\n",
    "a prompt of a million tokens": post(json.dumps(GOOD | {"prompt": [7] * 10**6}).encode()),
}


async def test_malformed_and_oversized_bodies_are_their_senders_fault_alone(server: Served) -> None:
    async def send() -> None:
        for name, data in MALFORMED.items():
            answer = await server.raw(data)
            assert answer.partition(b" ")[2].startswith(b"4"), f"{name}: {answer[:300]!r}"

    await unharmed(server, send())
    await all_slots_are_free(server)


async def test_a_body_that_never_ends_holds_nobody_up(server: Served) -> None:
    connections = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]

    async def drip() -> None:
        for _, writer in connections:
            writer.write(post(b'{"model": ', length=10**6))
            await writer.drain()
        assert await server.is_exact([8], 5)

    try:
        await unharmed(server, drip())
    finally:
        for _, writer in connections:
            writer.transport.abort()


async def test_clients_that_go_away_free_their_slots(server: Served) -> None:
    # So many that the queue would be full for good if their places were not given back.
    assert LEAVING > 2 * MAX_QUEUE
    await server.crowd_leaves(LEAVING, at_a_time=16)
    await all_slots_are_free(server)
    assert await server.is_exact([9, 9], 10)


async def test_beyond_the_queue_new_requests_are_refused_and_those_in_it_are_answered(server: Served) -> None:
    prompts = [[30 + number] for number in range(4 * MAX_QUEUE)]
    answers = await asyncio.gather(*(server.complete(prompt, 400) for prompt in prompts))
    served_ = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(served_) >= MAX_QUEUE
    assert refused
    for prompt, answer in served_:
        assert token_ids(answer) == expected_tokens(prompt, 400)
    for answer in refused:
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["Retry-After"]) >= 1
    await all_slots_are_free(server)


async def test_garbage_and_a_thousand_connections_at_the_control_socket_harm_nobody(server: Served) -> None:
    (directory,) = socket_dirs(os.getpid())
    path = str(directory / SOCKET_NAME)

    async def abuse() -> None:
        for garbage in (b"", b"\n", b"\0" * 1000, b"{" * 10_000 + b"\n", b'{"v": 1, "verb": 7}\n', os.urandom(200_000)):
            assert b'"result"' not in await _say(path, garbage)
        held = [await _connect(path) for _ in range(CONNECTIONS)]
        assert await server.is_exact([11], 20)
        for connection in held:
            connection.close()

    await unharmed(server, abuse())
    status = b'{"v": 1, "verb": "status"}\n'
    async with asyncio.timeout(60):
        while b'"result"' not in await _say(path, status):
            await asyncio.sleep(0.1)


async def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    async with asyncio.timeout(60):
        while True:
            try:
                await asyncio.get_running_loop().sock_connect(connection, path)
            except BlockingIOError:  # the backlog is full
                await asyncio.sleep(0.01)
            else:
                return connection


async def _say(path: str, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path, limit=2**24)
    try:
        # It may have been refused, and closed, before it has said all.
        try:
            writer.write(data)
            await writer.drain()
            writer.write_eof()
            return await asyncio.wait_for(reader.read(), 60)
        except ConnectionError:
            return b"error: the connection was closed"
    finally:
        writer.close()
