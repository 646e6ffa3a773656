"""The control socket: what is asked and answered, by whom, and that abuse costs the group nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dplaunch import control, control_client
from dplaunch.control import MAX_CONNECTIONS, ControlServer
from dplaunch.control_client import GroupAddress, ask, stream
from dplaunch.control_wire import GROUP_FILE, MAX_REQUEST_BYTES, SOCKET_NAME, RemoteError
from dplaunch.errors import ExitCode, NoGroupError, UsageError
from dplaunch.runtime_dir import make_runtime_dir
from dplaunch.testing import poll_until, poll_until_async

Lines = AsyncGenerator[dict[str, Any], None]


class Played:
    """What a group answers in these tests."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.waiting = 0
        self.go_on = asyncio.Event()

    async def answer(self, verb: str, arguments: dict[str, Any]) -> Lines:
        self.asked.append((verb, arguments))
        match verb:
            case "wait":
                self.waiting += 1
                try:
                    yield {"type": "event", "event": {"message": "it began"}}
                    await self.go_on.wait()
                finally:
                    self.waiting -= 1
            case "refuse":
                raise UsageError("no", hint="Do this.", detail="because")
            case "break":
                raise ZeroDivisionError("oh")
            case "flood":
                while True:
                    yield {"type": "event", "event": {"message": "x" * 100_000}}
        yield {"type": "result", "result": {"verb": verb}}


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only place where this test's groups are looked for."""
    with tempfile.TemporaryDirectory(prefix="dpl") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        monkeypatch.setattr("dplaunch.runtime_dir._own_name", lambda: "dplaunch-test-nobody-has-this")
        yield Path(path)


@pytest.fixture
def played() -> Played:
    return Played()


@pytest.fixture
async def group(runtime: Path, played: Played) -> AsyncIterator[GroupAddress]:
    """A group that can be asked."""
    directory = make_runtime_dir()
    server = ControlServer(played.answer)
    server.open(directory / SOCKET_NAME)
    (directory / GROUP_FILE).write_text(json.dumps({"name": "g", "pid": os.getpid()}))
    yield GroupAddress("g", os.getpid(), directory / SOCKET_NAME)
    await server.close()


async def talk(group: GroupAddress, data: bytes, *, half_close: bool = False) -> list[dict[str, Any]]:
    """Every line that comes back until the other end closes."""
    return await asyncio.to_thread(_talk, group, data, half_close)


def _talk(group: GroupAddress, data: bytes, half_close: bool) -> list[dict[str, Any]]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(group.path))
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        said = b""
        with contextlib.suppress(ConnectionError):
            while more := connection.recv(2**16):
                said += more
        return [json.loads(line) for line in said.splitlines()]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# What is asked and answered.


async def test_a_request_gets_what_happens_and_then_its_result(group: GroupAddress, played: Played) -> None:
    played.go_on.set()
    lines = await asyncio.to_thread(lambda: list(stream(group, "wait", {"dp": 3})))
    assert [line["type"] for line in lines] == ["event", "result"]
    assert lines[-1]["result"] == {"verb": "wait"}
    assert played.asked == [("wait", {"dp": 3})]


async def test_a_refusal_keeps_the_groups_own_words_and_exit_code(group: GroupAddress) -> None:
    with pytest.raises(RemoteError) as caught:
        await asyncio.to_thread(ask, group, "refuse")
    error = caught.value
    assert (error.message, error.hint, error.detail, error.exit_code) == ("no", "Do this.", "because", ExitCode.USAGE)


async def test_a_fault_in_an_answer_is_told_and_the_next_one_works(group: GroupAddress) -> None:
    with pytest.raises(RemoteError, match=r"unexpected ZeroDivisionError: oh \(a bug in dplaunch\)") as caught:
        await asyncio.to_thread(ask, group, "break")
    assert caught.value.exit_code is ExitCode.INTERNAL
    assert await asyncio.to_thread(ask, group, "hello") == {"verb": "hello"}


async def test_a_client_that_sends_no_more_still_gets_its_answer(group: GroupAddress, played: Played) -> None:
    asking = asyncio.create_task(talk(group, b'{"v": 1, "verb": "wait"}\n', half_close=True))
    await poll_until_async(lambda: played.waiting, 30)
    played.go_on.set()
    assert [line["type"] for line in await asking] == ["event", "result"]


