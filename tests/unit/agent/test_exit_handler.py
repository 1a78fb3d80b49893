"""What the end of an agent means to the subprocess executor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from leoflow_celery.domain.attempt import AttemptId, attempt_name
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.subprocess.directory import as_utf8, standard_max_running, system_id
from leoflow_celery.executors.subprocess.environment import inherited, staging_dir
from leoflow_celery.executors.subprocess.exit_handler import settle
from leoflow_celery.executors.subprocess.processes import Processes, earlier_names


def record(state, **more):
    return TerminationRecord("ti", state, **more)


@pytest.mark.parametrize(
    ("left", "exit_code", "seen"),
    [
        (record(TaskState.NONE, reported=True), 0, True),
        (record(TaskState.SUCCESS, reported=True), 0, True),
        (record(TaskState.FAILED, reported=True), 1, True),
        (None, 0, True),
        (None, None, False),
    ],
)
def test_nothing_to_report(left, exit_code, seen):
    assert settle(left, exit_code, seen) is None


def test_an_unreported_outcome_is_reported_as_it_was():
    report = settle(record(TaskState.SUCCESS, exit_code=0, return_value="1"), 1, True)
    assert (report.outcome.state, report.return_value) == (TaskState.SUCCESS, "1")
    report = settle(record(TaskState.FAILED, exit_code=3, reason="timeout", message="m"), 1, False)
    assert (report.outcome.reason, report.outcome.exit_code) == (FailureReason.TIMEOUT, 3)


@pytest.mark.parametrize(
    ("left", "exit_code", "seen", "text"),
    [
        (None, -9, True, "killed by SIGKILL"),
        (None, 2, True, "exit code 2"),
        (record(TaskState.RUNNING), None, False, "its process is gone"),
        (record(TaskState.RUNNING), 0, True, "exit code 0"),
    ],
)
def test_a_lost_process(left, exit_code, seen, text):
    report = settle(left, exit_code, seen)
    assert report.outcome.reason is FailureReason.PROCESS_LOST
    assert text in report.outcome.message


def test_only_what_is_no_secret_is_inherited():
    environ = {"PATH": "/bin", "LC_ALL": "C", "https_proxy": "p", "LEOFLOW_JWT_SECRET": "s", "AWS_SECRET": "s"}
    kept = {"PATH": "/bin", "LC_ALL": "C", "https_proxy": "p"}
    assert inherited(environ) == {**kept, "GRPC_ENABLE_FORK_SUPPORT": "0"}


@pytest.mark.parametrize("claim", ["../../etc", "/etc", ".."])
def test_a_staging_claim_stays_below_the_root(tmp_path, claim):
    assert staging_dir(tmp_path, claim).resolve().parent == tmp_path / "staging"
    assert staging_dir(tmp_path, claim, "d", "r", "t").resolve().parent == tmp_path / "staging"


def test_runs_that_name_the_same_claim_share_no_directory(tmp_path):
    own = staging_dir(tmp_path, "scratch", "d", "r", "t")
    assert own == staging_dir(tmp_path, "scratch", "d", "r", "t")
    others = {staging_dir(tmp_path, "scratch", *run) for run in (("d", "r2", "t"), ("d2", "r", "t"), ("d", "r", "t2"))}
    assert len({own, *others}) == 4
    staging_dir(tmp_path, "x" * 253, "d", "r", "t").mkdir(parents=True)


@pytest.mark.parametrize(
    ("source", "first"),
    [
        ("# -*- coding: latin-1 -*-\nx = 'é'", "# -*- coding: utf-8 -*-"),
        ("#!/usr/bin/python\n# vim: fileencoding=latin-1\nx = 'é'", "# vim: fileencoding=utf-8"),
        ("x = 'é'\n# coding: latin-1", "# coding: latin-1"),
    ],
)
def test_source_is_utf_8_whatever_its_coding_line_says(source, first):
    data = as_utf8(source)
    assert first in data.decode()
    found = {}
    exec(compile(data, "dag.py", "exec"), found)  # noqa: S102 - our own text
    assert found["x"] == "é"


def test_earlier_launches_and_tries_are_named():
    attempt = AttemptId("ti", try_number=2, launch=3)
    names = earlier_names(attempt, "d", "t")
    for earlier in (AttemptId("ti", 2, 1), AttemptId("ti", 2, 2), AttemptId("ti", 1, 1)):
        assert attempt_name(earlier, "d", "t") in names
    assert attempt_name(attempt, "d", "t") not in names
    assert earlier_names(AttemptId("ti"), "d", "t") == []


def test_workers_that_start_together_agree_on_the_systems_id(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        ids = set(pool.map(lambda _: system_id(tmp_path), range(64)))
    assert len(ids) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["system"]


def test_an_id_that_is_not_ours_is_said(tmp_path):
    (tmp_path / "system").write_text("")
    with pytest.raises(ConfigurationError, match=r"LEOFLOW_SUBPROCESS_STATE_DIR .*/system does not hold 32"):
        system_id(tmp_path)


def test_two_systems_mark_the_same_attempt_in_another_way():
    ours, theirs = Processes("a" * 32), Processes("b" * 32)
    assert ours.limit("leoflow-d-t-1-x") != theirs.limit("leoflow-d-t-1-x")
    assert ours.variable("leoflow-d-t-1-x") != theirs.variable("leoflow-d-t-1-x")
    assert 0 < ours.limit("leoflow-d-t-1-x") < 1 << 63


@pytest.mark.parametrize(
    ("cores", "memory_gib", "limit"), [(2, 64, 32), (64, 16, 64), (1, 0.5, 4)], ids=["cores", "memory", "small"]
)
def test_how_many_run_at_once_unless_it_is_said(cores, memory_gib, limit):
    assert standard_max_running(cores, int(memory_gib * (1 << 30))) == limit
