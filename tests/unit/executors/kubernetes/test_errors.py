"""Every answer an API server can give becomes a launch error, and the right kind of it."""

from __future__ import annotations

import json

import pytest

from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason
from leoflow_celery.errors import PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.kubernetes.errors import (
    AlreadyExists,
    ApiError,
    Expired,
    NotFound,
    QuotaExceeded,
    Unreachable,
    api_error,
    to_launch_error,
)


def answer(status: int, reason: str, message: str = "no", **details: object) -> ApiError:
    body = {"kind": "Status", "status": "Failure", "code": status, "reason": reason, "message": message}
    return api_error(status, json.dumps({**body, "details": details}).encode())


@pytest.mark.parametrize("status", [0, *range(300, 600)])
def test_the_mapping_is_total(status: int) -> None:
    error = ApiError(status, "Whatever", "the server's own words")
    launch_error = to_launch_error(error)
    assert isinstance(launch_error, TransientLaunchError | PermanentLaunchError)
    assert "the server's own words" in launch_error.message
    is_config = CLASS_OF[FailureReason(launch_error.reason)] is FailureClass.CONFIG
    assert is_config == isinstance(launch_error, PermanentLaunchError)
    assert error.kind


@pytest.mark.parametrize("status", [0, 401, 408, 409, 410, 429, 500, 502, 503, 504])
def test_what_others_can_change_is_tried_again(status: int) -> None:
    assert isinstance(to_launch_error(ApiError(status, "", "m")), TransientLaunchError)


@pytest.mark.parametrize("status", [400, 403, 404, 405, 413, 415, 422])
def test_what_only_the_request_can_change_is_not(status: int) -> None:
    assert isinstance(to_launch_error(ApiError(status, "", "m")), PermanentLaunchError)


def test_a_used_up_quota_frees_up_again() -> None:
    message = 'pods "a" is forbidden: exceeded quota: few, requested: pods=1, used: pods=5, limited: pods=5'
    error = answer(403, "Forbidden", message)
    assert isinstance(error, QuotaExceeded)
    launch_error = to_launch_error(error)
    assert isinstance(launch_error, TransientLaunchError)
    assert message in launch_error.message
    assert launch_error.reason == FailureReason.QUEUED_TIMEOUT  # it waits in line, should it be given up


def test_a_plugin_without_a_token_makes_us_nobody_for_a_while() -> None:
    message = 'pods is forbidden: User "system:anonymous" cannot create resource "pods"'
    error = answer(403, "Forbidden", message)
    assert error.is_unauthenticated
    assert isinstance(to_launch_error(error), TransientLaunchError)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (answer(403, "Forbidden"), FailureReason.FORBIDDEN),
        (answer(404, "NotFound", kind="namespaces", name="nowhere"), FailureReason.NAMESPACE_NOT_FOUND),
        (answer(404, "NotFound", kind="pods"), FailureReason.INVALID_SPEC),
        (answer(422, "Invalid", causes=[{"field": "spec.containers[0].image"}]), FailureReason.INVALID_IMAGE),
        (
            answer(422, "Invalid", causes=[{"field": "spec.containers[0].resources.requests"}]),
            FailureReason.INVALID_QUANTITY,
        ),
        (answer(400, "BadRequest", "v1.Pod: quantities must match the regular"), FailureReason.INVALID_QUANTITY),
        (answer(422, "Invalid", causes=[{"field": "spec.nodeSelector"}]), FailureReason.INVALID_SPEC),
    ],
)
def test_a_permanent_error_has_its_reason(error: ApiError, reason: FailureReason) -> None:
    assert to_launch_error(error).reason == reason


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        (404, "NotFound", NotFound),
        (409, "AlreadyExists", AlreadyExists),
        (409, "Conflict", ApiError),
        (410, "Expired", Expired),
        (410, "Gone", Expired),
        (500, "InternalError", ApiError),
    ],
)
def test_an_answer_has_its_type(status: int, reason: str, kind: type[ApiError]) -> None:
    assert type(answer(status, reason)) is kind


@pytest.mark.parametrize(
    ("header", "body", "seconds"),
    [("7", b"", 7.0), (None, b'{"details": {"retryAfterSeconds": 3}}', 3.0), (None, b"", None), ("soon", b"", None)],
)
def test_the_servers_wish_to_wait_is_kept(header: str | None, body: bytes, seconds: float | None) -> None:
    launch_error = to_launch_error(api_error(429, body, header))
    assert isinstance(launch_error, TransientLaunchError)
    assert launch_error.retry_after_seconds == seconds


@pytest.mark.parametrize("body", [b"", b"<html>502 Bad Gateway</html>", b"[1]", b'{"message": null}', b"\xff\xfe"])
def test_a_proxys_answer_is_an_error_too(body: bytes) -> None:
    error = api_error(502, body)
    assert error.message
    assert isinstance(to_launch_error(error), TransientLaunchError)


def test_no_answer_says_which_kind() -> None:
    error = Unreachable("timeout", "https://api did not answer in time")
    assert (error.status, error.kind, str(error)) == (0, "timeout", "https://api did not answer in time")
