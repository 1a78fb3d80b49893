"""``TaskRequest``: everything an executor needs to run one task instance, validated at the door.

The fields are the executor contract's ``Request`` in snake_case, plus what this system adds (executor choice, XCom
wiring, result callback). Unknown keys are errors; every error names the field, the value and the fix.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.quantity import parse_quantity
from leoflow_celery.domain.xcom import check_schema
from leoflow_celery.errors import InvalidRequest, RequestTooLarge

#: Of UTF-8. Five ids of this size are the largest key that a PostgreSQL index takes.
MAX_ID_BYTES = 512
#: 1 MiB: a request travels through the broker; anything bigger belongs in the image or in /staging.
MAX_REQUEST_BYTES = 1_048_576


#: A DNS subdomain, as the Kubernetes API wants it; Docker takes any of these too.
MAX_CLAIM_CHARACTERS = 253
_CLAIM_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")


class Operator(StrEnum):
    """What the user code is."""

    PYTHON = "python"
    BASH = "bash"
    HTTP_API = "http_api"


def _identifier(value: str) -> str:
    if not value or len(value.encode()) > MAX_ID_BYTES:
        raise ValueError(f"must have 1 to {MAX_ID_BYTES} bytes")
    if value in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", value):
        raise ValueError("is used in file names: no slash, backslash, control character, '.' or '..'")
    return value


def _plain_identifier(value: str) -> str:
    if ":" in value:
        raise ValueError("is used in keys that colons separate: no colon")
    return _identifier(value)


def _text(value: str) -> str:
    value.encode()  # a lone surrogate is no text that anybody could store
    if "\x00" in value:
        raise ValueError("holds a NUL character, which no database, process or API takes; remove it")
    return value


def _claim_name(value: str) -> str:
    if value and (len(value) > MAX_CLAIM_CHARACTERS or not _CLAIM_NAME.fullmatch(value)):
        raise ValueError(
            f"names a volume: at most {MAX_CLAIM_CHARACTERS} lower-case letters, digits, '-' and '.', with a letter or "
            "digit at both ends"
        )
    return value


def _quantity(value: str) -> str:
    parse_quantity(value)
    return value


def _env_names(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        name.encode(), text.encode()  # as for any text
        if not name or "=" in name or "\x00" in name or "\x00" in text:
            head, equals, _ = name.partition("=")
            shown = f"{head}=…" if equals else name  # what follows may well be the value
            raise ValueError(f"variable {shown!r}: a name may hold no '=' or NUL and not be empty, a value no NUL")
    return value


def _parameters(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if not name or re.search(r"[=\x00]", _text(name)):
            raise ValueError(f"parameter {name!r}: a name may hold no '=' or NUL and not be empty")
    return value


def _plain_json(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError("holds a number that JSON does not know (NaN, Infinity) or no program reads") from error
    return value


def _xcom_schema(value: dict[str, Any]) -> dict[str, Any]:
    check_schema(value)
    return value


#: Of a Pod object; the API server would drop any other key, and say nothing.
_POD_KEYS = frozenset({"apiVersion", "kind", "metadata", "spec"})


def _pod_part(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if unknown := sorted(value.keys() - _POD_KEYS - {"$patch"}):
        raise ValueError(
            f"has the key {unknown[0]!r}; a Pod has metadata and spec: write spec.{unknown[0]}, or the like"
        )
    return value


def _mount_path(value: str) -> str:
    if value and (not value.startswith("/") or ":" in value):
        raise ValueError("is a directory in the container: an absolute path without a colon, e.g. /secrets")
    return _text(value)


def _wrong(field: str, text: str) -> PydanticCustomError:
    """A rule between fields is broken: pydantic knows no place for it, so the error names its field itself."""
    return PydanticCustomError("rule", "{text}", {"field": field, "text": text})


Identifier = Annotated[str, AfterValidator(_identifier)]
PlainIdentifier = Annotated[str, AfterValidator(_plain_identifier)]
Text = Annotated[str, AfterValidator(_text)]
ClaimName = Annotated[str, AfterValidator(_claim_name)]
MountPath = Annotated[str, AfterValidator(_mount_path)]
PodPart = Annotated[dict[str, JsonValue], AfterValidator(_pod_part)]
Quantity = Annotated[str, AfterValidator(_quantity)]
OptionalQuantity = Annotated[str, AfterValidator(lambda value: value and _quantity(value))]
XComSchema = Annotated[dict[str, Any], AfterValidator(_xcom_schema)]
Parameters = Annotated[dict[str, PlainIdentifier], AfterValidator(_parameters)]
Arguments = Annotated[dict[str, JsonValue], AfterValidator(_plain_json)]
Environment = Annotated[dict[str, str], AfterValidator(_env_names)]


class Frozen(BaseModel):
    """A frozen value that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ResourceList(Frozen):
    """CPU and memory as Kubernetes quantities; empty means unset."""

    cpu: Quantity | None = None
    memory: Quantity | None = None


