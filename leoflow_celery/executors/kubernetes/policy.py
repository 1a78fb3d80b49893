"""The operator's policy for pods: what a request's ``pod_override`` may set, what is forced, what is refused.

A publisher is not the operator. What is not named here is refused, a field that Kubernetes gets next year too. The
check is of the override as it was sent, before it is merged: nobody sets, deletes or replaces what he may not set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from leoflow_celery.domain.attempt import TASK_CONTAINER, staging_claim_name
from leoflow_celery.domain.fields import printable
from leoflow_celery.domain.pod_fields import TYPES, item_path
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import Frozen, TaskRequest, Toleration
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.core import PREFIX
from leoflow_celery.executors.kubernetes.merge import Json
from leoflow_celery.executors.policy import ExecutorPolicy, load_policy, matches

_VARIABLE = "LEOFLOW_KUBERNETES_POLICY"
#: What our own container has, for those that an override adds.
_CONFINED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_CONTAINER_KINDS = ("containers", "initContainers", "ephemeralContainers")


def _field_path(path: str) -> str:
    """A field of a Pod, as ``spec.containers.lifecycle``; lists have no numbers."""
    top, *names = path.split(".")
    kind = {"metadata": "ObjectMeta", "spec": "PodSpec"}.get(top, "")
    for name in names:
        kind = TYPES.get(kind, {}).get(name, "").strip("[]{}")
        if not kind:
            raise ValueError(f"{path!r} is not a field of a Pod; write it as in spec.containers.lifecycle")
    if not names:
        raise ValueError(f"{path!r} would allow all of it; name the fields, as in spec.hostAliases")
    return path


class Allowed(Frozen):
    """What an override may set beside the defaults."""

    #: Fields with all that is below them, as ``spec.hostAliases`` or ``spec.volumes.nfs``.
    fields: tuple[Annotated[str, AfterValidator(_field_path)], ...] = ()
    #: Containers beside ``task``, and init containers, under the same rules as ``task``.
    sidecars: bool = False
    #: Names; ``*`` stands for any part. ``secrets`` holds for the request's own fields too, once it is there.
    secrets: tuple[str, ...] | None = None
    config_maps: tuple[str, ...] = ("*",)
    #: Persistent volume claims beside the run's own.
    claims: tuple[str, ...] = ()


class Forced(Frozen):
    """What every pod of the queue has, whatever template, request and override say."""

    runtime_class: str = ""
    service_account: str = ""
    #: Added to the request's; wins where both have a key.
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()


class Refused(Frozen):
    """What no request may have, wherever it says so. Names; ``*`` stands for any part."""

    service_accounts: tuple[str, ...] = ()
    priority_classes: tuple[str, ...] = ()
    label_prefixes: tuple[str, ...] = ()
    annotation_prefixes: tuple[str, ...] = ()


class PodPolicy(ExecutorPolicy):
    """The operator's rules for pods; the default one is what holds without a file."""

    allow: Allowed = Allowed()
    force: Forced = Forced()
    refuse: Refused = Refused()

    @classmethod
    def load(cls, path: Path | None) -> PodPolicy:
        """Raises ConfigurationError: see ``load_policy``."""
        return load_policy(path, _VARIABLE, cls)

    def check(self, request: TaskRequest, base: Json) -> None:
        """Refuse a request whose override, or own fields, ask for what the operator does not allow.

        ``base`` is what the queue's pods have in common: its containers and volumes are the operator's.

        Raises:
            PermanentLaunchError: ``forbidden``; names the field, the value and the fix.
        """
        for problem in (*override_problems(request.pod_override, request, self, base), *self._own_problems(request)):
            raise PermanentLaunchError(FailureReason.FORBIDDEN, printable(str(problem)))

    def applied(self, pod: Json, request: TaskRequest) -> Json:
        """The merged pod with what is forced, and with the ceilings as limits where its containers have none.

        Raises:
            PermanentLaunchError: an image, a class, an account, a label or an amount is refused; names field and value.
        """
        pod = self._with_forced(pod)
        spec, theirs = pod["spec"], _touched(request)
        self._check_names(pod, request)
        for kind in ("containers", "initContainers"):
            if kind in spec:
                spec = {**spec, kind: [self._contained(kind, one, theirs) for one in spec[kind]]}
        self._check_amounts(spec.get("resources") or {}, "spec.resources")
        return {**pod, "spec": spec}

    def _contained(self, kind: str, container: Json, theirs: frozenset[str]) -> Json:
        """A container within the limits; those that are the operator's alone are not judged."""
        if container["name"] not in theirs:
            return container
        path = f"spec.{kind}[{container['name']}]"
        if image := container.get("image"):
            self.check_image(str(image), f"{path}.image")
        resources = container.get("resources") or {}
        self._check_amounts(resources, f"{path}.resources")
        limits, requests = dict(resources.get("limits") or {}), dict(resources.get("requests") or {})
        for resource, ceiling in self.ceilings.items():
            # Of what is counted (GPUs, huge pages) a limit is a wish: none is none.
            if resource in ("cpu", "memory", "ephemeral-storage") and limits.get(resource) is None:
                limits[resource] = ceiling
                requests.setdefault(resource, "0")
        found = {**resources, **({"limits": limits} if limits else {}), **({"requests": requests} if requests else {})}
        if container["name"] != TASK_CONTAINER and f"spec.{kind}" not in self.allow.fields:
            container = {**container, "securityContext": {**_CONFINED, **(container.get("securityContext") or {})}}
        return {**container, "resources": found} if found else container

    def _check_amounts(self, resources: Json, path: str) -> None:
        for part in ("limits", "requests"):
            for resource, amount in (resources.get(part) or {}).items():
                self.check_amount(resource, amount, f"{path}.{part}.{resource}")

    def _with_forced(self, pod: Json) -> Json:
        force, spec = self.force, dict(pod["spec"])
        if force.runtime_class:
            spec["runtimeClassName"] = force.runtime_class
        if force.service_account:
            spec["serviceAccountName"] = force.service_account
            spec.pop("serviceAccount", None)
        if force.node_selector:
            spec["nodeSelector"] = {**(spec.get("nodeSelector") or {}), **force.node_selector}
        if force.tolerations:
            forced = [one.model_dump(exclude_none=True) for one in force.tolerations]
            others = [one for one in spec.get("tolerations") or [] if one not in forced]
            spec["tolerations"] = [*others, *forced]
        return {**pod, "spec": spec}

    def _check_names(self, pod: Json, request: TaskRequest) -> None:
        spec, refuse = pod["spec"], self.refuse
        account = str(spec.get("serviceAccountName") or spec.get("serviceAccount") or "")
        named = (
            ("spec.serviceAccountName", account, refuse.service_accounts),
            ("spec.priorityClassName", str(spec.get("priorityClassName") or ""), refuse.priority_classes),
        )
        for path, name, patterns in named:
            if name and matches(name, patterns):
                raise _forbidden(path, name, "is refused by the operator's policy; name another one")
        override: Any = request.pod_override.get("metadata") or {}
        for part, prefixes in (("labels", refuse.label_prefixes), ("annotations", refuse.annotation_prefixes)):
            for key in override.get(part) or {}:
                if str(key).startswith(prefixes):
                    raise _forbidden(f"pod_override.metadata.{part}", str(key), "has a prefix that the policy refuses")

    def _own_problems(self, request: TaskRequest) -> Iterator[Problem]:
        """The request's own fields that name Secrets: they are the operator's matter once he lists any."""
        if self.allow.secrets is None:
            return
        names = {"task_secret_name": request.task_secret_name}
        for number, one in enumerate(request.secrets):
            name, slash, _ = (one.reference or one.name).partition("/")
            if one.source == "k8s_secret" and slash:
                names[f"secrets.{number}.reference"] = name
        for number, name in enumerate(request.execution.image_pull_secrets):
            names[f"execution.image_pull_secrets.{number}"] = name
        for field, name in names.items():
            if name and not matches(name, self.allow.secrets):
                yield Problem(field, f"names the Secret {name!r}, which the operator's policy does not list")


