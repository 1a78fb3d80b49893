"""The engine of JSON Schemas, alone in a process that may be ended at any moment (see ``schema``).

Regular expressions take linear time. Schemas themselves do not: references and ``unevaluatedProperties`` can say in a
few lines what takes longer than the universe has, already while they are compiled.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import jsonschema_rs

from leoflow_celery.confined import serve

_SHOWN_CHARACTERS = 200
#: Compiled size of all patterns of a schema together, and of one; ``^\\w{1,255}$`` has about one MiB.
_PATTERNS_BYTES, _PATTERN_BYTES = 64 << 20, 10 << 20


def answer(question: bytes) -> bytes:
    """Of a schema alone: what is wrong with it. Of a schema, NUL and a value: which rule the value breaks where."""
    schema, _, value = question.partition(b"\x00")
    validator, wrong = _compiled(schema.decode())
    if validator is None:
        return json.dumps({"schema": wrong}).encode()
    if not value:
        # A schema that is lost on these is lost on every value.
        probes: tuple[Any, ...] = (None, False, 0, "", [], {})
        for probe in probes:
            validator.is_valid(probe)
        return b"{}"
    try:
        validator.validate(json.loads(value))
    except jsonschema_rs.ValidationError as broken:
        place = "/".join(map(str, broken.instance_path))[:_SHOWN_CHARACTERS] or "the value"
        return json.dumps({"place": place, "rule": _rule(broken)}).encode()
    return b"{}"


def _rule(broken: jsonschema_rs.ValidationError) -> str:
    keywords = [part for part in broken.schema_path if isinstance(part, str)]
    return str(keywords[-1])[:_SHOWN_CHARACTERS] if keywords else str(broken.kind.name)


# As text: what is compiled is a few times as large, and a process meets the same few schemas over and over.
@lru_cache(maxsize=16)
def _compiled(text: str) -> tuple[Any, str]:
    """A validator, or what is wrong."""
    schema = json.loads(text)
    limit = min(_PATTERN_BYTES, _PATTERNS_BYTES // max(1, text.count('"pattern')))
    limit = min(limit, _PATTERNS_BYTES // max(1, _count_pattern_properties(schema)))
    options = jsonschema_rs.RegexOptions(size_limit=limit, dfa_size_limit=_PATTERN_BYTES)
    try:
        kind = jsonschema_rs.validator_cls_for(schema)
        return kind(schema, pattern_options=options, retriever=_fetch_nothing, validate_formats=False), ""
    except jsonschema_rs.ValidationError as error:
        if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.Referencing):
            return None, _dangling(error.message)
        return None, _invalid(error)


def _invalid(error: jsonschema_rs.ValidationError) -> str:
    text = f"is not a JSON Schema: {error.message[:_SHOWN_CHARACTERS]}"
    if not error.message.endswith('"regex"'):
        return text
    return (
        f"{text}, or one too large. Patterns are matched in linear time: no look-around, no back-references, "
        "and [A-Za-z0-9_]{1,64} rather than many \\w{1,64}"
    )


def _dangling(message: str) -> str:
    what = message.split(" is not present", 1)[0].split(" does not exist", 1)[0][:_SHOWN_CHARACTERS]
    return f"refers to what it does not hold ({what}), and nothing is fetched; put that below $defs"


def _count_pattern_properties(schema: Any) -> int:
    """How many patterns name properties, wherever that may be."""
    found, waiting = 0, [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            patterns = each.get("patternProperties")
            found += len(patterns) if isinstance(patterns, dict) else 0
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return found


def _fetch_nothing(_uri: str) -> Any:
    raise ValueError("nothing is fetched")


if __name__ == "__main__":
    serve(answer)
