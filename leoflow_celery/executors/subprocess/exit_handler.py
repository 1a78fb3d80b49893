"""What the end of an agent means, and telling it."""

from __future__ import annotations

import logging
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord
from leoflow_celery.executors.base import FailureReporter
from leoflow_celery.executors.subprocess.directory import AttemptDirectory, all_attempts
from leoflow_celery.executors.subprocess.processes import Processes

log = logging.getLogger(__name__)
_LAST_LINES, _LAST_LINE_CHARACTERS = 50, 2_000


@dataclass(frozen=True, slots=True)
class Report:
    """An outcome that the control plane has not heard of; ``return_value`` is JSON text that it does not have."""

    outcome: Outcome
    return_value: str | None = None


@dataclass(frozen=True, slots=True)
class Exited:
    """An agent ended; ``code`` is negative for a signal, None when nobody could see it.

    ``started`` is set once the starter has let go of the directory: an agent may end sooner than that.
    """

    path: Path
    attempt: AttemptId
    code: int | None
    started: threading.Event


def settle(record: TerminationRecord | None, exit_code: int | None, seen: bool) -> Report | None:
    """What to report of an agent that ended.

    ``seen``: the end was observed by the worker that started it. Otherwise (a worker was killed, its successor looks
    around) an agent without any record never claimed its attempt, and the attempt may run elsewhere by now.
    """
    if record is not None and record.state is TaskState.NONE:
        return None
    if record is not None and record.ended:
        return None if record.reported else Report(record.outcome(), record.return_value)
    if record is None and (exit_code == 0 or not seen):
        return None
    return Report(Outcome.failed(FailureReason.PROCESS_LOST, f"the agent ended without a report: {_how(exit_code)}"))


def _how(exit_code: int | None) -> str:
    if exit_code is None:
        return "its process is gone"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


class Settler:
    """Settles attempts one after the other in a thread of its own: a reporter may wait for its broker."""

    def __init__(
        self,
        processes: Processes,
        reporter: FailureReporter | None,
        keys_of: Callable[[str], Sequence[str]] = lambda _: (),
    ) -> None:
        """``keys_of`` are the keys that sign the record of an attempt, by its name; without one any is believed."""
        self._processes, self._reporter, self._keys_of = processes, reporter, keys_of
        self._overran: dict[str, int] = {}
        self._queue: queue.SimpleQueue[Exited | Path | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="leoflow-settler", daemon=True)
        self._thread.start()

    def exited(self, exited: Exited) -> None:
        """An agent that this worker had started ended."""
        self._queue.put(exited)

    def overran(self, name: str, seconds: int) -> None:
        """The attempt is about to be killed: it ran longer than it may."""
        self._overran[name] = seconds

    def settle_leftover(self, directory: AttemptDirectory) -> bool:
        """Report what an earlier agent left in a directory we hold; True when the attempt has ended by its word."""
        if not self._processes.kill(directory.path.name):
            raise TimeoutError(f"processes of {directory.path.name} are still there although they were killed")
        record = directory.record(self._keys_of(directory.path.name))
        self._report(directory, directory.attempt(), settle(record, None, seen=False))
        return record is not None and record.ended

    def sweep_soon(self, root: Path) -> None:
        """Sweep in the background."""
        self._queue.put(root)

    def sweep(self, root: Path) -> None:
        """Settle and remove every directory whose agent is gone."""
        for path in all_attempts(root):
            directory = AttemptDirectory.acquire_existing(path)
            if directory is None:
                continue
            try:
                self.settle_leftover(directory)
            except Exception:
                log.exception("subprocess.settle_failed", extra={"attempt_name": path.name})
                directory.release()
            else:
                directory.remove()

    def close(self, timeout_seconds: float) -> None:
        """Finish what is queued, for so long."""
        self._queue.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                self.sweep(work) if isinstance(work, Path) else self._settle_exit(work)
            except Exception:
                # The directory stays: the sweep of the next start reports it.
                log.exception("subprocess.settle_failed", extra={"work": str(work)})

    def _settle_exit(self, exited: Exited) -> None:
        if exited.code != 0:
            # Before the lock: a foreign agent may have leaked it to what it left running.
            self._processes.kill(exited.path.name)
        exited.started.wait()
        directory = AttemptDirectory.acquire_existing(exited.path)
        if directory is None:
            return  # started again, or settled by another worker
        try:
            record = directory.record(self._keys_of(exited.path.name))
            report = settle(record, exited.code, seen=True)
            seconds = self._overran.pop(exited.path.name, None)
            if seconds is not None and report is not None and report.outcome.reason is FailureReason.PROCESS_LOST:
                message = f"the task ran longer than {seconds} s, and its agent did not stop it"
                report = Report(Outcome.failed(FailureReason.TIMEOUT, message))
            self._report(directory, exited.attempt, report)
        except BaseException:
            directory.release()
            raise
        directory.remove()

    def _report(self, directory: AttemptDirectory, attempt: AttemptId | None, report: Report | None) -> None:
        if report is None or attempt is None:
            return
        outcome, said = report.outcome, _last_words(directory)
        log.warning(
            "subprocess.unreported_end",
            extra={"attempt": str(attempt), "reason": str(outcome.reason), "agent_log": "\n".join(said[-5:])},
        )
        if outcome.state is TaskState.FAILED:
            outcome = outcome.evolve(log_tail=said)
        if self._reporter is not None:
            self._reporter(attempt, outcome, report.return_value)


def _last_words(directory: AttemptDirectory) -> tuple[str, ...]:
    """The last lines of the agent's own output; what the task printed is in its log."""
    try:
        with directory.agent_log.open(errors="replace") as lines:
            return tuple(line.rstrip("\n")[:_LAST_LINE_CHARACTERS] for line in deque(lines, _LAST_LINES))
    except OSError:
        return ()
