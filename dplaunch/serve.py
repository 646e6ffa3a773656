"""The `dplaunch` command's work: a group, vLLM's OpenAI app on top, signals, and what the user sees of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dplaunch.argv import scan
from dplaunch.collector import collected_rarely
from dplaunch.errors import AddressError, DplaunchError, ExitCode, GroupClosedError
from dplaunch.events import Event, Kind, Listener
from dplaunch.group import AsyncGroup
from dplaunch.health import add_ready_route
from dplaunch.limits import allow_open_files
from dplaunch.progress import ReportKind, make_reporter
from dplaunch.seam import server, steered
from dplaunch.spec import LaunchSpec
from dplaunch.sync import new_loop
from dplaunch.tee import Tee
from dplaunch.threads import in_thread
from dplaunch.ui import UiOptions

FRONTEND_LOG = "frontend.log"
"""The log of this process, beside the ranks' own."""


def serve(spec: LaunchSpec, ui: UiOptions) -> ExitCode:
    """Serves until a signal or the group's end; returns what the process should exit with.

    Raises:
        DplaunchError: when the group cannot be started, or when it died.
    """
    allow_open_files()
    spec = dataclasses.replace(spec, log_stats=not scan(spec.vllm_argv).get("disable_log_stats", False))
    with (
        contextlib.closing(_bind(ui.host, ui.port)) as listener,
        asyncio.Runner(loop_factory=new_loop) as runner,
    ):
        return runner.run(_serve(spec, ui, listener))


def _bind(host: str, port: int) -> socket.socket:
    # Before anything is started: an address that is taken should cost nobody half a minute.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise AddressError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            hint="Choose another with --port, or --port 0 for a free one.",
        ) from error
    return listener


async def _serve(spec: LaunchSpec, ui: UiOptions, listener: socket.socket) -> ExitCode:
    started = time.monotonic()
    stop = _StopRequest()
    kind = ReportKind.JSON if ui.json_logs else ReportKind.QUIET if ui.quiet else ReportKind.AUTO
    reporter = make_reporter(kind, ranks=spec.dp)
    group = AsyncGroup(spec, server=True, listeners=[reporter], quiet_vllm=True)
    group.sight.on_stop = stop.ask
    with stop.listening(), contextlib.ExitStack() as stack:
        try:
            with reporter:
                opening = asyncio.ensure_future(_open(group, ui, stack))
                if not await stop.first_of(opening):
                    opening.cancel()
                    await _end(group, opening, stop)
                    return stop.exit_code
                app = opening.result()
            address = group.sight.address = _address(listener)
            _announce(address, group, reporter, ui, time.monotonic() - started)
            with server.environment_read_once(), collected_rarely():
                return await _run(app, listener, group, stop)
        finally:
            await _close(group, stop)


async def _close(group: AsyncGroup, stop: _StopRequest) -> None:
    closing = asyncio.ensure_future(group.close(stop.reason))
    await _end(group, closing, stop)
    closing.result()


async def _end(group: AsyncGroup, ending: asyncio.Future[Any], stop: _StopRequest) -> None:
    """Waits for an orderly end; at a second signal the ranks are killed, and then it comes soon."""
    if not await stop.second_of(ending):
        # Before there are any, there is nothing to wait for either.
        with contextlib.suppress(GroupClosedError):
            for rank in group.supervisor.ranks:
                if rank.handle is not None:
                    rank.handle.kill()
        await asyncio.wait((ending,))


async def _open(group: AsyncGroup, ui: UiOptions, stack: contextlib.ExitStack) -> Any:
    opening = asyncio.ensure_future(group.open())
    planned = asyncio.ensure_future(group.planned())
    try:
        await asyncio.wait((planned, opening), return_when=asyncio.FIRST_COMPLETED)
        if group.is_planned:
            stack.enter_context(_logging_to(group.plan.log_dir / FRONTEND_LOG))
            if ui.tee:
                files = {rank.identity.rank: rank.log_file for rank in group.plan.ranks}
                tee = stack.enter_context(Tee(files, sys.stdout))
                group.listen(lambda event: _follow(tee, event))
        await opening
    finally:
        planned.cancel()
        opening.cancel()
        await asyncio.gather(planned, opening, return_exceptions=True)
    args = group.config.server_args
    if args is None:
        raise DplaunchError("the server's flags were not parsed", hint="This is a bug in dplaunch: please report it.")
    await in_thread(lambda: server.load_plugins(args), "plugins")
    app = await server.make_app(group.engine, args)
    steered.follow_unloading(app, group.verbs)
    add_ready_route(app, group)
    return app


def _follow(tee: Tee, event: Event) -> None:
    """Shows the log of a rank that joins."""
    if event.kind is Kind.SCALE and event.rank is not None:
        tee.add(event.rank, Path(event.data["log_file"]))


