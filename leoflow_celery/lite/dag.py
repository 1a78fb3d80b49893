"""``Dag``: the compiled dag.json, read strictly, and the task requests it stands for.

The text is strict JSON: no key twice, and null means "not set". Every rule that one file can break is checked here,
before a run exists: unknown keys, ids, missing fields, cycles, inputs that no upstream produces. Errors name the file,
the task, the key, the value and the fix.
"""

from __future__ import annotations

import json
import re
import uuid
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from leoflow_celery.domain.attempt import staging_claim_name
from leoflow_celery.domain.clear import KeptDag
from leoflow_celery.domain.fields import (
    Environment,
    JsonObject,
    JsonSchema,
    Name,
    NotEmpty,
    OptionalQuantity,
    Parameters,
)
from leoflow_celery.domain.request import (
    Execution,
    Frozen,
    HttpRequest,
    Operator,
    Resources,
    SecretReference,
    TaskRequest,
    invalid_request,
)
from leoflow_celery.errors import DecryptionFailed, InvalidDag, InvalidRequest
from leoflow_celery.lite.plan import Retries, TriggerRule

#: Objects whose keys are ours; a null below them (a call argument, an HTTP body) is the user's own value.
_SHOWN_CHARACTERS = 100
_OUR_OBJECTS = ("default_args", "staging", "http_request", "resources", "execution")


