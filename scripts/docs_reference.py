"""The pages of the reference that are made from the code, as a hook of MkDocs (``make docs``).

Settings, commands, request and dag.json, failure reasons and the changelog are written once, in the code; a page that
is built from there cannot be stale.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs: adds the generated pages to those of docs/."""
    for name, build in PAGES.items():
        files.append(File.generated(config, name, content=build()))
    return files


# -- settings -------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting: variable, default, unit and reason."""
    from leoflow_celery.settings import Settings, variables

    parts = [
        "# Settings",
        "Every setting is an environment variable. A secret may also come from a file "
        "(`LEOFLOW_JWT_SECRET_FILE=/run/…`), and "
        "any setting from a file of lines `NAME=value` that `LEOFLOW_ENV_FILE` names; the environment wins over it. "
        "`leoflow config` shows the values that a process would use, and where each comes from.",
    ]
    for group_field in Settings.model_fields.values():
        group: Any = group_field.annotation
        parts += [f"## {first_sentence(group).rstrip('.')}", "| variable | default | what it is |\n|---|---|---|"]
        comments = field_comments(group)
        for field, names in variables(group).items():
            named = "<br>".join(f"`{name}`" for name in names)
            parts[-1] += f"\n| {named} | {default_of(group, field)} | {cell(comments.get(field, ''))} |"
    return "\n\n".join(parts) + "\n"


def default_of(model: type[BaseModel], name: str) -> str:
    """A field's default as a reader writes it."""
    field = model.model_fields[name]
    if field.default is PydanticUndefined:
        return ""  # a factory's value may be a path of the machine that builds the page
    value = field.default.get_secret_value() if hasattr(field.default, "get_secret_value") else field.default
    if value is None or value == "" or value == ():
        return ""
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def field_comments(model: type[BaseModel]) -> dict[str, str]:
    """The ``#:`` comments above the fields of a class, by field."""
    found: dict[str, str] = {}
    comment: list[str] = []
    for line in textwrap.dedent(inspect.getsource(model)).splitlines():
        stripped = line.strip()
        if stripped.startswith("#:"):
            comment.append(stripped.removeprefix("#:").strip())
        elif match := re.match(r"    (\w+): ", line):
            found[match[1]] = " ".join(comment)
            comment = []
        elif stripped:
            comment = []
    return found


