"""Supervised children are real processes here: they die, hang, ignore signals and have children of their own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from leoflow_celery.lite.supervisor import Child, ChildFailed, RestartPolicy, Supervisor, tail
from tests.support.process import ManagedProcess, process_ended
from tests.support.waiting import wait_until

QUICK = RestartPolicy(backoff_seconds=0.05, max_backoff_seconds=0.2)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", f"import os, signal, subprocess, sys, time; {code}")


def sleeper(name: str, **more: object) -> Child:
    return Child(name, python("time.sleep(60)"), **more)  # type: ignore[arg-type]


def pid_of(supervisor: Supervisor, name: str) -> int | None:
    return next(status.pid for status in supervisor.statuses() if status.name == name)


def has_line(path: Path, text: str) -> Callable[[], bool]:
    return lambda: path.exists() and text in path.read_text()


def test_each_child_starts_when_the_one_before_it_is_ready(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    seen = tmp_path / "seen"
    first = Child(
        "first", python(f"time.sleep(0.3); open({str(flag)!r}, 'w').close(); time.sleep(60)"), ready=flag.exists
    )
    second = Child(
        "second",
        python(f"open({str(seen)!r}, 'w').write(str(os.path.exists({str(flag)!r}))); time.sleep(60)"),
        ready=lambda: seen.exists() and seen.read_text() != "",
    )
    with Supervisor([first, second], tmp_path / "logs"):
        assert seen.read_text() == "True"


def test_children_stop_in_the_reverse_order(tmp_path: Path) -> None:
    order = tmp_path / "order"

    def child(name: str) -> Child:
        ready = tmp_path / f"{name}-ready"
        note = f"open({str(order)!r}, 'a').write({name!r} + ' ')"
        code = (
            f"signal.signal(signal.SIGTERM, lambda *a: ({note}, sys.exit(0)));"
            f"open({str(ready)!r}, 'w').close(); time.sleep(60)"
        )
        return Child(name, python(code), ready=ready.exists)

    with Supervisor([child("a"), child("b"), child("c")], tmp_path / "logs"):
        pass
    assert order.read_text().split() == ["c", "b", "a"]


def test_a_child_killed_with_9_is_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Supervisor([sleeper("one")], tmp_path, QUICK) as supervisor:
        first = pid_of(supervisor, "one")
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: pid_of(supervisor, "one") not in (None, first), message="another process")
        (status,) = supervisor.statuses()
        assert (status.restarts, status.last_exit) == (1, "was killed by SIGKILL")
    assert "one was killed by SIGKILL; starting it again" in caplog.text


def test_a_child_that_keeps_dying_is_started_again_later_and_later(tmp_path: Path) -> None:
    policy = RestartPolicy(backoff_seconds=1.0, max_backoff_seconds=5.0)
    assert [policy.delay_seconds(failures) for failures in range(1, 6)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    ready = tmp_path / "ready"
    code = f"open({str(ready)!r}, 'w').close(); time.sleep(0.2); sys.exit(3)"
    with Supervisor([Child("flapping", python(code), ready=ready.exists)], tmp_path / "logs", QUICK) as supervisor:
        wait_until(lambda: supervisor.statuses()[0].restarts >= 3, 20)
        assert supervisor.statuses()[0].last_exit == "exited with code 3"


def test_a_child_that_ends_before_it_is_ready_fails_the_start_with_its_last_lines(tmp_path: Path) -> None:
    good = sleeper("good")
    bad = Child(
        "bad", python("print('line 1'); print('no such key', file=sys.stderr); sys.exit(2)"), ready=lambda: False
    )
    supervisor = Supervisor([good, bad], tmp_path)
    with pytest.raises(ChildFailed) as caught:
        supervisor.start()
    error = caught.value
    assert error.name == "bad"
    assert "bad exited with code 2 before it was ready" in str(error)
    assert "no such key" in str(error)
    assert error.log_path == tmp_path / "bad.log"
    assert [status.pid for status in supervisor.statuses()] == [None, None]


def test_a_child_that_is_never_ready_fails_the_start(tmp_path: Path) -> None:
    child = sleeper("slow", ready=lambda: False, ready_timeout_seconds=0.2)
    with pytest.raises(ChildFailed, match=r"slow is not ready after 0\.2 s; it printed nothing"):
        Supervisor([child], tmp_path).start()


def test_a_command_that_does_not_exist_says_so(tmp_path: Path) -> None:
    child = Child("ghost", ("/nonexistent/program",), ready=lambda: False)
    with pytest.raises(ChildFailed, match="cannot run '/nonexistent/program': No such file or directory"):
        Supervisor([child], tmp_path).start()


def test_a_child_that_ignores_sigterm_is_killed_after_its_time(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w').close(); time.sleep(60)"
    child = Child("deaf", python(code), ready=ready.exists, stop_timeout_seconds=0.3)
    with Supervisor([child], tmp_path / "logs") as supervisor:
        pid = pid_of(supervisor, "deaf")
    assert pid is not None
    assert process_ended(pid)


def test_kill_does_not_wait_for_a_child_that_takes_its_time(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w').close(); time.sleep(60)"
    supervisor = Supervisor(
        [Child("deaf", python(code), ready=ready.exists, stop_timeout_seconds=100)], tmp_path / "logs"
    )
    supervisor.start()
    impatient = threading.Timer(0.2, supervisor.kill)
    impatient.start()
    supervisor.stop()
    impatient.join()
    assert supervisor.statuses()[0].last_exit == "was killed by SIGKILL"


def test_what_a_killed_child_had_started_goes_with_it(tmp_path: Path) -> None:
    grandchild = tmp_path / "grandchild"
    code = (
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']);"
        f"open({str(grandchild)!r}, 'w').write(str(child.pid) + '.'); time.sleep(60)"
    )
    child = Child("parent", python(code), ready=lambda: grandchild.exists() and grandchild.read_text().endswith("."))
    with Supervisor([child], tmp_path / "logs", RestartPolicy(backoff_seconds=30)) as supervisor:
        below = int(grandchild.read_text().rstrip("."))
        pid = pid_of(supervisor, "parent")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: process_ended(below), message="the end of the grandchild")


def test_the_log_of_the_previous_run_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    for text in ("first run", "second run"):
        child = Child("one", python(f"print({text!r}, flush=True); time.sleep(60)"), ready=has_line(log, text))
        with Supervisor([child], tmp_path):
            pass
    assert (tmp_path / "one.log.1").read_text() == "first run\n"
    assert log.read_text() == "second run\n"


def test_a_childs_environment_and_directory_are_what_was_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    code = "print(os.getcwd(), sorted(os.environ), '.', flush=True); time.sleep(60)"
    child = Child("one", python(code), env={"ONLY": "this"}, work_dir=tmp_path, ready=has_line(log, "."))
    with Supervisor([child], tmp_path):
        pass
    assert log.read_text().startswith(str(tmp_path))
    assert "ONLY" in log.read_text()
    assert "PATH" not in log.read_text()


SUPERVISE = """
import signal, sys, time
from pathlib import Path
from leoflow_celery.lite.supervisor import Child
from leoflow_celery.lite.supervisor import Supervisor

