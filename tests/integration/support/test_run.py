"""A run of the tests as a whole: it ends with its servers, and nothing that the tests' own hooks meet ends it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.process import ManagedProcess, process_ended
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[3]


def pytest_run(tmp_path: Path, text: str, *options: str, **env: str) -> ManagedProcess:
    """A run of one file with this text, under the settings and hooks of this suite, that was just started."""
    tests = tmp_path / "test_one.py"
    tests.write_text(text)
    plugins = ("-p", "tests.conftest", "-p", "no:cacheprovider")
    command = (sys.executable, "-m", "pytest", "-c", ROOT / "setup.cfg", *plugins, *options, tests)
    # Not a share of ours.
    outer = {name: None for name in os.environ if name.startswith(("PYTEST_XDIST_", "COV_"))}
    return ManagedProcess(command, tmp_path / "log", {**outer, **env}, cwd=ROOT)


WAITS = """
import os, signal
from pathlib import Path


def test_one(redis_server):
    Path(os.environ["PIDS"]).write_text(f"{redis_server.pid}.")
    signal.pause()
"""


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_test_run_that_is_ended_takes_its_servers_with_it(
    tmp_path: Path, number: signal.Signals, workers: str
) -> None:
    pids = tmp_path / "pids"
    with pytest_run(tmp_path, WAITS, f"-n{workers}", PIDS=str(pids)) as run:
        wait_until(lambda: pids.exists() and pids.read_text().endswith("."), 30, run.output)
        run.send_signal(number)
        run.wait()
    server = int(pids.read_text().rstrip("."))
    wait_until(lambda: process_ended(server), 20, message="the end of the redis-server")


FAILS = """
import shutil

import pytest

from tests.support import leaks
from tests.support.process import ManagedProcess
from tests.support.requirements import require


def test_whose_process_lost_its_file(tmp_path):
    with ManagedProcess(["true"], tmp_path / "log", name="lost") as process:
        process.wait()
        shutil.rmtree(tmp_path)
        raise AssertionError("for a reason of its own")


@pytest.fixture
def server(tmp_path):
    directory = tmp_path / "server"
    directory.mkdir()
    with ManagedProcess(["false"], directory / "log", name="server") as process:
        process.wait()
    shutil.rmtree(directory)
    require("postgres", "it ended with 1")


def test_whose_server_did_not_start(server):
    pass


def test_beside_a_server_that_stopped_answering():
    def list_names():
        raise ConnectionError("nobody there")

    leaks.look_also(list_names)


def test_after_them():
    pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_the_hooks_meet_fails_a_test_at_most_and_the_run_goes_on(tmp_path: Path, workers: str) -> None:
    with pytest_run(tmp_path, FAILS, f"-n{workers}", LEOFLOW_TEST_REQUIRE="") as run:
        assert run.wait(60) == pytest.ExitCode.TESTS_FAILED, run.output()
    assert "1 failed, 2 passed, 1 skipped" in run.output()
    assert "for a reason of its own" in run.output()
    assert "needs postgres: it ended with 1" in run.output()
    assert "cannot be shown: FileNotFoundError" in run.output()


def test_what_is_required_fails_instead_of_being_skipped(tmp_path: Path) -> None:
    with pytest_run(tmp_path, FAILS, LEOFLOW_TEST_REQUIRE="redis,postgres") as run:
        assert run.wait(60) == pytest.ExitCode.TESTS_FAILED, run.output()
    assert "1 failed, 2 passed, 1 error" in run.output()
    assert "needs postgres: it ended with 1 (LEOFLOW_TEST_REQUIRE names it)" in run.output()


SHARES = """
import os, subprocess, sys, tempfile
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.ports import free_port
from tests.support.waiting import wait_until

SHARED = Path(os.environ["SHARED"])


def test_one(redis_url, postgres_url):
    mine = os.environ["PYTEST_XDIST_WORKER"]
    before = leaks.Footprint.take(orphans=True)
    program = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    subprocess.run([sys.executable, "-c", program], check=True)
    directory = tempfile.mkdtemp(prefix="leoflow-")
    (SHARED / mine).write_text(f"{redis_url} {postgres_url} {free_port()} {tempfile.gettempdir()}")
    wait_until(lambda: len(list(SHARED.iterdir())) >= 2, 60)  # the other one has started its own, too
    found = leaks._difference(before)
    assert len(found) == 2, found
    leaks.kill_leaked_processes(before)
    Path(directory).rmdir()
"""


def test_workers_beside_each_other_share_nothing_and_are_not_blamed_for_each_other(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    with pytest_run(tmp_path, SHARES, "-n2", "--dist=each", SHARED=str(shared)) as run:
        assert run.wait(120) == pytest.ExitCode.OK, run.output()
    first, second = (path.read_text().split() for path in shared.iterdir())
    assert not set(first) & set(second)
