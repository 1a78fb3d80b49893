"""The identity of an attempt and every external name derived from it.

An attempt is (task_instance_id, try_number, launch). ``try_number`` belongs to the scheduler's retries; ``launch``
starts at 1 and grows when *we* start the same try again. All names are functions of the attempt, so that a second
launch of the same attempt finds "name in use" instead of making a second pod.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass, replace
from typing import Any

#: The tenant of a system that has only one.
STANDARD_TENANT = "default"
#: Of a try and of a launch: more than anybody counts to, and a column holds it.
MAX_NUMBER = 1_000_000
#: The container of the user's code in a pod.
TASK_CONTAINER = "task"

_NAMESPACE = uuid.UUID("6f0b9c5e-4a55-5f0e-9d0a-1e0f5ca1ab1e")
#: The first digits of the Celery id of every try: no other message may be sent under such an id.
_TRY_ID_PREFIX = "1e0f10a7"
#: Of every staging volume that is named after its run.
STAGING_PREFIX = "leoflow-staging-"
_NAME_LIMIT = 63
_SUFFIX_HEX_DIGITS = 10


def text_in(value: Any, name: str, most_bytes: int = 255) -> str:
    """A text that somebody else wrote down, as every database takes it.

    Raises:
        ValueError: it is none: another type, too long, or with a NUL or half a surrogate pair.
    """
    if not isinstance(value, str) or len(value) > most_bytes or "\x00" in value:
        raise ValueError(f"{name} is not a text of at most {most_bytes} bytes without NUL")
    if len(value.encode()) > most_bytes:  # half a pair has no bytes, which is a ValueError too
        raise ValueError(f"{name} has more than {most_bytes} bytes")
    return value


def _number(value: Any, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_NUMBER:
        return value
    raise ValueError(f"{name} is not a whole number in 1..{MAX_NUMBER}")


@dataclass(frozen=True, slots=True)
class AttemptId:
    """One start of one try of one task instance."""

    task_instance_id: str
    try_number: int = 1
    launch: int = 1

    def to_json(self) -> dict[str, Any]:
        return {"task_instance_id": self.task_instance_id, "try_number": self.try_number, "launch": self.launch}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AttemptId:
        """The attempt again.

        Raises:
            KeyError, ValueError: it is none that a database could hold.
        """
        identity = text_in(data["task_instance_id"], "task_instance_id", 512)
        if not identity:
            raise ValueError("task_instance_id is empty")
        return cls(identity, _number(data["try_number"], "try_number"), _number(data.get("launch", 1), "launch"))

    def evolve(self, **changes: Any) -> AttemptId:
        return replace(self, **changes)

    def __str__(self) -> str:
        return f"{self.task_instance_id}/{self.try_number}.{self.launch}"


@dataclass(frozen=True, slots=True)
class LaunchReport:
    """An executor started an attempt.

    ``external_name`` is what it is called there, ``hostname`` who started it, ``back_end`` the server that runs it
    (``BackEnd`` as text), empty when nobody can ask that.
    """

    attempt: AttemptId
    external_name: str
    hostname: str
    back_end: str = ""

    def to_json(self) -> dict[str, Any]:
        named = {"external_name": self.external_name, "hostname": self.hostname, "back_end": self.back_end}
        return {"attempt": self.attempt.to_json(), **named}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LaunchReport:
        """The report again.

        Raises:
            KeyError, ValueError: it is none that a database could hold.
        """
        names = (text_in(data.get(name, ""), name) for name in ("external_name", "hostname", "back_end"))
        return cls(AttemptId.from_json(data["attempt"]), *names)


def celery_task_id(task_instance_id: str, try_number: int) -> str:
    """The Celery id of a try. A relaunch keeps it: the scheduler waits on the try, not on its launches.

    It is a UUID of version 5 that can be told from everybody else's, also before its try is recorded.
    """
    return _TRY_ID_PREFIX + str(uuid.uuid5(_NAMESPACE, f"{task_instance_id}\x00{try_number}"))[len(_TRY_ID_PREFIX) :]


def is_try_id(celery_id: str) -> bool:
    """Whether a Celery id is the own one of some try, which nobody else may use: ``celery_task_id`` made it."""
    return celery_id.startswith(_TRY_ID_PREFIX)


def digest(*parts: object, length: int = _SUFFIX_HEX_DIGITS) -> str:
    """A short stable hash of the raw parts: what keeps two ids apart that sanitise to the same text."""
    raw = "\x00".join(str(part) for part in parts).encode(errors="surrogatepass")
    return hashlib.sha256(raw).hexdigest()[:length]


def sanitise(text: str) -> str:
    """Lower case, anything but a-z 0-9 - becomes -, trimmed of - (Leoflow's rule for names and labels)."""
    return re.sub(r"[^a-z0-9-]", "-", text.lower()).strip("-")


def label_value(text: str) -> str:
    """A Kubernetes label value: sanitised, at most 63 characters, hashed when sanitising changed or cut something."""
    clean = sanitise(text)
    if clean == text and len(clean) <= _NAME_LIMIT:
        return clean
    tail = digest(text, length=8)
    return f"{clean[: _NAME_LIMIT - 9].rstrip('-')}-{tail}".lstrip("-")


def attempt_suffix(attempt: AttemptId) -> str:
    """The end of every external name of the attempt."""
    return digest(attempt.task_instance_id, attempt.try_number, attempt.launch)


def attempt_name(attempt: AttemptId, dag_id: str, task_id: str) -> str:
    """The pod and container name: ``leoflow-<dag>-<task>-<try>-<suffix>``, DNS-1123, at most 63 characters.

    The suffix is derived from the raw attempt, so it is the same on redelivery and another for the next launch.
    """
    suffix = attempt_suffix(attempt)
    base = f"leoflow-{sanitise(dag_id)}-{sanitise(task_id)}-{attempt.try_number}"
    return f"{base[: _NAME_LIMIT - len(suffix) - 1].rstrip('-')}-{suffix}"


def staging_claim_name(dag_id: str, run_id: str, tenant_id: str = STANDARD_TENANT) -> str:
    """The PVC or volume name of a run's staging volume, stable across retries and clear + re-run.

    A hyphen in the DAG's id calls for the hash: DAG "a" with run "b-c" and DAG "a-b" with run "c" would share a volume.
    So does another tenant than the standard one, who may run the same DAG.
    """
    owner = (dag_id, run_id) if tenant_id == STANDARD_TENANT else (tenant_id, dag_id, run_id)
    name = f"{STAGING_PREFIX}{sanitise(dag_id)}-{sanitise(run_id)}"
    unchanged = sanitise(dag_id) == dag_id and sanitise(run_id) == run_id
    if unchanged and "-" not in dag_id and len(name) <= _NAME_LIMIT and tenant_id == STANDARD_TENANT:
        return name
    return f"{name[: _NAME_LIMIT - 9].rstrip('-')}-{digest(*owner, length=8)}"