def _forbidden(path: str, value: str, words: str) -> PermanentLaunchError:
    return PermanentLaunchError(FailureReason.FORBIDDEN, printable(f"{path}: {value!r} {words}"))


def _touched(request: TaskRequest) -> frozenset[str]:
    """The containers that a request has a hand in."""
    spec: Any = request.pod_override.get("spec")
    found = {TASK_CONTAINER}
    for kind in _CONTAINER_KINDS:
        containers = spec.get(kind) if isinstance(spec, dict) else None
        for one in containers if isinstance(containers, list) else ():
            if isinstance(one, dict) and isinstance(one.get("name"), str):
                found.add(one["name"])
    return frozenset(found)


#: The number or the plain name of a list item in a place.
_ITEM = re.compile(r"\[[A-Za-z0-9_.-]*\]")


@dataclass(frozen=True, slots=True)
class Problem:
    """What of an override is refused: where, and why."""

    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"

    def is_below(self, fields: frozenset[str]) -> bool:
        """Whether it is in one of these fields; an init container's have the names of a container's."""
        field = _ITEM.sub("", self.path).removeprefix("pod_override.")
        names = field.replace("spec.initContainers.", "spec.containers.", 1), field
        return any(name == one or name.startswith(f"{one}.") for name in names for one in fields)


