"""Machines on this machine: Linux namespaces with addresses of their own, joined by a private bridge.

Nothing here has a name outside of its processes, so nothing can collide with another run, and the kernel removes
all of it with the last process: also when the test run is killed, since each node ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

SUBNET = "10.77.0"
ROOT = Path(__file__).parents[2]
READY = "ready\n"
START_S = 10.0
"""Seconds for a command that only asks something of the kernel."""

END_S = 60.0
"""Seconds for a killed node to be gone: on a busy machine the kernel takes its time to free what its processes had."""

OWN_NAMESPACES = ("--net", "--mount", "--pid", "--uts")

BOOT = """
set -e
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$1/own"
if [ "$2" != 0 ]; then mount -t tmpfs -o ro tmpfs "$1/launcher"; fi
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/resolv.conf" /etc/resolv.conf
echo "machine$2" > /proc/sys/kernel/hostname
echo ready
# Orphans become children of process 1, which is cat; where that signal is ignored, the kernel reaps them.
exec env --ignore-signal=CHLD cat
"""
"""What process 1 of a node does; its arguments are the network's directory and the node's number."""

PROBE = """
ip link add dplprobe type bridge
ip link add dplprobe0 type veth peer name dplprobe1
mount -t tmpfs tmpfs /dev/shm
mount --bind /etc/hosts /etc/hosts
"""


def why_not() -> str:
    """Why there can be no `Network` on this machine; "" when there can be."""
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)} on this machine (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    probe = ["unshare", *OWN_NAMESPACES, "--fork", "--mount-proc", "sh", "-ec", PROBE]
    tried = subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_S)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


class Node:
    """One machine: its process 1, and what was started on it through `Network.run`."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.started: list[subprocess.Popen[Any]] = []
        self._holder = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the test run, which then ends the node.
            start_new_session=True,
        )
        try:
            self.pid = self._wait_for_boot()
        except BaseException:
            self._let_go()
            raise

    def _wait_for_boot(self) -> int:
        holder = self._holder
        if holder.stdout is None or holder.stderr is None or holder.stdout.readline() != READY:
            holder.kill()
            raise RuntimeError(f"a node could not be made: {holder.communicate()[1]}")
        # `unshare --fork` stays outside and waits for process 1; without --fork it is the process itself.
        children = psutil.Process(holder.pid).children()
        return children[0].pid if children else holder.pid

    @property
    def holder(self) -> int:
        """The pid of the process outside that made the node."""
        return self._holder.pid

    @property
    def pid_namespace(self) -> str:
        """The kernel's name of the node's process ids; "" once the node has ended."""
        return _namespace(self.pid)

    def kill(self) -> None:
        """Ends every process of the node, with SIGKILL, and returns when none is left. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            if self._holder.poll() is None:
                # The kernel kills all others of a process namespace with its process 1, and reaps them first.
                os.kill(self.pid, signal.SIGKILL)
        for helper in (self._holder, *self.started):
            # A helper stops when the process that it waits for is stopped, and would not see that one's end.
            helper.send_signal(signal.SIGCONT)
        self._let_go()
        for process in self.started:
            process.wait(END_S)

    def _let_go(self) -> None:
        self._holder.wait(END_S)
        for stream in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            if stream is not None:
                stream.close()


class Network:
    """Machines numbered from 0, for a with statement.

    Each has its own address, host name, process ids, shared memory and `own` directory. Files are shared, but for
    those in `launcher_only`, which exist on node 0 (and here) alone.

    Args:
        nodes: how many.
    """

    def __init__(self, nodes: int) -> None:
        self.size = nodes
        # Short: Ray puts unix sockets below it, whose paths may have 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix=f"dplnet{os.getpid()}-", dir="/tmp"))
        self.own = self.directory / "own"
        """The same path on every node, and other content."""
        self.launcher_only = self.directory / "launcher"
        self._switch: Node | None = None
        self._nodes: list[Node] = []
        self._ports = 0
        self._port: dict[int, str] = {}

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> None:
        self.directory.chmod(0o755)
        self.own.mkdir()
        self.launcher_only.mkdir()
        hosts = ["127.0.0.1 localhost", *(f"{self.address(i)} {self.hostname(i)}" for i in range(self.size))]
        (self.directory / "hosts").write_text("\n".join(hosts) + "\n")
        # No name server: a name that is not in hosts is refused at once.
        (self.directory / "resolv.conf").write_text("options attempts:1\n")
        self._switch = Node(["unshare", "--net", "sh", "-ec", "echo ready; exec cat"])
        _ip(self._switch, "link add bridge type bridge", "link set bridge up")
        for number in range(self.size):
            self._nodes.append(self._new_node(number))

    def _new_node(self, number: int) -> Node:
        if self._switch is None:
            raise RuntimeError("the network is closed")
        unshare = ["unshare", *OWN_NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc"]
        node = Node([*unshare, "sh", "-ec", BOOT, "node", str(self.directory), str(number)])
        try:
            self._connect(node, self._switch, number)
        except BaseException:
            node.kill()
            raise
        return node

    def _connect(self, node: Node, switch: Node, number: int) -> None:
        # A port of a machine that was killed goes when the kernel gets round to it; its name is not free until then.
        self._ports += 1
        port = self._port[number] = f"port{self._ports}"
        # The same for whatever takes the node's place: the others would go on sending to the old one for seconds.
        mac = f"02:00:00:00:00:{number + 1:02x}"
        _ip(
            switch,
            f"link add {port} type veth peer name eth0 address {mac} netns {node.pid}",
            f"link set {port} master bridge up",
        )
        _ip(
            node,
            "link set lo up",
            f"address add {self.address(number)}/24 dev eth0",
            "link set eth0 up",
            # Leads nowhere; programs find their own address by asking for the way to a far one.
            "route add default dev eth0",
        )

    def address(self, node: int) -> str:
        """The node's IP address."""
        return f"{SUBNET}.{node + 1}"

    def hostname(self, node: int) -> str:
        """What the node calls itself; every node can resolve it."""
        return f"machine{node}"

    def env(self, **more: str) -> dict[str, str]:
        """An environment for processes on nodes: this one's, with everything temporary in the node's own directory."""
        # Process ids mean something else on each node, so files that are named after them must not be shared.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "XDG_RUNTIME", "PYTEST_"))}
        own = str(self.own)
        return {**kept, "PYTHONPATH": str(ROOT), "TMPDIR": own, "XDG_STATE_HOME": own, **more}

    def run(
        self, node: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Starts a process on the node. Its `pid` is that of a helper out here, which ends as the process does.

        Args:
            node: which.
            argv: what to run; the working directory is "/".
            env: its environment; None for `env()`.
            popen: further arguments of `subprocess.Popen`.
        """
        target = self._nodes[node]
        enter = ["nsenter", "--target", str(target.pid), *OWN_NAMESPACES, "--"]
        environ = self.env() if env is None else env
        process: subprocess.Popen[Any] = subprocess.Popen([*enter, *argv], env=environ, start_new_session=True, **popen)
        target.started.append(process)
        return process

    def processes(self, node: int) -> list[psutil.Process]:
        """The processes that the node has now, its process 1 and zombies too."""
        namespace = self._nodes[node].pid_namespace
        return [each for each in psutil.process_iter() if namespace and _namespace(each.pid) == namespace]

    def cut(self, node: int) -> None:
        """Pulls the node's cable; its processes go on."""
        self._set_port(node, "down")

    def mend(self, node: int) -> None:
        """Puts the cable back."""
        self._set_port(node, "up")

    @property
    def helpers(self) -> list[int]:
        """The pids of the processes outside of the nodes that hold them: children of this process."""
        helpers = [node.holder for node in (*self._nodes, *filter(None, (self._switch,)))]
        return [*helpers, *(process.pid for node in self._nodes for process in node.started)]

    def _set_port(self, node: int, state: str) -> None:
        if self._switch is not None:
            _ip(self._switch, f"link set {self._port[node]} {state}")

    def kill(self, node: int) -> None:
        """Ends every process of the node, with SIGKILL, and returns when none is left. Idempotent."""
        self._nodes[node].kill()

    def replace(self, node: int) -> None:
        """Kills the node, if it is there still, and boots another machine with its address."""
        self.kill(node)
        self._nodes[node] = self._new_node(node)

    def close(self) -> None:
        """Ends everything on every node and removes what was made. Idempotent."""
        for node in (*self._nodes, *filter(None, (self._switch,))):
            node.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def _ip(node: Node, *commands: str) -> None:
    with _reporting(commands):
        subprocess.run(
            ["nsenter", f"--net=/proc/{node.pid}/ns/net", "ip", "-batch", "-"],
            input="\n".join(commands),
            capture_output=True,
            text=True,
            check=True,
            timeout=START_S,
        )


@contextlib.contextmanager
def _reporting(commands: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"ip failed at one of {commands}: {error.stderr}") from error


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
