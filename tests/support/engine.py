"""The Docker Engine as tests look at it: with a client of their own, never with the code under test."""

from __future__ import annotations

import io
import os
import secrets
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import docker
from docker.errors import APIError, NotFound

from tests.support import leaks
from tests.support.environment import SESSION_VARIABLE
from tests.support.images import require_docker
from tests.support.waiting import wait_until

SYSTEM_LABEL = "leoflow.io/system"


def system_name() -> str:
    """A name for the system of one test: what it leaves on an Engine that others use, too, can be told by it."""
    return f"{_session_prefix()}{secrets.token_hex(4)}"


def _session_prefix() -> str:
    return f"test-{os.environ.get(SESSION_VARIABLE, '')}-"


class TestEngine:
    """One Engine, and what a system of a test has there."""

    __test__ = False

    def __init__(self, url: str = "") -> None:
        environment = {**os.environ, **({"DOCKER_HOST": url} if url else {})}
        self.api = docker.APIClient(version="auto", timeout=120, **docker.utils.kwargs_from_env(environment))

    def state(self, name: str) -> dict[str, Any]:
        """``State`` of a container; empty when there is none."""
        try:
            return dict(self.api.inspect_container(name)["State"])
        except NotFound:
            return {}

    def status(self, name: str) -> str:
        return str(self.state(name).get("Status", "gone"))

    def wait(self, name: str, status: str = "exited", timeout: float = 120) -> dict[str, Any]:
        """Until a container has that status."""
        wait_until(lambda: self.status(name) == status, timeout, lambda: self.story(name), interval=0.1)
        return self.state(name)

    def run(self, name: str, *command: str) -> int:
        """The exit code of a command in a running container."""
        made = self.api.exec_create(name, list(command))["Id"]
        self.api.exec_start(made)
        return int(self.api.exec_inspect(made)["ExitCode"])

    def story(self, name: str) -> str:
        """What a container is and what it printed, for a failed test."""
        try:
            return f"{name}: {self.state(name)}\n{self.api.logs(name).decode(errors='replace')}"
        except NotFound:
            return f"{name} is gone"

    def containers(self, system: str) -> list[dict[str, Any]]:
        return list(self.api.containers(all=True, filters={"label": f"{SYSTEM_LABEL}={system}"}))

    def volumes(self, system: str) -> list[str]:
        found = self.api.volumes({"label": f"{SYSTEM_LABEL}={system}"})["Volumes"] or []
        return [one["Name"] for one in found]

    def of_this_session(self) -> list[str]:
        """All containers, volumes and networks of systems of this session's tests, for the leak checker."""
        containers = self.api.containers(all=True, filters={"label": SYSTEM_LABEL})
        volumes = self.api.volumes({"label": SYSTEM_LABEL})["Volumes"] or []
        networks = self.api.networks(filters={"label": SYSTEM_LABEL})
        ours = _session_prefix()
        return [
            *(f"container {one['Names']}" for one in containers if one["Labels"][SYSTEM_LABEL].startswith(ours)),
            *(f"volume {one['Name']}" for one in volumes if one["Labels"][SYSTEM_LABEL].startswith(ours)),
            *(f"network {one['Name']}" for one in networks if one["Labels"][SYSTEM_LABEL].startswith(ours)),
        ]

    def remove_all(self, system: str) -> None:
        """Everything of a test's system; what is being removed already is waited for."""
        for one in self.containers(system):
            with suppress(APIError):
                self.api.remove_container(one["Id"], v=True, force=True)
        wait_until(lambda: not self.containers(system), 60, "containers to be removed")
        for name in self.volumes(system):
            with suppress(NotFound):
                self.api.remove_volume(name, force=True)

    @contextmanager
    def image(self, base: str, *lines: str, program: bytes = b"") -> Iterator[str]:
        """An image of a test: ``lines`` of a Dockerfile on a base, ``program`` is its executable /program."""
        dockerfile = "\n".join((f"FROM {base}", "COPY program /program", *lines))
        context = _tar({"Dockerfile": dockerfile.encode(), "program": program})
        steps = list(self.api.build(fileobj=io.BytesIO(context), custom_context=True, rm=True, decode=True))
        ids = [step["aux"]["ID"] for step in steps if "aux" in step]
        assert ids, steps
        built = str(ids[-1])
        try:
            yield built
        finally:
            self.api.remove_image(built, force=True)

    def close(self) -> None:
        self.api.close()


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@contextmanager
def engine_of_tests() -> Iterator[TestEngine]:
    """The Engine of DOCKER_HOST; the test is skipped where there is none."""
    require_docker()
    engine = TestEngine()
    leaks.look_also(engine.of_this_session)
    try:
        yield engine
    finally:
        leaks.look_no_more(engine.of_this_session)
        engine.close()


def now() -> float:
    """SQL was read just now, long enough after everything before it (clocks may be apart)."""
    return time.time() + 60
