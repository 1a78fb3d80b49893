"""The leak checker sees what it is there for."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from tests.support import leaks
from tests.support.process import ManagedProcess, process_ended
from tests.support.waiting import wait_until

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "_GRACE_SECONDS", 0.1)


def test_a_child_process_is_a_leak() -> None:
    before = leaks.Footprint.take(orphans=False)
    child = subprocess.Popen(SLEEP)
    assert any(f"process {child.pid}" in line for line in leaks.leaks_since(before))
    leaks.kill_leaked_processes(before)
    child.wait()
    assert leaks.leaks_since(before) == []


def test_an_orphan_in_a_session_of_its_own_is_a_leak() -> None:
    before = leaks.Footprint.take(orphans=True)
    start = f"import subprocess; print(subprocess.Popen({SLEEP!r}, start_new_session=True, stdout=-3, stderr=-3).pid)"
    pid = int(subprocess.run([sys.executable, "-c", start], check=True, capture_output=True).stdout)
    assert any(f"process {pid}" in line for line in leaks.leaks_since(before))
    leaks.kill_leaked_processes(before)
    wait_until(lambda: process_ended(pid))


def test_a_kept_process_and_what_it_starts_are_none(tmp_path: Path) -> None:
    before = leaks.Footprint.take(orphans=True)
    start = f"import subprocess, time; subprocess.Popen({SLEEP!r}); time.sleep(60)"
    with ManagedProcess([sys.executable, "-c", start], tmp_path / "log") as parent:
        leaks.keep_process(parent.pid)
        wait_until(psutil.Process(parent.pid).children)
        assert leaks.leaks_since(before) == []
        leaks.release_process(parent.pid)
        parent.kill_group()
    assert leaks.leaks_since(before) == []


def test_a_thread_that_is_no_daemon_is_a_leak() -> None:
    before = leaks.Footprint.take(orphans=False)
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait, name="left-behind")
    thread.start()
    assert leaks.leaks_since(before) == ["thread 'left-behind'"]
    go_on.set()
    thread.join()


def test_a_temporary_directory_of_ours_is_a_leak() -> None:
    before = leaks.Footprint.take(orphans=False)
    directory = tempfile.mkdtemp(prefix="leoflow-test-")
    assert leaks.leaks_since(before) == [f"directory {directory}"]
    shutil.rmtree(directory)
