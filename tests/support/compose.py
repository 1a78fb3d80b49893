"""The system of compose.yaml as a test brings it up: a project of its own, with its own secrets, ports and networks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.requirements import require
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
MAKE_SECRETS = ROOT / "deploy/compose/make-secrets"
_COMMAND_SECONDS = 240


@cache
def compose_command() -> tuple[str, ...]:
    """``docker compose``, or Debian's ``docker-compose``; skips the test where there is neither."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True)
    if plugin.returncode == 0:
        return ("docker", "compose")
    if shutil.which("docker-compose") is None:
        require("docker-compose", "no docker compose and no docker-compose (Debian: docker-compose)")
    return ("docker-compose",)


def docker(*arguments: str, check: bool = True) -> str:
    """Run a docker command and return what it printed."""
    result = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=_COMMAND_SECONDS)
    assert not check or result.returncode == 0, f"docker {' '.join(arguments)}: {result.stderr}"
    return result.stdout


class Compose:
    """One project below ``directory``; ``settings`` replace lines of the .env that make-secrets writes."""

    def __init__(self, directory: Path, project: str, settings: Mapping[str, str]) -> None:
        self.project, self.settings = project, settings
        self.secrets_dir, self.env_file = directory / "secrets", directory / "compose.env"
        subprocess.run([MAKE_SECRETS, self.secrets_dir, self.env_file], check=True, capture_output=True)
        replaced = {"COMPOSE_PROJECT_NAME": project, **settings}
        kept = [line for line in self.env_file.read_text().splitlines() if line.partition("=")[0] not in replaced]
        self.env_file.write_text("\n".join([*kept, *(f"{name}={value}" for name, value in replaced.items())]) + "\n")

    @property
    def secrets(self) -> dict[str, str]:
        """What make-secrets wrote, by name."""
        return {path.name: path.read_text().strip() for path in self.secrets_dir.iterdir()}

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One docker-compose command of the project."""
        command = [*compose_command(), "--env-file", str(self.env_file), *arguments]
        # .env decides, so none of our own variables may.
        env = {name: value for name, value in os.environ.items() if not name.startswith(("LEOFLOW_", "COMPOSE_"))}
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=_COMMAND_SECONDS)
        if check and result.returncode != 0:
            logs = self.run("logs", "--no-color", "--tail=40", check=False).stdout
            raise AssertionError(
                f"{' '.join(arguments)}: {result.returncode}\n{result.stderr}\n{result.stdout}\n{logs}"
            )
        return result

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``leoflow`` in a container of the project."""
        return self.run("run", "--rm", "-T", "cli", *arguments, check=check)

    def containers(self) -> dict[str, dict[str, Any]]:
        """What the Engine knows about each container, by service."""
        listed = docker("ps", "-aq", f"--filter=label=com.docker.compose.project={self.project}").split()
        found = json.loads(docker("inspect", *listed)) if listed else []
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in found}

    def health(self) -> dict[str, str]:
        """Each running service's health; one that ended shows its exit code."""
        return {name: _health(one["State"]) for name, one in self.containers().items()}

    def wait_until_healthy(self) -> None:
        """Until every service is healthy, or just runs when it has no check; what ran once has ended well."""

        def healthy() -> bool:
            return set(self.health().values()) <= {"healthy", "running", "exit 0"}

        wait_until(healthy, 240, lambda: f"{self.health()}\n{self._logs()}", 1)

    def _logs(self) -> str:
        return self.run("logs", "--no-color", "--tail=40", check=False).stdout

    def execute(self, service: str, *command: str) -> str:
        """Run a command in a service's container."""
        return docker("exec", self.containers()[service]["Id"], *command)

    def left_behind(self) -> list[str]:
        """Containers, networks and volumes that carry the project's name or label."""
        listings = (
            docker("ps", "-a", "--format={{.Names}} {{.Labels}}"),
            docker("network", "ls", "--format={{.Name}} {{.Labels}}"),
            docker("volume", "ls", "--format={{.Name}} {{.Labels}}"),
        )
        return [line for listing in listings for line in listing.splitlines() if re.search(rf"\b{self.project}", line)]

    def down(self) -> None:
        """Remove everything, the volumes too."""
        self.run("--profile=cli", "--profile=example", "down", "--volumes", "--timeout=30")


def _health(state: dict[str, Any]) -> str:
    if state["Status"] == "exited":
        return f"exit {state['ExitCode']}"
    return str(state.get("Health", {}).get("Status", state["Status"]))
