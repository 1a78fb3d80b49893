"""What is executed for a task, and the environment it sees. Pure: files to write are returned, not written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from leoflow_celery.agent.config import AgentConfig
from leoflow_celery.agent.inputs import Inputs
from leoflow_celery.domain import strict_json
from leoflow_celery.errors import InvalidRequest
from leoflow_celery.protocol import agent_pb2 as pb

#: Linux refuses one string over 128 KiB and a few MiB altogether; half of the first leaves room for the name.
MAX_STRING_BYTES = 65_536
MAX_TOTAL_BYTES = 524_288

#: As the program of an exec task: the interpreter that python tasks have here.
PYTHON = "{python}"

_AGENT_ONLY = ("LEOFLOW_AGENT_", "LEOFLOW_XCOM_", "LEOFLOW_XCOMFILE_", "LEOFLOW_CALL_ARGS_")
_AGENT_ONLY_NAMES = frozenset({"LEOFLOW_CONTROL_PLANE_ADDR", "LEOFLOW_TERMINATION_LOG", "LEOFLOW_PYTHON"})


@dataclass(slots=True)
class Command:
    """An argument list, its environment, and files (by absolute path) that must exist before it runs."""

    argv: list[str]
    env: dict[str, str]
    files: dict[str, bytes] = field(default_factory=dict)
    #: What the process reads from its standard input.
    stdin: bytes = field(default=b"", repr=False)

    def write_files(self) -> None:
        for path, content in self.files.items():
            Path(path).write_bytes(content)


def build_command(
    spec: pb.TaskSpec, inputs: Inputs, config: AgentConfig, directory: Path, environ: Mapping[str, str]
) -> Command:
    """The command of a task.

    ``directory`` is the agent's private one, ``environ`` the agent's own environment: the user's process inherits it
    without what is the agent's business alone (its token, above all).

    Raises:
        InvalidRequest: an operator that no agent knows, or text that no process can be given.
    """
    command = Command([], _inherited(environ))
    command.env.update({f"AIRFLOW_VAR_{key.upper()}": value for key, value in inputs.variables.items()})
    command.env.update({f"AIRFLOW_CONN_{key.upper()}": value for key, value in inputs.connections.items()})
    command.env.update(_of_run(spec))
    command.env.update(spec.environment)
    command.env.update(
        LEOFLOW_TASK_INSTANCE_ID=config.task_instance_id,
        LEOFLOW_RETURN_VALUE_PATH=str(directory / "return_value.json"),
        LEOFLOW_REASON_PATH=str(directory / "reason"),
    )
    _add_call_args(command, spec.call_args_json, directory)
    _add_xcoms(command, inputs.xcoms, directory)
    _add_operator(command, spec, inputs, config, directory)
    _check(command)
    return command


def _of_run(spec: pb.TaskSpec) -> dict[str, str]:
    """What the task is told about its run, where the request says it; times are RFC 3339."""
    values = {
        "LEOFLOW_TS": spec.logical_date,
        "LEOFLOW_DS": spec.logical_date[:10],
        "LEOFLOW_DATA_INTERVAL_START": spec.data_interval_start,
        "LEOFLOW_DATA_INTERVAL_END": spec.data_interval_end,
        "LEOFLOW_PARAMS": spec.params_json,
        "LEOFLOW_FIRST_RESCHEDULE_AT": spec.first_reschedule_at,
        "LEOFLOW_MAX_TRIES": str(spec.max_tries or ""),
        "LEOFLOW_TRY_NUMBER": str(spec.try_number or ""),
        "LEOFLOW_DAG_ID": spec.dag_id,
        "LEOFLOW_RUN_ID": spec.run_id,
        "LEOFLOW_TASK_ID": spec.task_id,
    }
    return {name: value for name, value in values.items() if value}


def _check(command: Command) -> None:
    if any("\x00" in text for text in command.argv):
        raise InvalidRequest("entrypoint: holds a NUL character, which no process can be given", "entrypoint")
    for name, value in command.env.items():
        if "=" in name or "\x00" in name + value:
            shown = name.partition("=")[0]  # what follows may well be the value
            raise InvalidRequest(
                f"the environment variable {shown!r} cannot be set: its name holds '=', or name or value a NUL "
                "character; correct env, xcom_input, or the variables and connections of the control plane",
                "env",
            )


def _inherited(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(_AGENT_ONLY) and name not in _AGENT_ONLY_NAMES
    }


def _add_call_args(command: Command, text: str, directory: Path) -> None:
    if len(text) > MAX_STRING_BYTES:
        path = str(directory / "call_args.json")
        command.files[path] = text.encode()
        command.env["LEOFLOW_CALL_ARGS_FILE"] = path
    elif text:
        command.env["LEOFLOW_CALL_ARGS_JSON"] = text


def _add_xcoms(command: Command, xcoms: Mapping[str, bytes], directory: Path) -> None:
    if xcoms:
        command.env["LEOFLOW_XCOM_PARAMS"] = json.dumps(list(xcoms))
    total = 0
    for number, (parameter, value) in enumerate(xcoms.items()):
        text = _as_text(value)
        total += len(value)
        if text is None or len(value) > MAX_STRING_BYTES or total > MAX_TOTAL_BYTES:
            path = str(directory / f"xcom-{number}.json")
            command.files[path] = value
            command.env[f"LEOFLOW_XCOMFILE_{parameter.upper()}"] = path
        else:
            command.env[f"LEOFLOW_XCOM_{parameter.upper()}"] = text


def _as_text(value: bytes) -> str | None:
    """The value as an environment string, or None when it cannot be one."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return None
    return None if "\x00" in text else text