class Resources(Frozen):
    """What the scheduler reserves (requests) and what is enforced (limits)."""

    requests: ResourceList = ResourceList()
    limits: ResourceList = ResourceList()


class Toleration(Frozen):
    """A Kubernetes toleration; the field names are the API's."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None  # noqa: N815 - the Kubernetes API's own name


PullPolicy = Literal["Always", "IfNotPresent", "Never"]


class Execution(Frozen):
    """Where and as whom the task runs."""

    node_selector: dict[Text, Text] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    service_account: Text | None = None
    image_pull_policy: PullPolicy | None = None
    #: A Kubernetes Affinity object, as the API has it.
    affinity: dict[str, JsonValue] = Field(default_factory=dict)
    #: Names of Secrets, added to those of the queue.
    image_pull_secrets: tuple[Text, ...] = ()
    #: Between SIGTERM and SIGKILL; None is the queue's.
    termination_grace_seconds: Annotated[int, Field(ge=0, le=3_600)] | None = None


class HttpRequest(Frozen):
    """The call of an http_api task. ``body`` is any JSON; ``timeout_seconds`` bounds one attempt of the call."""

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+\S*$", max_length=8_192)]
    headers: dict[str, str] = Field(default_factory=dict)
    body: JsonValue = None
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60
    success_status_codes: Annotated[tuple[Annotated[int, Field(ge=100, le=599)], ...], Field(min_length=1)] = (
        200,
        201,
        202,
        204,
    )


class SecretReference(Frozen):
    """A secret of the task: environment variable ``name``, taken from ``source`` under ``reference`` (or name)."""

    name: Text
    source: Literal["env", "vault", "k8s_secret"]
    reference: Text | None = None


class ResultCallback(Frozen):
    """Any Celery task, called once per try with the final event (a JSON object)."""

    task: Annotated[Text, Field(min_length=1)]
    queue: Text | None = None


class TaskRequest(Frozen):
    """One task instance to run. See the field groups; only the ids and the operator's own fields are required."""

    task_instance_id: Identifier
    tenant_id: PlainIdentifier = "default"
    dag_id: PlainIdentifier
    run_id: Identifier
    task_id: PlainIdentifier
    try_number: Annotated[int, Field(ge=1, le=1_000_000)] = 1

    image: Text = ""
    image_pull_policy: PullPolicy | None = None
    operator: Operator
    entrypoint: Text = ""
    env: Environment = Field(default_factory=dict)
    resources: Resources = Resources()
    execution: Execution = Execution()
    #: 0 means no limit.
    timeout_seconds: Annotated[int, Field(ge=0, le=30 * 24 * 3600)] = 0
    source: Text = ""
    http_request: HttpRequest | None = None

    #: Filled in at dispatch when empty.
    control_plane_addr: Text = ""
    agent_token: Text = ""

    staging_claim: ClaimName = ""
    staging_size: OptionalQuantity = ""
    staging_storage_class: Text = ""
    staging_access_mode: Literal["", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"] = ""
    agent_tls_ca_config_map: Text = ""
    task_secret_name: Text = ""
    task_secret_mount_path: MountPath = ""

    # What this system adds to the contract.
    dag_version: Text = ""
    execution_mode: Literal["inline", "pod"] | None = None
    executor: Literal["kubernetes", "docker", "subprocess", "inline"] | None = None
    #: parameter name → upstream task id
    xcom_input: Parameters = Field(default_factory=dict)
    xcom_schema: XComSchema | None = None
    call_args: Arguments = Field(default_factory=dict)
    secrets: tuple[SecretReference, ...] = ()
    result_callback: ResultCallback | None = None
    #: Part of a Pod object, merged over the pod of this request (strategic merge); for the kubernetes executor.
    pod_override: PodPart = Field(default_factory=dict)
    #: Start again with so many times the memory limit after an OOM kill; None is the system's setting, 1 is off.
    oom_memory_factor: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] | None = None
    #: Celery priority on Redis: 0 is served first, 9 last.
    priority: Annotated[int, Field(ge=0, le=9)] = 3

    @model_validator(mode="after")
    def _operator_fields(self) -> TaskRequest:
        match self.operator:
            case Operator.PYTHON:
                module, colon, name = self.entrypoint.partition(":")
                if not (module and colon and name):
                    raise _wrong(
                        "entrypoint",
                        f"a python task needs 'module:callable', e.g. 'dag:extract' (got {self.entrypoint!r})",
                    )
            case Operator.BASH:
                if not self.entrypoint.strip():
                    raise _wrong("entrypoint", "is empty; a bash task needs the command to run")
            case Operator.HTTP_API:
                if self.http_request is None:
                    raise _wrong("http_request", "is missing; an http_api task needs method and url")
        if self.operator is not Operator.HTTP_API and (self.execution_mode == "inline" or self.executor == "inline"):
            field = "executor" if self.executor == "inline" else "execution_mode"
            raise _wrong(field, f"'inline' is for http_api tasks; a {self.operator} task is run by an agent")
        return self

    @model_validator(mode="after")
    def _task_secret(self) -> TaskRequest:
        if self.task_secret_name and not self.task_secret_mount_path:
            raise _wrong("task_secret_mount_path", "is empty; say where task_secret_name is mounted, e.g. /secrets")
        return self

    @property
    def attempt(self) -> AttemptId:
        """The first launch of this try."""
        return AttemptId(self.task_instance_id, self.try_number)

    def evolve(self, **changes: Any) -> TaskRequest:
        """A copy with other values (not validated again: for values of our own)."""
        return self.model_copy(update=changes)


