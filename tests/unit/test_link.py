"""One incarnation's sockets, driven by a rank that is played by hand."""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pytest
import zmq

from dplaunch.channel import COMPILING, RankChannel
from dplaunch.link import MESSAGES_PER_TURN, Failure, RankLink, Transport
from dplaunch.seam import wire
from dplaunch.testing import poll_until_async

ENGINE = (3).to_bytes(2, "little")
"""What a rank in lockstep calls itself; an independent one is 0."""


class RankEnd:
    """A rank's sockets, one message at a time."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self.handshake = self._connect(zmq.DEALER, address)
        self.input = self.handshake
        self.output = self.handshake

    def _connect(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        if kind == zmq.DEALER:
            socket.setsockopt(zmq.IDENTITY, ENGINE)
        socket.connect(address)
        return socket

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)

    async def hello(self) -> dict[str, Any]:
        """Says HELLO; the addresses that it got."""
        self.say(self.handshake, {"status": "HELLO", "local": True})
        answer: dict[str, Any] = msgspec.msgpack.decode(await in_thread(self.handshake.recv))
        addresses: dict[str, Any] = answer["addresses"]
        self.input = self._connect(zmq.DEALER, addresses["inputs"][0])
        self.output = self._connect(zmq.PUSH, addresses["outputs"][0])
        return answer

    def say(self, socket: zmq.Socket[bytes], message: dict[str, Any]) -> None:
        """Sends a map."""
        socket.send(msgspec.msgpack.encode(message))


async def in_thread(work: Callable[[], bytes]) -> bytes:
    return await asyncio.to_thread(work)


class Seen:
    """What a link called back with."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.outputs: list[tuple[RankLink, list[bytes]]] = []

    def on_output(self, link: RankLink, frames: Sequence[Any]) -> None:
        self.outputs.append((link, [bytes(frame.buffer) for frame in frames]))


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: the address of a unix socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="dpl") as path:
        yield Path(path)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


Open = Callable[..., RankLink]


@pytest.fixture
def open_link(context: zmq.Context[zmq.Socket[bytes]], directory: Path, seen: Seen) -> Open:
    def make(rank: int = 3, incarnation: int = 0, transport: Transport | None = None) -> RankLink:
        return RankLink(
            rank,
            incarnation,
            context=context,
            transport=transport or Transport(directory=directory),
            on_phase=seen.phases.append,
            on_output=seen.on_output,
        )

    return make


READY_RESPONSE = {"num_gpu_blocks": 7}


@pytest.mark.parametrize("local", [True, False])
async def test_hello_is_answered_with_the_incarnations_own_addresses(
    open_link: Open, directory: Path, local: bool
) -> None:
    link = open_link(transport=Transport(directory=directory) if local else Transport(host="127.0.0.1"))
    with RankEnd(link.handshake_address) as rank:
        answer = await rank.hello()
    addresses = answer["addresses"]
    everything = [*addresses["inputs"], *addresses["outputs"], link.handshake_address]
    assert len(set(everything)) == 3
    start = f"ipc://{directory}/" if local else "tcp://127.0.0.1:"
    assert all(address.startswith(start) for address in everything)
    assert answer["parallel_config"] == {}
    link.close()


async def test_two_incarnations_share_no_address(open_link: Open) -> None:
    links = [open_link(3, 0), open_link(3, 1), open_link(1, 0)]
    assert len({link.handshake_address for link in links}) == 3
    for link in links:
        link.close()


@pytest.mark.parametrize("response_first", [True, False])
async def test_a_rank_is_ready_when_both_words_are_there_in_either_order(open_link: Open, response_first: bool) -> None:
    link = open_link()
    with RankEnd(link.handshake_address) as rank:
        await rank.hello()
        words: list[Callable[[], None]] = [
            lambda: rank.say(rank.handshake, {"status": "READY", "local": True}),
            lambda: rank.say(rank.input, READY_RESPONSE),
        ]
        first, second = reversed(words) if response_first else words
        first()
        done, _ = await asyncio.wait((link.ready,), timeout=0.05)
        assert not done
        second()
        assert await asyncio.wait_for(link.ready, 5) == READY_RESPONSE
    link.close()


async def test_phases_and_last_words_arrive_beside_the_handshake(open_link: Open, seen: Seen) -> None:
    link = open_link()
    with RankEnd(link.handshake_address) as rank:
        with RankChannel(link.handshake_address, 3, 0) as channel:
            channel.phase("importing")
            await rank.hello()
            channel.phase("loading")
            channel.failed(ValueError("no such model"))
        await asyncio.wait_for(link.failed.wait(), 5)
    assert seen.phases == ["importing", "loading"]
    assert link.failure == Failure("ValueError", "no such model")
    link.close()


