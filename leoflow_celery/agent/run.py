"""The user process under supervision: started, bounded in time, stopped when asked, understood at its end."""

from __future__ import annotations

import asyncio
import errno
import time
from pathlib import Path
from typing import Any

from leoflow_celery.agent import linux
from leoflow_celery.agent.command import Command
from leoflow_celery.agent.config import AgentConfig
from leoflow_celery.agent.deadline import StopRequest
from leoflow_celery.agent.heartbeat import Heartbeat
from leoflow_celery.agent.logs import AGENT_STREAM, LogShipper
from leoflow_celery.agent.process import UserProcess
from leoflow_celery.agent.result import OomWatch, outcome_of_exit, read_reason, read_return_value, shell_exit_code
from leoflow_celery.agent.stdout_mirror import StdoutMirrors
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.protocol import agent_pb2 as pb

_COMMAND_NOT_FOUND = 127


class TaskRun:
    """One run of one command."""

    def __init__(self, config: AgentConfig, stop: StopRequest, heartbeat: Heartbeat, shipper: LogShipper) -> None:
        self._config, self._stop, self._heartbeat, self._shipper = config, stop, heartbeat, shipper
        self._process: UserProcess | None = None
        self._mirrors = StdoutMirrors(config.echo)
        self.seconds = 0.0
        #: Why there are no variables or connections; said in the task's log once the task speaks of them.
        self.withheld: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int | None:
        """How the process ended, negative for a signal; None when it did not (yet)."""
        process = self._process
        return process.exit_code if process is not None and process.exited.done() else None

    def return_value(self, directory: Path) -> bytes | None:
        """The value that the process wrote. Raises XComRejected for one that cannot be stored."""
        return read_return_value(directory / "return_value.json")

    async def run(self, command: Command, timeout_seconds: int) -> Outcome:
        """Run the command to its end; never raises for anything the command does."""
        self._shipper.add(AGENT_STREAM, "task started")
        started, watch = time.monotonic(), OomWatch(linux.oom_kills)
        try:
            self._process = UserProcess(command.argv, command.env, command.stdin)
        except OSError as error:
            return _cannot_execute(command.argv[0], error)
        await self._process.read_output(self._stdout, self._stderr, self._shipper.throttled)
        watching = asyncio.create_task(watch.run())
        try:
            stopped = await self._until_end(self._process, timeout_seconds)
        finally:
            watching.cancel()
        await self._process.finish()
        self.seconds = time.monotonic() - started
        await self._mirrors.close()
        exit_code = self._process.exit_code
        if stopped:
            return await self._stopped_outcome(exit_code)
        named = read_reason(Path(command.env["LEOFLOW_REASON_PATH"]))
        return outcome_of_exit(exit_code, named, watch.killed, watch.outlived)

    async def _until_end(self, process: UserProcess, timeout_seconds: int) -> bool:
        """Wait for the end; True when we brought it about."""
        stopping = asyncio.create_task(self._stop.wait())
        either: set[asyncio.Future[Any]] = {process.exited, stopping}
        await asyncio.wait(either, timeout=timeout_seconds or None, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if process.exited.done():
            return False
        self._stop.ask(FailureReason.TIMEOUT, f"the task ran longer than {timeout_seconds} s")
        self._shipper.add(AGENT_STREAM, f"stopping the task: {self._stop.message}", pb.LOG_LEVEL_WARN)
        await process.terminate(self._config.kill_grace_seconds)
        return True

    async def _stopped_outcome(self, exit_code: int) -> Outcome:
        """An interrupted task never ends as success, whatever its exit code says."""
        await self._heartbeat.explain_interruption()
        reason = self._stop.reason or FailureReason.INTERRUPTED
        return Outcome.failed(reason, self._stop.message, shell_exit_code(exit_code))

    def mention(self, text: str) -> None:
        """Say what was withheld when the task uses it: a line, or its command, names such a variable."""
        if self.withheld and ("AIRFLOW_VAR_" in text or "AIRFLOW_CONN_" in text):
            for warning in self.withheld:
                self._shipper.add(AGENT_STREAM, warning, pb.LOG_LEVEL_WARN)
            self.withheld = ()

    def _stdout(self, line: str) -> None:
        self._shipper.add("stdout", line, pb.LOG_LEVEL_INFO)
        self.mention(line)
        self._mirrors.stdout.line(line)

    def _stderr(self, line: str) -> None:
        self._shipper.add("stderr", line, pb.LOG_LEVEL_ERROR)
        self.mention(line)
        self._mirrors.stderr.line(line)


def _cannot_execute(program: str, error: OSError) -> Outcome:
    if error.errno == errno.E2BIG:
        return Outcome.failed(
            FailureReason.INVALID_SPEC, "the environment is too large for Linux: put large values into an XCom or file"
        )
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return Outcome.failed(FailureReason.LAUNCH_FAILED, f"cannot start {program}: {error.strerror}")
    return Outcome.failed(
        FailureReason.COMMAND_NOT_FOUND, f"cannot execute {program}: {error.strerror}", _COMMAND_NOT_FOUND
    )
