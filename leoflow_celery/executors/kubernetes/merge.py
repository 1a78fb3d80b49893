"""Strategic merge of a Pod, as ``kubectl patch`` does it: pod templates and pod overrides.

Objects are merged key by key and null deletes a key. Lists are replaced, but for those whose items the API matches by a
key (containers by ``name``, mounts by ``mountPath``). ``$patch: delete`` removes an object or a list item,
``$patch: replace`` takes the patch as it is; a list item that is only ``$patch: replace`` replaces the whole list.

One thing differs from ``kubectl patch``: where an object holds one of several kinds (an env entry has a ``value`` or a
``valueFrom``, a volume has one source) the patch's kind replaces the other, as ``kubectl apply`` does it.
"""

from __future__ import annotations

import json
from typing import Any, Final

Json = dict[str, Any]

_CONTAINER_LISTS = {"env": "name", "volumeMounts": "mountPath", "volumeDevices": "devicePath", "ports": "containerPort"}
_CONTAINERS = ("spec.containers", "spec.initContainers")
#: ``patchMergeKey`` of core/v1: path of a list → the key that identifies its items. Tolerations have none.
MERGE_KEYS: Final[dict[str, str]] = {
    "metadata.ownerReferences": "uid",
    "spec.volumes": "name",
    "spec.imagePullSecrets": "name",
    "spec.hostAliases": "ip",
    "spec.topologySpreadConstraints": "topologyKey",
    "spec.schedulingGates": "name",
    "spec.resourceClaims": "name",
    **dict.fromkeys(_CONTAINERS, "name"),
    **{f"{container}.{name}": key for container in _CONTAINERS for name, key in _CONTAINER_LISTS.items()},
}
_ONE_OF = frozenset(
    {"spec.volumes", *(f"{container}.{name}" for container in _CONTAINERS for name in ("env", "env.valueFrom"))}
)
_DELETED: Final = object()
_REPLACE: Final = {"$patch": "replace"}


class MergeError(ValueError):
    """A patch that cannot be merged; the text starts with the place in the patch."""


def merge(base: Json, patch: Json) -> Json:
    """``base`` with ``patch`` merged over it; neither is changed, and parts of both may be shared.

    Raises:
        MergeError: names the place and what is wrong there.
    """
    return _objects(base, patch, "")


def _objects(base: Json, patch: Json, path: str) -> Json:
    directive = patch.get("$patch", "merge")
    if directive not in ("merge", "replace"):
        raise MergeError(f"{path or 'the patch'}: $patch is {directive!r}; merge, replace or delete are known")
    result = {} if directive == "replace" else _kept(base, patch, path)
    for name, value in patch.items():
        if name == "$patch":
            continue
        if not isinstance(name, str):
            raise MergeError(f"{path or 'the patch'}: the key {json.dumps(name, default=str)} is not text; quote it")
        where = f"{path}.{name}" if path else name
        if name.startswith("$"):
            raise MergeError(f"{where}: only the directive $patch is known")
        merged = _values(result.get(name), value, where)
        if merged is _DELETED:
            result.pop(name, None)
        else:
            result[name] = merged
    return result


def _kept(base: Json, patch: Json, path: str) -> Json:
    """What stays of ``base``: all of it, but of one-of objects only the kind that the patch speaks of."""
    key = MERGE_KEYS.get(path, "")
    if path in _ONE_OF and patch.keys() - {key, "$patch"}:
        return {name: value for name, value in base.items() if name == key or name in patch}
    return dict(base)


def _values(old: Any, new: Any, where: str) -> Any:
    if new is None:
        return _DELETED
    if isinstance(new, dict):
        if new.get("$patch") == "delete":
            return _DELETED
        _check_kind(old, dict, where)
        return _objects(old or {}, new, where)
    if where in MERGE_KEYS and not isinstance(new, list):
        raise MergeError(f"{where}: a list belongs here")
    if isinstance(new, list):
        _check_kind(old, list, where)
        return _lists(old or [], new, where) if where in MERGE_KEYS else new
    if isinstance(old, dict | list):
        raise MergeError(f"{where}: {_kind(old)} belongs here")
    return new


def _check_kind(old: Any, kind: type, where: str) -> None:
    if old is not None and not isinstance(old, kind):
        raise MergeError(f"{where}: {_kind(old)} belongs here")


def _kind(value: Any) -> str:
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else "a plain value"


def _lists(base: list[Any], patch: list[Any], where: str) -> list[Any]:
    key = MERGE_KEYS[where]
    items = {} if _REPLACE in patch else {item[key]: item for item in base}
    for number, item in enumerate(patch):
        if item == _REPLACE:
            continue
        if not isinstance(item, dict) or not isinstance(item.get(key), str | int):
            raise MergeError(f"{where}[{number}]: an object with {key!r} belongs here: list items are matched by it")
        if item.get("$patch") == "delete":
            items.pop(item[key], None)
        elif item.get("$patch") == "replace":  # the API server would drop this very item, and say nothing
            raise MergeError(
                f"{where}[{number}]: an item with $patch: replace replaces the whole list, and has no more"
            )
        else:
            items[item[key]] = _objects(items.get(item[key], {}), item, where)
    return list(items.values())
