"""In a notebook's kernel: launched in a cell, interrupted, hurt, shut down. The ranks are stand-ins."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dplaunch.testing import poll_until
from tests.real.conftest import START_S
from tests.real.families import family, wait_gone
from tests.real.standins import ROOT

pytest.importorskip("ipykernel")
manager = pytest.importorskip("jupyter_client.manager")

LAUNCH = """
from pathlib import Path
from vllm import SamplingParams
from dplaunch.sync import Group
from dplaunch.testing import StandInPlan
from tests.real.standins import standin_spec
group = Group(standin_spec({model!r}, Path({logs!r}), StandInPlan(token_delay_s=0.02)), progress=None, listeners=[])
"""
"""Six lines of a user's, more or less: engines that take their time."""

ANSWERS = """
params = [SamplingParams(max_tokens=count, detokenize=False) for count in {tokens}]
outputs = group.generate([[1, 2, 3]] * len(params), params)
[len(output.outputs[0].token_ids) for output in outputs]
"""

FEW = [4] * 8
"""Tokens of answers that are there at once."""

SOME = [60] * 4 + [200] * 4
"""Half of them take more than the second after which a bar is drawn, the others four."""

ENDLESS = [60] * 4 + [900] * 4
"""The last take twenty seconds."""


class Kernel:
    """A kernel in a process of its own, and a client of it, as a notebook is."""

    def __init__(self, directory: Path) -> None:
        self._manager = manager.KernelManager(transport="ipc", connection_file=str(directory / "kernel.json"))
        env = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(directory), "JUPYTER_RUNTIME_DIR": str(directory)}
        self._manager.start_kernel(env={**os.environ, **env})
        self.pid: int = self._manager.provisioner.pid
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=START_S)

    def run(self, code: str, when_it_shows: Callable[[], None] | None = None) -> tuple[str, str, str]:
        """Runs a cell.

        Args:
            code: the cell.
            when_it_shows: called at its first output.

        Returns its result, what it wrote, and the name of the exception that it ended with.
        """
        results: list[str] = []
        written: list[str] = []
        action = [when_it_shows] if when_it_shows is not None else []

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "execute_result":
                results.append(content["data"]["text/plain"])
            elif message["msg_type"] == "stream":
                written.append(content["text"])
                while action:
                    action.pop()()

        reply = self._client.execute_interactive(code, output_hook=hear, timeout=START_S, allow_stdin=False)
        return "".join(results), "".join(written), reply["content"].get("ename", "")

    def interrupt(self) -> None:
        """The stop button."""
        self._manager.interrupt_kernel()

    def shut_down(self) -> None:
        """As when the notebook is closed. Idempotent."""
        self._client.stop_channels()
        if self._manager.has_kernel:
            self._manager.shutdown_kernel()
        self._manager.cleanup_resources()


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.shut_down()


def pid_of_rank_1(kernel: Kernel) -> int:
    return int(kernel.run("group.call('dplaunch_report', rank=1)[0]['pid']")[0])


@pytest.mark.leaves("jupyter's client keeps event loops here; the test waits for the kernel's processes")
def test_a_group_in_a_notebook_survives_the_stop_button_and_a_ranks_death_and_ends_with_the_kernel(
    kernel: Kernel, smollm: str, tmp_path: Path
) -> None:
    launched = kernel.run(LAUNCH.format(model=smollm, logs=str(tmp_path / "logs")) + "group.ranks_up")
    assert (launched[0], launched[2]) == ("[0, 1]", ""), launched
    everyone = family(kernel.pid)
    assert len(everyone) >= 3  # the helper and two ranks

    assert kernel.run(ANSWERS.format(tokens=FEW)) == (str(FEW), "", "")

    _, _, error = kernel.run(ANSWERS.format(tokens=ENDLESS), when_it_shows=kernel.interrupt)
    assert error == "KeyboardInterrupt"
    assert kernel.run("group._group.client.unfinished, group.ranks_up")[0] == "(0, [0, 1])"
    assert kernel.run(ANSWERS.format(tokens=FEW))[0] == str(FEW)

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)

    pid = pid_of_rank_1(kernel)
    result, written, error = kernel.run(ANSWERS.format(tokens=SOME), when_it_shows=kill)
    assert (result, error) == (str(SOME), "")
    # One line, overwritten.
    assert re.fullmatch(r"(\r[█░]{30} \d/8 prompts [^\n\r]*)+\n", written), written
    assert re.search(r"█{30} 8/8 prompts .*tokens/s .*ranks \d+/\d+% ", written), written
    poll_until(lambda: kernel.run("group.ranks_up")[0] == "[0, 1]", START_S, "the killed rank to be back")
    assert pid_of_rank_1(kernel) != pid

    # Nobody closes the group.
    everyone = [*everyone, *family(kernel.pid)]
    kernel.shut_down()
    wait_gone(everyone, START_S)
