"""The command's work over a group that is played: signals, what is printed, what it ends with."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from dplaunch import serve as serve_module
from dplaunch.collector import RARELY
from dplaunch.errors import AddressError, DplaunchError, ExitCode, GroupClosedError, GroupDeadError, RankFailedError
from dplaunch.seam import server
from dplaunch.serve import FRONTEND_LOG, serve
from dplaunch.spec import LaunchSpec
from dplaunch.testing import poll_until
from dplaunch.ui import UiOptions

Step = Callable[[], Awaitable[None]]


class FakeHandle:
    """A rank's process, which is only ever killed."""

    def __init__(self) -> None:
        self.killed = asyncio.Event()

    def kill(self) -> None:
        self.killed.set()


class FakeGroup:
    """A group whose start and end do what a test says."""

    made: FakeGroup

    def __init__(self, spec: LaunchSpec, *, directory: Path, **options: Any) -> None:
        FakeGroup.made = self
        self.spec = spec
        self.options = options
        self.reasons: list[str] = []
        self.handle = FakeHandle()
        self.has_ranks = True
        self.sight = SimpleNamespace(address=None, on_stop=None)
        self.drain_s = 0.0
        self.is_planned = True
        self.engine = object()
        self.verbs = None
        self.config = SimpleNamespace(server_args=SimpleNamespace(uvicorn_log_level="info"))
        self.plan = SimpleNamespace(log_dir=directory, ranks=[1, 2], model="/models/m", model_note="")
        self.opened = self.cancelled = False
        self.closing: asyncio.Task[None] | None = None
        self.dead: asyncio.Future[DplaunchError] = asyncio.get_running_loop().create_future()

    on_open: Step = staticmethod(lambda: asyncio.sleep(0))
    on_close: Step = staticmethod(lambda: asyncio.sleep(0))

    async def open(self) -> FakeGroup:
        try:
            await self.on_open()
        except asyncio.CancelledError:
            self.cancelled = True
            await self.close("the start failed")
            raise
        self.opened = True
        return self

    async def planned(self) -> None:
        """At once."""

    @property
    def supervisor(self) -> Any:
        if not self.has_ranks:
            raise GroupClosedError("the group is not running")
        return SimpleNamespace(ranks=[SimpleNamespace(handle=self.handle), SimpleNamespace(handle=None)])

    async def close(self, reason: str) -> None:
        self.reasons.append(reason)
        if self.closing is None:
            self.closing = asyncio.create_task(self._close())
        await asyncio.shield(self.closing)

    async def _close(self) -> None:
        await self.on_close()
        if not self.dead.done():
            self.dead.cancel()


def make_app() -> FastAPI:
    """An HTTP app that says hello."""
    app = FastAPI()

    @app.get("/", response_class=PlainTextResponse)
    async def hello() -> str:
        logging.getLogger("vllm").info("somebody asked")
        return "hello"

    return app


