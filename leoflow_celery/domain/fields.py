"""The kinds of values that a request or a DAG holds, each with the rule that keeps it from breaking something later.

Text without what no database keeps, JSON that every reader takes, names that fit a file, an environment or a key.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, JsonValue, ValidationInfo

from leoflow_celery.domain import strict_json
from leoflow_celery.domain.pod_fields import item_path, misfit
from leoflow_celery.domain.quantity import parse_quantity
from leoflow_celery.domain.schema import check_schema

#: Of UTF-8. Five ids of this size are the largest key that a PostgreSQL index takes.
MAX_ID_BYTES = 512
#: A DNS subdomain, as the Kubernetes API wants it; Docker takes any of these too.
MAX_CLAIM_CHARACTERS = 253
#: More than any number needs, with its unit.
MAX_QUANTITY_CHARACTERS = 64
#: What the column of a name or of a Celery id takes.
MAX_NAME_CHARACTERS = 255

Item = TypeVar("Item")

_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
#: Control and format characters (ESC, bidi overrides, zero-width ones), halves of pairs, line and paragraph separators.
_UNPRINTABLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_CLAIM_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")
_HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
#: Of a Pod object; the API server would drop any other key, and say nothing.
_POD_KEYS = frozenset({"apiVersion", "kind", "metadata", "spec"})
#: How an agent is run is for its image and its executor to say: a request that could would break it, or take it over.
_CONTROL_PREFIXES = ("LEOFLOW_AGENT_", "LEOFLOW_CALL_ARGS_", "LEOFLOW_XCOM_", "LEOFLOW_XCOMFILE_", "LEOFLOW_WARM_")
_CONTROL_NAMES = frozenset(
    {
        *("LEOFLOW_CONTROL_PLANE_ADDR", "LEOFLOW_TASK_INSTANCE_ID", "LEOFLOW_ATTEMPT_NAME", "LEOFLOW_POD_NAME"),
        *("LEOFLOW_TERMINATION_LOG", "LEOFLOW_STAGING_DIR", "LEOFLOW_SOURCE_DIR", "LEOFLOW_RETURN_VALUE_PATH"),
        *("LEOFLOW_REASON_PATH", "LEOFLOW_HTTP_REQUEST_JSON", "LEOFLOW_HTTP_REQUEST_PATH", "LEOFLOW_TRY_NUMBER"),
        *("LEOFLOW_TIMEOUT_SECONDS", "LEOFLOW_MAX_ATTEMPTS_PER_WORKER", "LEOFLOW_MAX_WORKER_LIFETIME_SECONDS"),
    }
)
#: The two that only say how patient one's own agent is and what it keeps on disk, with the least that it takes.
_TUNING = {"LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS": 0.0, "LEOFLOW_AGENT_SPOOL_BYTES": 65_536.0}
_NAME_RULE = "a name may hold no '=', NUL or half a surrogate pair and not be empty"


def is_storable(text: str) -> bool:
    """Whether every database, process and API takes the text: no NUL, no half of a surrogate pair."""
    return _UNSTORABLE.search(text) is None


def _text(value: str) -> str:
    if not is_storable(value):
        raise ValueError(
            "holds a NUL character or half a surrogate pair, which no database or process takes; remove it"
        )
    return value


def is_printable(text: str) -> bool:
    """Whether a log, a terminal and a name show the text as it is: nothing in it moves, hides or reverses the rest."""
    if text.isascii():
        return text.isprintable()
    return not any(unicodedata.category(character) in _UNPRINTABLE_CATEGORIES for character in set(text))


def printable(text: str, characters: int | None = None, keep: str = "") -> str:
    """The text with every character that ``is_printable`` refuses, but for those to ``keep``, written as its escape.

    At most so many of its ``characters`` are shown.
    """
    if characters is not None and len(text) > characters:
        return f"{printable(text[:characters], keep=keep)}…"
    if is_printable(text):
        return text
    return escaped(text, keep, lambda one: one.encode("unicode_escape").decode())


def escaped(text: str, keep: str, escape: Callable[[str], str]) -> str:
    """The text with ``escape`` of each character that is not printable. A log has millions, and few different ones."""
    for one in set(text).difference(keep):
        if not is_printable(one):
            text = text.replace(one, escape(one))
    return text


def _label(value: str) -> str:
    if not is_printable(_text(value)):
        raise ValueError(
            "holds a control, bidirectional or invisible character, which would forge what logs and terminals show; "
            "remove it"
        )
    return value


def _identifier(value: str) -> str:
    if value in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", value):
        raise ValueError("is used in file names: no slash, backslash, control character, '.' or '..'")
    if not value or len(_label(value).encode()) > MAX_ID_BYTES:
        raise ValueError(f"must have 1 to {MAX_ID_BYTES} bytes")
    return value


def _plain_identifier(value: str) -> str:
    if ":" in value:
        raise ValueError("is used in keys that colons separate: no colon")
    return _identifier(value)


def _claim_name(value: str) -> str:
    if value and (len(value) > MAX_CLAIM_CHARACTERS or not _CLAIM_NAME.fullmatch(value)):
        raise ValueError(
            f"names a volume: at most {MAX_CLAIM_CHARACTERS} lower-case letters, digits, '-' and '.', with a letter or "
            "digit at both ends"
        )
    return value


def _quantity(value: str) -> str:
    if len(value) > MAX_QUANTITY_CHARACTERS:
        raise ValueError(f"must have at most {MAX_QUANTITY_CHARACTERS} characters; write for example 500m or 128Mi")
    parse_quantity(value)
    return value


def is_variable_name(name: str) -> bool:
    """Whether a process can be given a variable of this name."""
    return bool(name) and "=" not in name and is_storable(name)


def _variable_name(value: str) -> str:
    if not is_variable_name(value):
        raise ValueError(_NAME_RULE)
    return _label(value)


def control_variable_problem(name: str, value: Any) -> str:
    """Why a task's variable of this name cannot be: a sentence with the fix, or nothing. The value is not quoted."""
    if name in _TUNING:
        if not isinstance(value, str) or _is_number(value, _TUNING[name]):
            return ""
        return f"variable {name!r}: its value must be a number of at least {_TUNING[name]:g}"
    if name in _CONTROL_NAMES or name.startswith(_CONTROL_PREFIXES):
        return (
            f"variable {name!r} controls the agent and is set by the executor alone; remove it, or give the variable "
            "another name"
        )
    return ""


