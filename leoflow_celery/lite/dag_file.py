"""A DAG from any file that describes one: dag.json, YAML with the same keys, or Python with the Airflow Task SDK.

A Python file is run to be read. That happens in a process of its own, with an interpreter that the user chooses,
without our settings in its environment and for a limited time; what it hands back is checked like any other dag.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leoflow_celery.errors import InvalidDag
from leoflow_celery.lite.dag import Dag, load_dag

#: Importing the Task SDK takes two to three seconds.
COMPILE_SECONDS = 60.0
_YAML_SUFFIXES = (".yaml", ".yml")
_SHOWN_ERRORS = 10
_SHOWN_OUTPUT_CHARACTERS = 2_000


@dataclass(frozen=True, slots=True)
class DagFile:
    """A DAG, the dag.json it stands for, and what the compiler remarks."""

    dag: Dag
    content: bytes
    notes: tuple[str, ...] = ()


def load_dag_file(
    path: Path, *, python: str = "", dag_id: str = "", image: str = "", seconds: float = COMPILE_SECONDS
) -> DagFile:
    """The DAG of a file; ``python`` is the interpreter for a .py file, ``dag_id`` the DAG to take from it.

    Raises:
        InvalidDag: the file cannot be read, compiled, or breaks a rule; names file, place, value and fix.
    """
    if path.suffix == ".py":
        answer = _compile(path, python or default_python(), dag_id, image, seconds)
        content = json.dumps(answer["dag"], indent=2, ensure_ascii=False).encode() + b"\n"
        return DagFile(_checked(path, content), content, tuple(answer["notes"]))
    if path.suffix in _YAML_SUFFIXES:
        content = json.dumps(_yaml(path), indent=2, ensure_ascii=False).encode() + b"\n"
        return DagFile(_checked(path, content), content)
    dag = load_dag(path)
    return DagFile(dag, path.read_bytes())


def default_python() -> str:
    """The interpreter that tasks run in, LEOFLOW_PYTHON, or our own."""
    return os.environ.get("LEOFLOW_PYTHON") or sys.executable


def _checked(path: Path, content: bytes) -> Dag:
    try:
        return load_dag(content)
    except InvalidDag as error:
        raise InvalidDag(f"{path}: {str(error).removeprefix('dag.json: ')}", error.field) from error


def _compile(path: Path, python: str, dag_id: str, image: str, seconds: float) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidDag(f"{path}: cannot be read: no such file; give the path of a DAG file")
    runtime = find_spec("leoflow_runtime")
    home = Path(str(runtime.origin)).parents[1] if runtime and runtime.origin else Path.cwd()
    with tempfile.TemporaryDirectory(prefix="leoflow-compile-") as directory:
        # Nothing but the runtime is made importable: this package's own dependencies are not the user's.
        (Path(directory) / "leoflow_runtime").symlink_to(home / "leoflow_runtime", target_is_directory=True)
        output = Path(directory) / "answer.json"
        command = [python, "-m", "leoflow_runtime.compile", str(path), str(output)]
        options = ["--shown", str(path), "--dag-id", dag_id, "--image", image]
        said = _run([*command, *options], _environment(directory), path, seconds)
        try:
            answer: dict[str, Any] = json.loads(output.read_bytes())
        except (OSError, ValueError):
            tail = " ".join(said[-_SHOWN_OUTPUT_CHARACTERS:].split()) or "it said nothing"
            raise InvalidDag(f"{path}: {python} ended before the DAG was compiled: {tail}") from None
    if errors := answer.get("errors"):
        more = f"; and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
        raise InvalidDag("; ".join(errors[:_SHOWN_ERRORS]) + more)
    if said.strip():
        sys.stderr.write(said if said.endswith("\n") else f"{said}\n")
    return answer


def _environment(directory: str) -> dict[str, str]:
    """The user's own, without our settings: they hold keys."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LEOFLOW_")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (directory, environ.get("PYTHONPATH"))))
    environ.setdefault("AIRFLOW_HOME", os.path.join(directory, "airflow"))
    return {**environ, "PYTHONDONTWRITEBYTECODE": "1"}


def _run(command: list[str], environ: dict[str, str], path: Path, seconds: float) -> str:
    """What the process printed. All that it started ends with it."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        except OSError as error:
            raise InvalidDag(
                f"{command[0]}: cannot be run: {error.strerror}; name an interpreter with --python"
            ) from error
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise InvalidDag(
                f"{path}: takes more than {seconds:g} s to import; do the work in tasks and not at the top of the file"
            ) from None
        finally:
            _kill_group(process)
        said.seek(0)
        return said.read().decode("utf-8", "replace")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise InvalidDag(f"{path}: reading YAML needs PyYAML; install leoflow-celery[authoring]") from error

    class Loader(yaml.SafeLoader):
        """Dates stay text, as in JSON, and no key comes twice."""

    def unique(loader: Any, node: Any) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                raise InvalidDag(
                    f"{path}:{key_node.start_mark.line + 1}: key {key!r} is given twice in one object; keep one of them"
                )
            seen.add(key)
        loader.flatten_mapping(node)  # what is merged with << comes first, and may be set anew
        return {
            loader.construct_object(key, deep=True): loader.construct_object(one, deep=True) for key, one in node.value
        }

    Loader.add_constructor("tag:yaml.org,2002:map", unique)
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        with path.open("rb") as file:
            data = yaml.load(file, Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise InvalidDag(f"{path}: cannot be read: {error.strerror}; give the path of a DAG file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InvalidDag(f"{where}: is not YAML: {getattr(error, 'problem', None) or error}") from error
    return data