def override_problems(
    override: Json, request: TaskRequest, policy: PodPolicy, base: Json | None = None
) -> Iterator[Problem]:
    """All that a ``pod_override`` may not set, over the queue's pods. A pure function of the four."""
    own = {request.staging_claim, staging_claim_name(request.dag_id, request.run_id, request.tenant_id)} - {""}
    allowed = FREE | frozenset(policy.allow.fields)
    for problem in _Judge(policy, frozenset(own), _names_of(base or {}), override).of_pod(override):
        if not problem.is_below(allowed):
            yield problem


def _names_of(base: Json) -> frozenset[str]:
    """Of the template's volumes and containers: who could change those would change what is the operator's."""
    spec = base.get("spec") or {}
    found = (one.get("name") for kind in ("volumes", *_CONTAINER_KINDS) for one in spec.get(kind) or ())
    return frozenset(str(name) for name in found) - {TASK_CONTAINER}


def _volumes_of(override: Json) -> frozenset[str]:
    """The volumes that an override brings with it: the only ones, beside ours, that it may mount."""
    spec = override.get("spec")
    volumes = spec.get("volumes") if isinstance(spec, dict) else None
    items = (one for one in (volumes if isinstance(volumes, list) else ()) if isinstance(one, dict))
    return frozenset(str(one.get("name")) for one in items if len(one) > 1)


#: Where only the API's own rules hold: whatever stands there, the task gets no more than its own share and place.
FREE = frozenset(
    {
        *("spec.nodeSelector", "spec.tolerations", "spec.affinity", "spec.activeDeadlineSeconds"),
        *("spec.priorityClassName", "spec.priority", "spec.runtimeClassName"),
        # What the task's own code could do as well, in the container that it has anyway.
        *(f"spec.containers.{name}" for name in ("image", "imagePullPolicy", "command", "args", "workingDir")),
    }
)
_OUR_PREFIX = "leoflow-"
_OUR_VOLUMES = frozenset({"leoflow-staging", "leoflow-tmp", "leoflow-task-secret"})
#: Annotations that switch a container's protection off.
_PROTECTION = re.compile(r"(^|\.)security\.(alpha|beta)\.kubernetes\.io/")
_MAX_GRACE_SECONDS = 3_600


def _is_ordinary_id(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1


def _drops_all(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"drop"} and "ALL" in (value["drop"] or ())


_SAFER: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), _is_ordinary_id),
    **dict.fromkeys(("runAsNonRoot", "readOnlyRootFilesystem"), lambda value: value is True),
    **dict.fromkeys(("allowPrivilegeEscalation", "privileged"), lambda value: value is False),
    "fsGroupChangePolicy": lambda value: value in ("OnRootMismatch", "Always"),
    "capabilities": _drops_all,
    "seccompProfile": lambda value: value == {"type": "RuntimeDefault"},
}


