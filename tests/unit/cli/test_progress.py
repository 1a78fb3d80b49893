"""What a person sees while a run goes on."""

from __future__ import annotations

import pytest
from rich.console import Console

from leoflow_celery.cli.progress import LiveProgress, PlainProgress, describe
from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.lite.driver import RetryPlanned, RunEvent, RunFinished, RunStarted, TaskChanged, Waiting

EVENTS: list[RunEvent] = [
    RunStarted("d", "r", "default", resumed=False),
    TaskChanged("a", TaskState.RUNNING, 1),
    TaskChanged("a", TaskState.UP_FOR_RETRY, 1, "non_zero_exit", "exit\ncode 3", 0.5),
    RetryPlanned("a", 2, 30),
    Waiting("broker is away"),
    Waiting("broker is away"),
    TaskChanged("a", TaskState.SUCCESS, 2, seconds=75),
    RunFinished(RunState.SUCCESS),
]


def test_plain_lines_say_each_thing_once() -> None:
    lines: list[str] = []
    show = PlainProgress(lines.append)
    for event in EVENTS:
        show(event)
    assert [line.split(" ", 1)[1] for line in lines] == [
        "run r of d started",
        "a: running",
        "a: up_for_retry after 0.50 s - non_zero_exit: exit code 3",
        "a: try 2 starts in 30.0 s",
        "waiting: broker is away",
        "a: success (try 2) after 1 m 15 s",
        "run ended: success",
    ]


def rendered(live: LiveProgress, console: Console) -> str:
    with console.capture() as capture:
        console.print(live.view())
    return capture.get()


def test_the_table_follows_the_run() -> None:
    now = [100.0]
    console = Console(width=100, height=20)
    live = LiveProgress(console, ["a", "b"], clock=lambda: now[0])
    for event in EVENTS[:2]:
        live(event)
    now[0] += 4
    text = rendered(live, console)
    assert "d r  0 of 2 done" in text
    assert "running" in text
    assert "4.00 s" in text
    for event in EVENTS[2:5]:
        live(event)
    text = rendered(live, console)
    assert "up_for_retry" in text
    assert "try 2 in 30.0 s" in text
    assert "waiting: broker is away" in text
    for event in EVENTS[6:]:
        live(event)
    text = rendered(live, console)
    assert "d r: success  1 of 2 done" in text
    assert "broker is away" not in text


def test_a_run_larger_than_the_terminal_shows_what_needs_attention() -> None:
    console = Console(width=80, height=12)
    live = LiveProgress(console, [f"t{number:03}" for number in range(500)])
    live(TaskChanged("t400", TaskState.RUNNING, 1))
    live(TaskChanged("t450", TaskState.FAILED, 1, "oom_killed", "killed"))
    for number in range(20):
        live(TaskChanged(f"t{number:03}", TaskState.SUCCESS, 1, seconds=1))
    text = rendered(live, console)
    assert text.count("\n") <= 12
    assert "t400" in text
    assert "t450" in text
    assert "21 of 500 done" in text


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (RunStarted("d", "r", "default", resumed=True, watched=True), "watching run r of d"),
        (RunStarted("d", "r", "default", resumed=True, ended=True), "run r of d had ended before: nothing is started"),
        (RunStarted("d", "r", "default", resumed=True), "run r of d resumed"),
        (TaskChanged("a", TaskState.NONE, 2), "a: waiting for try 2"),
    ],
)
def test_lines_say_who_does_what(event: RunEvent, line: str) -> None:
    assert describe(event) == line
