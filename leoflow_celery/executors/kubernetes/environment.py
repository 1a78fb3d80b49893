"""The environment of the container ``task``: what every agent is told, then the request's own variables.

The token and the request's variables are in a Secret that the pod owns, and the pod refers to it by name. Where no name
is given they are in the pod. A pod whose token is exchanged has none; its agent is told where to find what proves which
pod it is.
"""

from __future__ import annotations

import re
from typing import Any

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.core import Confidential

TERMINATION_LOG = "/dev/termination-log"
STAGING_DIR = "/staging"
CA_DIR = "/etc/leoflow/tls"
#: An empty directory of the pod, for the agent: user code tidies up /tmp, and the root may be read-only.
ATTEMPT_DIR = "/run/leoflow/attempt"
#: What every API version takes as the name of a variable and as a key of a Secret; others reach the user's process from
#: the control plane only.
_NAME = re.compile(r"(?!\.$|\.\.)[-._a-zA-Z][-._a-zA-Z0-9]{0,252}")
#: What Linux takes of one variable, name and NUL included. With a larger one nothing starts, not even the agent that
#: would say so.
_VARIABLE_BYTES = 131_072
#: The API's own default.
_GRACE_SECONDS = 30.0
_TOKEN = "LEOFLOW_AGENT_TOKEN"  # noqa: S105 - a variable's name
_TOKEN_PATH = "LEOFLOW_AGENT_TOKEN_PATH"  # noqa: S105 - as above
#: Where a pod's agent has its token from is for us to say, also when it has none.
RESERVED = frozenset({_TOKEN, _TOKEN_PATH})
#: A shorter argument is an option or the name of a program.
_TELLING_CHARACTERS = 8
#: Where the kubelet puts the service account's token that the agent exchanges.
IDENTITY_DIR, IDENTITY_FILE = "/var/run/secrets/leoflow", "token"


def agent_variables(
    launch: LaunchSpec, termination_grace_seconds: float = _GRACE_SECONDS, exchanged: bool = False
) -> dict[str, str]:
    """What only we decide, whatever a template, a request or an override says."""
    env = launch.agent_environment(termination_grace_seconds) | {
        "LEOFLOW_ATTEMPT_NAME": launch.name,
        "LEOFLOW_TERMINATION_LOG": TERMINATION_LOG,
        "LEOFLOW_AGENT_WORK_DIR": ATTEMPT_DIR,
        "LEOFLOW_AGENT_ECHO": "true",
        "LEOFLOW_AGENT_LEAVE_INTERRUPTION": "true",
    }
    if exchanged:
        del env[_TOKEN]
        env[_TOKEN_PATH] = f"{IDENTITY_DIR}/{IDENTITY_FILE}"
    if launch.request.agent_tls_ca_config_map:
        env |= {"LEOFLOW_AGENT_INSECURE": "false", "LEOFLOW_AGENT_TLS_CA": f"{CA_DIR}/ca.crt"}
    if launch.request.staging_claim:
        env["LEOFLOW_STAGING_DIR"] = STAGING_DIR
    return env


def secret_variables(launch: LaunchSpec, exchanged: bool = False) -> dict[str, str]:
    """The part that others may not read: the token, unless it is exchanged, and the request's variables."""
    ours = agent_variables(launch)
    reserved = ours.keys() | RESERVED
    theirs = {name: value for name, value in launch.request.env.items() if _fits(name, value) and name not in reserved}
    return theirs if exchanged else {_TOKEN: ours[_TOKEN], **theirs}


def _fits(name: str, value: str) -> bool:
    return _NAME.fullmatch(name) is not None and len(f"{name}={value}".encode()) < _VARIABLE_BYTES


def agent_entries(
    launch: LaunchSpec, spec: dict[str, Any], secret: str, exchanged: bool = False
) -> list[dict[str, Any]]:
    """``agent_variables`` as the API has them, for a pod with this ``spec``."""
    grace = spec.get("terminationGracePeriodSeconds")
    variables = agent_variables(launch, _GRACE_SECONDS if grace is None else float(grace), exchanged)
    return [
        _reference(name, secret, name) if secret and name == _TOKEN else _plain(name, value)
        for name, value in variables.items()
    ]


def request_entries(launch: LaunchSpec, secret: str) -> list[dict[str, Any]]:
    """The request's variables, and those that it takes from Secrets of its own."""
    values = secret_variables(launch, exchanged=True)
    own = [_reference(name, secret, name) if secret else _plain(name, value) for name, value in values.items()]
    return own + secret_entries(launch.request)


def confidential(launch: LaunchSpec, pod: dict[str, Any]) -> Confidential:
    """What of a pod and its Secret is nobody else's business: the token, each variable that is not ours, arguments.

    An API server quotes what it was sent. Whoever wrote a value (the request, its override, the template) sent it in
    confidence.
    """
    ours = agent_variables(launch).keys() - {_TOKEN}
    values: list[Any] = [launch.request.agent_token, *launch.request.env.values()]
    spec = pod.get("spec") or {}
    for container in (*spec.get("containers", ()), *spec.get("initContainers", ())):
        entries = [one for one in container.get("env") or () if isinstance(one, dict)]
        values += [one.get("value") for one in entries if one.get("name") not in ours]
        arguments = (*(container.get("command") or ()), *(container.get("args") or ()))
        values += [one for one in arguments if isinstance(one, str) and len(one) >= _TELLING_CHARACTERS]
    return Confidential(values)


def secret_of(container: dict[str, Any]) -> str:
    """The name of the Secret that a container has its token from; nothing when it has it in plain."""
    for one in container.get("env") or ():
        if one["name"] == _TOKEN:
            return str(one.get("valueFrom", {}).get("secretKeyRef", {}).get("name", ""))
    return ""


def secret_entries(request: TaskRequest) -> list[dict[str, Any]]:
    """The request's secrets with source ``k8s_secret``: ``secret/key``, or a key of the task secret.

    Raises:
        PermanentLaunchError: one names no Secret.
    """
    found = []
    for one in request.secrets:
        if one.source == "k8s_secret":
            secret, slash, key = (one.reference or one.name).partition("/")
            if not slash and not request.task_secret_name:
                raise PermanentLaunchError(
                    FailureReason.UNKNOWN_SECRET,
                    f"secrets: {one.name!r} names no Secret; write reference 'secret/key', or set task_secret_name",
                )
            found.append(
                _reference(one.name, secret, key) if slash else _reference(one.name, request.task_secret_name, secret)
            )
    return found


def _plain(name: str, value: str) -> dict[str, Any]:
    """The kubelet replaces ``$(NAME)`` in plain values, unless the dollar is doubled."""
    return {"name": name, "value": value.replace("$", "$$")}


def _reference(name: str, secret: str, key: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