class _Judge:
    """One override. Every method yields the problems of what it is given, with their places for people."""

    def __init__(self, policy: PodPolicy, claims: frozenset[str], taken: frozenset[str], override: Json) -> None:
        self._allow, self._claims, self._taken = policy.allow, claims, taken
        self._mountable = _OUR_VOLUMES | _volumes_of(override)

    def of_pod(self, pod: Json) -> Iterator[Problem]:
        for key, value in pod.items():
            path = f"pod_override.{key}"
            if key in ("metadata", "spec") and isinstance(value, dict):
                rule = self._of_metadata if key == "metadata" else self._of_spec
                for name, member in value.items():
                    yield from rule(name, member, f"{path}.{name}")
            elif key not in ("apiVersion", "kind"):
                yield _not_allowed(path, value)

    def _of_metadata(self, name: str, value: Any, path: str) -> Iterator[Problem]:
        if name not in ("labels", "annotations") or not isinstance(value, dict):
            yield _not_allowed(path, value)
            return
        for key in value:
            if key.startswith(PREFIX):
                yield Problem(path, f"{key!r} says whose the pod is, and is ours; remove it")
            elif key.startswith("$") or (name == "annotations" and _PROTECTION.search(key)):
                yield _not_allowed(f"{path}.{key}", value[key])

    def _of_spec(self, name: str, value: Any, path: str) -> Iterator[Problem]:
        match name:
            case "containers" | "initContainers":
                yield from self._of_items(value, path, self._of_container)
            case "volumes":
                yield from self._of_items(value, path, self._of_volume)
            case "securityContext":
                yield from self._of_security(value, path)
            case "resources":
                yield from self._of_resources(value, path)
            case "imagePullSecrets":
                yield from self._of_items(value, path, lambda one, at: self._of_secret(one, at, "name"))
            case "terminationGracePeriodSeconds":
                if not isinstance(value, int) or not 0 <= value <= _MAX_GRACE_SECONDS:
                    yield Problem(path, f"{_shown(value)} must be from 0 to {_MAX_GRACE_SECONDS} seconds")
            case _:
                yield _not_allowed(path, value)

    def _of_items(self, value: Any, path: str, rule: Callable[[Json, str], Iterator[Problem]]) -> Iterator[Problem]:
        if not isinstance(value, list):
            yield _not_allowed(path, value)
            return
        for number, item in enumerate(value):
            at = item_path(path, number, item)
            if isinstance(item, dict):
                yield from rule(item, at)
            else:
                yield _not_allowed(at, item)

    def _of_container(self, container: Json, path: str) -> Iterator[Problem]:
        name, is_first = container.get("name"), path.startswith("pod_override.spec.containers[")
        if not (is_first and name == TASK_CONTAINER):
            if not self._allow.sidecars:
                yield Problem(path, f"only the container {TASK_CONTAINER!r} may be changed; {_FIX}")
                return
            if name in self._taken or str(name).startswith(_OUR_PREFIX):
                yield Problem(path, "is a container of ours or of the operator's template; name yours otherwise")
                return
        for field, value in container.items():
            if field == "restartPolicy" and value == "Always" and not is_first:
                continue  # a native sidecar
            yield from self._of_container_field(field, value, f"{path}.{field}")

    def _of_container_field(self, name: str, value: Any, path: str) -> Iterator[Problem]:
        match name:
            case "name":
                return
            case "resources":
                yield from self._of_resources(value, path)
            case "securityContext":
                yield from self._of_security(value, path)
            case "env":
                yield from self._of_items(value, path, self._of_variable)
            case "envFrom":
                yield from self._of_items(value, path, self._of_source)
            case "volumeMounts":
                yield from self._of_items(value, path, self._of_mount)
            case _:
                yield _not_allowed(path, value)

    def _of_resources(self, value: Any, path: str) -> Iterator[Problem]:
        if not isinstance(value, dict):
            yield _not_allowed(path, value)
            return
        for name, part in value.items():
            if name not in ("limits", "requests"):
                yield _not_allowed(f"{path}.{name}", part)

    def _of_security(self, value: Any, path: str) -> Iterator[Problem]:
        """Only what makes a pod safer, or another user than root of it."""
        if not isinstance(value, dict):
            yield _not_allowed(path, value)
            return
        for name, wanted in value.items():
            rule = _SAFER.get(name)
            if rule is None or not rule(wanted):
                yield _not_allowed(f"{path}.{name}", wanted)

    def _of_variable(self, entry: Json, path: str) -> Iterator[Problem]:
        """An entry of ``env``; its value is never quoted."""
        if entry.get("$patch") == "delete" or entry == {"$patch": "replace"}:
            return
        for name in entry.keys() - {"name", "value", "valueFrom"}:
            yield _not_allowed(f"{path}.{name}", None)
        source = entry.get("valueFrom")
        if source is None:
            return
        if not isinstance(source, dict):
            yield _not_allowed(f"{path}.valueFrom", None)
            return
        for kind, reference in source.items():
            at = f"{path}.valueFrom.{kind}"
            match kind:
                case "fieldRef" | "resourceFieldRef":
                    continue
                case "secretKeyRef":
                    yield from self._of_secret(reference, at, "name")
                case "configMapKeyRef":
                    yield from self._of_config_map(reference, at)
                case _:
                    yield _not_allowed(at, None)

    def _of_source(self, entry: Json, path: str) -> Iterator[Problem]:
        for name, value in entry.items():
            match name:
                case "prefix":
                    continue
                case "secretRef":
                    yield from self._of_secret(value, f"{path}.{name}", "name")
                case "configMapRef":
                    yield from self._of_config_map(value, f"{path}.{name}")
                case _:
                    yield _not_allowed(f"{path}.{name}", None)

    def _of_mount(self, mount: Json, path: str) -> Iterator[Problem]:
        for name, value in mount.items():
            if name not in ("name", "mountPath", "subPath", "subPathExpr", "readOnly"):
                yield _not_allowed(f"{path}.{name}", value)
        if mount.get("name") not in self._mountable:
            yield Problem(
                f"{path}.name",
                f"{_shown(mount.get('name'))} is not a volume of this override or of the request; only those can be "
                "mounted",
            )

    def _of_volume(self, volume: Json, path: str) -> Iterator[Problem]:
        sources = {name: value for name, value in volume.items() if name != "name"}
        if volume.get("name") in self._taken or str(volume.get("name")).startswith(_OUR_PREFIX):
            yield Problem(path, "is a volume of ours or of the operator's template; name yours otherwise")
        if not sources:
            yield Problem(path, "has no source; name one, as configMap or emptyDir")
        for kind, source in sources.items():
            at = f"{path}.{kind}"
            match kind:
                case "emptyDir" if isinstance(source, dict):
                    for name in source.keys() - {"sizeLimit", "medium"}:
                        yield _not_allowed(f"{at}.{name}", source[name])
                case "configMap":
                    yield from self._of_config_map(source, at)
                case "secret":
                    yield from self._of_secret(source, at, "secretName")
                case "persistentVolumeClaim":
                    yield from self._of_claim(source, at)
                case "projected" if isinstance(source, dict):
                    yield from self._of_projection(source, at)
                case _:
                    yield _not_allowed(at, source)

    def _of_projection(self, projected: Json, path: str) -> Iterator[Problem]:
        for name in projected.keys() - {"sources", "defaultMode"}:
            yield _not_allowed(f"{path}.{name}", projected[name])

        def of_source(source: Json, at: str) -> Iterator[Problem]:
            for kind, value in source.items():
                match kind:
                    case "configMap":
                        yield from self._of_config_map(value, f"{at}.{kind}")
                    case "secret":
                        yield from self._of_secret(value, f"{at}.{kind}", "name")
                    case _:
                        yield _not_allowed(f"{at}.{kind}", value)

        yield from self._of_items(projected.get("sources"), f"{path}.sources", of_source)

    def _of_claim(self, source: Any, path: str) -> Iterator[Problem]:
        name = source.get("claimName") if isinstance(source, dict) else None
        if not isinstance(name, str) or not (name in self._claims or matches(name, self._allow.claims)):
            yield Problem(
                f"{path}.claimName",
                f"{_shown(name)} is not the volume of this run, and no claim that the operator's policy lists",
            )

    def _of_secret(self, source: Any, path: str, key: str) -> Iterator[Problem]:
        """Its name has to be there: a part of a reference would be merged into that of the template."""
        name = source.get(key) if isinstance(source, dict) else None
        if not isinstance(name, str) or not matches(name, self._allow.secrets or ()):
            yield Problem(f"{path}.{key}", f"{_shown(name)} is no Secret that the operator's policy lists; {_FIX}")

    def _of_config_map(self, source: Any, path: str) -> Iterator[Problem]:
        name = source.get("name") if isinstance(source, dict) else None
        if not isinstance(name, str) or not matches(name, self._allow.config_maps):
            yield Problem(f"{path}.name", f"{_shown(name)} is no config map that the operator's policy lists; {_FIX}")


_FIX = f"remove it, or let the operator allow it ({_VARIABLE})"


def _not_allowed(path: str, value: Any) -> Problem:
    shown = f" {_shown(value)}" if isinstance(value, str | int | float) and value != "" else ""
    return Problem(path, f"an override may not set{shown or ' this'}; {_FIX}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return "nothing" if value is None else "this"
