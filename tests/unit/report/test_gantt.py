"""The chart in the terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.cells import cell_len

from leoflow_celery.domain.states import TaskState
from leoflow_celery.report.data import Found, RunReport, build
from leoflow_celery.report.gantt import ASCII, gantt_lines, short_seconds
from tests.support.reports import T0, large, run_view, view

SPECS = {name: {"task_id": name, "depends_on": []} for name in ("load", "later")}


def report_of(found: Found) -> RunReport:
    return build("default", "sales", "r1", found)


def chart(found: Found, width: int, **more: str) -> list[str]:
    return [str(line) for line in gantt_lines(report_of(found), width, **more)]


def test_each_try_has_a_line_with_its_phases_at_their_times() -> None:
    failed = replace(view(ran=7), state=TaskState.FAILED)
    second = replace(view(at=40, ran=17), try_number=2)
    shown = chart(Found(run_view(seconds=60), [failed, second], T0 + 60, SPECS), 80, glyphs=ASCII)
    assert len(shown) == 5
    rows = {line.split()[0]: line for line in shown[:3]}
    assert rows["load#1"].endswith("7.00 s failed")
    assert rows["load#2"].endswith("17.0 s success")
    assert rows["later"].endswith("waiting")
    start = len("load#1 ")
    first, last = rows["load#1"][start:], rows["load#2"][start:]
    assert first.startswith(".-#######")
    assert last.rindex("#") > first.rindex("#") + 20
    assert last.index("#") > 30
    assert shown[-2].split() == ["0", "1m00s"]
    assert shown[-1] == ". queued  - pending  # running  = reporting"


@pytest.mark.parametrize("width", [8, 20, 40, 60, 80, 120, 300])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    wide = [view("日本語の名前がとても長いタスクです" * 3), view("x" * 150, at=5), view("a", at=7)]
    lines = chart(Found(run_view(), wide, T0 + 60), width)
    assert max(map(cell_len, lines)) <= width
    if width >= 80:
        assert sum("█" in line for line in lines) == 4  # three tries and the legend


def test_what_is_short_is_seen_too() -> None:
    short = [view("long", ran=10_000), view("short", at=5_000, ran=0.01)]
    lines = chart(Found(run_view(seconds=10_100), short, T0 + 10_100), 80)
    assert next(line for line in lines if line.startswith("short")).count("█") == 1


def test_a_run_that_just_began_and_one_without_tasks_have_a_chart() -> None:
    assert chart(Found(run_view(seconds=None), [], T0, SPECS), 80)[0].endswith("waiting")
    assert len(chart(Found(run_view(seconds=0), [], T0), 80)) == 2


def test_a_name_that_commands_a_terminal_is_shown_as_text() -> None:
    lines = chart(Found(run_view(), [view("a\x1b[2J\u202eb")], T0), 80)
    assert "\\x1b[2J\\u202eb" in lines[0]


def test_a_result_that_is_handed_over_much_later_does_not_make_the_rest_small() -> None:
    late = Found(run_view(seconds=8), [view(ran=5)], T0 + 5_000, reported={("ti-load", 1): T0 + 4_000})
    assert chart(late, 80)[0].count("█") > 20


def test_durations_are_short() -> None:
    shown = [short_seconds(one) for one in (0.0004, 0.9996, 9.994, 59.94, 59.96, 200, 3_599.9, 14_700, 1_047_600)]
    assert shown == ["0 ms", "1.00 s", "9.99 s", "59.9 s", "1m00s", "3m20s", "1h00m", "4h05m", "12d 3h"]


def test_a_thousand_tasks() -> None:
    assert len(chart(large(1_000), 80)) == 1_002
