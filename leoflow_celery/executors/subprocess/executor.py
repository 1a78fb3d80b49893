"""``SubprocessExecutor``: starts agents on this host and returns; what becomes of them is settled in the background."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.base import FailureReporter, Launched, LaunchSpec
from leoflow_celery.executors.core import run_ids
from leoflow_celery.executors.subprocess.directory import (
    Account,
    AttemptDirectory,
    Slots,
    live_pid,
    state_root,
    system_id,
)
from leoflow_celery.executors.subprocess.environment import agent_environment, staging_dir
from leoflow_celery.executors.subprocess.exit_handler import Exited, Settler
from leoflow_celery.executors.subprocess.processes import Processes, earlier_names
from leoflow_celery.executors.subprocess.reaper import Reaper
from leoflow_celery.executors.subprocess.spawners import AgentStart, ExecSpawner, ForkSpawner, Spawner
from leoflow_celery.settings import SubprocessSettings

log = logging.getLogger(__name__)

_PERMANENT = {errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ENOEXEC, errno.ELOOP}
_CLOSE_SECONDS = 5.0
#: What an earlier launch that lives may take to end by itself, and then when it is asked to.
_END_SECONDS, _STOP_SECONDS = 2.0, 10.0
_POLL_SECONDS = 0.05
#: After its time and grace an attempt that still runs is killed: its agent does not look at the time.
_TIMEOUT_ALLOWANCE_SECONDS = 60.0
_SWEEP_SECONDS = 60.0


class SubprocessExecutor:
    """Runs agents as host processes, in a session of their own, so that they survive the worker.

    ``reporter`` hears of every attempt that ended without its agent saying so, from a thread of the executor.
    """

    def __init__(
        self,
        settings: SubprocessSettings,
        reporter: FailureReporter | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        secrets: Sequence[str] = (),
    ) -> None:
        """Settle what a killed worker left behind.

        ``secrets`` are this worker's own, and its successor's, newest first: the keys that sign records come from them.

        Raises:
            ConfigurationError: the state directory or the user that tasks run as cannot be used.
        """
        self._account = Account.of(settings)
        who = f"user {settings.user!r}" if self._account else "this user"
        log.warning(
            f"subprocess.no_isolation: user code runs as {who} on this host, without any isolation; "
            "the subprocess executor is for development only"
        )
        # A foreign agent signs nothing.
        self._secrets = () if settings.agent_path else tuple(secrets)
        self._settings, self._environ = settings, dict(os.environ if environ is None else environ)
        self._root = state_root(settings.state_dir)
        self._processes = Processes(system_id(self._root))
        if self._account:
            self._account.open_way(self._root)
        self._reaper, self._settler = Reaper(), Settler(self._processes, reporter, self._record_keys)
        self._slots = Slots(self._root, settings.max_running)
        self._spawner = self._make_spawner()
        self._sweep_regularly()

    def _sweep_regularly(self) -> None:
        self._settler.sweep_soon(self._root)
        self._reaper.call_later(_SWEEP_SECONDS, self._sweep_regularly)

    def _make_spawner(self) -> Spawner:
        if self._settings.agent_path or not self._settings.preload_agent:
            return ExecSpawner(self._reaper, self._settings.agent_path)
        # What this user imported is not run as another.
        preload = () if self._account else self._settings.preload
        return ForkSpawner(self._reaper, self._environ, self._root / "forkserver.log", preload)

    def execute(self, launch: LaunchSpec) -> Launched:
        """Start the attempt's agent; an attempt that is alive here, or ended here unreported, is not started again.

        Raises:
            HostFull: it runs as many as it may.
            TransientLaunchError: the host has no process or memory to spare.
            PermanentLaunchError: the agent cannot be executed (``command_not_found``).
        """
        self._end_earlier(launch)
        try:
            directory = AttemptDirectory.acquire_unless_alive(self._path(launch.name), self._acquire)
        except TimeoutError as error:
            raise TransientLaunchError(FailureReason.LAUNCH_FAILED, str(error)) from error
        if directory is None:
            return Launched(launch.name, already=True)
        started = threading.Event()
        try:
            return self._execute(launch, directory, started)
        finally:
            started.set()

    def room(self) -> int:
        """How many more attempts would start on this host now."""
        return self._slots.free()

    def _acquire(self, path: Path) -> AttemptDirectory | None:
        with self._slots.admission(path):
            return AttemptDirectory.acquire(path)

    def _end_earlier(self, launch: LaunchSpec) -> None:
        """Return when nothing of an earlier launch or try of the task instance runs on this host.

        One whose agent lives is left a moment to end by itself, then asked to, then killed.

        Raises:
            TransientLaunchError: something survives even SIGKILL. It is waited for: two launches never overlap.
        """
        names = earlier_names(launch.attempt, launch.request.dag_id, launch.request.task_id)
        for signalled, patience_seconds in ((0, _END_SECONDS), (signal.SIGTERM, _STOP_SECONDS)):
            if not names or not any(self._processes.of(*names)):
                return
            agents = [pid for name in names if (pid := live_pid(self._path(name))) is not None]
            deadline = time.monotonic() + patience_seconds
            for pid in agents:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signalled)
            while time.monotonic() < deadline and any(live_pid(self._path(name)) in agents for name in names):
                time.sleep(_POLL_SECONDS)
        if not self._processes.kill(*names):
            left = ", ".join(map(str, self._processes.of(*names)))
            raise TransientLaunchError(
                FailureReason.LAUNCH_FAILED,
                f"an earlier launch of this task still has processes on this host that SIGKILL did not end: {left}",
            )

    def _execute(self, launch: LaunchSpec, directory: AttemptDirectory, started: threading.Event) -> Launched:
        try:
            if directory.attempt() is not None and self._settler.settle_leftover(directory):
                directory.remove()
                return Launched(launch.name, already=True)
            pid = self._start(launch, directory, started)
        except TimeoutError as error:
            # It may have started all the same: then it holds the lock and the next delivery finds it alive.
            directory.release()
            raise TransientLaunchError(FailureReason.LAUNCH_FAILED, "the fork server did not answer in time") from error
        except OSError as error:
            directory.remove()
            raise self._launch_error(error) from error
        directory.release()
        return Launched(launch.name, details={"pid": str(pid), "directory": str(directory.path)})

    def cancel(self, name: str, grace_seconds: float) -> None:
        """SIGTERM to the attempt's agent now, SIGKILL to everything of it after the grace. Returns at once."""
        pid = live_pid(self._path(name))
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        self._reaper.call_later(grace_seconds, lambda: self._kill(name, pid))

    def sweep(self) -> None:
        """Settle and remove attempts whose agents ended unseen: their worker was killed. Also done every minute."""
        self._settler.sweep(self._root)

    def close(self) -> None:
        """Stop watching. Agents go on; the next executor on this state directory settles them."""
        self._spawner.close()
        self._reaper.close()
        self._settler.close(_CLOSE_SECONDS)

    def _start(self, launch: LaunchSpec, directory: AttemptDirectory, started: threading.Event) -> int:
        if self._settings.work_dir and not os.path.isdir(self._settings.work_dir):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._settings.work_dir)
        directory.prepare(launch.attempt, launch.request.source, self._account)
        if launch.request.staging_claim:
            staging = staging_dir(self._root, launch.request.staging_claim, *run_ids(launch.request).values())
            staging.mkdir(parents=True, exist_ok=True)
            if self._account:
                os.chown(staging, self._account.uid, self._account.gid)
                staging.chmod(0o700)
        mark, limit = self._processes.variable(launch.name), self._processes.limit(launch.name)
        env = agent_environment(
            launch, directory, self._root, self._settings.venvs_root, mark, self._environ, self._account
        )
        if keys := self._record_keys(launch.name):
            env["LEOFLOW_AGENT_RECORD_KEY"] = keys[0]
        start = AgentStart(env, self._settings.work_dir, directory.agent_log, directory.lock, limit)
        pid = self._spawner.start(
            start, lambda code: self._settler.exited(Exited(directory.path, launch.attempt, code, started))
        )
        directory.write_pid(pid)
        if seconds := launch.request.timeout_seconds:
            # An agent stops its task itself, and says so; this is for one that does not.
            grace = launch.request.execution.termination_grace_seconds or 0
            late = seconds + _TIMEOUT_ALLOWANCE_SECONDS + grace
            self._reaper.call_later(late, lambda: self._overran(launch, pid))
        return pid

    def _overran(self, launch: LaunchSpec, pid: int) -> None:
        if live_pid(self._path(launch.name)) == pid:
            self._settler.overran(launch.name, launch.request.timeout_seconds)
            self._kill(launch.name, pid)

    def _kill(self, name: str, pid: int) -> None:
        if live_pid(self._path(name)) == pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            self._processes.kill(name)

    def _record_keys(self, name: str) -> list[str]:
        """Those that sign the record of an attempt: no task knows them, and each is good for this launch alone."""
        text = f"leoflow.termination/{name}".encode()
        return [hmac.new(secret.encode(), text, hashlib.sha256).hexdigest() for secret in self._secrets]

    def _path(self, name: str) -> Path:
        return self._root / "attempts" / name

    def _launch_error(self, error: OSError) -> TransientLaunchError | PermanentLaunchError:
        if error.errno in _PERMANENT:
            what = error.filename or self._settings.agent_path or "the agent"
            message = f"cannot execute {what}: {error.strerror}; see LEOFLOW_SUBPROCESS_AGENT_PATH and _WORK_DIR"
            return PermanentLaunchError(FailureReason.COMMAND_NOT_FOUND, message)
        return TransientLaunchError(FailureReason.LAUNCH_FAILED, f"cannot start the agent: {error}")
