"""One attempt from the claim to the report."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from leoflow_celery.agent import linux
from leoflow_celery.agent.client import CallRefused, ControlPlane, retried
from leoflow_celery.agent.command import Command, build_command
from leoflow_celery.agent.config import AgentConfig
from leoflow_celery.agent.deadline import Deadline, StopRequest
from leoflow_celery.agent.heartbeat import FENCED, Heartbeat
from leoflow_celery.agent.inputs import InputRefused, fetch_inputs
from leoflow_celery.agent.logs import LogShipper, Spool
from leoflow_celery.agent.report import TerminationLog, push_return_value, report_end, report_state
from leoflow_celery.agent.result import outcome_of_defect
from leoflow_celery.agent.run import TaskRun
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import (
    ClaimRefused,
    Fenced,
    GatewayUnavailable,
    InvalidRequest,
    InvalidToken,
    LeoflowError,
    XComRejected,
)
from leoflow_celery.protocol import agent_pb2 as pb

log = logging.getLogger(__name__)
T = TypeVar("T")

AGENT_VERSION = "leoflow-celery"
#: Of the time for handing over: lines that nobody takes leave the report the other half.
_HALF = 0.5
#: What a shell says of a process that SIGTERM ended.
_INTERRUPTED_EXIT_CODE = 143
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Stopped(LeoflowError):
    """The task was asked to stop before its process ran."""


class Agent:
    """Runs one attempt. ``stop`` is shared with the signal handlers."""

    def __init__(self, config: AgentConfig, plane: ControlPlane, stop: StopRequest, environ: Mapping[str, str]) -> None:
        self._config, self._plane, self._stop, self._environ = config, plane, stop, environ
        self._heartbeat = Heartbeat(plane, stop, config.heartbeat_seconds)
        self._termination = TerminationLog(config.termination_log, config.task_instance_id)
        self.task_run: TaskRun | None = None

    async def run(self) -> int:
        """The exit code: 0 when the attempt succeeded, was skipped or was not ours to run, 143 when it was interrupted
        and somebody else will say why, else 1.
        """
        try:
            await self._unless_stopped(self._register())
        except ClaimRefused as error:
            log.info("not running: the claim was refused (%s): %s", error.why, error)
            self._termination.nothing_ran(f"claim refused: {error.why}")
            return 0
        except LeoflowError as error:
            return self._never_started(error)
        self._termination.claimed()
        return await self._run_claimed()

    def beat_now(self) -> None:
        self._heartbeat.beat_now()

    async def _register(self) -> None:
        request = pb.RegisterRequest(agent_version=AGENT_VERSION, hostname=socket.gethostname())
        await retried(lambda: self._plane.register(request), self._patience())

    def _never_started(self, error: LeoflowError) -> int:
        log.error("not running: %s", error)
        reason = FailureReason.LAUNCH_FAILED
        if isinstance(error, InvalidToken):
            reason = FailureReason.FORBIDDEN
        elif isinstance(error, Stopped):
            reason = FailureReason.INTERRUPTED
        self._termination.never_claimed(Outcome.failed(reason, f"the agent could not register: {error}"))
        return 1

    async def _run_claimed(self) -> int:
        spool = Spool(self._config.spool_bytes)
        shipper = LogShipper(self._plane, spool, self._heartbeat.beat_now)
        shipping = asyncio.create_task(shipper.run())
        beating = asyncio.create_task(self._heartbeat.run())
        try:
            try:
                with _private_directory(self._config.work_dir) as directory:
                    outcome, value = await self._run_task_or_say_why(directory, shipper)
            except OSError as error:
                # Of the directory itself: a full disk, above all. Nothing ran.
                message = f"the agent's directory cannot be made: {error}"
                outcome, value = Outcome.failed(FailureReason.LAUNCH_FAILED, message), None
            return await self._deliver(outcome, value, shipper, shipping)
        finally:
            for task in (shipping, beating):
                task.cancel()
            await asyncio.gather(shipping, beating, return_exceptions=True)
            spool.close()

    async def _run_task_or_say_why(self, directory: Path, shipper: LogShipper) -> tuple[Outcome, bytes | None]:
        """A defect of our own must not leave a task without an outcome, nor a process without its agent."""
        try:
            return await self._run_task(directory, shipper)
        except Exception as error:
            log.exception("the agent failed")
            exit_code = self.task_run.exit_code if self.task_run else None
            linux.kill_descendants()
            return outcome_of_defect(error, exit_code), None

    async def _run_task(self, directory: Path, shipper: LogShipper) -> tuple[Outcome, bytes | None]:
        try:
            command, timeout, withheld = await self._unless_stopped(self._prepare(directory))
        except Stopped:
            await self._heartbeat.explain_interruption()
            return self._stopped_outcome(), None
        except InvalidRequest as error:
            return Outcome.failed(FailureReason.INVALID_SPEC, str(error)), None
        except CallRefused as error:
            return Outcome.failed(FailureReason.INVALID_SPEC, f"the control plane refuses the task: {error}"), None
        except InputRefused as error:
            return Outcome.failed(FailureReason.FORBIDDEN, str(error)), None
        except (Fenced, ClaimRefused):
            self._stop.ask(FailureReason.CANCELLED, FENCED)
            return self._stopped_outcome(), None
        except LeoflowError as error:
            return Outcome.failed(FailureReason.LAUNCH_FAILED, f"the task could not be prepared: {error}"), None
        self.task_run = TaskRun(self._config, self._stop, self._heartbeat, shipper)
        self.task_run.withheld = withheld
        self.task_run.mention(" ".join(command.argv))
        outcome = await self.task_run.run(command, timeout)
        if outcome.state is not TaskState.SUCCESS:
            return outcome, None
        try:
            return outcome, self.task_run.return_value(directory)
        except XComRejected as error:
            return Outcome.failed(FailureReason(error.reason), f"the return value was refused: {error}", 0), None

    async def _prepare(self, directory: Path) -> tuple[Command, int, tuple[str, ...]]:
        spec = await retried(lambda: self._plane.call("GetTaskSpec", pb.GetTaskSpecRequest()), self._patience())
        inputs = await fetch_inputs(self._plane, spec.xcom_input_mapping, self._patience())
        for warning in inputs.warnings:
            log.info("%s", warning)
        command = build_command(spec, inputs, self._config, directory, self._environ)
        try:
            command.write_files()
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise LeoflowError(f"its inputs cannot be written: {error}") from error
        answer = await report_state(self._plane, Outcome(TaskState.RUNNING), self._patience())
        if answer.should_terminate:
            self._stop.ask(FailureReason.CANCELLED, FENCED)
        return command, spec.execution_timeout_seconds, inputs.warnings

    async def _deliver(
        self, outcome: Outcome, value: bytes | None, shipper: LogShipper, shipping: asyncio.Task[None]
    ) -> int:
        self._termination.record(outcome, value)
        if self._leaves(outcome):
            shipper.add("agent", f"task stopped: {outcome.message}", pb.LOG_LEVEL_WARN)
            await shipper.drain(shipping, self._patience(_HALF))
            return _INTERRUPTED_EXIT_CODE
        if value is not None:
            try:
                outcome = await push_return_value(self._plane, value, self._patience()) or outcome
            except GatewayUnavailable as error:
                log.error("the return value could not be delivered: %s", error)  # noqa: TRY400
                return 1
            except LeoflowError as error:
                outcome = Outcome.failed(FailureReason.INVALID_XCOM, f"the return value was refused: {error}", 0)
            self._termination.record(outcome)
        self._frame_end(outcome, shipper)
        if not await shipper.drain(shipping, self._patience(_HALF)):
            log.warning("not all log lines could be delivered")
        if not await report_end(self._plane, outcome, self._patience(_HALF)):
            return 1
        self._termination.record(outcome, reported=True)
        return 1 if outcome.state is TaskState.FAILED else 0

    def _frame_end(self, outcome: Outcome, shipper: LogShipper) -> None:
        seconds = self.task_run.seconds if self.task_run else 0.0
        if outcome.state is TaskState.FAILED:
            shipper.add("agent", f"task failed in {seconds:.2f}s: {outcome.message}", pb.LOG_LEVEL_ERROR)
        else:
            word = "succeeded" if outcome.state is TaskState.SUCCESS else outcome.state.value
            later = f"; it looks again at {outcome.message}" if outcome.reschedule_at is not None else ""
            shipper.add("agent", f"task {word} in {seconds:.2f}s{later}")

    def _patience(self, share: float = 1.0) -> Deadline:
        return Deadline(self._stop, self._config.report_deadline_seconds * share)

    def _leaves(self, outcome: Outcome) -> bool:
        """Whether the outcome stays unreported in the termination log, for an executor that finds out the reason."""
        interrupted = self._stop.reason is outcome.reason is FailureReason.INTERRUPTED
        return self._config.leave_interruption and interrupted

    def _stopped_outcome(self) -> Outcome:
        return Outcome.failed(self._stop.reason or FailureReason.INTERRUPTED, self._stop.message)

    async def _unless_stopped(self, work: Awaitable[T]) -> T:
        """The result of some work, or Stopped as soon as the task is asked to stop."""
        working = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stop.wait())
        either: set[asyncio.Future[Any]] = {working, stopping}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if self._stop.asked:
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError, LeoflowError):
                await working
            raise Stopped(self._stop.message)
        return working.result()


@contextlib.contextmanager
def _private_directory(parent: str | None) -> Iterator[Path]:
    """A directory of this agent alone, with nothing to import but ``leoflow_runtime`` in its ``runtime``.

    Executors name a parent outside of /tmp: that is the user's to tidy up.
    """
    path = _directory_in(parent)
    try:
        spec = find_spec("leoflow_runtime")
        (path / "runtime").mkdir()
        if spec is not None and spec.submodule_search_locations:
            os.symlink(spec.submodule_search_locations[0], path / "runtime" / "leoflow_runtime")
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _directory_in(parent: str | None) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="leoflow-agent-", dir=parent))
    except OSError as error:
        if parent is None:
            raise
        log.warning("LEOFLOW_AGENT_WORK_DIR=%s: %s; using the temporary directory", parent, error.strerror)
        return Path(tempfile.mkdtemp(prefix="leoflow-agent-"))