sleep = (sys.executable, "-S", "-c", "import time; time.sleep(60)")
saving = (sys.executable, "-S", "-u", "-c", sys.argv[2])
children = [Child("plain", sleep), Child("saving", saving, parent_death_signal=signal.SIGTERM)]
with Supervisor(children, Path(sys.argv[1])) as supervisor:
    print("pids", *(status.pid for status in supervisor.statuses()), flush=True)
    time.sleep(60)
"""


def test_children_end_when_the_supervisor_is_killed_with_9(tmp_path: Path) -> None:
    """Without any code of the supervisor running: one by SIGKILL, one by a SIGTERM that it can act on."""
    saved = tmp_path / "saved"
    saving = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *a: (open({str(saved)!r}, 'w').close(), sys.exit(0)))\n"
        "print('armed')\ntime.sleep(60)"
    )
    with ManagedProcess([sys.executable, "-c", SUPERVISE, tmp_path, saving], tmp_path / "supervisor.log") as parent:
        pids = [int(text) for text in parent.wait_for_line(r"^pids (\d+) (\d+)").groups()]
        wait_until(has_line(tmp_path / "saving.log", "armed"))
        parent.kill()
        wait_until(lambda: all(map(process_ended, pids)), message=f"the end of {pids}")
    assert saved.exists()


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(5_000)))
    assert tail(log, 2) == "line 4998\nline 4999"
    assert tail(tmp_path / "missing", 2) == ""
