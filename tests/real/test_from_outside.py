"""What a second terminal sees of a command that serves, and does with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from dplaunch import control_client
from tests.real.standins import READY, Screen, launch_flags, run_here

pytestmark = pytest.mark.usefixtures("no_socket_is_left", "vllm_is_imported")


def in_a_second_terminal(*argv: str) -> str:
    """What another process's `dplaunch` prints."""
    done = subprocess.run([sys.executable, "-m", "dplaunch", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_serving_command_is_seen_scaled_and_stopped_from_another_process(smollm: str, tmp_path: Path) -> None:
    def look(screen: Screen) -> None:
        screen.wait_for(READY)
        (status,) = json.loads(in_a_second_terminal("status", "--group", "outside", "--json"))
        assert (status["state"], status["ready"], status["pid"]) == ("ready", 2, os.getpid())
        assert status["address"] in screen.out.getvalue()
        with urllib.request.urlopen(f"{status['address']}/metrics") as answer:
            metrics = answer.read().decode()
        assert 'dplaunch_rank_up{group="outside",rank="1"} 1.0' in metrics
        assert "vllm:num_requests_running" in metrics
        assert "rank 0 | " in in_a_second_terminal("logs", "--group", "outside")
        said = in_a_second_terminal("scale", "--group", "outside", "--dp", "1", "--drain", "5").splitlines()
        assert said[0] == "scaling from 2 ranks to 1"
        assert said[-1] == "1 of 1 ranks ready"
        assert "outside  ready  1 of 1 ranks ready" in in_a_second_terminal("status", "--group", "outside")
        # Not by the command, which would wait for the end of this process.
        (group,) = control_client.choose("outside", one=True)
        (*_, last) = control_client.stream(group, "stop", {"drain": 5})
        assert last["result"] == {"ends_process": True, "pid": os.getpid()}

    outcome = run_here(*launch_flags(smollm, tmp_path, "--name", "outside"), meanwhile=look)
    assert outcome.code == 0, outcome.err
    assert "rank 0 is asked to stop: dplaunch stop" in outcome.err
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events[-1]["message"] == "rank 0 stopped"
