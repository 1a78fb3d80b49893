"""What the Engine's refusals mean: typed errors, and the one mapping to launch errors.

::

    EngineError              any call that did not succeed; has the HTTP status and the Engine's own message
    ├── NotFound             404
    │   └── ImageMissing     the Engine does not have the image
    ├── Conflict             409: a name in use, a volume in use, a removal under way
    ├── PullFailed           the registry's answer, or that there was none
    └── Unreachable          no answer at all, or only a part of one
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import LaunchError, LeoflowError, PermanentLaunchError, TransientLaunchError


class EngineError(LeoflowError):
    """A call failed. ``status`` is the HTTP status (0: no answer), ``message`` the Engine's own text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message

    def __str__(self) -> str:
        return self.message


class NotFound(EngineError):
    """There is no such container, volume or network."""


class ImageMissing(NotFound):
    """The Engine does not have the image."""


class Conflict(EngineError):
    """The name is taken, or the thing is in use."""


class PullFailed(EngineError):
    """The image could not be pulled; ``final`` when pulling again cannot help."""

    @property
    def final(self) -> bool:
        text = self.message.lower()
        return self.status in (401, 403, 404) or any(words in text for words in _FINAL_PULL_WORDS)


class Unreachable(EngineError):
    """No answer, or only a part of one. Whether the call took effect is not known."""

    def __init__(self, message: str) -> None:
        super().__init__(0, message)


_FINAL_PULL_WORDS = (
    "pull access denied",
    "manifest unknown",
    "repository does not exist",
    "name unknown",
    "no matching manifest",
    "requested access to the resource is denied",
    "unauthorized:",
)
#: Words of the Engine → reason, the first that fits. They are stable: scripts all over the world look for them.
_REASONS: tuple[tuple[tuple[str, ...], FailureReason], ...] = (
    (("invalid reference format", "invalid tag format", "no command specified"), FailureReason.INVALID_IMAGE),
    (("bind source path does not exist",), FailureReason.UNKNOWN_SECRET),
    (("memory", "cpu"), FailureReason.INVALID_QUANTITY),
)
#: The runtime's words when the image has no such program, or it may not be executed.
_NO_PROGRAM = (
    "executable file not found",
    "no such file or directory: unknown",
    "permission denied: unknown",
    "is a directory: unknown",
)
_WRONG_MACHINE = "exec format error"
#: The Engine's words when the image contradicts itself: its USER, its WORKDIR, a file where a directory is mounted.
_BROKEN_IMAGE = (
    "unable to find user",
    "unable to find group",
    "uids and gids must be in range",
    "no matching entries in passwd file",
    "no matching entries in group file",
    "cannot mkdir:",
    "is not directory",
)
#: What the runtime prints in the container when the kernel refuses its program: all that such a container ever says.
_REFUSED = re.compile(
    r"(?:standard_init_linux\.go:\d+: )?exec (?P<program>\S+|user process caused):? \"?"
    r"(?P<why>exec format error|no such file or directory|permission denied|not a directory|is a directory)\"?"
)


def to_launch_error(error: EngineError) -> LaunchError:
    """Whether starting the attempt may work later, or never will. The Engine's own message is kept verbatim."""
    text = error.message.lower()
    if isinstance(error, PullFailed):
        kind = PermanentLaunchError if error.final else TransientLaunchError
        return kind(FailureReason.IMAGE_PULL_FAILED, error.message)
    if any(words in text for words in _BROKEN_IMAGE):
        message = f"image: {error.message}; correct the image: its USER, its WORKDIR, and files where we mount"
        return PermanentLaunchError(FailureReason.INVALID_IMAGE, message)
    if "oci runtime" in text and _WRONG_MACHINE in text:
        return PermanentLaunchError(FailureReason.INVALID_IMAGE, f"image: {error.message}; {_MACHINE_FIX}")
    if "oci runtime" in text and "exec" in text and any(words in text for words in _NO_PROGRAM):
        return PermanentLaunchError(FailureReason.COMMAND_NOT_FOUND, error.message)
    if isinstance(error, NotFound) and "network" in text and "no such container" not in text:
        message = f"{error.message}; create it on this host, or see LEOFLOW_DOCKER_NETWORK"
        return PermanentLaunchError(FailureReason.CONTAINER_CREATE_FAILED, message)
    if "could not select device driver" in text:
        message = f"docker_override.device_requests: {error.message}; no GPU driver is installed on this host"
        return PermanentLaunchError(FailureReason.CONTAINER_CREATE_FAILED, message)
    if "setting rlimit" in text:
        message = f"docker_override.ulimits: {error.message}; ask for less"
        return PermanentLaunchError(FailureReason.INVALID_SPEC, message)
    if error.status in (400, 422):
        return PermanentLaunchError(_reason(text), error.message + _FIXES.get(_reason(text), ""))
    if error.status == 403:
        return PermanentLaunchError(FailureReason.FORBIDDEN, error.message)
    return TransientLaunchError(FailureReason.LAUNCH_FAILED, error.message)


def refused_program(log_tail: Sequence[str]) -> tuple[FailureReason, str] | None:
    """Why the kernel did not run the image's program, when that is all that a container has said."""
    lines = [line.strip() for line in log_tail if line.strip()]
    found = _REFUSED.fullmatch(lines[0]) if len(lines) == 1 else None
    if found is None:
        return None
    if found["why"] == _WRONG_MACHINE:
        return FailureReason.INVALID_IMAGE, f"image: its program cannot be run ({lines[0]}); {_MACHINE_FIX}"
    message = f"image: its program cannot be run ({lines[0]}); correct its entrypoint, or the #! line of that script"
    return FailureReason.COMMAND_NOT_FOUND, message


def _reason(text: str) -> FailureReason:
    found = (reason for words, reason in _REASONS if any(word in text for word in words))
    return next(found, FailureReason.INVALID_SPEC)


_MACHINE_FIX = (
    "use an image built for this host's architecture, whose entrypoint is a program or a script with a #! line"
)
_FIXES = {
    FailureReason.UNKNOWN_SECRET: "; put a directory of that name below LEOFLOW_DOCKER_SECRETS_DIR on every host",
}
