"""LEOFLOW_SUBPROCESS_PRELOAD: user code in a fork of an interpreter that imported its modules, as in a fresh one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.executors.subprocess import SubprocessExecutor
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.settings import SubprocessSettings
from tests.integration.subprocess.conftest import ENVIRON, end_tasks
from tests.support.waiting import wait_until

#: Looks for the agent's token in its own memory, among other things that a fresh interpreter would show.
LOOK = """
import json, os, sys, re
early = "colorsys" in sys.modules
needle = re.compile(b"t0[k]en")
found = 0
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps:
        start, end = (int(one, 16) for one in line.split()[0].split("-"))
        if "rw" in line and "[v" not in line:
            try:
                memory.seek(start)
                found += len(needle.findall(memory.read(end - start)))
            except OSError:
                pass
seen = {"found": found, "early": early, "argv": sys.argv[1:], "input": sys.stdin.read(), "name": __name__}
seen |= {"own": os.environ.get("MINE"), "fds": len(os.listdir("/proc/self/fd")), "leader": os.getsid(0) == os.getpid()}
seen["agent"] = sorted(name for name in os.environ if name.startswith("LEOFLOW_AGENT"))
json.dump(seen, open(os.environ["LEOFLOW_RETURN_VALUE_PATH"], "w"))
print("out"); print("err", file=sys.stderr)
"""


@pytest.fixture
def execute(plane, launch, reports, tmp_path: Path) -> Iterator[Callable[..., pb.ReportStateRequest]]:
    (tmp_path / "code").mkdir()
    made: list[SubprocessExecutor] = []

    def run(code: str, *arguments: str, stdin: str = "", modules: tuple[str, ...] = ("colorsys",), **env: str) -> Any:
        (tmp_path / "code" / "job.py").write_text(code)
        plane.spec = pb.TaskSpec(operator="exec", environment={"PYTHONPATH": str(tmp_path / "code"), **env})
        plane.spec.extra["argv"], plane.spec.extra["stdin"] = [sys.executable, "-m", "job", *arguments], stdin
        settings = SubprocessSettings(state_dir=str(tmp_path / "state"), preload=modules)
        made.append(SubprocessExecutor(settings, reports, environ=ENVIRON))
        made[-1].execute(launch())
        wait_until(plane.final)
        return plane.final().request

    yield run
    wait_until(lambda: end_tasks(tmp_path), message="agents end when their tasks do")
    for executor in made:
        executor.close()


def test_the_code_finds_what_a_fresh_interpreter_has_and_no_token_in_its_memory(execute, plane) -> None:
    report = execute(LOOK, "a b", "$HOME", stdin="input" * 50_000, MINE="1")
    assert report.state == pb.TASK_STATE_SUCCESS, report.error_message
    seen = json.loads(plane.pushed[-1].value)
    assert seen.pop("input") == "input" * 50_000
    assert seen == {
        "found": 0,
        "early": True,
        "argv": ["a b", "$HOME"],
        "name": "__main__",
        "own": "1",
        "fds": 4,
        "leader": True,
        "agent": [],
    }
    assert (plane.text("stdout"), plane.text("stderr")) == (["out"], ["err"])


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('no')", 1),
        ("raise ValueError('x')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
    ],
)
def test_it_ends_as_an_interpreter_ends(execute, code: str, exit_code: int) -> None:
    assert execute(code).exit_code == exit_code


def test_what_runs_at_the_end_runs(execute, plane) -> None:
    code = (
        "import atexit, threading; atexit.register(print, 'last'); threading.Thread(target=print, args=('a',)).start()"
    )
    assert execute(code).state == pb.TASK_STATE_SUCCESS
    assert plane.text("stdout") == ["a", "last"]


def test_a_module_that_is_not_there_costs_nothing_but_a_word(execute, tmp_path: Path) -> None:
    assert execute("print(1)", modules=("no_such_module",)).state == pb.TASK_STATE_SUCCESS
    assert "LEOFLOW_SUBPROCESS_PRELOAD: no_such_module" in (tmp_path / "state" / "forkserver.log").read_text()


def test_the_look_into_the_memory_sees_what_is_there(execute, plane) -> None:
    execute(LOOK, "t0ken")
    assert json.loads(plane.pushed[-1].value)["found"] > 0
