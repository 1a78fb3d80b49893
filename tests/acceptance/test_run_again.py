"""Runs are found, followed, cleared and repeated: on the embedded system, and on a deployed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from leoflow_celery.domain.states import RunState
from leoflow_celery.errors import TaskFailed
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import PATIENCE, wait_until

LEOFLOW = (sys.executable, "-m", "leoflow_celery.cli")


class Embedded:
    """The embedded system at its standard place below a directory, used without naming it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "leoflow" / "lite"
        self.cwd: Path | None = None
        self.env = {**os.environ, "XDG_STATE_HOME": str(directory), "COLUMNS": "220"}

    def __call__(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [*LEOFLOW, *map(str, arguments)]
        ended = subprocess.run(
            command, env=self.env, cwd=self.cwd, capture_output=True, text=True, timeout=90 * PATIENCE, check=False
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code).stdout)

    def spawn(self, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [*LEOFLOW, *map(str, arguments)]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def states(self, dag_id: str, run_id: str) -> dict[str, tuple[str, int]]:
        """Task → state and number of its newest try."""
        views = self.json("tasks", dag_id, run_id)
        return {view["task_id"]: (view["state"], view["try_number"]) for view in views}


def processes_of(directory: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = " ".join(process.info["cmdline"] or ())
        if str(directory) in command or str(directory) in (process.info["cwd"] or ""):
            found.append(command)
    return found


@pytest.fixture
def leoflow(tmp_path: Path) -> Iterator[Embedded]:
    system = Embedded(tmp_path / "s")
    system.directory.mkdir()
    yield system
    wait_until(lambda: not processes_of(system.state), 15, lambda: f"still there: {processes_of(system.state)}")


def bash(task_id: str, command: str, *upstreams: str, **more: Any) -> dict[str, Any]:
    return {"task_id": task_id, "type": "bash", "entrypoint": command, "depends_on": list(upstreams), **more}


def write_dag(directory: Path, *tasks: dict[str, Any], **more: Any) -> Path:
    path = directory / "dag.json"
    head = {"schema_version": "1.0", "dag_id": "d", "dag_version": "1", "image": "none"}
    path.write_text(json.dumps({**head, **more, "tasks": list(tasks)}))
    return path


def test_runs_and_tasks_are_found_without_a_flag_and_by_latest(leoflow: Embedded, tmp_path: Path) -> None:
    dag = write_dag(tmp_path, bash("a", "echo hello"), bash("b", "exit 3", "a"))
    ran = leoflow("lite", "run", dag, "--run-id", "first", code=1)
    assert "'leoflow --lite retry d first'" in ran.stderr
    write_dag(tmp_path, bash("a", "echo hello"))
    # No --lite: there is no other system.
    whole = leoflow.json("run", dag, "--run-id", "second")
    assert (whole["run"]["state"], [view["state"] for view in whole["task_instances"]]) == ("success", ["success"])
    assert whole["xcoms"] == []

    found = [(run["dag_id"], run["run_id"], run["state"]) for run in leoflow.json("runs")]
    assert found == [("d", "second", "success"), ("d", "first", "failed")]
    assert [run["run_id"] for run in leoflow.json("runs", "d", "--state", "failed")] == ["first"]
    assert [run["run_id"] for run in leoflow.json("runs", "--since", "1h", "--limit", "1")] == ["second"]
    assert leoflow.json("runs", "--since", "2999-01-01") == []
    assert leoflow.json("runs", "other") == []
    assert leoflow.states("d", "first") == {"a": ("success", 1), "b": ("failed", 1)}
    assert leoflow.json("status", "d", "latest")["run"]["run_id"] == "second"
    assert leoflow.json("tasks", "d", "latest")[0]["run_id"] == "second"
    assert "hello" in leoflow("logs", "d", "latest", "a").stdout
    table = leoflow("runs").stdout.splitlines()
    assert table[1].split() == ["dag", "run", "state", "started", "time", "version"]
    assert table[2].split()[:3] == ["d", "second", "success"]

    missing = leoflow("status", "d", "nope", code=2).stderr
    assert f"in the embedded system of {leoflow.state}" in missing
    assert "--since: 'soon' is neither a time ago" in leoflow("runs", "--since", "soon", code=2).stderr


def test_a_bad_run_id_is_refused_before_anything_starts(leoflow: Embedded, tmp_path: Path) -> None:
    dag = write_dag(tmp_path, bash("a", "true"))
    for run_id, said in (("latest", "'latest' stands for the run started last"), ("x" * 600, "--run-id: ")):
        refused = leoflow("lite", "run", dag, "--run-id", run_id, code=2)
        assert said in refused.stderr
        assert "starting" not in refused.stderr
    assert not leoflow.state.exists()


def test_every_command_finds_the_only_system_and_looking_makes_none(leoflow: Embedded, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    leoflow.cwd = nowhere
    for command in (["runs"], ["status", "d", "r"], ["logs", "d", "latest"], ["cancel", "d", "r"]):
        assert "'leoflow lite run DAG.json' needs no settings" in leoflow(*command, code=2).stderr
    assert not list(nowhere.iterdir())
    assert not leoflow.state.exists()
    leoflow("lite", "run", write_dag(tmp_path, bash("a", "true")), "--run-id", "r")
    sources = {one["name"]: one["source"] for one in leoflow.json("config")}
    assert sources["LEOFLOW_DATABASE_URL"] == f"embedded system {leoflow.state}"
    assert "start the system with 'leoflow lite up'" in leoflow("dead-letters", "list", code=2).stderr
    assert not list(nowhere.iterdir())


def test_the_remark_after_ctrl_c_stays_on_the_screen(leoflow: Embedded, tmp_path: Path) -> None:
    """On a terminal, where a table is drawn over and over."""
    import pty

    started = tmp_path / "started"
    dag = write_dag(tmp_path, bash("a", f"touch {started}; exec sleep 300"))
    primary, secondary = pty.openpty()
    command = [*LEOFLOW, "lite", "run", str(dag), "--run-id", "r"]
    run = subprocess.Popen(command, env={**leoflow.env, "TERM": "xterm"}, stdout=subprocess.PIPE, stderr=secondary)
    os.close(secondary)
    wait_until(started.exists, 60, "the task starts")
    run.send_signal(signal.SIGINT)
    seen = b""
    while True:
        try:
            chunk = os.read(primary, 65_536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    run.communicate(timeout=60 * PATIENCE)
    os.close(primary)
    assert run.returncode == 130
    # What is drawn after it goes up no further than its own lines: the remark is above them.
    before, _, after = seen.partition(b"interrupted: stopping the tasks")
    assert before
    assert after.split(b"\n", 1)[0].strip().endswith(b"(again to stop at once)")
    drawn_after = after.split(b"\n", 1)[1].split(b"\x1b[1A")[0]
    assert b"d r" in drawn_after, "the table is drawn again below the remark"


@pytest.fixture
def up(leoflow: Embedded) -> Iterator[Embedded]:
    """The embedded system, at work until the end of the test."""
    process = leoflow.spawn("lite", "up")
    assert process.stdout is not None
    said = process.stdout.readline()
    if "is up" not in said:
        pytest.fail(f"{said}{process.communicate()[1]}")
    yield leoflow
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60 * PATIENCE)


def test_a_run_is_watched_and_its_logs_followed_from_other_shells(up: Embedded, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    waits = f"echo before; until [ -e {gate} ]; do sleep 0.1; done; echo behind"
    dag = write_dag(
        tmp_path, bash("first", "echo one"), bash("second", waits, "first"), bash("third", "exit 3", "second")
    )
    run = up.spawn("run", dag, "--run-id", "r")
    wait_until(lambda: up("runs", "--state", "running").stdout.count(" r "), 60, "the run is there", interval=1)
    logs = up.spawn("logs", "d", "latest", "-f")
    watch = up.spawn("watch", "d", "r", "--json")
    plain = up.spawn("watch", "d", "latest")
    assert logs.stdout is not None
    lines = []
    while not any("before" in line for line in lines):
        lines.append(logs.stdout.readline())
        assert lines[-1], "it ended before the task"
    assert watch.stdout is not None
    changes = [json.loads(watch.stdout.readline())]
    while (changes[-1].get("task_id"), changes[-1].get("state")) != ("second", "running"):
        changes.append(json.loads(watch.stdout.readline()))
    gate.touch()
    assert run.wait(timeout=60 * PATIENCE) == 1
    run.communicate()

    rest, _ = logs.communicate(timeout=60 * PATIENCE)
    shown = [line.split(" | ", 1) for line in [*lines, *rest.splitlines()]]
    texts = [(name.strip(), text.split()[-1]) for name, text in shown]
    for one in (("first", "one"), ("second", "before"), ("second", "behind")):
        assert texts.count(one) == 1, texts
    assert texts.index(("second", "before")) < texts.index(("second", "behind"))
    assert {name for name, _ in texts} == {"first", "second", "third"}

    rest, _ = watch.communicate(timeout=60 * PATIENCE)
    changes += [json.loads(line) for line in rest.splitlines()]
    ended = {one["task_id"]: one["state"] for one in changes if one["event"] == "task_changed"}
    assert ended == {"first": "success", "second": "success", "third": "failed"}
    assert changes[-1] == {"event": "run_finished", "state": "failed"}
    assert watch.returncode == 1
    _, said = plain.communicate(timeout=60 * PATIENCE)
    assert plain.returncode == 1
    assert "third: failed" in said
    assert "run ended: failed" in said

    whole = up("logs", "d", "r").stdout.splitlines()
    assert {line.split(" | ")[0].strip() for line in whole} == {"first", "second", "third"}
    records = [json.loads(line) for line in up("logs", "d", "r", "--json").stdout.splitlines()]
    assert {"task_id": "first", "try_number": 1, "msg": "one"}.items() <= records[1].items()


def counted(task_id: str, directory: Path, command: str, *upstreams: str, **more: Any) -> dict[str, Any]:
    """A task that leaves a line in ``directory/task_id`` for each time that it ran."""
    return bash(task_id, f"echo ran >> {directory / task_id}; {command}", *upstreams, **more)


def times(directory: Path, *task_ids: str) -> list[int]:
    return [len((directory / name).read_text().splitlines()) for name in task_ids]


def flawed_dag(directory: Path) -> Path:
    """``load → clean → report``, where clean fails until a file is there; notify runs after clean in any case."""
    return write_dag(
        directory,
        counted("load", directory, "true"),
        counted("clean", directory, f"test -e {directory / 'mended'}", "load"),
        counted("report", directory, "true", "clean"),
        counted("notify", directory, "true", "clean", trigger_rule="all_done"),
        counted("other", directory, "true"),
        staging={"enabled": True},
    )


def check_only_what_can_run(leoflow: Any, directory: Path) -> None:
    """A task below a failed one that is kept gets no try that could only be upstream_failed."""
    (directory / "below").mkdir()
    tasks = (
        bash("bad", "exit 3"),
        bash("good", "true"),
        bash("both", "true", "bad", "good"),
        bash("end", "true", "good"),
    )
    leoflow("run", write_dag(directory / "below", *tasks, dag_id="below"), "--run-id", "r", code=1)
    refused = leoflow("retry", "below", "r", "both", code=2).stderr
    assert "TASK: 'both' cannot run: bad failed; name what failed too" in refused
    leoflow("retry", "below", "r", "good", "--downstream", code=1)
    assert leoflow.states("below", "r") == {
        "bad": ("failed", 1),
        "good": ("success", 2),
        "both": ("upstream_failed", 1),
        "end": ("success", 2),
    }


def check_a_new_version(leoflow: Any, directory: Path) -> None:
    """A run that succeeded takes a new version of its DAG, whose new tasks run."""
    (directory / "new").mkdir()
    dag = write_dag(directory / "new", bash("a", "true"), dag_id="new")
    leoflow("run", dag, "--run-id", "r")
    assert "nothing to run again" in leoflow("retry", "new", "r", "--dag", dag).stderr
    write_dag(directory / "new", bash("a", "true"), bash("b", "true", "a"), dag_id="new", dag_version="2")
    refused = leoflow("run", dag, "--run-id", "r", code=2).stderr
    assert "was started with another content" in refused
    assert f"retry new r --dag {dag}'" in refused
    leoflow("retry", "new", "r", "--dag", dag)
    assert leoflow.states("new", "r") == {"a": ("success", 1), "b": ("success", 1)}
    assert leoflow.json("status", "new", "r")["run"]["dag_version"] == "2"
    dag.unlink()
    leoflow("retry", "new", "r", "b")  # it is kept with the run
    assert "had ended before: nothing is started" not in leoflow("watch", "new", "r").stderr


def check_retry(leoflow: Any, directory: Path) -> None:
    """The same on every system: ``leoflow`` runs commands on it."""
    dag = flawed_dag(directory)
    leoflow("run", dag, "--run-id", "r", code=1)
    before = {view["task_id"]: view for view in leoflow.json("tasks", "d", "r")}
    assert before["report"]["state"] == "upstream_failed"
    still = leoflow("retry", "d", "r", "other", code=1)
    assert "other: try 2 (try 1 stays success)" in still.stderr
    assert times(directory, "load", "clean", "notify", "other") == [1, 1, 1, 2]

    (directory / "mended").touch()
    dag.unlink()  # the run keeps its DAG
    again = leoflow.json("retry", "d", "latest")
    assert again["run"]["state"] == "success"
    newest = {view["task_id"]: (view["state"], view["try_number"]) for view in again["task_instances"]}
    assert newest == {
        "load": ("success", 1),
        "clean": ("success", 2),
        "report": ("success", 2),
        "notify": ("success", 2),
        "other": ("success", 2),
    }
    assert times(directory, "load", "clean", "report", "notify", "other") == [1, 2, 1, 2, 2]
    every = [(view["task_id"], view["try_number"], view["state"]) for view in leoflow.json("tasks", "d", "r", "--all")]
    assert ("clean", 1, "failed") in every
    assert ("report", 1, "upstream_failed") in every
    assert len(every) == 9
    history = [event["event"] for event in leoflow.json("status", "d", "r", "clean")["events"]]
    assert history.count("cleared") == 1
    assert history.count("finished") == 2
    claims = {(view["task_id"], view["staging_claim"]) for view in leoflow.json("tasks", "d", "r", "--all")}
    assert len(claims) == 5, "a new try mounts what the earlier one mounted"
    assert "nothing to run again" in leoflow("retry", "d", "r").stderr
    assert "task 'nope' has no try in this run" in leoflow("retry", "d", "r", "nope", code=2).stderr

    more = leoflow("retry", "d", "r", "clean", "--downstream")
    assert "report: try 3" in more.stderr
    assert times(directory, "load", "clean", "report", "notify", "other") == [1, 3, 2, 3, 2]

    check_only_what_can_run(leoflow, directory)
    check_a_new_version(leoflow, directory)
    new = leoflow.json("rerun", "d", "r", "--run-id", "copy")
    assert (new["run"]["run_id"], new["run"]["state"]) == ("copy", "success")
    assert times(directory, "load", "clean", "report", "notify", "other") == [2, 4, 3, 4, 3]
    assert "run 'copy' of dag 'd' exists" in leoflow("rerun", "d", "r", "--run-id", "copy", code=2).stderr


def test_a_run_is_cleared_and_repeated_on_an_embedded_system(up: Embedded, tmp_path: Path) -> None:
    check_retry(up, tmp_path)


def test_a_retry_starts_the_embedded_system_itself_and_takes_a_mended_dag(leoflow: Embedded, tmp_path: Path) -> None:
    dag = write_dag(tmp_path, bash("a", "echo kept"), bash("b", "exit 3", "a"), bash("c", "true", "b"))
    leoflow("lite", "run", dag, "--run-id", "r", code=1)
    write_dag(tmp_path, bash("a", "echo kept"), bash("b", "echo mended", "a"), bash("c", "true", "b"))
    leoflow("retry", "d", "r", "--dag", dag)
    assert leoflow.states("d", "r") == {"a": ("success", 1), "b": ("success", 2), "c": ("success", 2)}
    assert "mended" in leoflow("logs", "d", "r", "b").stdout


def test_a_retry_that_may_not_use_the_system_changes_nothing(leoflow: Embedded, tmp_path: Path) -> None:
    """The directory of an embedded system belongs to one command at a time."""
    go = tmp_path / "go"
    dag = write_dag(tmp_path, bash("a", f"test -e {go}"), bash("b", "true"))
    failed = leoflow("lite", "run", dag, "--run-id", "r", "--tenant", "acme", code=1)
    assert "retry d r --tenant acme'" in failed.stderr
    (tmp_path / "other").mkdir()
    waits = write_dag(
        tmp_path / "other",
        bash("w", f"touch {tmp_path / 'on'}; until test -e {go}; do sleep 0.1; done"),
        dag_id="other",
    )
    other = leoflow.spawn("lite", "run", waits, "--run-id", "o")
    try:
        wait_until((tmp_path / "on").exists, 60, "the other run")
        assert "in use by" in leoflow("retry", "d", "r", "a", "--tenant", "acme", code=2).stderr
        shown = leoflow.json("status", "d", "r", "--tenant", "acme")
        assert shown["run"]["state"] == "failed"
        assert {(view["try_number"], view["state"]) for view in shown["task_instances"]} == {
            (1, "failed"), (1, "success")
        }  # fmt: skip
    finally:
        go.touch()
        other.communicate(timeout=60 * PATIENCE)
    # A new version of the DAG says what depends on what.
    mended = write_dag(tmp_path, bash("a", "true"), bash("b", "true", "a"))
    leoflow("retry", "d", "r", "--tenant", "acme", "--dag", mended)
    views = leoflow.json("tasks", "d", "r", "--tenant", "acme")
    assert {view["task_id"]: view["try_number"] for view in views} == {"a": 2, "b": 2}


class Deployed(Embedded):
    """A deployed system, named by the environment."""

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        super().__init__(directory)
        self.env |= env


@pytest.fixture
def deployed(tmp_path: Path, shared_redis: RedisServer, request: pytest.FixtureRequest) -> Iterator[System]:
    postgres = request.getfixturevalue("postgres")
    url = postgres.empty()
    (tmp_path / "deployed").mkdir()
    with System(tmp_path / "deployed", shared_redis.url(), url, MAINTENANCE_INTERVAL_SECONDS=2) as system:
        system.start_gateway()
        system.start_workers("workers.subprocess", "workers.control")
        system.start_beat()
        yield system
    postgres.drop(url)


def test_a_run_is_cleared_and_repeated_on_a_deployed_system(deployed: System, tmp_path: Path) -> None:
    check_retry(Deployed(tmp_path / "cli", deployed.env), tmp_path)


def test_a_scheduler_of_its_own_clears_and_submits_the_new_tries(deployed: System, tmp_path: Path) -> None:
    client = deployed.client
    client.create_run("own", "r")

    def request(task_id: str, try_number: int) -> dict[str, Any]:
        command = f"test -e {tmp_path / 'mended'}"
        identity = {"task_instance_id": f"own-{task_id}", "dag_id": "own", "run_id": "r", "task_id": task_id}
        return {**identity, "try_number": try_number, "operator": "bash", "entrypoint": command}

    with pytest.raises(TaskFailed):
        client.submit(request("a", 1)).get(timeout=60)
    client.finish_run("own", "r", RunState.FAILED)
    (tmp_path / "mended").touch()
    [cleared] = client.clear("own", "r")
    assert (cleared.task_id, cleared.next_try, client.run("own", "r").state) == ("a", 2, RunState.RUNNING)
    client.submit(request("a", cleared.next_try)).get(timeout=60)
    assert [view.state.value for view in client.tries("own", "r")] == ["failed", "success"]
    assert client.clear("own", "r") == []


def test_a_try_submitted_again_with_other_content_says_so(up: Embedded, tmp_path: Path) -> None:
    request = {"task_instance_id": "ti", "dag_id": "d", "run_id": "r", "task_id": "t", "operator": "bash"}
    path = tmp_path / "request.json"
    path.write_text(json.dumps({**request, "entrypoint": "true"}))
    up("submit", path, "--wait")
    assert up("submit", path).stderr == ""
    path.write_text(json.dumps({**request, "entrypoint": "exit 7"}))
    again = up("submit", path)
    assert "ti try 1 was submitted before with another content, which stays; submit try_number 2" in again.stderr
    assert "success" in again.stdout
    assert up.json("dead-letters", "list") == []
    settings = {one["name"]: one for one in up.json("config")}
    assert settings["LEOFLOW_SEAL_KEYS"]["value"] == "***"
    assert settings["LEOFLOW_DATABASE_URL"] == {
        "name": "LEOFLOW_DATABASE_URL",
        "value": f"sqlite:///{up.state}/leoflow.db",
        "source": f"embedded system {up.state}",
    }


def test_a_deployed_system_is_named_by_a_file_and_wins_over_an_embedded_one(
    deployed: System, leoflow: Embedded, tmp_path: Path
) -> None:
    leoflow.state.mkdir(parents=True)
    (leoflow.state / "keys.json").write_text("{}")  # an embedded one that nobody could use
    (tmp_path / "settings.env").write_text(
        "".join(f"export {name}='{value}'\n" for name, value in deployed.env.items())
    )
    dag = write_dag(tmp_path, bash("a", "true"))
    leoflow("--env-file", tmp_path / "settings.env", "run", dag, "--run-id", "r")
    assert deployed.client.run("d", "r").state is RunState.SUCCESS
    leoflow.env["LEOFLOW_ENV_FILE"] = str(tmp_path / "settings.env")
    assert [run["run_id"] for run in leoflow.json("runs")] == ["r"]
