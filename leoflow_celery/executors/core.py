"""What the executors share: whose a pod or a container is, in its own words, and other people's words made safe.

The attempt can be rebuilt from the raw ids that annotations and Docker labels carry, so a reconcile needs no other
source. They are words all the same: whoever may create pods can write them. Where more is at stake than tidying up, a
``Voucher`` says it under seal.

A server quotes what it was sent, and what it was sent holds secrets: what comes back keeps the server's own words,
without any value that we sent in confidence, bounded, on plain lines.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol
from urllib.parse import quote

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.fields import printable
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import DecryptionFailed, PermanentLaunchError
from leoflow_celery.executors.base import LaunchSpec, Sealing

HIDDEN = "[hidden]"
#: A sentence and its causes. The longest useful one we saw has 1,100.
MAX_CHARACTERS = 2_000
#: A Go JSON decoder shows where it stopped, with what stands before and after: parts of our own body, cut anywhere.
_QUOTED_BODY = re.compile(
    r",? error found in #?\d+ byte of \.\.\.\|.*?\|\.\.\.(?:, bigger context \.\.\.\|.*?\|\.\.\.)?|\.\.\.\|.*?\|\.\.\.",
    re.DOTALL,
)
#: Shorter values (a digit, ``true``) are words of the language: hidden where they stand in quotes, and nowhere else.
_LEAST = 4
_CUT_MARK = r"(?:\.\.\.|…|\Z)"


class Confidential:
    """Values that were sent in confidence. Calling it with a text gives the text without them."""

    def __init__(self, values: Iterable[Any]) -> None:
        spellings: set[str] = set()
        for value in values:
            if value not in (None, ""):
                spellings |= _spellings(json.dumps(value) if isinstance(value, bool) else str(value))
        self._long = sorted((one for one in spellings if len(one) >= _LEAST), key=len, reverse=True)
        self._short = [one for one in spellings if len(one) < _LEAST]

    def __call__(self, text: str) -> str:
        text = _QUOTED_BODY.sub("", text)
        for value in self._long:
            text = text.replace(value, HIDDEN)
        for value in self._short:
            for mark in ('\\"', '"', "'", "`"):
                text = text.replace(f"{mark}{value}{mark}", f"{mark}{HIDDEN}{mark}")
        for value in self._long:
            text = _without_parts(text, value)
        text = printable(re.sub(r"\s*[\r\n]+\s*", " ", text).strip())
        return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 3]}..."

    def everywhere(self, data: Any) -> Any:
        """JSON-like data with each text in it made safe."""
        if isinstance(data, str):
            return self(data)
        if isinstance(data, list):
            return [self.everywhere(one) for one in data]
        return {key: self.everywhere(one) for key, one in data.items()} if isinstance(data, dict) else data


def _spellings(value: str) -> set[str]:
    """A value as it is, as JSON and Go quote it, as the kubelet's language, a Secret and a URL have it."""
    plain = {value, value.replace("$", "$$"), *(line for line in value.splitlines() if len(line) > _LEAST)}
    quoted = {json.dumps(one, ensure_ascii=ascii_only)[1:-1] for one in plain for ascii_only in (True, False)}
    # Go's JSON writes these three as escapes.
    escaped = {re.sub("[<>&]", lambda one: f"\\u{ord(one[0]):04x}", one) for one in quoted}
    encoded = base64.b64encode(value.encode(errors="surrogatepass")).decode()
    found = plain | quoted | escaped | ({encoded} if len(value) >= _LEAST else set())
    found |= {json.dumps(one)[1:-1] for one in quoted}  # a message that quotes another server's message
    if len(value) >= _LEAST:
        found.add(quote(value, safe="", errors="replace"))
    return found


def _without_parts(text: str, value: str) -> str:
    """Without the beginning or the end of a value that the server itself cut off."""
    for found in reversed(list(re.finditer(_CUT_MARK, text))):
        before = text[: found.start()]
        size = next((n for n in range(min(len(value), len(before)), _LEAST - 1, -1) if before.endswith(value[:n])), 0)
        if size:
            text = before[:-size] + HIDDEN + text[found.start() :]
    position = 0
    while (start := min((at for mark in ("...", "…") if (at := text.find(mark, position)) >= 0), default=-1)) >= 0:
        start += 3 if text.startswith("...", start) else 1
        rest = text[start:]
        size = next((n for n in range(min(len(value), len(rest)), _LEAST - 1, -1) if rest.startswith(value[-n:])), 0)
        if size:
            text = text[:start] + HIDDEN + rest[size:]
        position = start
    return text