def parse_dag_text(content: bytes) -> Any:
    """The data of a dag.json.

    Raises:
        ValueError: not UTF-8, not JSON (names line and column), a key given twice, or nested too deeply.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} column {error.colno}: is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply; a dag.json needs a few levels only") from error
    if not isinstance(data, dict):
        raise ValueError("is not a JSON object; a dag.json starts with {")  # noqa: TRY004 - the text is wrong, not a type
    return _without_nulls(data)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:_SHOWN_CHARACTERS]!r} is given twice in one object; keep one of them")
        found[key] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write a number, a string or null")


def _without_nulls(ours: dict[str, Any]) -> dict[str, Any]:
    """Drop keys set to null, as compilers write unset fields, from the objects whose keys are ours."""
    kept = {key: value for key, value in ours.items() if value is not None}
    for key in _OUR_OBJECTS:
        if isinstance(kept.get(key), dict):
            kept[key] = _without_nulls(kept[key])
    if isinstance(kept.get("tasks"), list):
        kept["tasks"] = [_without_nulls(task) if isinstance(task, dict) else task for task in kept["tasks"]]
    return kept


_NAMESPACE = uuid.UUID("0f9a3f1e-8f3b-5c43-9b52-6e6c2a6f7d10")


Id = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_][a-zA-Z0-9_-]{0,199}$")]
RetryCount = Annotated[int, Field(ge=0, le=100)]
Delay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Timeout = Annotated[int, Field(ge=1)]


class DefaultArgs(Frozen):
    """What a task takes when it says nothing itself."""

    retries: RetryCount = 0
    retry_delay_seconds: Delay = 300
    execution_timeout_seconds: Timeout | None = None


class Staging(Frozen):
    """One volume that the tasks of a run share."""

    enabled: bool = False
    size: OptionalQuantity = ""
    storage_class: str = ""


class TaskSpec(Frozen):
    """One task of a DAG. ``None`` in the first three overrides means: as ``default_args`` says."""

    task_id: Id
    type: Operator
    depends_on: tuple[Id, ...] = ()
    trigger_rule: TriggerRule = TriggerRule.ALL_SUCCESS
    retries: RetryCount | None = None
    retry_delay_seconds: Delay | None = None
    execution_timeout_seconds: Timeout | None = None
    execution_mode: Literal["inline", "pod"] | None = None
    entrypoint: str = ""
    http_request: HttpRequest | None = None
    env: Environment = Field(default_factory=dict)
    call_args: JsonObject = Field(default_factory=dict)
    secrets: tuple[SecretReference, ...] = ()
    resources: Resources = Resources()
    execution: Execution = Execution()
    #: parameter name → upstream task id
    xcom_input: Parameters[Id] = Field(default_factory=dict)
    xcom_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _fields_of_type(self) -> TaskSpec:
        if self.type is Operator.EXEC:
            raise ValueError("type: a dag.json has no exec tasks; use python, bash or http_api")
        if self.type is Operator.HTTP_API:
            if self.http_request is None:
                raise ValueError("http_request: is missing; an http_api task needs one with method and url")
            if self.entrypoint:
                raise ValueError("entrypoint: an http_api task runs no code; remove it, or set another type")
            has_agent = self.mode == "pod"
            self.http_request.check_values(self.call_args, self.env, self.xcom_input, self.secrets, has_agent=has_agent)
            return self
        if self.http_request is not None:
            raise ValueError(f"http_request: a {self.type} task makes no call; remove it or set type http_api")
        if self.execution_mode == "inline":
            raise ValueError(f"execution_mode: 'inline' is for http_api; a {self.type} task is always 'pod'; remove it")
        if self.type is Operator.BASH and not self.entrypoint.strip():
            raise ValueError("entrypoint: is missing; a bash task needs the command to run")
        if self.type is Operator.PYTHON and not re.fullmatch(r"[^:\s]+:[^:\s]+", self.entrypoint):
            raise ValueError(
                f"entrypoint: a python task needs 'module:callable', e.g. 'dag:extract' (got {self.entrypoint!r})"
            )
        return self

    @property
    def mode(self) -> Literal["inline", "pod"]:
        """Inline for http_api unless it says otherwise; python and bash always run in an agent."""
        if self.type is Operator.HTTP_API:
            return self.execution_mode or "inline"
        return "pod"


class Dag(Frozen):
    """A whole dag.json. The scheduling keys are accepted and not used by a single run."""

    schema_version: Literal["1.0"]
    dag_id: Id
    dag_version: Annotated[Name, Field(min_length=1)]
    image: str
    tasks: NotEmpty[TaskSpec]
    description: str = ""
    owner: str = ""
    tags: tuple[str, ...] = ()
    schedule: str = ""
    schedule_timezone: str = ""
    start_date: str = ""
    end_date: str = ""
    max_active_runs: Annotated[int, Field(ge=0)] = 0
    catchup: bool = False
    default_args: DefaultArgs = DefaultArgs()
    staging: Staging = Staging()
    source: str = ""

    @model_validator(mode="after")
    def _graph(self) -> Dag:
        if len(self.by_id) < len(self.tasks):
            ids = [task.task_id for task in self.tasks]
            twice = next(task_id for task_id in ids if ids.count(task_id) > 1)
            raise ValueError(f"tasks: task_id {twice!r} occurs more than once; give every task an id of its own")
        for task in self.tasks:
            for upstream in (*task.depends_on, *task.xcom_input.values()):
                if upstream not in self.by_id:
                    key = "depends_on" if upstream in task.depends_on else "xcom_input"
                    raise ValueError(
                        f"task {task.task_id!r}: {key}: no task has the id {upstream!r}; correct the id or add the task"
                    )
        _ = self.order
        for task in self.tasks:
            self._check_inputs(task)
        return self

    def _check_inputs(self, task: TaskSpec) -> None:
        missing = set(task.xcom_input.values()) - set(task.depends_on)
        if missing and (missing := missing - self.ancestors(task.task_id)):
            parameter, upstream = next(item for item in task.xcom_input.items() if item[1] in missing)
            raise ValueError(
                f"task {task.task_id!r}: xcom_input: parameter {parameter!r} reads {upstream!r}, which does not run "
                f"before it, so the value may not exist; add {upstream!r} to depends_on"
            )

    @cached_property
    def by_id(self) -> dict[str, TaskSpec]:
        """task_id → task, in the file's order."""
        return {task.task_id: task for task in self.tasks}

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The task ids, every upstream before its downstreams."""
        try:
            return tuple(TopologicalSorter({task.task_id: task.depends_on for task in self.tasks}).static_order())
        except CycleError as error:
            # graphlib lists each node before the one that waits for it; people read "a waits for b".
            circle = " → ".join(repr(task_id) for task_id in reversed(error.args[1]))
            raise ValueError(f"depends_on: the tasks wait for each other: {circle}; remove one of these") from error

    def ancestors(self, task_id: str) -> set[str]:
        """Every task that ends before this one may start."""
        found: set[str] = set()
        waiting = list(self.by_id[task_id].depends_on)
        while waiting:
            upstream = waiting.pop()
            if upstream not in found:
                found.add(upstream)
                waiting.extend(self.by_id[upstream].depends_on)
        return found

    def downstream(self, task_id: str) -> set[str]:
        """Every task that may start only after this one; none for a task that the DAG no longer has."""
        found: set[str] = set()
        for other in self.order:
            if found.union((task_id,)).intersection(self.by_id[other].depends_on):
                found.add(other)
        return found

    def retries_of(self, task_id: str) -> Retries:
        """How often a task is tried again, and after how many seconds."""
        task, defaults = self.by_id[task_id], self.default_args
        return Retries(
            defaults.retries if task.retries is None else task.retries,
            defaults.retry_delay_seconds if task.retry_delay_seconds is None else task.retry_delay_seconds,
        )


def kept_dag(kept: KeptDag) -> Dag:
    """The DAG that is stored with a run (``Client.dag_of``).

    Raises:
        DecryptionFailed: another version stored it and it breaks a rule of this one.
    """
    try:
        return Dag.model_validate(kept.content)
    except ValidationError as error:
        raise DecryptionFailed("the stored DAG is not of this version; give its dag.json again") from error


def load_dag(source: Path | str | bytes) -> Dag:
    """A DAG from a dag.json: its path, or its content as bytes.

    Raises:
        InvalidDag: the file cannot be read, is no JSON, or breaks a rule; names file, task, key, value and fix.
    """
    name = "dag.json" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise InvalidDag(f"{name}: cannot be read: {error.strerror}; give the path of a dag.json") from error
    try:
        data = parse_dag_text(content)
        # JSON mode, strict: "3" is no number and 1 is no boolean, but an array may become a tuple.
        return Dag.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        found = invalid_request(error, InvalidDag)
        raise InvalidDag(f"{name}: {_with_task_ids(found.message, data)}", found.field) from error
    except ValueError as error:
        raise InvalidDag(f"{name}: {error}") from error


def _with_task_ids(message: str, data: Any) -> str:
    """``tasks.3.retries`` as ``task 'load': retries``: people know their tasks by id, not by position."""

    def named(match: re.Match[str]) -> str:
        task = data["tasks"][int(match[1])]
        task_id = task.get("task_id") if isinstance(task, dict) else None
        return f"task {task_id!r}: " if isinstance(task_id, str) else f"tasks[{match[1]}]: "

    return re.sub(r"\btasks\.(\d+)(?:\.|: )", named, message)


def task_instance_id(tenant_id: str, dag_id: str, run_id: str, task_id: str) -> str:
    """The id of a task in a run: the same on every call, so that a driver that starts again finds its tasks."""
    return str(uuid.uuid5(_NAMESPACE, "\x00".join((tenant_id, dag_id, run_id, task_id))))


def task_request(
    dag: Dag, task_id: str, run_id: str, *, try_number: int = 1, tenant_id: str = "default"
) -> TaskRequest:
    """One try of a task as the executors take it.

    Raises:
        InvalidDag: a value cannot travel in a request, the run id for example; names the task and the field.
    """
    task = dag.by_id[task_id]
    timeout = task.execution_timeout_seconds or dag.default_args.execution_timeout_seconds or 0
    try:
        return TaskRequest(
            task_instance_id=task_instance_id(tenant_id, dag.dag_id, run_id, task_id),
            tenant_id=tenant_id,
            dag_id=dag.dag_id,
            dag_version=dag.dag_version,
            run_id=run_id,
            task_id=task_id,
            try_number=try_number,
            image=dag.image,
            image_pull_policy=task.execution.image_pull_policy,
            operator=task.type,
            entrypoint=task.entrypoint,
            env=task.env,
            resources=task.resources,
            execution=task.execution,
            timeout_seconds=timeout,
            source="" if task.type is Operator.HTTP_API else dag.source,
            http_request=task.http_request,
            execution_mode=task.mode,
            xcom_input=task.xcom_input,
            xcom_schema=task.xcom_schema,
            call_args=task.call_args,
            secrets=task.secrets,
            **_staging(dag, run_id, tenant_id),
        )
    except ValidationError as error:
        found: InvalidRequest = invalid_request(error)
        raise InvalidDag(f"task {task_id!r}: {found.message}", found.field) from error


def _staging(dag: Dag, run_id: str, tenant_id: str) -> dict[str, Any]:
    if not dag.staging.enabled:
        return {}
    return {
        "staging_claim": staging_claim_name(dag.dag_id, run_id, tenant_id),
        "staging_size": dag.staging.size,
        "staging_storage_class": dag.staging.storage_class,
    }