class Rig:
    """What a test may change before `serve` runs, and see afterwards."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.lines: list[str] = []
        self.on_open = FakeGroup.on_open
        self.on_close = FakeGroup.on_close
        self.threads: list[threading.Thread] = []
        monkeypatch.setattr("dplaunch.serve.AsyncGroup", self._group)
        monkeypatch.setattr("dplaunch.serve.print_lines", self._print)
        monkeypatch.setattr(server, "load_plugins", lambda args: None)
        monkeypatch.setattr(server, "make_app", self._app)

    def _group(self, spec: LaunchSpec, **options: Any) -> FakeGroup:
        group = FakeGroup(spec, directory=self.directory, **options)
        group.on_open, group.on_close = self.on_open, self.on_close
        return group

    async def _app(self, engine: Any, args: Any) -> Any:
        return make_app()

    def _print(self, lines: Sequence[str]) -> None:
        self.lines += lines

    def serve(self, **ui: Any) -> ExitCode:
        """Serves on a free port."""
        return serve(LaunchSpec(model="m", dp=2), UiOptions(**{"port": 0, **ui}))

    def when_served(self, work: Callable[[str], None]) -> None:
        """Runs in a thread once the address is printed, and interrupts the server afterwards."""

        def run() -> None:
            poll_until(lambda: self.lines, what="the address")
            address = re.search(r"http://\S+", "\n".join(self.lines))
            assert address is not None
            try:
                work(address[0])
            finally:
                send(signal.SIGINT)

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()


def send(number: signal.Signals) -> None:
    """A signal to this process."""
    os.kill(os.getpid(), number)


async def send_and_wait(number: signal.Signals) -> None:
    send(number)
    await asyncio.Event().wait()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(tmp_path, monkeypatch)
    yield rig
    for thread in rig.threads:
        thread.join(10)


# The address.


def test_a_port_that_is_taken_is_refused_before_anything_starts(rig: Rig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use") as e:
            rig.serve(port=port)
    assert "--port 0" in e.value.hint
    assert e.value.exit_code is ExitCode.ADDRESS


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("192.0.2.1", 0), ("no such host.invalid", 0)])
def test_an_address_that_cannot_be_is_refused(rig: Rig, host: str, port: int) -> None:
    with pytest.raises(AddressError, match=re.escape(f"cannot listen on {host}:{port}")):
        rig.serve(host=host, port=port)


def test_an_ipv6_address_is_printed_in_brackets(rig: Rig) -> None:
    if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this machine has no IPv6")
    rig.when_served(lambda address: None)
    try:
        rig.serve(host="::1")
    except AddressError:
        rig.lines.append("http://none")
        pytest.skip("this machine has no IPv6 loopback")
    assert any(line.startswith("dplaunch: http://[::1]:") for line in rig.lines)


# Serving.


def test_it_serves_until_ctrl_c_and_ends_well(rig: Rig) -> None:
    answers: list[str] = []
    rig.when_served(lambda address: answers.append(httpx.get(address).text))
    assert rig.serve() is ExitCode.OK
    assert answers == ["hello"]
    assert FakeGroup.made.reasons[0] == "SIGINT"


def test_pythons_collector_looks_rarely_while_it_serves_and_then_as_before(rig: Rig) -> None:
    before, seen = gc.get_threshold(), []
    rig.when_served(lambda address: seen.append((httpx.get(address).text, gc.get_threshold()[0])))
    rig.serve()
    assert seen == [("hello", RARELY)]
    assert gc.get_threshold() == before


def test_vllms_variables_are_read_once_while_it_serves_and_again_afterwards(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import envs

    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "30")
    before, seen = dict(os.environ), []

    def change(address: str) -> None:
        httpx.get(address)
        set_by_it = set(os.environ) - set(before)
        monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "77")
        seen.append((envs.VLLM_LOG_STATS_INTERVAL, set_by_it))

    rig.when_served(change)
    rig.serve()
    # Ranks that come up later would inherit what is set here.
    assert seen == [(30, set())]
    assert envs.VLLM_LOG_STATS_INTERVAL == 77


def test_what_is_printed_has_the_address_the_logs_and_a_line_to_try(rig: Rig) -> None:
    rig.when_served(lambda address: None)
    rig.serve()
    text = "\n".join(rig.lines)
    assert re.search(r"2 ranks ready in \d+\.\d s, serving /models/m", text)
    assert f"(logs: {rig.directory})" in text
    assert re.search(r"curl http://127\.0\.0\.1:\d+/v1/chat/completions", text)
    assert "Ctrl-C stops it." in text


def test_quiet_prints_the_address_alone(rig: Rig) -> None:
    rig.when_served(lambda address: None)
    rig.serve(quiet=True)
    assert len(rig.lines) == 2
    assert "curl" not in "\n".join(rig.lines)


def test_json_logs_carry_the_address_as_an_event(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    announce = serve_module._announce

    def announce_and_end(*args: Any) -> None:
        announce(*args)
        send(signal.SIGTERM)

    monkeypatch.setattr(serve_module, "_announce", announce_and_end)
    assert rig.serve(json_logs=True) is ExitCode.OK
    assert rig.lines == []
    assert re.search(r'"message": ?"2 ranks ready in .* at http://127\.0\.0\.1:\d+"', "".join(capfd.readouterr()))


def test_signal_handlers_and_the_root_logger_are_given_back(rig: Rig) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    rig.when_served(lambda address: None)
    rig.serve()
    assert [signal.getsignal(number) for number in numbers] == handlers
    assert (root.level, list(root.handlers)) == before


@pytest.fixture
def vllm_tells_all() -> Iterator[None]:
    """vLLM's logger as in a process of its own: lm-evaluation-harness, which this one may have run, mutes it."""
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("vllm_tells_all")
def test_this_process_logs_to_a_file_beside_the_ranks_own(rig: Rig) -> None:
    answers: list[httpx.Response] = []
    rig.when_served(lambda address: answers.append(httpx.get(address)))
    rig.serve()
    assert "INFO vllm: somebody asked" in (rig.directory / FRONTEND_LOG).read_text()


