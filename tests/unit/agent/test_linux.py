"""Where the kernel's count of OOM kills is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from leoflow_celery.agent.linux import oom_kills

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
