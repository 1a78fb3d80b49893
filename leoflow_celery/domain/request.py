"""``TaskRequest``: everything an executor needs to run one task instance, validated at the door.

The fields are the executor contract's ``Request`` in snake_case, plus what this system adds (executor choice, XCom
wiring, result callback). Unknown keys are errors; every error names the field, the value and the fix.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from leoflow_celery.domain import strict_json
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.fields import (
    MAX_NAME_CHARACTERS,
    Address,
    ClaimName,
    Environment,
    HostName,
    Identifier,
    Json,
    JsonObject,
    JsonSchema,
    Label,
    Moment,
    MountPath,
    Name,
    NotEmpty,
    OptionalQuantity,
    Parameters,
    PlainIdentifier,
    PodPart,
    Quantity,
    Text,
    VariableName,
    is_printable,
    printable,
)
from leoflow_celery.domain.http_call import Headers, TemplateError, Url, Values, check_call, fill
from leoflow_celery.domain.outcome import storable
from leoflow_celery.errors import InvalidRequest, RequestTooLarge

#: 1 MiB: a request travels through the broker; anything bigger belongs in the image or in /staging.
MAX_REQUEST_BYTES = 1_048_576


class Operator(StrEnum):
    """What the user code is."""

    PYTHON = "python"
    BASH = "bash"
    HTTP_API = "http_api"
    EXEC = "exec"


class RelaunchMode(StrEnum):
    """When the system starts a try again after an infrastructure failure or an OOM kill.

    ``before_start``: while none of its user code has begun. A scheduler that must be told of every second start of the
    user's code wants that.
    """

    ALWAYS = "always"
    BEFORE_START = "before_start"
    NEVER = "never"

    def permits(self, has_started: bool) -> bool:
        """Whether a launch may follow one whose user code has begun, or has not."""
        return self is RelaunchMode.ALWAYS or (self is RelaunchMode.BEFORE_START and not has_started)


def _wrong(field: str, text: str) -> PydanticCustomError:
    """A rule between fields is broken: pydantic knows no place for it, so the error names its field itself."""
    return PydanticCustomError("rule", "{text}", {"field": field, "text": text})


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

    key: Label | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: Label | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # noqa: N815 - the Kubernetes API's own name


PullPolicy = Literal["Always", "IfNotPresent", "Never"]


class Execution(Frozen):
    """Where and as whom the task runs."""

    node_selector: dict[Label, Label] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    service_account: Label | None = None
    image_pull_policy: PullPolicy | None = None
    #: A Kubernetes Affinity object, as the API has it.
    affinity: JsonObject = Field(default_factory=dict)
    #: Names of Secrets, added to those of the queue.
    image_pull_secrets: tuple[Label, ...] = ()
    #: Between SIGTERM and SIGKILL; None is the queue's.
    termination_grace_seconds: Annotated[int, Field(ge=0, le=3_600)] | None = None


class HttpRequest(Frozen):
    """The call of an http_api task. ``body`` is any JSON; ``timeout_seconds`` bounds one attempt of the call.

    ``url``, header values and the strings of ``body`` may hold placeholders, see ``domain/http_call.py``.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    url: Url
    headers: Headers = Field(default_factory=dict)
    body: Json = None
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60
    success_status_codes: NotEmpty[Annotated[int, Field(ge=200, le=599)]] = (200, 201, 202, 204)
    #: How often the call is made at the most, when it fails in a way that may pass. None is the executor's own number
    #: for a call that may be repeated, and 1 for POST and PATCH.
    attempts: Annotated[int, Field(ge=1, le=10)] | None = None
    #: Whether results, logs and errors name the URL's path; it may hold a token. Query and user are never named.
    show_path: bool = False

    @model_validator(mode="after")
    def _one_authorization(self) -> HttpRequest:
        has_user = "@" in self.url.partition("://")[2].partition("/")[0].partition("?")[0].partition("#")[0]
        if has_user and any(name.lower() == "authorization" for name in self.headers):
            raise PydanticCustomError(
                "rule", "has a header Authorization beside the user of the url, and one call can carry one; remove one"
            )
        return self

    @property
    def may_be_repeated(self) -> bool:
        """Whether making the call twice is the same as making it once (RFC 9110, 9.2.2)."""
        return self.method not in ("POST", "PATCH")

    @property
    def may_be_made_again(self) -> bool:
        """Whether one try may make the call again when nobody knows whether it was made."""
        return self.may_be_repeated or (self.attempts or 1) > 1

    def filled(self, values: Values) -> HttpRequest:
        """The call with its values, as it is sent.

        Raises:
            TemplateError: names the field, the value and the fix.
        """
        filled = fill(self.url, self.headers, self.body, values)
        return self.model_copy(update={"url": filled.url, "headers": filled.headers, "body": filled.body})

    def check_values(
        self,
        call_args: dict[str, Any],
        env: dict[str, str],
        xcom_input: dict[str, str],
        secrets: tuple[SecretReference, ...],
        *,
        has_agent: bool,
    ) -> None:
        """Refuse a placeholder that nothing fills, and a value that goes nowhere.

        Raises:
            TemplateError: names the field, the value and the fix.
        """
        names = frozenset(secret.name for secret in secrets)
        values = Values(call_args, env, xcom_names=xcom_input, secret_names=names)
        check_call(self.url, self.headers, self.body, values, has_agent=has_agent)


