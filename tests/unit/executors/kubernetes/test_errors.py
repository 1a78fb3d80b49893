"""Every answer an API server can give becomes a launch error, and the right kind of it."""

from __future__ import annotations

import json

import pytest

from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason
from leoflow_celery.errors import PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.core import Confidential
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
    if isinstance(launch_error, PermanentLaunchError):
        assert CLASS_OF[FailureReason(launch_error.reason)] is FailureClass.CONFIG
    assert error.kind


@pytest.mark.parametrize("status", [0, 401, 408, 409, 410, 429, 500, 502, 503, 504])
def test_what_others_can_change_is_tried_again(status: int) -> None:
    assert isinstance(to_launch_error(ApiError(status, "", "m")), TransientLaunchError)


@pytest.mark.parametrize("status", [400, 403, 404, 405, 413, 415, 422])
def test_what_only_the_request_can_change_is_not(status: int) -> None:
    assert isinstance(to_launch_error(ApiError(status, "Refused", "m")), PermanentLaunchError)


#: Of real servers (1.20 to 1.33), each about us, the namespace or the server, and not about the pod.
MAY_PASS = [
    'pods is forbidden: User "w:a" cannot create resource "pods" in API group "" in the namespace "t"',
    'secrets is forbidden: User "w" cannot create resource "secrets" in API group "" in the namespace "t": RBAC: '
    'role.rbac.authorization.k8s.io "worker" not found',
    'pods "a" is forbidden: status unknown for quota: few, resources: requests.cpu',
    'pods "a" is forbidden: not yet ready to handle request',
    'pods "a" is forbidden: error looking up service account t/default: serviceaccount "default" not found',
]


@pytest.mark.parametrize("message", MAY_PASS)
def test_rights_quotas_and_namespaces_that_are_not_there_yet_are_waited_for_and_then_forbidden(message: str) -> None:
    launch_error = to_launch_error(answer(403, "Forbidden", message))
    assert isinstance(launch_error, TransientLaunchError)
    assert launch_error.reason == FailureReason.FORBIDDEN
    assert message in launch_error.message


@pytest.mark.parametrize(
    "message",
    [
        'pods "a" is forbidden: violates PodSecurity "restricted:latest": privileged (container "task" must not set …)',
        'pods "a" is forbidden: error looking up service account t/nobody: serviceaccount "nobody" not found',
        'pods "a" is forbidden: no PriorityClass with name urgent was found',
        'admission webhook "policy.example" denied the request: no',
    ],
)
def test_what_admission_says_of_the_pod_is_final(message: str) -> None:
    launch_error = to_launch_error(answer(403, "Forbidden", message))
    assert isinstance(launch_error, PermanentLaunchError)
    assert launch_error.reason == FailureReason.FORBIDDEN


def test_a_403_of_a_proxy_is_not_the_api_servers_last_word() -> None:
    launch_error = to_launch_error(api_error(403, b"<html>Forbidden by the firewall</html>"))
    assert isinstance(launch_error, TransientLaunchError)
    assert launch_error.reason == FailureReason.FORBIDDEN


def quota(requested: str, used: str, limited: str) -> ApiError:
    said = f"exceeded quota: few, requested: {requested}, used: {used}, limited: {limited}"
    return answer(403, "Forbidden", f'pods "a" is forbidden: {said}')


@pytest.mark.parametrize(
    ("requested", "used", "limited", "fits"),
    [
        ("requests.cpu=2", "requests.cpu=3", "requests.cpu=4", True),
        ("requests.cpu=5", "requests.cpu=0", "requests.cpu=4", False),
        ("requests.cpu=4", "requests.cpu=1m", "requests.cpu=4", True),
        ("cpu=500m,memory=2Gi", "cpu=0,memory=0", "cpu=4,memory=1536Mi", False),
        ("limits.memory=1Gi", "limits.memory=0", "limits.memory=1G", False),
        ("requests.nvidia.com/gpu=1", "requests.nvidia.com/gpu=0", "requests.nvidia.com/gpu=0", False),
        ("requests.storage=10Gi", "requests.storage=0", "requests.storage=5Gi", False),
        ("pods=1", "pods=0", "pods=0", True),
        ("count/pods=1", "count/pods=0", "count/pods=0", True),
        ("secrets=1", "secrets=0", "secrets=0", True),
        ("x.storageclass.storage.k8s.io/persistentvolumeclaims=1", "", "", True),
        ("cpu=lots", "cpu=0", "cpu=4", True),
    ],
)
def test_what_never_fits_into_a_quota_does_not_wait_for_it(requested: str, used: str, limited: str, fits: bool) -> None:
    launch_error = to_launch_error(quota(requested, used, limited))
    assert isinstance(launch_error, TransientLaunchError if fits else PermanentLaunchError)
    assert launch_error.reason == (FailureReason.QUEUED_TIMEOUT if fits else FailureReason.INVALID_QUANTITY)
    assert f"requested: {requested}" in launch_error.message


#: What a 1.20 API server says to a number where text belongs; newer ones quote no part of the body.
QUOTING = (
    'Pod in version "v1" cannot be handled as a Pod: v1.Pod.Spec: v1.PodSpec.Containers: []v1.Container: '
    'v1.Container.Env: []v1.EnvVar: v1.EnvVar.Value: ReadString: expects " or n, but found 5, error found in #10 byte '
    'of ...|,"value":5432}],"ima|..., bigger context ...|W","value":"s3cr3t-pass"},{"name":"N","value":5432}],"i|...'
)


def test_what_was_sent_in_confidence_is_in_no_part_of_an_error() -> None:
    details = {"causes": [{"field": "spec", "message": 'Invalid value: "s3cr3t-pass"'}]}
    error = answer(400, "BadRequest", f"{QUOTING}; s3cr3t-pass", **details)
    error.hide(Confidential(["s3cr3t-pass"]))
    launch_error = to_launch_error(error)
    for text in (
        str(error),
        repr(error),
        repr(error.args),
        repr(error.details),
        launch_error.message,
        repr(launch_error),
    ):
        assert "s3cr3t" not in text
    assert "v1.EnvVar.Value: ReadString" in launch_error.message
    assert launch_error.reason == FailureReason.INVALID_SPEC


def test_a_value_that_is_a_word_of_the_server_does_not_change_what_its_answer_means() -> None:
    error = answer(403, "Forbidden", MAY_PASS[0])
    error.hide(Confidential(["cannot", "User", "Forbidden", "resource"]))
    assert isinstance(to_launch_error(error), TransientLaunchError)
    assert "cannot" not in to_launch_error(error).message


@pytest.mark.parametrize(
    "error",
    [
        answer(404, "NotFound", kind="namespaces", name="nowhere"),
        answer(403, "Forbidden", "being terminated", causes=[{"reason": "NamespaceTerminating"}]),
    ],
)
def test_a_namespace_may_be_made_yet(error: ApiError) -> None:
    launch_error = to_launch_error(error)
    assert isinstance(launch_error, TransientLaunchError)
    assert launch_error.reason == FailureReason.NAMESPACE_NOT_FOUND


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
        (
            answer(403, "Forbidden", "maximum cpu usage per Container is 1, but limit is 2"),
            FailureReason.INVALID_QUANTITY,
        ),
        (answer(403, "Forbidden", "failed quota: q: must specify limits.cpu"), FailureReason.INVALID_QUANTITY),
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
