"""Where the kernel's count of OOM kills is read, and whom it is offered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from leoflow_celery.agent.linux import children, oom_kills

V1_IN_A_CONTAINER = "9:name=systemd:/docker/c1\n4:memory:/docker/c1\n1:cpu:/docker/c1\n0::/docker/c1\n"
V1_ON_A_HOST = "4:cpu,memory:/system.slice/x\n0::/\n"
V2_IN_A_CONTAINER = "0::/\n"
V2_WITHOUT_A_NAMESPACE = "0::/kubepods/pod1/c1\n"
V1_COUNTERS = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"
V2_COUNTERS = "low 0\nhigh 0\nmax 12\noom 4\noom_kill 3\noom_group_kill 0\n"


@pytest.mark.parametrize(
    ("memberships", "path", "counters"),
    [
        (V1_IN_A_CONTAINER, "memory/memory.oom_control", V1_COUNTERS),
        (V1_ON_A_HOST, "memory/system.slice/x/memory.oom_control", V1_COUNTERS),
        (V2_IN_A_CONTAINER, "memory.events", V2_COUNTERS),
        (V2_WITHOUT_A_NAMESPACE, "memory.events", V2_COUNTERS),
        (V2_WITHOUT_A_NAMESPACE, "kubepods/pod1/c1/memory.events", V2_COUNTERS),
    ],
)
def test_the_kills_of_the_own_cgroup_are_found(tmp_path: Path, memberships: str, path: str, counters: str) -> None:
    write(tmp_path / "proc/self/cgroup", memberships)
    write(tmp_path / "sys/fs/cgroup" / path, counters)
    assert oom_kills(tmp_path) == 3


@pytest.mark.parametrize("memberships", ["", "0::/\n", "1:cpu:/\n", "nonsense"])
def test_none_is_known_where_nothing_counts(tmp_path: Path, memberships: str) -> None:
    write(tmp_path / "proc/self/cgroup", memberships)
    assert oom_kills(tmp_path) == oom_kills(tmp_path / "nowhere") == 0


def test_a_counter_file_without_the_counter_is_none(tmp_path: Path) -> None:
    """Kernels before 4.13 have the file of version 1 without the line."""
    write(tmp_path / "proc/self/cgroup", V1_IN_A_CONTAINER)
    write(tmp_path / "sys/fs/cgroup/memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n")
    assert oom_kills(tmp_path) == 0


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


_PARENT = """
import subprocess, sys
from leoflow_celery.agent import linux
shell = subprocess.Popen(["sh", "-c", "(echo; exec sleep 600) & wait"], stdout=subprocess.PIPE)
shell.stdout.readline()
(child,) = linux.children(shell.pid)
linux.offer_children_to_oom_kill()
for pid in ("self", shell.pid, child):
    print(open(f"/proc/{pid}/oom_score_adj").read().strip(), flush=True)
linux.adopt_orphans()
shell.kill()
linux.kill_descendants()
"""


def test_what_the_process_had_started_is_offered_with_it() -> None:
    """Else the kernel would take a shell, and leave its child that eats the memory."""
    own = Path("/proc/self/oom_score_adj").read_text().strip()
    done = subprocess.run([sys.executable, "-c", _PARENT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [own, "1000", "1000"]


def test_a_process_that_is_gone_has_no_children() -> None:
    assert children(2**22 + 1) == []
