"""A DAG file of the Airflow Task SDK as a dag.json: ``python -m leoflow_runtime.compile dag.py OUTPUT``.

It runs the user's file, so it runs in a process of its own with the user's interpreter; ``leoflow dag compile`` starts
it. OUTPUT gets a JSON object: ``{"dag": …, "notes": […]}``, or ``{"errors": […]}`` with every error as
``file:line: what, and the way out``. What a task says that a dag.json cannot say is an error and is never dropped.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus, urlencode, urlsplit

from leoflow_runtime.airflow_sdk import TASK, Defined, recorded

#: What a source is called where it runs.
MODULE = "dag"
_RULES = re.findall(
    r"\w+",
    (
        "all_success all_failed all_done one_success one_failed one_done none_failed none_failed_min_one_success "
        "none_skipped all_skipped all_done_min_one_success always"
    ),
)
#: Parameters that Airflow fills from its context; a function that takes one without a default needs it.
_CONTEXT = frozenset(
    re.findall(
        r"\w+",
        "ti task_instance task dag dag_run run_id ds ts logical_date data_interval_start data_interval_end params var "
        "conn macros context ds_nodash ts_nodash ts_nodash_with_tz prev_start_date_success triggering_asset_events "
        "inlets outlets templates_dict map_index_template test_mode task_instance_key_str",
    )
)
#: Attribute → its value where nothing was asked for. What differs would be lost.
_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "depends_on_past": (False, "remove it: a run looks at no other run"),
    "wait_for_downstream": (False, "remove it: a run looks at no other run"),
    "retry_exponential_backoff": (False, "remove it; retry_delay is the same before every try"),
    "max_active_tis_per_dag": (None, "remove it, or use a queue of the executor with few places"),
    "max_active_tis_per_dagrun": (None, "remove it, or chain the tasks with >>"),
    "is_setup": (False, "write a plain task before the others"),
    "is_teardown": (False, "write a plain task with trigger_rule='all_done' behind the others"),
    "on_failure_callback": (None, "write a task with trigger_rule='one_failed' behind it"),
    "on_success_callback": (None, "write a task behind it"),
    "on_retry_callback": (None, "remove it"),
    "on_execute_callback": (None, "remove it"),
    "on_skipped_callback": (None, "write a task with trigger_rule='all_skipped' behind it"),
    "outlets": ([], "remove it: assets belong to the scheduler"),
    "inlets": ([], "remove it: assets belong to the scheduler"),
    "pool": ("default_pool", "remove it, or use a queue of the executor with few places"),
    "templates_dict": (None, "hand the values over as arguments"),
}
_NOTHING = ":"
_JINJA = re.compile(r"\{\{|\{%")
_PULL = re.compile(
    r"\{\{\s*(?:ti|task_instance)\.xcom_pull\(\s*(?:task_ids\s*=\s*)?['\"]([^'\"]+)['\"]\s*"
    r"(?:,\s*dag_id\s*=\s*['\"][^'\"]*['\"]\s*)?(?:,\s*key\s*=\s*['\"]return_value['\"]\s*)?\)\s*\}\}"
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PROLOGUE = r"""
leoflow_input() {
  local v="LEOFLOW_XCOM_$2" f="LEOFLOW_XCOMFILE_$2"
  v=${!v-}
  if [ -n "${!f-}" ]; then v=$(cat "${!f}"); fi
  if [[ $v == \"*\" ]]; then v=${v#\"}; v=${v%\"}; v=${v//\\\"/\"}; printf -v v %b "$v"; fi
  export "$1=$v"
}
""".strip()
#: Exit code 99 of a BashOperator: not failed, skipped.
_SKIP_TRAP = (
    "trap 'code=$?; if [ $code = 99 ]; then printf skipped > \"$LEOFLOW_REASON_PATH\"; exit 0; fi; exit $code' EXIT"
)
#: The last line of a BashOperator's output is its result.
_LAST_LINE = r"""
leoflow_output=$(mktemp)
{
%s
} > >(tee "$leoflow_output")
wait $!
leoflow_line=$(tail -n 1 "$leoflow_output")
rm -f "$leoflow_output"
leoflow_line=${leoflow_line//\\/\\\\}
leoflow_line=${leoflow_line//\"/\\\"}
leoflow_line=${leoflow_line//$'\t'/\\t}
printf '"%%s"' "${leoflow_line//$'\r'/}" > "$LEOFLOW_RETURN_VALUE_PATH"
""".strip()
_FORM = "application/x-www-form-urlencoded"


class Wrong(Exception):
    """One thing that a dag.json cannot say, and the way out."""


class Compiler:
    """One DAG of one file."""

    def __init__(self, path: str, shown: str, found: Defined, dag: Any, module: Any) -> None:
        self.path, self.shown, self.found, self.dag, self.module = path, shown, found, dag, module
        self.errors: list[str] = []
        self.notes: list[str] = []
        #: Ids of tasks whose result is an input of another.
        self.taken: set[str] = set()
        self.ids = {task.task_id: task.task_id.replace(".", "__") for task in dag.tasks}

    def document(self, source: str, image: str) -> dict[str, Any]:
        """The dag.json; without meaning once there are errors."""
        tasks = []
        for task in self.dag.tasks:
            try:
                tasks.append(self._task(task))
            except Wrong as wrong:
                self._wrong(self.found.line(self.dag, task.task_id), f"task {task.task_id!r}: {wrong}")
        self._return_last_lines(tasks)
        self._check_dag()
        document = {
            "schema_version": "1.0",
            "dag_id": self.dag.dag_id,
            "dag_version": hashlib.sha256(source.encode()).hexdigest()[:12],
            "description": self.dag.description,
            "tags": sorted(self.dag.tags or ()),
            "schedule": self.dag.schedule if isinstance(self.dag.schedule, str) else None,
            "start_date": self.dag.start_date.isoformat() if self.dag.start_date else None,
            "end_date": self.dag.end_date.isoformat() if self.dag.end_date else None,
            "catchup": bool(self.dag.catchup) or None,
            "image": image or None,
            "tasks": tasks,
            "source": source if any(task["type"] == "python" for task in tasks) else None,
        }
        return _set_only(document)

    def _return_last_lines(self, tasks: list[dict[str, Any]]) -> None:
        """A command whose result is taken, and that writes none itself, returns its last line, as in Airflow."""
        for task in tasks:
            command = task.get("entrypoint", "")
            taken = task["type"] == "bash" and task["task_id"] in self.taken
            if taken and command != _NOTHING and "LEOFLOW_RETURN_VALUE_PATH" not in command:
                task["entrypoint"] = _LAST_LINE % f"(\n{command}\n) || exit"

    def _wrong(self, line: int, text: str) -> None:
        self.errors.append(f"{self.shown}:{line}: {text}" if line else f"{self.shown}: {text}")

    def _check_dag(self) -> None:
        line = min((self.found.line(self.dag, task.task_id) for task in self.dag.tasks), default=0)
        if len(set(self.ids.values())) < len(self.ids):
            self._wrong(line, "two tasks get the same id once the '.' of a task group is '__'; rename one")
        if self.dag.params:
            self._wrong(line, f"DAG {self.dag.dag_id!r}: params: a run has none; use constants, or env of the tasks")
        if self.dag.schedule is not None and not isinstance(self.dag.schedule, str):
            self.notes.append("schedule is no cron text and is left out: a run does not use it")

    def _task(self, task: Any) -> dict[str, Any]:
        kind = type(task).__name__
        if not type(task).__module__.startswith("airflow."):
            raise Wrong(f"{kind} is an operator of your own, and no agent runs its execute(); write a @task function")
        compiled = self._compilers().get(kind)
        if compiled is None:
            raise Wrong(_way_out(kind))
        for name, (normal, way_out) in _UNSUPPORTED.items():
            value = getattr(task, name, normal)
            if value != normal and value not in (None, False, [], (), {}):
                raise Wrong(f"{name} cannot be expressed in a dag.json; {way_out}")
        rule = getattr(task.trigger_rule, "value", str(task.trigger_rule))
        if rule not in _RULES:
            raise Wrong(f"trigger_rule {rule!r} cannot be expressed in a dag.json; use one of {', '.join(_RULES)}")
        return _set_only(
            {
                "task_id": self.ids[task.task_id],
                **compiled(task),
                "depends_on": sorted(self.ids[up] for up in task.upstream_task_ids),
                "trigger_rule": rule if rule != "all_success" else None,
                "retries": task.retries or None,
                "retry_delay_seconds": _seconds(task.retry_delay) if task.retries else None,
                "execution_timeout_seconds": max(1, math.ceil(_seconds(task.execution_timeout)))
                if task.execution_timeout
                else None,
            }
        )

    def _compilers(self) -> dict[str, Callable[[Any], dict[str, Any]]]:
        return {
            "_PythonDecoratedOperator": self._python,
            "PythonOperator": self._python,
            "BashOperator": self._bash,
            "HttpOperator": self._http,
            "EmptyOperator": lambda _: {"type": "bash", "entrypoint": _NOTHING},
        }

    # Python

    def _python(self, task: Any) -> dict[str, Any]:
        function = task.python_callable
        name = getattr(function, "__name__", "the callable")
        if getattr(task, "multiple_outputs", False):
            raise Wrong(
                "multiple_outputs cannot be expressed in a dag.json; hand the whole value over and index it there"
            )
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            raise Wrong(f"{name} has no signature that can be read; wrap it in a function") from None
        for parameter in parameters.values():
            given = parameter.name in task.op_kwargs
            if parameter.name in _CONTEXT and not given and parameter.default in (parameter.empty, None):
                raise Wrong(
                    f"{name}() takes {parameter.name!r} from Airflow's context, which a task does not have; use "
                    "leoflow_runtime.context(), or hand the value over as an argument"
                )
        try:
            bound = inspect.signature(function).bind_partial(*task.op_args, **task.op_kwargs)
        except TypeError as error:
            raise Wrong(f"{name}(): {error}; correct the call") from None
        values: dict[str, Any] = {}
        for key, value in bound.arguments.items():
            kind = parameters[key].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise Wrong(f"{name}(): *{key} cannot be filled by name; give each parameter a name, or take one list")
            values.update(value if kind is inspect.Parameter.VAR_KEYWORD else {key: value})
        inputs: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            source = self._source(value, f"argument {key!r}")
            if source is not None:
                inputs[key] = source
            else:
                arguments[key] = _literal(value, f"argument {key!r}")
        return {
            "type": "python",
            "entrypoint": self._entrypoint(task, function),
            "xcom_input": inputs,
            "call_args": arguments,
        }

    def _entrypoint(self, task: Any, function: Any) -> str:
        module, path = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
        if module == MODULE:
            return f"{MODULE}:{path if self._leads_to(path, function) else self._by_task(task)}"
        if not module or "<" in path:
            return f"{MODULE}:{self._by_task(task)}"
        file = getattr(sys.modules.get(module), "__file__", None) or ""
        if os.path.dirname(os.path.abspath(file)) == os.path.dirname(self.path):
            self.notes.append(
                f"{os.path.basename(file)} is not part of the source: have it in the image, "
                "or on PYTHONPATH of the workers"
            )
        return f"{module}:{path}"

    def _by_task(self, task: Any) -> str:
        return f"{TASK}{self.dag.dag_id}/{task.task_id}"

    def _leads_to(self, path: str, function: Any) -> bool:
        found = self.module
        for name in path.split("."):
            found = getattr(found, name, None)
        while found is not None and found is not function:
            found = getattr(found, "function", None)
        return found is function

    # Bash

    def _bash(self, task: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        exported: dict[str, str] = {}
        environment: dict[str, str] = {}
        for name, value in (task.env or {}).items():
            source = self._source(value, f"env {name!r}")
            pulled = _PULL.fullmatch(value) if isinstance(value, str) else None
            if pulled:
                source = self._id(pulled[1])
            if source is not None:
                inputs[name] = source
                exported[name] = name
            elif not isinstance(value, str) or _JINJA.search(value):
                raise Wrong(f"env {name!r} is no plain text; write text, or the result of a task as the whole value")
            else:
                environment[name] = value
        command = task.bash_command
        if not isinstance(command, str):
            raise Wrong("bash_command is no text; write the command, and hand results over with env={'NAME': result}")
        if re.search(r"\.(sh|bash)\s*$", command) and " " not in command.strip():
            raise Wrong("bash_command names a template file; write the command itself, or end it with a space")

        def variable(found: re.Match[str]) -> str:
            if command[: found.start()].count("'") % 2:
                raise Wrong(
                    "a result stands in single quotes in bash_command, where no variable does; use double quotes"
                )
            task_id = self._id(found[1])
            name = "XCOM_" + re.sub(r"\W", "_", task_id).upper()
            inputs[name] = task_id
            exported[name] = name
            return "${" + name + "}"

        text = _PULL.sub(variable, command)
        if _JINJA.search(text):
            raise Wrong(
                "bash_command is a Jinja template, and nobody renders one; hand values over with env={'NAME': result}, "
                "and write '{ {' for two braces"
            )
        if task.cwd:
            text = f"cd {_quoted(task.cwd)} || exit\n{text}"
        if not _is_default(task, "skip_on_exit_code", 99):
            raise Wrong("skip_on_exit_code cannot be expressed in a dag.json; exit with 99 to skip")
        if re.search(r"\b99\b", text):
            text = f"{_SKIP_TRAP}\n{text}"
        lines = [f"leoflow_input {name} {parameter.upper()}" for name, parameter in exported.items()]
        if lines:
            text = "\n".join([_PROLOGUE, *lines, text])
        return {"type": "bash", "entrypoint": text, "env": environment, "xcom_input": inputs}

    # HTTP

    def _http(self, task: Any) -> dict[str, Any]:
        for name in ("response_check", "response_filter", "pagination_function", "auth_type"):
            if getattr(task, name, None) is not None:
                raise Wrong(f"{name} is code that no http_api task runs; check the value in a @task behind it")
        if getattr(task, "deferrable", False):
            raise Wrong("deferrable: an http_api task is; remove it")
        inputs: dict[str, Any] = {}
        url = self._url(task)
        headers = {str(name): self._text(value, f"header {name!r}", inputs) for name, value in task.headers.items()}
        body, method = None, task.method.upper()
        if isinstance(task.data, dict) and method == "GET":
            pairs = self._pairs(task.data, inputs, quote)
            url += ("&" if "?" in url else "?") + "&".join(pairs) if pairs else ""
        elif isinstance(task.data, dict) and task.data:
            body = "&".join(self._pairs(task.data, inputs, quote_plus))
            headers.setdefault("Content-Type", _FORM)
        elif task.data:
            body = self._text(task.data, "data", inputs)
        options = dict(task.extra_options)
        timeout = options.pop("timeout", None)
        if options:
            raise Wrong(f"extra_options {sorted(options)[0]!r} cannot be expressed in a dag.json; remove it")
        call = {"method": method, "url": url, "headers": headers, "body": body, "timeout_seconds": timeout}
        return {"type": "http_api", "http_request": _set_only(call), "xcom_input": inputs}

    def _url(self, task: Any) -> str:
        endpoint = task.endpoint or ""
        if not isinstance(endpoint, str) or _JINJA.search(endpoint):
            raise Wrong("endpoint is no plain text; write the URL, and values that differ as data")
        if re.match(r"https?://", endpoint):
            return endpoint
        variable = f"AIRFLOW_CONN_{task.http_conn_id.upper()}"
        base = os.environ.get(variable, "")
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Wrong(
                f"endpoint {endpoint!r} belongs to the connection {task.http_conn_id!r}; write the whole URL as "
                f"endpoint, or set {variable}=https://host for the compilation"
            )
        if parts.username or parts.password:
            raise Wrong(
                f"the connection {task.http_conn_id!r} holds a password, which would be in the dag.json; write the URL "
                "as endpoint, and a header from a secret"
            )
        return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/{endpoint.lstrip('/')}"

    def _pairs(self, data: dict[str, Any], inputs: dict[str, Any], escape: Callable[[str], str]) -> list[str]:
        pairs = []
        for key, value in data.items():
            source = self._source(value, f"data {key!r}")
            if source is None:
                text = _literal(value, f"data {key!r}")
                pairs.append(urlencode({key: text}, quote_via=lambda one, *_: escape(one)))
            else:
                pairs.append(f"{escape(str(key))}={{{{ xcom.{self._input(str(key), source, inputs)} }}}}")
        return pairs

    def _text(self, value: Any, what: str, inputs: dict[str, Any]) -> str:
        source = self._source(value, what)
        if source is not None:
            name = re.sub(r"\W", "_", what.split(" ")[-1].strip("'"))
            return f"{{{{ xcom.{self._input(name, source, inputs)} }}}}"
        if not isinstance(value, str):
            raise Wrong(f"{what} is no text; write text, or the result of a task as the whole value")

        def placeholder(found: re.Match[str]) -> str:
            task_id = self._id(found[1])
            return f"{{{{ xcom.{self._input(task_id.replace('-', '_'), task_id, inputs)} }}}}"

        text = _PULL.sub(placeholder, value)
        if _JINJA.search(_PULL.sub("", value)):
            raise Wrong(
                f"{what} is a Jinja template, and nobody renders one; use the result of a task as the whole value"
            )
        return text

    def _input(self, name: str, source: Any, inputs: dict[str, Any]) -> str:
        name = name if _VARIABLE.fullmatch(name) else "input_" + re.sub(r"\W", "_", name)
        while name in inputs and inputs[name] != source:
            name += "_"
        inputs[name] = source
        return name

    # Results of other tasks

    def _source(self, value: Any, what: str) -> Any:
        """The task id behind a result, a list of them behind a list of results, or None for a value of another kind."""
        if isinstance(value, (list, tuple)) and value and all(_is_result(one) for one in value):
            return [self._source(one, what) for one in value]
        if not _is_result(value):
            if any(_is_result(one) for one in _inside(value)):
                raise Wrong(
                    f"{what} mixes results of tasks and other values; hand the results over as arguments of their own, "
                    "or as a list of results only"
                )
            return None
        if type(value).__name__ != "PlainXComArg":
            raise Wrong(f"{what}: .map(), .zip() and .concat() cannot be expressed in a dag.json; write a @task for it")
        if value.key != "return_value":
            raise Wrong(
                f"{what} takes the key {value.key!r} of a result; hand the whole result over and index it there"
            )
        return self._id(value.operator.task_id)

    def _id(self, task_id: str) -> str:
        if task_id not in self.ids:
            raise Wrong(f"no task has the id {task_id!r}; correct it")
        self.taken.add(self.ids[task_id])
        return str(self.ids[task_id])


def _way_out(kind: str) -> str:
    ways = {
        "MappedOperator": "expand() decides at run time how many tasks there are; write a list comprehension: "
        "[process(part) for part in PARTS]",
        "DecoratedMappedOperator": "expand() decides at run time how many tasks there are; write a list comprehension: "
        "[process(part) for part in PARTS]",
        "BranchPythonOperator": "no task chooses which others run; let each of them skip itself with "
        "leoflow_runtime.skip()",
        "ShortCircuitOperator": "no task chooses which others run; let it skip itself with leoflow_runtime.skip()",
        "_BranchPythonDecoratedOperator": "no task chooses which others run; let each of them skip itself with "
        "leoflow_runtime.skip()",
        "_ShortCircuitDecoratedOperator": "no task chooses which others run; let it skip itself with "
        "leoflow_runtime.skip()",
    }
    known = "@task functions, PythonOperator, BashOperator, HttpOperator and EmptyOperator"
    return ways.get(kind, f"{kind} cannot be expressed in a dag.json, which has {known}; write a @task that does it")


def _is_result(value: Any) -> bool:
    return any(cls.__name__ == "XComArg" for cls in type(value).__mro__)


def _inside(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict):
        for one in value.values():
            yield from _inside(one)
    elif isinstance(value, (list, tuple, set)):
        for one in value:
            yield from _inside(one)


def _literal(value: Any, what: str) -> Any:
    if any(isinstance(one, str) and _JINJA.search(one) for one in _inside(value)):
        raise Wrong(f"{what} is a Jinja template, and nobody renders one; hand the value over as it is")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Wrong(f"{what} is not JSON ({error}); use text, numbers, lists and objects") from None
    return value


def _is_default(task: Any, name: str, normal: Any) -> bool:
    value = getattr(task, name, normal)
    return value in (normal, [normal], (normal,))


def _seconds(value: Any) -> float:
    seconds = float(value.total_seconds() if hasattr(value, "total_seconds") else value)
    return int(seconds) if seconds.is_integer() else seconds


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _set_only(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value not in ({}, [], "")}


def compile_file(path: str, shown: str, dag_id: str = "", image: str = "") -> dict[str, Any]:
    """``{"dag": …, "notes": […]}`` or ``{"errors": […]}``."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
        with recorded(path) as found:
            module = _imported(path)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "airflow":
            return {"errors": [_no_sdk(shown, error.name)]}
        return {"errors": [_raised(path, shown, error)]}
    except SystemExit as error:
        return {"errors": [f"{shown}: ends with sys.exit({error.code!r}) when it is imported; remove that"]}
    except Exception as error:  # noqa: BLE001 - the user's file may raise anything
        return {"errors": [_raised(path, shown, error)]}
    dags = [dag for dag in found.dags if dag_id in ("", dag.dag_id)]
    names = ", ".join(repr(dag.dag_id) for dag in found.dags)
    if not dags:
        what = f"no DAG {dag_id!r}, it defines {names}" if found.dags else "no DAG with a task; call the @dag function"
        return {"errors": [f"{shown}: defines {what}"]}
    if len(dags) > 1:
        return {"errors": [f"{shown}: defines the DAGs {names}; choose one with --dag-id"]}
    compiler = Compiler(path, shown, found, dags[0], module)
    document = compiler.document(source, image)
    return {"errors": compiler.errors} if compiler.errors else {"dag": document, "notes": compiler.notes}


def _imported(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError("is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    sys.path.insert(0, os.path.dirname(path))
    spec.loader.exec_module(module)
    return module


def _no_sdk(shown: str, name: str) -> str:
    if name in ("airflow", "airflow.sdk"):
        return (
            f"{shown}: {sys.executable} has no Airflow Task SDK; install leoflow-celery[authoring] there, or name "
            "another interpreter with --python"
        )
    return f"{shown}: imports {name}, which {sys.executable} does not have; install the provider it belongs to"


def _raised(path: str, shown: str, error: BaseException) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f"{shown}:{line}" if line else shown
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}; correct it"


def main(argv: list[str]) -> int:
    """Write the answer to the output file; 0 also for a file that cannot be compiled."""
    parser = argparse.ArgumentParser(prog="python -m leoflow_runtime.compile")
    parser.add_argument("path")
    parser.add_argument("output")
    parser.add_argument("--shown", default="")
    parser.add_argument("--dag-id", default="")
    parser.add_argument("--image", default="")
    options = parser.parse_args(argv)
    path = os.path.abspath(options.path)
    answer = compile_file(path, options.shown or options.path, options.dag_id, options.image)
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump(answer, file, ensure_ascii=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
