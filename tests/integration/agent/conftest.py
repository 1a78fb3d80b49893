"""A control plane and a way to start real agents against it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.agent.control_plane import ControlPlane
from tests.support.waiting import PATIENCE


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    control_plane = ControlPlane().start()
    yield control_plane
    control_plane.close()


class AgentProcess:
    """A running agent; ``termination()`` is what it left in its termination log.

    ``defect`` is Python that the agent's process runs first, to break what cannot be broken from outside.
    """

    def __init__(self, plane: ControlPlane, directory: Path, defect: str = "", **env: str) -> None:
        self.log = directory / "termination"
        self.tmp = directory / "tmp"
        self.tmp.mkdir(exist_ok=True)
        self.popen = subprocess.Popen(
            [sys.executable, "-c", f"{defect}\nfrom leoflow_celery.agent.__main__ import command\ncommand()"],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                "PATH": os.environ["PATH"],
                "TMPDIR": str(self.tmp),
                "LEOFLOW_CONTROL_PLANE_ADDR": plane.address,
                "LEOFLOW_AGENT_TOKEN": "t0ken",
                "LEOFLOW_TASK_INSTANCE_ID": "ti-1",
                "LEOFLOW_TERMINATION_LOG": str(self.log),
                "LEOFLOW_AGENT_KILL_GRACE_SECONDS": "1",
                "LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS": "30",
                **env,
            },
        )

    def wait(self, timeout: float = 30) -> int:
        """The exit code; the private directory must be gone with the agent."""
        self.output, _ = self.popen.communicate(timeout=timeout * PATIENCE)
        assert list(self.tmp.iterdir()) == []
        return self.popen.returncode

    def termination(self) -> dict[str, Any]:
        """What it left; without a state while it is being written."""
        return json.loads(self.log.read_text() or '{"state": ""}')


@pytest.fixture
def start_agent(plane: ControlPlane, tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    started: list[AgentProcess] = []

    def start(defect: str = "", **env: str) -> AgentProcess:
        started.append(AgentProcess(plane, tmp_path, defect, **env))
        return started[-1]

    yield start
    for agent in started:
        if agent.popen.poll() is None:
            agent.popen.kill()
            agent.popen.communicate()
