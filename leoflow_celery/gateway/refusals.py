"""What a call is refused with: every error as a gRPC status, in one place."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from leoflow_celery.errors import (
    ClaimRefused,
    DecryptionFailed,
    Fenced,
    InvalidToken,
    LeoflowError,
    NotFound,
    Unavailable,
)
from leoflow_celery.protocol.service import REFUSED_KEY


class InvalidArgument(LeoflowError):
    """A call holds a value that can never work."""


class NotPermitted(LeoflowError):
    """The caller may not have what it asks for."""


class NotPossible(LeoflowError):
    """The call cannot work as the system is set up; the text names the setting or the secret."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status with its text and trailing metadata."""

    code: grpc.StatusCode
    text: str
    trailing: tuple[tuple[str, str], ...] = ()


_CODE_OF: tuple[tuple[type[LeoflowError], grpc.StatusCode], ...] = (
    (InvalidToken, grpc.StatusCode.UNAUTHENTICATED),
    (Fenced, grpc.StatusCode.ABORTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (NotPermitted, grpc.StatusCode.PERMISSION_DENIED),
    (NotPossible, grpc.StatusCode.FAILED_PRECONDITION),
    (DecryptionFailed, grpc.StatusCode.FAILED_PRECONDITION),
)


def refusal_of(error: Exception) -> Refusal | None:
    """The status of an error we raise on purpose; None for one that nobody expected."""
    if isinstance(error, ClaimRefused):
        return Refusal(grpc.StatusCode.FAILED_PRECONDITION, str(error), ((REFUSED_KEY, error.why),))
    return next((Refusal(code, str(error)) for kind, code in _CODE_OF if isinstance(error, kind)), None)