# -- commands -------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its arguments and options, from its own ``--help``."""
    from leoflow_celery.cli.main import app

    parts = [
        "# Commands",
        "What `--help` says, for every command. [The command `leoflow`](../cli.md) tells how they are used together.",
    ]
    for path, command in walk(typer.main.get_command(app), "leoflow"):
        parts += [f"## `{path}`", (command.help or "").strip(), f"```text\n{path} {_usage(command)}\n```"]
        rows = [row for parameter in command.params if (row := _parameter_row(parameter))]
        if rows:
            parts.append("| argument or option | what it is |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A command and all below it, each with the words that call it."""
    yield path, command
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from walk(child, f"{path} {name}")


def _usage(command: Any) -> str:
    arguments = [_metavar(one) for one in command.params if one.param_type_name == "argument"]
    return " ".join(["[OPTIONS]", *arguments, *(["COMMAND …"] if getattr(command, "commands", None) else [])])


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _parameter_row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"| `{_metavar(parameter)}` | {cell(parameter.help or '')} |"
    shown = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if not parameter.is_flag:
        shown += f" `{_metavar(parameter)}`"
    return f"| {shown} | {cell(parameter.help or '')} |"


# -- request and dag.json -------------------------------------------------------------------------------------------


def request_page() -> str:
    """The task request, field by field."""
    from leoflow_celery.domain.request import TaskRequest, request_json_schema

    return _schema_page("Task request", TaskRequest, request_json_schema(), "leoflow schema")


def _schema_page(title: str, model: type[BaseModel], schema: dict[str, Any], command: str) -> str:
    parts = [
        f"# {title}",
        f"{cell(inspect.getdoc(model) or '')} Unknown keys are errors. `{command}` prints the JSON Schema below.",
        _fields_table(model, schema),
    ]
    for name, part in sorted(schema.get("$defs", {}).items()):
        nested = _model_named(model, name)
        parts.append(f"## {name}")
        if part.get("description"):
            parts.append(cell(part["description"]))
        if part.get("enum"):
            parts.append("One of " + ", ".join(f"`{value}`" for value in part["enum"]) + ".")
        elif part.get("properties"):
            parts.append(_fields_table(nested, part))
    parts += ["## JSON Schema", f"```json\n{json.dumps(schema, indent=2)}\n```"]
    return "\n\n".join(parts) + "\n"


def _fields_table(model: type[BaseModel] | None, schema: dict[str, Any]) -> str:
    comments = field_comments(model) if model is not None else {}
    required = set(schema.get("required", ()))
    lines = ["| field | type | default | what it is |", "|---|---|---|---|"]
    for name, part in schema["properties"].items():
        default = part.get("default")
        shown = (
            "required" if name in required else f"`{json.dumps(default)}`" if default not in (None, "", [], {}) else ""
        )
        lines.append(
            f"| `{name}` | {_type(part)} | {shown} | {cell(comments.get(name, '') or part.get('description', ''))} |"
        )
    return "\n".join(lines)


def _type(part: dict[str, Any]) -> str:
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if name != "JsonValue" else "any JSON"
    if "const" in part:
        return f"`{json.dumps(part['const'])}`"
    if "enum" in part:
        return ", ".join(f"`{json.dumps(value)}`" for value in part["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in part:
            kinds = dict.fromkeys(_type(one) for one in part[key] if one.get("type") != "null")
            return " or ".join(kinds)
    if part.get("type") == "array":
        return f"list of {_type(part.get('items', {}))}"
    if part.get("type") == "object" and isinstance(part.get("additionalProperties"), dict):
        return f"name → {_type(part['additionalProperties'])}"
    return str(part.get("type", "any JSON"))


def _model_named(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    found = getattr(inspect.getmodule(model), name, None)
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


# -- reasons and papers ---------------------------------------------------------------------------------------------


def reasons_page() -> str:
    """Every failure reason with its class."""
    from leoflow_celery.domain.reasons import CLASS_OF, FailureClass

    told = {
        FailureClass.USER: "The task's own failure. The scheduler's retries decide.",
        FailureClass.INFRASTRUCTURE: "The system's failure. The same try is started again, twice at most "
        "(`LEOFLOW_MAINTENANCE_MAX_RELAUNCHES`), and no retry of the user's is spent.",
        FailureClass.RESOURCES: "More of something is needed. Memory may grow by `oom_memory_factor`; else it fails.",
        FailureClass.CONFIG: "It can never work as it is. The try fails at once and is not started again.",
    }
    parts = [
        "# Failure reasons",
        "The machine-readable reason that every failed try carries, by the class that decides what follows.",
    ]
    for kind, sentence in told.items():
        names = sorted(reason.value for reason, of in CLASS_OF.items() if of is kind)
        parts += [f"## {kind.value}", sentence, ", ".join(f"`{name}`" for name in names)]
    return "\n\n".join(parts) + "\n"


def changelog_page() -> str:
    """CHANGELOG.md, with its links as a page of the site has them."""
    return (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")


def first_sentence(thing: Any) -> str:
    """Of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].partition(". ")[0]


def cell(text: str) -> str:
    """Text for a cell of a table: one line, and reStructuredText's double backticks as Markdown's single ones."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


#: Page → what makes it.
PAGES: dict[str, Callable[[], str]] = {
    "reference/settings.md": settings_page,
    "reference/commands.md": commands_page,
    "reference/request.md": request_page,
    "reference/reasons.md": reasons_page,
    "changelog.md": changelog_page,
}
