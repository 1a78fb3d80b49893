"""The environment of a test run: none of the developer's own settings, and a temporary directory of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path

#: Set in our environment, so inherited by every process a test starts: how the leak checker finds orphans.
SESSION_VARIABLE = "LEOFLOW_TEST_SESSION"
_KEPT_PREFIX = "LEOFLOW_TEST_"


def strip_settings() -> None:
    """Remove every LEOFLOW_* variable except the tests' own: a developer's settings must not decide a test."""
    for name in [name for name in os.environ if name.startswith("LEOFLOW_") and not name.startswith(_KEPT_PREFIX)]:
        del os.environ[name]


def worker_name() -> str:
    """``gw0``, ``gw1`` … in a process that runs a share of the tests beside others; empty in the only one."""
    return os.environ.get("PYTEST_XDIST_WORKER", "")


def isolate_temporary_directory() -> Path:
    """Give this process (and its children) a temporary directory that nobody else writes to.

    Its name is short: sockets live in it, and a socket's path holds 107 bytes. pytest's ``tmp_path`` stays where it
    was, to be looked at after a failure. Of several processes that share the tests, each has its own session, in a
    directory within that of the process that started them: nothing of one is taken for another's.
    """
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    # Tests name volumes and labels after it, which may hold no underscore; one of mkdtemp's names in four does.
    name = worker_name() or f"lf-{secrets.token_hex(4)}"
    directory = Path(tempfile.gettempdir()) / name
    directory.mkdir(0o711)  # the PostgreSQL user has to pass through it
    os.environ["TMPDIR"] = str(directory)
    tempfile.tempdir = None
    state = directory / "state"
    state.mkdir()
    os.environ["XDG_STATE_HOME"] = str(state)
    session = f"{directory.parent.name}-{name}" if worker_name() else name
    os.environ[SESSION_VARIABLE] = session
    return directory


def remove_temporary_directory(directory: Path) -> None:
    """What isolate_temporary_directory made goes away."""
    shutil.rmtree(directory, ignore_errors=True)
    os.environ.pop("TMPDIR", None)
    tempfile.tempdir = None