async def _run(app: Any, listener: socket.socket, group: AsyncGroup, stop: _StopRequest) -> ExitCode:
    import uvicorn

    args = group.config.server_args
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=getattr(args, "uvicorn_log_level", "info"),
        access_log=not getattr(args, "disable_uvicorn_access_log", False),
        ssl_keyfile=getattr(args, "ssl_keyfile", None),
        ssl_certfile=getattr(args, "ssl_certfile", None),
        ssl_ca_certs=getattr(args, "ssl_ca_certs", None),
    )
    http = _server_class()(config)
    serving = asyncio.ensure_future(http.serve(sockets=[listener]))
    dead = asyncio.ensure_future(asyncio.shield(group.dead))
    await stop.first_of(serving, dead)
    # As it is now: whoever stops the group may say how long its requests get.
    config.timeout_graceful_shutdown = int(group.drain_s + group.spec.shutdown_timeout_s)
    http.should_exit = True
    try:
        if stop.requested:
            # Answers under way end with the ranks' abort, so that the HTTP server does not wait for them.
            await _close(group, stop)
    finally:
        await serving
    if dead.done() and not dead.cancelled():
        raise dead.result()
    dead.cancel()
    return ExitCode.OK


def _server_class() -> Any:
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals are this module's matter."""
            yield

    return Server


class _StopRequest:
    """SIGINT and SIGTERM: the first asks for an orderly end, the second for an immediate one. `dplaunch stop` too."""

    def __init__(self) -> None:
        self._name = ""
        self._first, self._second = asyncio.Event(), asyncio.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block; the handlers only set a flag."""
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def ask(self) -> None:
        """Asks for an orderly end in another way than by a signal."""
        self._name = self._name or "dplaunch stop"
        self._first.set()

    def _on_signal(self, number: signal.Signals) -> None:
        self._name = number.name
        (self._second if self._first.is_set() else self._first).set()

    @property
    def requested(self) -> bool:
        """Whether the end was asked for."""
        return self._first.is_set()

    @property
    def reason(self) -> str:
        """Why the group is stopped."""
        return self._name or "the server ended"

    @property
    def exit_code(self) -> ExitCode:
        """For a start that was given up."""
        return ExitCode.INTERRUPTED if self._name == "SIGINT" else ExitCode.TERMINATED

    async def first_of(self, *futures: asyncio.Future[Any]) -> bool:
        """Waits for any of the futures (True) or for the first signal (False)."""
        return await _before(self._first, *futures)

    async def second_of(self, *futures: asyncio.Future[Any]) -> bool:
        """Waits for any of the futures (True) or for the second signal (False)."""
        return await _before(self._second, *futures)


async def _before(event: asyncio.Event, *futures: asyncio.Future[Any]) -> bool:
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((waiting, *futures), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return any(future.done() for future in futures)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(address: str, group: AsyncGroup, emit: Listener, ui: UiOptions, seconds: float) -> None:
    count = len(group.plan.ranks)
    ready = f"{count} {'rank' if count == 1 else 'ranks'} ready in {seconds:.1f} s, serving {_model(group)}"
    if ui.json_logs:
        emit(Event(message=f"{ready} at {address}"))
        return
    lines: list[str] = [f"dplaunch: {ready}", f"dplaunch: {address}  (logs: {group.plan.log_dir})"]
    if not ui.quiet:
        question = {"role": "user", "content": "What is the capital of France?"}
        body = json.dumps({"messages": [question], "max_tokens": 32, "temperature": 0})
        lines += ["", "Ask it:", f"  curl {address}/v1/chat/completions \\"]
        lines += ["    -H 'Content-Type: application/json' \\", f"    -d '{body}'", "", "Ctrl-C stops it."]
    print_lines(lines)


def _model(group: AsyncGroup) -> str:
    return group.plan.model_note or group.plan.model


def print_lines(lines: Sequence[str]) -> None:
    """Writes to standard output, at once even when it is a pipe."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """This process's log, vLLM's frontend and the access log in it, goes to a file; errors to stderr too."""
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setLevel(logging.ERROR)
    to_terminal.setFormatter(logging.Formatter(f"dplaunch: %(levelname)s %(message)s (more in {path})"))
    root, vllm = logging.getLogger(), logging.getLogger("vllm")
    level, own_way = root.level, (vllm.propagate, vllm.handlers)
    # Where vLLM was imported before, it has given its loggers a handler of their own.
    vllm.propagate, vllm.handlers = True, []
    root.setLevel(logging.INFO)
    root.addHandler(to_file)
    root.addHandler(to_terminal)
    try:
        yield
    finally:
        root.removeHandler(to_file)
        root.removeHandler(to_terminal)
        root.setLevel(level)
        vllm.propagate, vllm.handlers = own_way
        to_file.close()
