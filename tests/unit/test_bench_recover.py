"""What clients see of a rank's death: told apart, read from streams, and put into the table; no model is run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_recover
from benchmarks.streams import RANK_HEADER, Clients, Death, Stream, judge, median_gap
from dplaunch.testing import poll_until_async


def _stream(
    prompt: int, began: float, arrivals: Sequence[float], ended: float, text: str = "", error: str = ""
) -> Stream:
    pieces, counts = list(text.ljust(len(arrivals))), list(range(1, len(arrivals) + 1))
    return Stream(prompt, began, pieces=pieces, arrivals=list(arrivals), counts=counts, ended=ended, error=error)


def test_what_clients_saw_of_a_death_is_told_apart_by_the_kill_and_the_return() -> None:
    known = [_stream(0, 0, [1, 2, 3], 3, "abc"), _stream(1, 0, [1, 2, 3], 3, "xyz")]
    moved = _stream(0, 10, [11, 12, 18], 18, "abc")  # stands still over the kill at 12.5
    stayed = _stream(1, 10, [11, 12, 13, 14], 14, "xyz ")
    stayed.pieces = ["x", "y", "z", ""]
    failed = _stream(0, 10, [11], 12.7, "a", error="gone")
    later = _stream(1, 14, [15, 17], 17, "x?")
    refused = _stream(0, 15, [], 15.1, error="HTTP 503")
    death = judge([moved, stayed, failed, later, refused], known, 10.5, 12.5, 19)
    assert (death.in_flight, death.failed, death.failed_later) == (3, 1, 1)
    assert (death.compared, death.differ) == (3, 1)
    assert death.pause_s == 6.0
    assert (death.before_s, death.during_s) == (1.0, 1.5)


def test_a_stream_that_never_went_on_has_no_pause_and_no_gaps() -> None:
    stream = _stream(0, 0, [1, 2], 2)
    assert stream.pause(5) == 0.0
    assert median_gap([stream], 3, 9) == 0.0


def test_tokens_of_one_event_share_the_time_since_the_one_before() -> None:
    stream = _stream(0, 0, [1, 2, 8, 9], 9)
    stream.counts = [1, 2, 5, 5]  # three in the third, none in the last
    assert stream.gaps(0, 10) == [1.0, 2.0, 2.0, 2.0]
    assert stream.gaps(1.5, 10) == [2.0, 2.0, 2.0]


async def test_a_streamed_answer_is_whole_or_an_error() -> None:
    good = [_event("to"), _event("gether", "length"), b"data: [DONE]\n"]
    cases = {
        b"".join(good): ("together", ""),
        good[0]: ("to", "the answer ended with None, not at its length"),
        b"".join([good[0], b'data: {"error": {"message": "rank 1 died"}}\n']): ("to", "{'message': 'rank 1 died'}"),
        b"".join([good[0], _event("", "error"), good[2]]): ("to", "the answer ended with error, not at its length"),
    }
    for sent, (text, error) in cases.items():
        async with _answering_server(200, sent) as clients:
            (stream,) = await clients.once()
        assert (stream.text, stream.error) == (text, error)
    async with _answering_server(503, b"nothing can serve") as clients:
        (stream,) = await clients.once()
        assert not await clients.answers(1)
    assert stream.error == "HTTP 503: nothing can serve"
    assert stream.ended >= stream.began


async def test_clients_ask_in_turn_until_the_block_ends_and_pin_what_they_are_told_to() -> None:
    asked: list[tuple[str, str | None]] = []
    async with _answering_server(200, _event("x", "length"), asked, questions=2) as clients:
        async with clients.steadily(rank=3) as streams:
            await poll_until_async(lambda: len(asked) >= 5, 30.0)
        assert {stream.error for stream in streams} == {""}
        assert len(streams) == len(asked)
    assert [prompt for prompt, _ in asked[:4]] == [asked[0][0], asked[1][0]] * 2
    assert {rank for _, rank in asked} == {"3"}


def _event(text: str, reason: str | None = None) -> bytes:
    said = {"choices": [{"text": text, "finish_reason": reason}], "usage": {"completion_tokens": 1}}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


@contextlib.asynccontextmanager
async def _answering_server(
    status: int, body: bytes, asked: list[tuple[str, str | None]] | None = None, questions: int = 1
) -> AsyncIterator[Clients]:
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        if asked is not None:
            asked.append(((await request.json())["prompt"], request.headers.get(RANK_HEADER)))
        return web.Response(status=status, body=body)

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with Clients(f"http://127.0.0.1:{port}", "m", clients=1, questions=questions, tokens=4) as clients:
            yield clients
    finally:
        await runner.cleanup()


def test_every_line_of_the_recovery_table_has_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, Sequence[str]]] = []
    death = Death(
        in_flight=8, failed=0, failed_later=0, compared=40, differ=0, pause_s=0.5, before_s=0.1, during_s=0.12
    )

    @contextlib.contextmanager
    def server(side: str, flags: Sequence[str], seconds: float) -> Iterator[Any]:
        started.append((side, flags))
        yield SimpleNamespace(address="http://127.0.0.1:1"), seconds

    async def stock(*_: Any) -> Mapping[str, float]:
        return {"stock failed": 100.0, "stock in flight": 8}

    async def ours(*_: Any) -> Mapping[str, float]:
        return bench_recover.dplaunch_samples(death, 5.0, 0.11)

    monkeypatch.setattr(bench_recover, "stock_server", lambda settings, flags: server("stock", flags, 50.0))
    monkeypatch.setattr(bench_recover, "dplaunch_server", lambda settings, flags: server("dplaunch", flags, 10.0))
    monkeypatch.setattr(bench_recover, "measure_stock", stock)
    monkeypatch.setattr(bench_recover, "measure_dplaunch", ours)
    monkeypatch.setattr("sys.argv", ["bench", "--rounds", "1", "--model", "model"])
    bench_recover.main()
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert len(result["ratios"]) == len(bench_recover.COMPARISONS)
    assert "MISSED" not in output
    assert [side for side, _ in started] == ["stock", "dplaunch"]
    assert {tuple(flags) for _, flags in started} == {("--no-enable-prefix-caching",)}
