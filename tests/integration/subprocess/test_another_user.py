"""``LEOFLOW_SUBPROCESS_USER``: tasks run as another user, who has what is the task's and nothing of the worker's."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.registry import check_executor
from leoflow_celery.executors.subprocess.directory import system_id
from leoflow_celery.executors.subprocess.processes import Processes
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.settings import Settings, SubprocessSettings
from tests.support.waiting import wait_until

NOBODY = pwd.getpwnam("nobody")
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin:/bin") or ""
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root starts anything as another user")


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory that others may pass through to; pytest's own ones are closed."""
    path = Path(tempfile.mkdtemp(prefix="leoflow-test-user-"))
    path.chmod(0o711)
    yield path / "state"
    wait_until(lambda: ended(path / "state"), message="the tasks are gone")
    shutil.rmtree(path)


def ended(root: Path) -> bool:
    for path in (root / "attempts").iterdir() if root.exists() else ():
        Processes(system_id(root)).kill(path.name)
    return not root.exists() or not list((root / "attempts").iterdir())


def test_a_task_has_what_is_its_own_and_nothing_of_the_workers(plane, make_executor, launch, reports, state):
    look = """
        id -u; id -g; id -G; echo $HOME $USER $(ls -d $HOME >/dev/null 2>&1 || true)
        cat /proc/$PPID/environ; kill -9 $PPID
        for one in $(dirname $LEOFLOW_SOURCE_DIR)/*; do cat $one; echo x >>$one; done
        ls $(dirname $LEOFLOW_SOURCE_DIR)
        grep -c code $LEOFLOW_SOURCE_DIR/dag.py
        echo kept >$LEOFLOW_STAGING_DIR/file; ls -ld $LEOFLOW_STAGING_DIR | cut -c1-10
        grep -E '^(Cap(Prm|Eff)|NoNewPrivs)' /proc/self/status
        echo '[1, 2]' >$LEOFLOW_RETURN_VALUE_PATH
    """
    plane.spec = pb.TaskSpec(operator="bash", entrypoint=look)
    make_executor(state_dir=str(state), user="nobody").execute(
        launch(source="# code", staging_claim="shared", staging_size="1Mi")
    )
    wait_until(plane.final, 60, lambda: str(plane.lines))
    assert plane.final().request.state == pb.TASK_STATE_SUCCESS, plane.lines
    said, refused = plane.text("stdout"), "\n".join(plane.text("stderr"))
    groups = " ".join(map(str, os.getgrouplist("nobody", NOBODY.pw_gid)))
    assert said[:3] == [str(NOBODY.pw_uid), str(NOBODY.pw_gid), groups]
    assert said[3].split() == [NOBODY.pw_dir, "nobody"]
    assert said[4:6] == ["1", "drwx------"]
    assert [line.split()[1] for line in said[6:8]] == ["0" * 16] * 2
    for what in ("environ: Permission denied", "Operation not permitted", "cannot open directory"):
        assert what in refused
    [value] = [call.request.value for call in plane.calls if call.name == "PushXCom"]
    assert value == b"[1, 2]"
    [staging] = (state / "staging").iterdir()
    owners = {path: (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in (staging, staging / "file")}
    assert {uid for uid, _ in owners.values()} == {NOBODY.pw_uid}
    assert reports == []


def test_what_the_agent_keeps_is_the_workers(plane, make_executor, launch, state):
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="echo ready; sleep 300")
    pid = int(make_executor(state_dir=str(state), user="nobody").execute(launch()).details["pid"])
    wait_until(lambda: "ready" in plane.text("stdout"))
    [directory] = (state / "attempts").iterdir()
    kept = [directory / name for name in ("agent.log", "attempt.json", "lock", "termination.json")]
    assert {(path.stat().st_uid, stat.S_IMODE(path.stat().st_mode) & 0o022) for path in kept} == {(0, 0)}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (state, state / "attempts", directory)} == {0o711}
    assert os.stat(f"/proc/{pid}").st_uid == 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert {os.stat(f"/proc/{child}").st_uid for child in children} == {NOBODY.pw_uid}


@pytest.mark.skipif(not SYSTEM_PYTHON, reason="the tests' own Python may be closed to other users")
def test_a_python_task_imports_its_source_and_gets_its_inputs(plane, make_executor, launch, state):
    source = "import os\n\ndef main(text):\n    return [os.getuid(), len(text)]\n"
    large = secrets.token_hex(100_000)
    plane.spec = pb.TaskSpec(operator="python", entrypoint="dag:main", call_args_json=f'{{"text": "{large}"}}')
    executor = make_executor({"LEOFLOW_PYTHON": SYSTEM_PYTHON}, state_dir=str(state), user="nobody")
    executor.execute(launch(operator="python", entrypoint="dag:main", source=source))
    wait_until(plane.final, 60, lambda: str(plane.lines))
    if "No module named leoflow_runtime" in str(plane.lines):
        pytest.skip("the tests' own package is closed to other users")
    [value] = [call.request.value for call in plane.calls if call.name == "PushXCom"]
    assert value.decode().replace(" ", "") == f"[{NOBODY.pw_uid},200000]"


@pytest.mark.parametrize(
    ("user", "settings", "says"),
    [
        ("no-such-user", {}, "this host has no such user; create it"),
        ("root", {}, "this is root"),
        ("nobody", {"agent_path": "/bin/true"}, "unset LEOFLOW_SUBPROCESS_AGENT_PATH"),
    ],
)
def test_a_user_that_cannot_be_used_stops_the_worker(user, settings, says):
    wrong = Settings(subprocess=SubprocessSettings(user=user, **settings))
    with pytest.raises(ConfigurationError, match=f"LEOFLOW_SUBPROCESS_USER={user}: .*{says}"):
        check_executor(ExecutorType.SUBPROCESS, wrong)


def test_a_worker_that_is_not_root_does_not_start(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1_000)
    with pytest.raises(ConfigurationError, match="start it as root, or unset it"):
        check_executor(ExecutorType.SUBPROCESS, Settings(subprocess=SubprocessSettings(user="nobody")))


def test_a_state_directory_behind_a_closed_one_is_refused(make_executor, tmp_path):
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigurationError, match="set LEOFLOW_SUBPROCESS_STATE_DIR to a directory below one"):
        make_executor(state_dir=str(tmp_path / "state"), user="nobody")