async def test_a_rank_that_compiles_while_it_serves_says_so(open_link: Open, seen: Seen) -> None:
    link = open_link()
    with RankEnd(link.handshake_address) as rank, RankChannel(link.handshake_address, 3, 0) as channel:
        await rank.hello()
        for phase, compiling in (("warming", False), (COMPILING, True), ("serving", False)):
            channel.phase(phase)
            await poll_until_async(lambda phase=phase: seen.phases[-1:] == [phase], 5)  # type: ignore[misc]
            assert link.compiling is compiling
    link.close()


async def test_an_engine_cannot_pass_for_the_channel(open_link: Open, seen: Seen) -> None:
    link = open_link()
    with RankEnd(link.handshake_address) as rank:
        rank.say(rank.handshake, {"status": "PHASE", "phase": "made up"})
        await rank.hello()
    assert seen.phases == []
    link.close()


async def test_requests_reach_the_engine_and_outputs_come_back(open_link: Open, seen: Seen) -> None:
    link = open_link()
    with RankEnd(link.handshake_address) as rank:
        await rank.hello()
        rank.say(rank.input, READY_RESPONSE)  # Until it has spoken, a ROUTER does not know its peer.
        rank.say(rank.handshake, {"status": "READY"})
        await asyncio.wait_for(link.ready, 5)
        link.send(wire.ADD, [b"request", b"tensor"])
        assert await asyncio.to_thread(rank.input.recv_multipart) == [wire.ADD, b"request", b"tensor"]
        rank.output.send_multipart([b"answer", b"tensor"])
        await poll_until_async(lambda: seen.outputs)
    assert seen.outputs == [(link, [b"answer", b"tensor"])]
    link.close()


async def test_a_flood_of_outputs_is_read_whole_and_leaves_the_loop_its_turns(open_link: Open, seen: Seen) -> None:
    link = open_link()
    count = MESSAGES_PER_TURN * 5
    steps: list[int] = []

    def step() -> None:
        steps.append(len(seen.outputs))
        if len(seen.outputs) < count:
            asyncio.get_running_loop().call_soon(step)

    with RankEnd(link.handshake_address) as rank:
        await rank.hello()
        for number in range(count):
            rank.output.send(str(number).encode())
        step()
        await poll_until_async(lambda: len(seen.outputs) == count)
    assert [frames for _, frames in seen.outputs] == [[str(number).encode()] for number in range(count)]
    assert max(after - before for before, after in itertools.pairwise(steps)) <= 2 * MESSAGES_PER_TURN
    link.close()


async def test_late_messages_of_a_closed_link_never_arrive(open_link: Open, seen: Seen) -> None:
    link, successor = open_link(3, 0), open_link(3, 1)
    with RankEnd(link.handshake_address) as old, RankEnd(successor.handshake_address) as new:
        await old.hello()
        await new.hello()
        old.output.send(b"was sent before the close")
        link.close()
        old.output.send(b"was sent after it")
        old.say(old.handshake, {"status": "READY"})
        new.output.send(b"alive")
        await poll_until_async(lambda: seen.outputs)
    assert seen.outputs == [(successor, [b"alive"])]
    assert link.ready.cancelled()
    successor.close()


async def test_a_closed_link_takes_no_requests_and_closes_once(open_link: Open) -> None:
    link = open_link()
    link.close()
    link.close()
    link.send(wire.ADD, [b"nobody is there"])


async def test_a_close_within_a_callback_stops_the_rest_of_the_burst(
    context: zmq.Context[zmq.Socket[bytes]], directory: Path
) -> None:
    got: list[bytes] = []

    def on_output(link: RankLink, frames: Sequence[Any]) -> None:
        got.append(bytes(frames[0].buffer))
        link.close()

    link = RankLink(
        *(0, 0),
        context=context,
        transport=Transport(directory=directory),
        on_phase=lambda phase: None,
        on_output=on_output,
    )
    with RankEnd(link.handshake_address) as rank:
        await rank.hello()
        for number in range(10):
            rank.output.send(str(number).encode())
        await poll_until_async(lambda: link.closed)
        await asyncio.sleep(0)
    assert got == [b"0"]


async def test_a_link_that_cannot_be_bound_leaves_no_socket_behind(
    context: zmq.Context[zmq.Socket[bytes]], directory: Path, open_link: Open
) -> None:
    open_link().close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(zmq.ZMQError):
        open_link(transport=Transport(directory=directory / "is not there"))
    await poll_until_async(lambda: len(os.listdir("/proc/self/fd")) <= before)
