"""JSON Schemas that users hand over: checked at the door, held against values, and never a reason to fetch anything."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from leoflow_celery.domain import strict_json

if TYPE_CHECKING:
    from jsonschema.protocols import Validator
    from referencing import Registry

_SHOWN_CHARACTERS = 200


def check_schema(schema: dict[str, Any]) -> None:
    """Refuse what no value can be held against.

    Raises:
        ValueError: it is no JSON Schema, or refers to something that it does not hold itself.
    """
    strict_json.check(schema)
    _validator(json.dumps(schema))


def violation(value: Any, schema: dict[str, Any]) -> str | None:
    """How a value breaks its schema, None when it does not. A schema that cannot be applied accepts nothing."""
    try:
        validator = _validator(json.dumps(schema))
    except ValueError as error:
        return f"xcom_schema: {error}"
    from jsonschema.exceptions import best_match

    try:
        broken = best_match(validator.iter_errors(value))
    except Exception as error:  # noqa: BLE001 - references in a circle, numbers no float holds: what a schema may do
        return f"xcom_schema cannot be applied: {type(error).__name__}"
    if broken is None:
        return None
    place = "/".join(str(part) for part in broken.absolute_path) or "the value"
    # Only the rule and the place: the value itself may be a secret and this text reaches logs and events.
    return f"{place} breaks the rule {broken.validator!r} of xcom_schema"


# Checking one costs ten milliseconds, and a process meets the same few schemas over and over.
@lru_cache(maxsize=64)
def _validator(text: str) -> Validator:
    import jsonschema  # 60 ms that only tasks with a schema should pay

    # The standard's own documents; the registry that jsonschema takes by itself fetches others.
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

    schema = json.loads(text)
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        dangling = _dangling_reference(schema, str(kind.META_SCHEMA.get("$schema")), REGISTRY)
    except jsonschema.SchemaError as error:
        raise ValueError(f"is not a JSON Schema: {error.message[:_SHOWN_CHARACTERS]}") from error
    except Exception as error:
        raise ValueError(f"is not a JSON Schema: {type(error).__name__} while it was read") from error
    if dangling is not None:
        shown = repr(dangling[:_SHOWN_CHARACTERS])
        raise ValueError(f"refers to {shown}, which it does not hold, and nothing is fetched; put that below $defs")
    return kind(schema, registry=REGISTRY)


def _dangling_reference(schema: Any, dialect: str, registry: Registry[Any]) -> str | None:
    """The first ``$ref`` that leads out of the schema and of the registry."""
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    root = specification_with(dialect, default=DRAFT202012).create_resource(schema)
    waiting = [(root, registry.resolver_with_root(root))]
    while waiting:
        resource, resolver = waiting.pop()
        reference = resource.contents.get("$ref") if isinstance(resource.contents, dict) else None
        if isinstance(reference, str):
            try:
                resolver.lookup(reference)
            except Unresolvable:
                return reference
        waiting += [(child, resolver.in_subresource(child)) for child in resource.subresources()]
    return None