class SecretReference(Frozen):
    """A secret of the task: environment variable ``name``, taken from ``source`` under ``reference`` (or name)."""

    name: VariableName
    source: Literal["env", "vault", "k8s_secret"]
    reference: Label | None = None


class DeviceRequest(Frozen):
    """GPUs of the host: how many (-1 is all), or which."""

    driver: Label = ""
    count: Annotated[int, Field(ge=-1, le=1_024)] | None = None
    device_ids: tuple[Label, ...] = ()
    capabilities: tuple[tuple[Label, ...], ...] = (("gpu",),)

    @model_validator(mode="after")
    def _how_many_or_which(self) -> DeviceRequest:
        if bool(self.count) == bool(self.device_ids):
            raise PydanticCustomError("rule", "needs one of count (a number, -1 is all) and device_ids")
        return self


# fmt: off
UlimitName = Literal[
    "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile",
    "nproc", "rss", "rtprio", "rttime", "sigpending", "stack",
]
# fmt: on


class Ulimit(Frozen):
    """A limit of each process; -1 is unlimited, and ``hard`` is ``soft`` unless given."""

    name: UlimitName
    soft: Annotated[int, Field(ge=-1, lt=2**63)]
    hard: Annotated[int, Field(ge=-1, lt=2**63)] | None = None

    @property
    def hard_limit(self) -> int:
        return self.soft if self.hard is None else self.hard

    @model_validator(mode="after")
    def _soft_below_hard(self) -> Ulimit:
        if self.hard_limit != -1 and not 0 <= self.soft <= self.hard_limit:
            raise PydanticCustomError("rule", "soft is more than hard; lower soft, or raise hard")
        return self


class DockerMount(Frozen):
    """A volume, or a directory of the host (bind); ``read_only`` None is as the operator lists it."""

    type: Literal["volume", "bind"] = "volume"
    source: Annotated[Label, Field(min_length=1)]
    target: Annotated[MountPath, Field(min_length=1)]
    read_only: bool | None = None

    @model_validator(mode="after")
    def _plain_target(self) -> DockerMount:
        if ".." in self.target.split("/"):
            raise PydanticCustomError("rule", "target leads out of itself with '..'; write the directory that is meant")
        return self


class DockerOverride(Frozen):
    """What a container has beside the request's own fields, as far as the operator's policy lets it.

    The field names are those of Docker's own Python client.
    """

    device_requests: tuple[DeviceRequest, ...] = ()
    shm_size: OptionalQuantity = ""
    ulimits: tuple[Ulimit, ...] = ()
    #: name → address
    extra_hosts: dict[HostName, Address] = Field(default_factory=dict)
    mounts: tuple[DockerMount, ...] = ()


class ResultCallback(Frozen):
    """Any Celery task, called once per try with the final event (a JSON object)."""

    task: Annotated[Label, Field(min_length=1)]
    queue: Label | None = None


