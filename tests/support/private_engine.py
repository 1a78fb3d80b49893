"""A Docker Engine of the test's own, to be stopped, killed and started again; it has no network and no registry."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.engine import TestEngine
from tests.support.leaks import keep_process, release_process
from tests.support.process import ManagedProcess
from tests.support.requirements import require
from tests.support.waiting import wait_until


class PrivateEngine:
    """A dockerd with directories of its own below ``directory``, whose path has to be short (sockets)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"unix://{directory}/docker.sock"
        self._process: ManagedProcess | None = None
        self._starts = 0

    def start(self) -> None:
        """Answering when this returns."""
        self._starts += 1
        command = (
            # Namespaces of its own: a dockerd without a bridge deletes the interface docker0 that it finds, and what it
            # mounts would outlive it.
            *("unshare", "--net", "--mount", "dockerd"),
            f"--host={self.url}",
            f"--data-root={self.directory}/data",
            f"--exec-root={self.directory}/exec",
            f"--pidfile={self.directory}/docker.pid",
            "--bridge=none",
            "--iptables=false",
            "--ip-forward=false",
            "--storage-driver=overlay2",
        )
        name = f"dockerd-{self._starts}"
        self._process = ManagedProcess(command, self.directory / f"{name}.out", name=name)
        keep_process(self._process.pid)  # for all tests of a module
        wait_until(self._answers, 60, self._said, interval=0.2)

    def stop(self) -> None:
        """As an operator stops it: containers are killed after their grace."""
        if self._process is not None:
            self._process.stop(60)
            release_process(self._process.pid)
            self._process = None

    def start_if_stopped(self) -> None:
        if self._process is None:
            self.start()

    def hang(self) -> None:
        """It takes connections and answers nothing, until ``resume``."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        os.kill(int((self.directory / "docker.pid").read_text()), number)

    def load(self, image: str) -> None:
        """Copy an image from the Engine of DOCKER_HOST."""
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            command = ["docker", "-H", self.url, "load", "-q"]
            subprocess.run(command, stdin=saved.stdout, check=True, capture_output=True)

    def client(self) -> TestEngine:
        return TestEngine(self.url)

    def _said(self) -> str:
        return self._process.output()[-2_000:] if self._process else ""

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, f"dockerd ended with {self._process.returncode}: {self._said()}"
        command = ["docker", "-H", self.url, "version", "--format", "{{.Server.Version}}"]
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


@contextmanager
def private_engine() -> Iterator[PrivateEngine]:
    """A running one; everything of it is gone afterwards. The test is skipped where none can run."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("dockerd", "unshare"))):
        require("docker", "a private Engine needs root, dockerd and unshare")
    directory = Path(tempfile.mkdtemp(prefix="lfd-", dir="/var/tmp"))
    engine = PrivateEngine(directory)
    try:
        try:
            engine.start()
        except AssertionError as error:
            require("docker", f"a private Engine could not start: {error}")
        yield engine
    finally:
        engine.stop()
        shutil.rmtree(directory)