def _is_number(text: str, at_least: float) -> bool:
    try:
        return at_least <= float(text) < float("inf")
    except ValueError:
        return False


def _environment(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not is_variable_name(name) or not is_storable(text):
            head, equals, _ = name.partition("=")
            shown = f"{head}=…" if equals else name  # what follows may well be the value
            raise ValueError(f"variable {shown!r}: {_NAME_RULE}, a value no NUL or half a surrogate pair")
        if not is_printable(name):
            raise ValueError(f"variable {name!r}: its name holds a control, bidirectional or invisible character")
        if problem := control_variable_problem(name, text):
            raise ValueError(problem)
    return value


_MAX_MOMENT_CHARACTERS = 64
_DAY_AND_T = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ]")


def _moment(text: str) -> str:
    """A time as RFC 3339 writes it, or empty."""
    if text:
        try:
            # Python reads more than RFC 3339: weeks, no dashes, any character for the T.
            has_offset = bool(_DAY_AND_T.match(text)) and datetime.fromisoformat(text).utcoffset() is not None
        except ValueError:
            has_offset = False
        if not has_offset or len(text) > _MAX_MOMENT_CHARACTERS:
            raise ValueError(f"is not a time with an offset, like 2030-01-31T12:00:00+00:00 (got {text[:80]!r})")
    return text


def _plain_json(value: JsonValue) -> JsonValue:
    strict_json.check(value)
    return value