class TaskRequest(Frozen):
    """One task instance to run. See the field groups; only the ids and the operator's own fields are required."""

    task_instance_id: Identifier
    tenant_id: PlainIdentifier = "default"
    dag_id: PlainIdentifier
    run_id: Identifier
    task_id: PlainIdentifier
    try_number: Annotated[int, Field(ge=1, le=1_000_000)] = 1

    image: Label = ""
    image_pull_policy: PullPolicy | None = None
    operator: Operator
    entrypoint: Text = ""
    env: Environment = Field(default_factory=dict)
    resources: Resources = Resources()
    execution: Execution = Field(default_factory=Execution)  # a default that is unhashable is copied deeply each time
    #: 0 means no limit.
    timeout_seconds: Annotated[int, Field(ge=0, le=30 * 24 * 3600)] = 0
    source: Text = ""
    http_request: HttpRequest | None = None
    #: exec: the program and its arguments. No shell sees them, and everybody who may look at processes does.
    argv: tuple[Text, ...] = ()
    #: exec: what the program reads from its standard input. It travels sealed and is neither argument nor environment.
    stdin: Text = ""

    #: Filled in at dispatch when empty.
    control_plane_addr: Label = ""
    agent_token: Label = ""

    staging_claim: ClaimName = ""
    staging_size: OptionalQuantity = ""
    staging_storage_class: Label = ""
    staging_access_mode: Literal["", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"] = ""
    agent_tls_ca_config_map: Label = ""
    task_secret_name: Label = ""
    task_secret_mount_path: MountPath = ""

    # What this system adds to the contract.
    dag_version: Label = ""
    execution_mode: Literal["inline", "pod"] | None = None
    executor: Literal["kubernetes", "docker", "subprocess", "inline"] | None = None
    #: parameter name → upstream task id
    xcom_input: Parameters[PlainIdentifier] = Field(default_factory=dict)
    xcom_schema: JsonSchema | None = None
    call_args: JsonObject = Field(default_factory=dict)
    secrets: tuple[SecretReference, ...] = ()
    #: Variables and connections that the task uses: no others are handed out. None: all of its tenant and DAG.
    variables: tuple[Name, ...] | None = None
    connections: tuple[Name, ...] | None = None
    #: Parameters of the run.
    params: JsonObject = Field(default_factory=dict)
    #: What the run stands for, and the times its data is of: RFC 3339 with an offset.
    logical_date: Moment = ""
    data_interval_start: Moment = ""
    data_interval_end: Moment = ""
    #: How many tries the scheduler gives the task, for the task to know; 0: it does not say.
    max_tries: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    result_callback: ResultCallback | None = None
    #: Part of a Pod object, merged over the pod of this request (strategic merge); for the kubernetes executor.
    pod_override: PodPart = Field(default_factory=dict)
    #: GPUs, /dev/shm, ulimits, names and mounts of this container; for the docker executor.
    docker_override: DockerOverride = Field(default_factory=DockerOverride)
    #: Start again with so many times the memory limit after an OOM kill; None is the system's setting, 1 is off.
    oom_memory_factor: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] | None = None
    #: Celery priority on Redis: 0 is served first, 9 last.
    priority: Annotated[int, Field(ge=0, le=9)] = 3
    #: Whose task it is: a scheduler that shares this system with others reads the ends of its own (``Client.ends``).
    owner: Name = ""
    #: When the system itself may start the try again; the scheduler's retries are its own.
    relaunch: RelaunchMode = RelaunchMode.ALWAYS

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
                self._check_call()
            case Operator.EXEC:
                self._check_argv()
        if self.operator is not Operator.EXEC:
            for field in ("argv", "stdin"):
                if getattr(self, field):
                    raise _wrong(field, f"is for exec tasks; remove it from this {self.operator} task")
        if self.http_request is not None and self.operator is not Operator.HTTP_API:
            raise _wrong("http_request", f"a {self.operator} task makes no call; remove it or set operator http_api")
        if self.operator is not Operator.HTTP_API and (self.execution_mode == "inline" or self.executor == "inline"):
            field = "executor" if self.executor == "inline" else "execution_mode"
            raise _wrong(field, f"'inline' is for http_api tasks; a {self.operator} task is run by an agent")
        return self

    def _check_argv(self) -> None:
        if not self.argv or not self.argv[0]:
            raise _wrong("argv", "is empty; an exec task needs a program and its arguments, as a list")
        if self.entrypoint:
            raise _wrong("entrypoint", "an exec task runs argv; remove it, or set another operator")

    def _check_call(self) -> None:
        if self.http_request is None:
            raise _wrong("http_request", "is missing; an http_api task needs method and url")
        for field in ("entrypoint", "source"):
            if getattr(self, field):
                raise _wrong(field, "an http_api task runs no code; remove it, or set another operator")
        has_agent = self.execution_mode == "pod" or self.executor not in (None, "inline")
        for field in ("variables", "connections", "params"):
            if getattr(self, field) and not has_agent:
                raise _wrong(
                    field,
                    "an inline call has no place for it; remove it, or let an agent run the task (executor)",
                )
        try:
            self.http_request.check_values(self.call_args, self.env, self.xcom_input, self.secrets, has_agent=has_agent)
        except TemplateError as error:
            raise _wrong(error.field, error.text) from error

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