PREFIX = "leoflow.io/"
#: The annotation with the voucher of a pod.
SEAL = f"{PREFIX}seal"
#: For whom a pod's service account token is that an agent exchanges.
AUDIENCE = "leoflow-agent"
_PURPOSE = "leoflow.pod"
_TASK_INSTANCE, _TRY, _LAUNCH = f"{PREFIX}task-instance-id", f"{PREFIX}try-number", f"{PREFIX}launch"


def raw_ids(launch: LaunchSpec) -> dict[str, str]:
    """The ids of an attempt as they are, by key."""
    request, attempt = launch.request, launch.attempt
    return {
        _TASK_INSTANCE: attempt.task_instance_id,
        _TRY: str(attempt.try_number),
        _LAUNCH: str(attempt.launch),
        f"{PREFIX}task-id": request.task_id,
        **run_ids(request),
    }


def run_ids(request: TaskRequest) -> dict[str, str]:
    """The ids of a run as they are, by key."""
    return {
        f"{PREFIX}dag-id": request.dag_id,
        f"{PREFIX}run-id": request.run_id,
        f"{PREFIX}tenant-id": request.tenant_id,
    }


def check_run(what: str, ids: Mapping[str, str], request: TaskRequest) -> None:
    """Refuse a staging volume that carries the ids of another run than the request's.

    Raises:
        PermanentLaunchError: names the volume, not its run.
    """
    if any(ids.get(key, own) != own for key, own in run_ids(request).items()):
        message = f"{what} belongs to another run; name the volume of run {request.run_id!r}, or one of its own"
        raise PermanentLaunchError(FailureReason.INVALID_SPEC, message)


def attempt_in(ids: Mapping[str, str]) -> AttemptId | None:
    """The attempt that such ids name, or None when they are not those of an attempt."""
    try:
        return AttemptId(ids[_TASK_INSTANCE], int(ids[_TRY]), int(ids[_LAUNCH]))
    except (KeyError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class PresentedPod:
    """The pod that somebody proved to be, as the cluster knows it."""

    namespace: str
    name: str
    uid: str
    annotations: Mapping[str, str]


class PodReviewer(Protocol):
    """Asks a cluster which pod a token was given to."""

    @property
    def namespace(self) -> str:
        """Where task pods live."""
        ...

    def pod_of(self, token: str) -> PresentedPod:
        """The pod in our namespace whose service account token this is.

        Raises:
            InvalidToken: no token of the cluster, or not for us, or its pod is gone.
            ClusterUnavailable: the API server did not answer, or does not let us ask.
        """
        ...

    def missing_rights(self) -> list[str]:
        """What the API server would not let us ask, as ``create tokenreviews``.

        Raises:
            ClusterUnavailable: it did not answer.
        """
        ...

    def close(self) -> None:
        """Close idle connections."""
        ...


@dataclass(frozen=True, slots=True)
class Voucher:
    """The word of a launch worker: I made this very pod, and for this attempt.

    The uid is the cluster's, and no second pod ever has it: copied to another pod the word is worth nothing.
    """

    attempt: AttemptId
    namespace: str
    name: str
    uid: str

    def sealed(self, sealing: Sealing) -> str:
        """The voucher as the pod's annotation has it."""
        return sealing.seal({"purpose": _PURPOSE, **asdict(self)})

    @classmethod
    def opened(cls, sealed: str, sealing: Sealing) -> Voucher | None:
        """The voucher again; None for a text that was not made as one with our keys."""
        try:
            found = sealing.open(sealed)
            if found["purpose"] != _PURPOSE:
                return None
            names = (str(found[name]) for name in ("namespace", "name", "uid"))
            return cls(AttemptId.from_json(found["attempt"]), *names)
        except (DecryptionFailed, KeyError, ValueError, TypeError):
            return None

    def is_of(self, pod: PresentedPod) -> bool:
        """Whether it speaks of this pod."""
        return (self.namespace, self.name, self.uid) == (pod.namespace, pod.name, pod.uid)
