"""What an agent on this host is told: the launch, and of the worker's own environment only what is no secret."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from leoflow_celery.domain.attempt import digest
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.core import run_ids
from leoflow_celery.executors.subprocess.directory import Account, AttemptDirectory

#: Marks every process that descends from an attempt, so that none is left when its agent was killed.
ATTEMPT_MARK = "LEOFLOW_ATTEMPT_MARK"

_KEPT = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TERM"),
        *("VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"),
        *("LEOFLOW_PYTHON", "LEOFLOW_AGENT_INSECURE", "LEOFLOW_AGENT_TLS_CA", "LEOFLOW_AGENT_SPOOL_BYTES"),
        *("LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS", "LEOFLOW_AGENT_KILL_GRACE_SECONDS"),
        "LEOFLOW_AGENT_HEARTBEAT_SECONDS",
    }
)
#: A process of another user takes a fork in the middle of gRPC's threads, and gRPC's handlers crash the child. It reads
#: this once, in the fork server. No agent uses gRPC on both sides of a fork, and tasks do not see it.
_NO_FORK_HANDLERS = {"GRPC_ENABLE_FORK_SUPPORT": "0"}


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of the worker's environment that agents may see. Keys and URLs of the worker are not among it."""
    kept = {name: value for name, value in environ.items() if name in _KEPT or name.startswith("LC_")}
    return {**kept, **_NO_FORK_HANDLERS}


def agent_environment(
    launch: LaunchSpec,
    directory: AttemptDirectory,
    root: Path,
    venvs_root: str,
    mark: str,
    environ: Mapping[str, str],
    account: Account | None = None,
) -> dict[str, str]:
    """The whole environment of one agent; ``account`` is whom its task runs as."""
    env = {
        **inherited(environ),
        **(account.environment if account else {}),
        **launch.agent_environment(launch.request.execution.termination_grace_seconds),
    }
    env["LEOFLOW_TERMINATION_LOG"] = str(directory.termination_log)
    # So that inputs and results of the task go with the attempt's directory even when the agent was killed.
    env["LEOFLOW_AGENT_WORK_DIR"] = str(directory.path)
    env["LEOFLOW_ATTEMPT_NAME"] = launch.name
    env[ATTEMPT_MARK] = mark
    if python := dag_python(venvs_root, launch.request.dag_id):
        env["LEOFLOW_PYTHON"] = str(python)
    if launch.request.source:
        env["LEOFLOW_SOURCE_DIR"] = str(directory.source_dir)
    if launch.request.staging_claim:
        env["LEOFLOW_STAGING_DIR"] = str(
            staging_dir(root, launch.request.staging_claim, *run_ids(launch.request).values())
        )
    return env


def dag_python(venvs_root: str, dag_id: str) -> Path | None:
    """``<venvs_root>/<dag_id>/bin/python`` when it is there."""
    if not venvs_root:
        return None
    python = Path(venvs_root) / dag_id / "bin" / "python"
    return python if python.exists() else None


def staging_dir(root: Path, claim: str, *run: str) -> Path:
    """The directory all tasks of a run share on this host; runs that name the same claim share nothing.

    A claim that is no plain name becomes one.
    """
    plain = claim not in (".", "..") and Path(claim).name == claim
    name = claim if plain else digest(claim, length=32)
    # A file's name ends at 255 bytes.
    return root / "staging" / (f"{name[:200]}-{digest(claim, *run, length=16)}" if run else name)