async def test_a_client_that_leaves_is_not_answered_any_more(group: GroupAddress, played: Played) -> None:
    _, writer = await asyncio.open_unix_connection(str(group.path))
    writer.write(b'{"v": 1, "verb": "wait"}\n')
    await poll_until_async(lambda: played.waiting == 1, 30)
    writer.close()
    await poll_until_async(lambda: played.waiting == 0, 30)


# Who may ask.


async def test_the_socket_is_for_its_user_alone(group: GroupAddress) -> None:
    assert stat.S_IMODE(group.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(group.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(group.path.parent.parent.stat().st_mode) == 0o700


ASK_AS_NOBODY = """
import os, socket, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(60)
    try:
        connection.connect(sys.argv[1])
    except PermissionError:
        print("denied")
    else:
        print(connection.recv(1000).decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_second_user_gets_no_answer_even_when_he_gets_at_the_socket(group: GroupAddress, runtime: Path) -> None:
    async def ask_as_nobody() -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ASK_AS_NOBODY, str(group.path), stdout=subprocess.PIPE
        )
        return (await process.communicate())[0].decode()

    runtime.chmod(0o755)
    assert await ask_as_nobody() == "denied\n"
    for path in (group.path.parent.parent, group.path.parent, group.path):
        path.chmod(0o777)
    assert "this group belongs to another user" in await ask_as_nobody()


# Abuse.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello\n", "not one JSON object"),
        (b"\xff\xfe\x00\n", "not one JSON object"),
        (b"\n", "not one JSON object"),
        (b"[1]\n", "not one JSON object"),
        (b"[" * 50_000 + b"\n", "not one JSON object"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not one JSON object"),
        (b'{"verb": "hello"}\n', "speaks version 1, not None"),
        (b'{"v": 2, "verb": "hello"}\n', "speaks version 1, not 2"),
        (b'{"v": 1}\n', "a request has a verb"),
        (b'{"v": 1, "verb": ["hello"]}\n', "a request has a verb"),
        (b'{"v": 1, "verb": "hello", "args": 3}\n', "a request has a verb"),
        (b"x" * (4 * MAX_REQUEST_BYTES), f"at most {MAX_REQUEST_BYTES} bytes"),
    ],
)
async def test_garbage_gets_one_error_and_is_hung_up_on(
    group: GroupAddress, played: Played, data: bytes, words: str
) -> None:
    (line,) = await talk(group, data)
    assert line["type"] == "error"
    assert words in line["error"]["message"]
    assert played.asked == []


async def test_a_client_that_says_nothing_is_hung_up_on(group: GroupAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_S", 0.05)
    (line,) = await talk(group, b'{"v": 1, "verb": "hel')
    assert "no request came" in line["error"]["message"]


async def test_a_client_that_does_not_read_is_hung_up_on(
    group: GroupAddress, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REQUEST_S", 0.2)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.setblocking(False)
        deaf.connect(str(group.path))
        deaf.send(b'{"v": 1, "verb": "flood"}\n')
        await poll_until_async(lambda: played.asked, 30)
        # What was written before it was given up is still there, and then the end.
        deaf.setblocking(True)
        deaf.settimeout(60)
        await asyncio.to_thread(_read_to_the_end, deaf)
    assert await asyncio.to_thread(ask, group, "hello") == {"verb": "hello"}


def _read_to_the_end(connection: socket.socket) -> None:
    # So slowly at first that the writer's patience ends.
    threading.Event().wait(1.0)
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(2**20):
            pass


A_THOUSAND = """
import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
ends = [socket.socket(socket.AF_UNIX) for _ in range(1000)]
for end in ends:
    end.setblocking(False)
    while True:
        try:
            end.connect(sys.argv[1])
            break
        except BlockingIOError:  # the queue is full
            time.sleep(0.01)
refused, deadline = set(), time.monotonic() + 60
while len(refused) < 1000 - int(sys.argv[2]) and time.monotonic() < deadline:
    for end in set(ends) - refused:
        try:
            said = end.recv(10_000)
        except BlockingIOError:
            continue
        assert b"open already" in said, said
        refused.add(end)
print(len(refused), flush=True)
sys.stdin.read()
"""


async def test_a_thousand_connections_at_once_leave_no_descriptor_and_hold_up_nobody(
    group: GroupAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REQUEST_S", 600.0)
    before, turns = descriptors(), 0

    async def serve() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    serving = asyncio.create_task(serve())
    arguments = ("-c", A_THOUSAND, str(group.path), str(MAX_CONNECTIONS))
    crowd = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert crowd.stdin is not None
    assert crowd.stdout is not None
    # Those beyond the bound are told so at once and hung up on; the others may still speak.
    assert int(await crowd.stdout.readline()) == 1000 - MAX_CONNECTIONS
    assert descriptors() < before + MAX_CONNECTIONS + 20
    assert turns > 1000
    # While all places are taken, one who asks properly is patient, and has his turn when they go.
    asking = asyncio.create_task(asyncio.to_thread(ask, group, "hello"))
    crowd.stdin.close()
    assert await asking == {"verb": "hello"}
    assert await crowd.wait() == 0
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await poll_until_async(lambda: descriptors() <= before, 30, "the descriptors to be closed")


async def test_closing_ends_every_connection(runtime: Path, played: Played) -> None:
    server = ControlServer(played.answer)
    path = make_runtime_dir() / SOCKET_NAME
    server.open(path)
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b'{"v": 1, "verb": "wait"}\n')
    await poll_until_async(lambda: played.waiting, 30)
    await server.close()
    assert played.waiting == 0
    assert b"it began" in await reader.read()
    writer.close()
    await writer.wait_closed()


# How groups are found.


def leave_group(directory: Path, name: str, *, listening: bool) -> socket.socket:
    """What a launcher leaves of a group in its directory; the end that listens is returned."""
    (directory / GROUP_FILE).write_text(json.dumps({"name": name, "pid": 1}))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / SOCKET_NAME))
    if listening:
        listener.listen()
    return listener


def test_groups_are_found_by_name_and_those_of_dead_launchers_are_removed(runtime: Path) -> None:
    alive, refuses, empty = make_runtime_dir(), make_runtime_dir(), make_runtime_dir()
    gone = runtime / "dplaunch" / f"{_unused_pid()}-abc"
    gone.mkdir()
    with leave_group(alive, "b", listening=True), leave_group(refuses, "a", listening=False):
        assert [(group.name, group.pid) for group in control_client.find_groups()] == [("b", os.getpid())]
    assert [path.exists() for path in (alive, refuses, empty, gone)] == [True, False, True, False]


def _unused_pid() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_one_of_several_groups_has_to_be_named(runtime: Path) -> None:
    with pytest.raises(NoGroupError, match="no group is running here"):
        control_client.choose(None, one=False)
    with (
        leave_group(make_runtime_dir(), "a", listening=True),
        leave_group(make_runtime_dir(), "b", listening=True),
    ):
        assert [group.name for group in control_client.choose(None, one=False)] == ["a", "b"]
        assert [group.name for group in control_client.choose("b", one=True)] == ["b"]
        with pytest.raises(NoGroupError, match=r"2 groups are running: a \(pid \d+\), b \(pid \d+\)") as caught:
            control_client.choose(None, one=True)
        assert "--group NAME" in caught.value.hint
        with pytest.raises(NoGroupError, match="no group c is running here") as caught:
            control_client.choose("c", one=False)
        assert "Running: a" in caught.value.hint
    assert caught.value.exit_code is ExitCode.NO_GROUP


def test_a_group_that_stands_still_is_named(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client, "ANSWER_S", 0.1)
    with leave_group(make_runtime_dir(), "stopped", listening=True):
        (group,) = control_client.find_groups()
        with pytest.raises(NoGroupError, match=rf"group stopped \(pid {os.getpid()}\) does not answer"):
            ask(group, "status")


def test_a_group_that_ends_during_an_answer_is_named(runtime: Path) -> None:
    def hang_up(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b'{"v": 1, "type": "event", "event": {}}\n')

    directory = make_runtime_dir()
    with leave_group(directory, "short", listening=True) as listener:
        thread = threading.Thread(target=hang_up, args=(listener,))
        thread.start()
        group = GroupAddress("short", 7, directory / SOCKET_NAME)
        with pytest.raises(NoGroupError, match=r"group short \(pid 7\) went away"):
            list(stream(group, "wait"))
        thread.join()
    poll_until(lambda: not thread.is_alive())