def _add_operator(command: Command, spec: pb.TaskSpec, inputs: Inputs, config: AgentConfig, directory: Path) -> None:
    match spec.operator:
        case "python":
            command.argv = [config.python, "-m", "leoflow_runtime", spec.entrypoint]
            # Lines appear in the log when they are printed, not when a buffer is full.
            command.env.setdefault("PYTHONUNBUFFERED", "1")
            # The runtime takes it away and puts the working directory on the path, after its own imports.
            command.env.setdefault("PYTHONSAFEPATH", "leoflow")
            paths = (command.env.get("LEOFLOW_SOURCE_DIR"), command.env.get("PYTHONPATH"), str(directory / "runtime"))
            command.env["PYTHONPATH"] = ":".join(path for path in paths if path)
        case "bash":
            command.argv = ["bash", *_script(command, spec.entrypoint, directory)]
        case "exec":
            command.argv = [value.string_value for value in spec.extra.fields["argv"].list_value.values]
            command.stdin = spec.extra.fields["stdin"].string_value.encode()
            if command.argv[:1] == [PYTHON]:
                command.argv[0] = config.python
            if not command.argv:
                raise InvalidRequest("argv: is empty; an exec task needs a program and its arguments", "argv")
        case "http_api":
            # -I: no module beside the user's code can stand in for one of ours.
            command.argv = [sys.executable, "-I", "-m", "leoflow_celery.executors.inline_http"]
            _add_http_request(command, spec, inputs.xcoms, directory)
        case other:
            raise InvalidRequest(
                f"operator {other!r} is not known to this agent: python, bash, exec or http_api", "operator"
            )


def _add_http_request(command: Command, spec: pb.TaskSpec, xcoms: Mapping[str, bytes], directory: Path) -> None:
    text = spec.extra.fields["http_request"].string_value
    if "{{" in text:
        text = _filled(text, spec, xcoms)
    command.env["LEOFLOW_TRY_NUMBER"] = str(spec.try_number or 1)
    command.env["LEOFLOW_TIMEOUT_SECONDS"] = str(spec.execution_timeout_seconds)
    if len(text.encode()) <= MAX_STRING_BYTES:
        command.env["LEOFLOW_HTTP_REQUEST_JSON"] = text
        return
    path = str(directory / "http_request.json")
    command.files[path] = text.encode()
    command.env["LEOFLOW_HTTP_REQUEST_PATH"] = path


def _filled(text: str, spec: pb.TaskSpec, xcoms: Mapping[str, bytes]) -> str:
    """The call with its values, as the inline worker fills it."""
    from leoflow_celery.domain.http_call import TemplateError, Values  # these cost a start that needs none of them
    from leoflow_celery.domain.request import HttpRequest

    try:
        parsed = {name: strict_json.parse(value) for name, value in xcoms.items()}
    except ValueError as error:
        raise InvalidRequest(f"xcom_input: a value is not JSON: {error}; correct its task", "xcom_input") from error
    args = json.loads(spec.call_args_json or "{}")
    try:
        values = Values(args, spec.environment, parsed, spec.xcom_input_mapping)
        return HttpRequest.model_validate_json(text).filled(values).model_dump_json()
    except TemplateError as error:
        raise InvalidRequest(str(error), error.field) from None


def _script(command: Command, text: str, directory: Path) -> list[str]:
    if len(text.encode()) <= MAX_STRING_BYTES:
        return ["-c", text]
    path = str(directory / "script.sh")
    command.files[path] = text.encode()
    return [path]
