"""Workers have names of their own without ``-n``, and doctor names a clash of those that were given one twice."""

from __future__ import annotations

import socket
import sys

from leoflow_celery.cli.doctor import check_workers
from tests.support.system import System, wait_for_worker

HOST = socket.gethostname()


def start_unnamed(system: System, module: str, *options: str) -> None:
    command = (sys.executable, "-m", "celery", "-A", module, "worker", "-l", "INFO", *options)
    wait_for_worker(system.start(f"{module}{''.join(options)}", *command))


def test_workers_that_nobody_named_are_called_after_what_they_do(own_system: System) -> None:
    for module in ("workers.control", "workers.inline", "workers.subprocess"):
        start_unnamed(own_system, module)
    settings = own_system.load_settings(DISPATCH_EXECUTOR_TYPE="subprocess")
    finding = check_workers(settings)
    assert (finding.ok, finding.sentence) == (
        True,
        "3 answer and consume dispatch, inline, maintenance, results, subprocess",
    )
    names = {name for answer in own_system.client.app.control.ping(timeout=3) for name in answer}
    assert names == {f"{name}@{HOST}" for name in ("control", "inline", "subprocess")}


def test_doctor_names_a_clash_and_calls_no_queue_forsaken_for_it(own_system: System) -> None:
    """Celery keeps one of the answers that come under one name: the queues of the other workers looked forsaken."""
    for module in ("workers.control", "workers.inline", "workers.subprocess"):
        start_unnamed(own_system, module, "-n", "same@%h")
    finding = check_workers(own_system.load_settings(DISPATCH_EXECUTOR_TYPE="subprocess"))
    assert not finding.ok
    assert finding.sentence == (
        f"3 workers are called same@{HOST}: monitors take them for one; "
        "give each a name of its own, 'celery … worker -n NAME@%h'"
    )