def parse_request(data: Any) -> TaskRequest:
    """A request from JSON-like data or JSON text.

    Raises:
        RequestTooLarge: more than ``MAX_REQUEST_BYTES`` of JSON text.
        InvalidRequest: names the first wrong field, its value when it is short and no secret, and the fix.
    """
    if isinstance(data, TaskRequest):
        return data
    try:
        if isinstance(data, str | bytes):
            check_size(len(data.encode(errors="surrogatepass") if isinstance(data, str) else data))
            return TaskRequest.model_validate_json(data)
        return TaskRequest.model_validate(data)
    except ValidationError as error:
        raise invalid_request(error) from error


def check_size(size_bytes: int) -> None:
    """Refuse a request too large for the broker.

    Raises:
        RequestTooLarge: more than ``MAX_REQUEST_BYTES``.
    """
    if size_bytes > MAX_REQUEST_BYTES:
        raise RequestTooLarge(
            f"the request has {size_bytes} bytes, the limit is {MAX_REQUEST_BYTES}; "
            "put large data into the image, an XCom or the staging volume"
        )


#: Values of these fields may be secret and are never repeated in a message.
_SECRET_FIELDS = frozenset({"env", "pod_override", "headers", "body", "agent_token", "call_args", "source", "url"})
#: Text where an object or a list belongs is that object's content, quoted once too often.
_SHAPE_ERRORS = frozenset({"model_type", "dict_type", "tuple_type", "list_type"})


def invalid_request(error: ValidationError, kind: type[InvalidRequest] = InvalidRequest) -> InvalidRequest:
    """The first failures of a pydantic error as one sentence of ours each."""
    parts, first = [], ""
    for item in error.errors(include_url=False)[:3]:
        path = ".".join(str(part) for part in item["loc"]) or str(item.get("ctx", {}).get("field", ""))
        first = first or path
        value = item.get("input")
        shown = ""
        if isinstance(value, str | int | float | bool) and not _SECRET_FIELDS.intersection(str(p) for p in item["loc"]):
            text = repr(value)
            shown = f" (got {text if len(text) <= 80 else text[:77] + '...'})"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message, shown = "is not a known key; remove it or check its spelling", ""
        elif item["type"] in _SHAPE_ERRORS:
            shown = ""
        parts.append(f"{path}: {message}{shown}" if path else message)
    return kind("; ".join(parts), first)


def request_json_schema() -> dict[str, Any]:
    """The JSON Schema of a request, for schedulers written in other languages."""
    return TaskRequest.model_json_schema()
