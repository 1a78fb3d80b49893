"""What the Engine's refusals mean for a launch. The messages are those of Engine 20.10."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.docker.errors import (
    Conflict,
    EngineError,
    NotFound,
    PullFailed,
    Unreachable,
    to_launch_error,
)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (Unreachable("away"), TransientLaunchError, "launch_failed"),
        (Conflict(409, "removal is already in progress"), TransientLaunchError, "launch_failed"),
        (NotFound(404, "No such container: x"), TransientLaunchError, "launch_failed"),
        (NotFound(404, "No such container: leoflow-network-check-1"), TransientLaunchError, "launch_failed"),
        (EngineError(500, "no space left on device"), TransientLaunchError, "launch_failed"),
        (NotFound(404, "network tasks not found"), PermanentLaunchError, "container_create_failed"),
        (EngineError(403, "authorization denied by plugin"), PermanentLaunchError, "forbidden"),
        (EngineError(400, "invalid reference format"), PermanentLaunchError, "invalid_image"),
        (EngineError(400, "invalid tag format"), PermanentLaunchError, "invalid_image"),
        (EngineError(400, "No command specified"), PermanentLaunchError, "invalid_image"),
        (EngineError(400, "Minimum memory limit allowed is 6MB"), PermanentLaunchError, "invalid_quantity"),
        (EngineError(400, "bind source path does not exist: /s"), PermanentLaunchError, "unknown_secret"),
        (EngineError(400, "invalid mount path: 'x'"), PermanentLaunchError, "invalid_spec"),
        (
            EngineError(400, 'OCI runtime create failed: exec: "/x": executable file not found in $PATH: unknown'),
            PermanentLaunchError,
            "command_not_found",
        ),
        (
            EngineError(500, "OCI runtime create failed: cgroup setup: device or resource busy: unknown"),
            TransientLaunchError,
            "launch_failed",
        ),
        (
            EngineError(500, "OCI runtime create failed: write cgroup.procs: permission denied: unknown"),
            TransientLaunchError,
            "launch_failed",
        ),
        (
            EngineError(400, 'OCI runtime create failed: exec: "/etc/passwd": permission denied: unknown'),
            PermanentLaunchError,
            "command_not_found",
        ),
        (EngineError(400, "OCI runtime create failed: exec format error"), PermanentLaunchError, "invalid_image"),
        (
            EngineError(500, "unable to find user x: no matching entries in passwd file"),
            PermanentLaunchError,
            "invalid_image",
        ),
        (EngineError(500, "Cannot mkdir: /etc/passwd is not a directory"), PermanentLaunchError, "invalid_image"),
        (PullFailed(500, "dial tcp: connection refused"), TransientLaunchError, "image_pull_failed"),
        (PullFailed(0, "toomanyrequests: rate limit"), TransientLaunchError, "image_pull_failed"),
        (PullFailed(404, "pull access denied for x"), PermanentLaunchError, "image_pull_failed"),
        (PullFailed(0, "manifest unknown"), PermanentLaunchError, "image_pull_failed"),
        (PullFailed(500, "unauthorized: authentication required"), PermanentLaunchError, "image_pull_failed"),
    ],
)
def test_every_refusal_has_its_meaning(error, kind, reason):
    launch_error = to_launch_error(error)
    assert type(launch_error) is kind
    assert launch_error.reason == FailureReason(reason)
    assert error.message in launch_error.message
