"""Every error of ours has a status, and no other error has."""

from __future__ import annotations

import grpc
import pytest

from leoflow_celery import errors
from leoflow_celery.gateway.rpc import InvalidArgument, NotPermitted, NotPossible, refusal_of
from leoflow_celery.protocol.service import REFUSED_KEY

CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidToken("expired", "x"), CODE.UNAUTHENTICATED),
        (errors.Fenced("x"), CODE.ABORTED),
        (errors.DatabaseUnavailable("x"), CODE.UNAVAILABLE),
        (errors.NotFound("x"), CODE.NOT_FOUND),
        (errors.DecryptionFailed("x"), CODE.FAILED_PRECONDITION),
        (InvalidArgument("x"), CODE.INVALID_ARGUMENT),
        (NotPermitted("x"), CODE.PERMISSION_DENIED),
        (NotPossible("x"), CODE.FAILED_PRECONDITION),
    ],
)
def test_statuses(error: Exception, code: grpc.StatusCode) -> None:
    refusal = refusal_of(error)
    assert refusal is not None
    assert (refusal.code, refusal.text, refusal.trailing) == (code, "x", ())


def test_a_refused_claim_says_why() -> None:
    refusal = refusal_of(errors.ClaimRefused("held", "by another"))
    assert refusal is not None
    assert (refusal.code, refusal.trailing) == (CODE.FAILED_PRECONDITION, ((REFUSED_KEY, "held"),))


def test_what_nobody_expected_has_none() -> None:
    assert refusal_of(KeyError("x")) is None