class NewRun(Frozen):
    """A run as it is recorded."""

    tenant_id: PlainIdentifier
    dag_id: PlainIdentifier
    run_id: Identifier
    dag_version: Name = ""


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
            parsed = TaskRequest.model_validate_json(data)
            json.loads(data, object_pairs_hook=strict_json.unique_keys)  # the line above takes the last of two
            return parsed
        return TaskRequest.model_validate(data)
    except ValidationError as error:
        raise invalid_request(error) from error
    except strict_json.DuplicateKey as error:
        raise InvalidRequest(f"request: {error}", "request") from error


def new_run(tenant_id: str, dag_id: str, run_id: str, dag_version: str = "") -> NewRun:
    """A run to record.

    Raises:
        InvalidRequest: names the first wrong field, its value and the fix.
    """
    try:
        return NewRun(tenant_id=tenant_id, dag_id=dag_id, run_id=run_id, dag_version=dag_version)
    except ValidationError as error:
        raise invalid_request(error) from error


def check_celery_id(celery_id: str) -> None:
    """Refuse the id of a message that could never be recorded as waiting for a try.

    Raises:
        InvalidRequest: too long, or text that no database keeps or no log may show.
    """
    if not 0 < len(celery_id) <= MAX_NAME_CHARACTERS or not is_printable(celery_id):
        raise InvalidRequest(
            f"id: a Celery id has 1 to {MAX_NAME_CHARACTERS} characters, no NUL and no half a surrogate pair, control, "
            f"bidirectional or invisible character; send the message with another one, or with none{_shown(celery_id)}",
            "id",
        )


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
_SECRET_FIELDS = frozenset(
    {"env", "pod_override", "headers", "body", "agent_token", "call_args", "source", "url", "stdin"}
)
#: Text where an object or a list belongs is that object's content, quoted once too often.
_SHAPE_ERRORS = frozenset({"model_type", "dict_type", "tuple_type", "list_type"})
_PATH_CHARACTERS = 200
_VALUE_CHARACTERS = 80


_SHOWN_ERRORS = 3


def invalid_request(error: ValidationError, kind: type[InvalidRequest] = InvalidRequest) -> InvalidRequest:
    """The first failures of a pydantic error as one sentence of ours each."""
    parts, first = [], ""
    found = error.errors(include_url=False)
    for item in found[:_SHOWN_ERRORS]:
        path = _path(item["loc"]) or str(item.get("ctx", {}).get("field", ""))
        first = first or path
        shown = "" if _SECRET_FIELDS.intersection(map(str, item["loc"])) else _shown(item.get("input"))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message, shown = "is not a known key; remove it or check its spelling", ""
        elif item["type"] in _SHAPE_ERRORS:
            shown = ""
        parts.append(f"{path}: {message}{shown}" if path else message)
    if len(found) > _SHOWN_ERRORS:
        parts.append(f"and {len(found) - _SHOWN_ERRORS} more")
    return kind("; ".join(parts), first)


def _path(location: tuple[int | str, ...]) -> str:
    """Where a value is, as text that can be stored; a key that is wrong is named like its value."""
    return _cut(printable(storable(".".join(str(part) for part in location if part != "[key]"))), _PATH_CHARACTERS)


def _shown(value: Any) -> str:
    """A value that is short enough to repeat, in brackets; nothing for one that is no scalar."""
    if not isinstance(value, str | int | float | bool):
        return ""
    try:
        return f" (got {_cut(repr(value), _VALUE_CHARACTERS)})"
    except ValueError:  # Python refuses to write an integer of thousands of digits
        return " (got an integer of thousands of digits)"


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[: characters - 3]}..."


def request_json_schema() -> dict[str, Any]:
    """The JSON Schema of a request, for schedulers written in other languages."""
    return TaskRequest.model_json_schema()