def _pod_part(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if unknown := sorted(value.keys() - _POD_KEYS - {"$patch"}):
        raise ValueError(
            f"has the key {unknown[0]!r}; a Pod has metadata and spec: write spec.{unknown[0]}, or the like"
        )
    if found := misfit(value):
        raise ValueError(printable(str(found)))
    for path, name, text in _pod_variables(value):
        if problem := control_variable_problem(name, text):
            raise ValueError(f"{printable(path)}: {problem}")
    return value


def _pod_variables(part: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Place, name and value of each variable that a part of a Pod, whose kinds were checked, gives a container."""
    spec = part.get("spec") or {}
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        for number, container in enumerate(spec.get(kind) or ()):
            for one in (container or {}).get("env") or ():
                if isinstance(one, dict) and isinstance(one.get("name"), str) and one.get("$patch") != "delete":
                    yield f"{item_path(f'spec.{kind}', number, container)}.env", one["name"], one.get("value")


#: The context of ``model_validate`` for what passed the door before and was kept under a seal since: a schema is not
#: compiled again. That takes up to a second, and whoever reads a request may have others waiting.
SEALED = {"schemas_were_checked": True}


def _schema(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    if info.context is None or not info.context.get("schemas_were_checked"):
        check_schema(value)
    return value


def _mount_path(value: str) -> str:
    if value and (not value.startswith("/") or ":" in value):
        raise ValueError("is a directory in the container: an absolute path without a colon, e.g. /secrets")
    return _label(value)


def _host_name(value: str) -> str:
    if not _HOST_NAME.fullmatch(value):
        raise ValueError("is the name of a host: letters, digits, '-', '.' and '_'")
    return value


def _address(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("is an IP address, e.g. 10.0.0.7") from None


def _parameters(value: dict[str, Item]) -> dict[str, Item]:
    seen: dict[str, str] = {}
    for name in value:
        if (other := seen.setdefault(name.upper(), name)) != name:
            raise ValueError(
                f"the parameters {other!r} and {name!r} are one variable, LEOFLOW_XCOM_{name.upper()}; rename one"
            )
    return value


def _not_empty(value: tuple[Item, ...]) -> tuple[Item, ...]:
    if not value:
        raise ValueError("is empty; it needs at least one item")
    return value


#: Free text: code, values, bodies.
Text = Annotated[str, AfterValidator(_text)]
#: Text that becomes a name, a label or part of a log line.
Label = Annotated[str, AfterValidator(_label)]
Name = Annotated[Label, Field(max_length=MAX_NAME_CHARACTERS)]
Identifier = Annotated[str, AfterValidator(_identifier)]
PlainIdentifier = Annotated[str, AfterValidator(_plain_identifier)]
ClaimName = Annotated[str, AfterValidator(_claim_name)]
HostName = Annotated[str, AfterValidator(_host_name)]
Address = Annotated[str, AfterValidator(_address)]
MountPath = Annotated[str, AfterValidator(_mount_path)]
Quantity = Annotated[str, AfterValidator(_quantity)]
OptionalQuantity = Annotated[str, AfterValidator(lambda value: value and _quantity(value))]
#: Of an environment variable, or of an argument that an agent makes one of.
VariableName = Annotated[str, AfterValidator(_variable_name)]
Environment = Annotated[dict[str, str], AfterValidator(_environment)]
#: Parameter name → where its value comes from.
Parameters = Annotated[dict[VariableName, Item], AfterValidator(_parameters)]
#: Not by min_length: pydantic counts the valid items only, and would call a list of wrong ones too short as well.
NotEmpty = Annotated[tuple[Item, ...], AfterValidator(_not_empty), Field(json_schema_extra={"minItems": 1})]
Json = Annotated[JsonValue, AfterValidator(_plain_json)]
Moment = Annotated[str, AfterValidator(_moment)]
JsonObject = Annotated[dict[str, JsonValue], AfterValidator(_plain_json)]
PodPart = Annotated[JsonObject, AfterValidator(_pod_part)]
JsonSchema = Annotated[dict[str, JsonValue], AfterValidator(_schema)]