@pytest.mark.parametrize(("argv", "stats"), [((), True), (("--disable-log-stats",), False)])
def test_metrics_are_collected_unless_vllms_own_flag_says_no(rig: Rig, argv: tuple[str, ...], stats: bool) -> None:
    rig.when_served(lambda address: None)
    serve(LaunchSpec(model="m", dp=2, vllm_argv=argv), UiOptions(port=0))
    assert FakeGroup.made.spec.log_stats is stats


def test_the_groups_death_ends_the_server_with_its_root_cause(rig: Rig) -> None:
    death = GroupDeadError("0 of 2 ranks are left")

    async def die_soon() -> None:
        asyncio.get_running_loop().call_later(0.05, lambda: FakeGroup.made.dead.set_result(death))

    rig.on_open = die_soon
    with pytest.raises(GroupDeadError) as caught:
        rig.serve()
    assert caught.value is death
    assert FakeGroup.made.reasons == ["the server ended"]


# Starts that do not come to an end.


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)]
)
def test_a_signal_during_the_start_gives_it_up(rig: Rig, number: signal.Signals, code: ExitCode) -> None:
    rig.on_open = lambda: send_and_wait(number)
    assert rig.serve() is code
    assert FakeGroup.made.cancelled
    assert FakeGroup.made.reasons[-1] == number.name
    assert rig.lines == []


def test_a_start_that_is_interrupted_while_it_plans_leaves_no_task_behind(rig: Rig) -> None:
    async def never_planned() -> None:
        FakeGroup.made.is_planned = False
        FakeGroup.made.has_ranks = False
        send(signal.SIGINT)
        await asyncio.Event().wait()

    rig.on_open = never_planned
    planned, FakeGroup.planned = FakeGroup.planned, lambda self: asyncio.Event().wait()  # type: ignore[assignment,return-value,method-assign]
    try:
        assert rig.serve() is ExitCode.INTERRUPTED
    finally:
        FakeGroup.planned = planned  # type: ignore[method-assign]
    assert FakeGroup.made.cancelled
    assert not (rig.directory / FRONTEND_LOG).exists()


def test_a_start_that_fails_closes_the_group_and_says_why(rig: Rig) -> None:
    async def fail() -> None:
        raise RankFailedError("rank 1 died while starting")

    rig.on_open = fail
    with pytest.raises(RankFailedError, match="rank 1 died"):
        rig.serve()
    assert FakeGroup.made.reasons == ["the server ended"]


# Impatience.


async def slow_to_close() -> None:
    """Interrupts again, and ends only when the ranks are killed."""
    send(signal.SIGINT)
    await FakeGroup.made.handle.killed.wait()


def test_a_second_signal_while_it_stops_kills_the_ranks(rig: Rig) -> None:
    rig.on_close = slow_to_close
    rig.when_served(lambda address: None)
    assert rig.serve() is ExitCode.OK
    assert FakeGroup.made.handle.killed.is_set()


def test_a_second_signal_during_the_start_kills_the_ranks(rig: Rig) -> None:
    rig.on_open = lambda: send_and_wait(signal.SIGINT)
    rig.on_close = slow_to_close
    assert rig.serve() is ExitCode.INTERRUPTED
    assert FakeGroup.made.handle.killed.is_set()


def test_a_second_signal_before_there_are_ranks_does_no_harm(rig: Rig) -> None:
    async def interrupt_again() -> None:
        FakeGroup.made.has_ranks = False
        send(signal.SIGINT)
        for _ in range(10):
            await asyncio.sleep(0.01)

    rig.on_open = lambda: send_and_wait(signal.SIGINT)
    rig.on_close = interrupt_again
    assert rig.serve() is ExitCode.INTERRUPTED


def test_an_error_while_it_closes_is_not_lost(rig: Rig) -> None:
    async def fail() -> None:
        raise OSError("the log directory is gone")

    rig.on_close = fail
    rig.when_served(lambda address: None)
    with pytest.raises(OSError, match="the log directory is gone"):
        rig.serve()
