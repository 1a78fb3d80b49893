"""What an operator lets tasks ask for, whatever starts them: images, and a ceiling per resource.

A policy is a YAML file. A key that nobody knows, or one that stands there twice, stops the worker: a rule that was
misspelt would not be one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, Field, ValidationError

from leoflow_celery.domain.fields import Quantity
from leoflow_celery.domain.quantity import parse_quantity
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import Frozen, TaskRequest
from leoflow_celery.errors import ConfigurationError, PermanentLaunchError

Model = TypeVar("Model", bound=Frozen)

_DOCKER_HUB = "docker.io"
_HUB_ALIASES = frozenset({"index.docker.io", "registry-1.docker.io", "registry.hub.docker.com", "hub.docker.com"})
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9A-Fa-f:]+\])"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?P<name>(?:{_HOST}(?::[0-9]+)?/)?{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}))?"
)
#: What an Engine takes for the beginning of a local image's id: no repository's name says what it is.
_ID = re.compile(r"(?:sha256:)?[0-9a-f]{4,64}")


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image as a registry knows it: ``python`` is ``docker.io/library/python``."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Registry and repository."""
        return f"{self.registry}/{self.repository}"

    @classmethod
    def parse(cls, text: str) -> ImageReference:
        """Read as Docker and the kubelet read it.

        Raises:
            ValueError: it is not the reference of an image.
        """
        found = _REFERENCE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text[:200]!r} is not the reference of an image; write registry/repository:tag")
        host, slash, rest = found["name"].partition("/")
        registry, repository = (_registry(host), rest) if slash and _is_host(host) else (_DOCKER_HUB, found["name"])
        if registry == _DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        return cls(registry, repository, found["tag"] or "", (found["digest"] or "").lower())


def _registry(host: str) -> str:
    name = host.lower().removesuffix(":443")
    return _DOCKER_HUB if name in _HUB_ALIASES else name


def _image_rule(rule: str) -> str:
    """A rule in its full form: ``python`` is ``docker.io/library/python``, ``acme/`` is ``docker.io/acme/``."""
    if rule == "*":
        return rule
    if rule.endswith(("/", "/*")):
        return _prefix(rule)
    try:
        reference = ImageReference.parse(rule)
    except ValueError:
        raise _no_rule(rule) from None
    if reference.tag or reference.digest:
        raise ValueError(f"{rule!r} names a tag or a digest; write the repository alone, which stands for all of them")
    return reference.name


def _prefix(rule: str) -> str:
    text = rule.removesuffix("*").removesuffix("/")
    host, _, path = text.partition("/")
    if not _is_host(host):
        host, path = _DOCKER_HUB, text
    if path and re.fullmatch(rf"{_PART}(?:/{_PART})*", path) is None:
        raise _no_rule(rule)
    return f"{_registry(host)}/{path}/" if path else f"{_registry(host)}/"


def _no_rule(rule: str) -> ValueError:
    return ValueError(
        f"{rule!r} is not a repository (registry.example/team/app) or a prefix that ends with '/' "
        "(registry.example/team/)"
    )


def _is_host(text: str) -> bool:
    """As Docker tells the name of a registry from the first part of a repository's."""
    is_host = any(mark in text for mark in ".:[") or text == "localhost" or text != text.lower()
    return is_host and re.fullmatch(rf"{_HOST}(?::[0-9]+)?", text) is not None


ImageRule = Annotated[str, AfterValidator(_image_rule)]


class ImageRules(Frozen):
    """By repository, or by prefix when a rule ends with '/'. ``refuse`` wins; an empty ``allow`` allows the others."""

    allow: tuple[ImageRule, ...] = ()
    refuse: tuple[ImageRule, ...] = ()

    def problem(self, image: str, *, ids: bool = False) -> str:
        """Why the image may not run: a sentence, or nothing. ``ids``: the back end takes ids of local images too."""
        if not (self.allow or self.refuse):
            return ""
        if ids and _ID.fullmatch(image):
            return f"{image!r} may be the id of a local image, which names no repository; name the image by repository"
        try:
            reference = ImageReference.parse(image)
        except ValueError as error:
            return str(error)
        if any(_covers(rule, reference) for rule in self.refuse):
            return f"{image!r} ({reference.name}) is refused by the operator's policy; use an image from elsewhere"
        if self.allow and not any(_covers(rule, reference) for rule in self.allow):
            return f"{image!r} ({reference.name}) is not among the images that the operator's policy allows"
        return ""


def _covers(rule: str, reference: ImageReference) -> bool:
    return rule == "*" or (reference.name.startswith(rule) if rule.endswith("/") else reference.name == rule)


class ExecutorPolicy(Frozen):
    """What pods and containers have in common."""

    images: ImageRules = ImageRules()
    #: resource → the most that one container may have. Without a limit of its own it gets this one.
    ceilings: dict[str, Quantity] = Field(default_factory=dict)

    def check_image(self, image: str, field: str, *, ids: bool = False) -> None:
        """Raises PermanentLaunchError when the image may not run."""
        if problem := self.images.problem(image, ids=ids):
            raise PermanentLaunchError(FailureReason.FORBIDDEN, f"{field}: {problem}")

    def check_amount(self, resource: str, amount: Any, field: str) -> None:
        """Raises PermanentLaunchError when so much of a resource is too much; what is no quantity is the server's."""
        ceiling = self.ceilings.get(resource)
        if ceiling is not None and (asked := _amount(amount)) is not None and asked > parse_quantity(ceiling):
            raise PermanentLaunchError(
                FailureReason.INVALID_QUANTITY,
                f"{field}: {amount} is more than the {ceiling} that the operator's policy allows; ask for less",
            )

    def within(self, request: TaskRequest) -> TaskRequest:
        """A container's request with the ceilings as limits where it has none. Ids of local images are no names.

        Raises:
            PermanentLaunchError: the image, or an amount, is refused; names field, value and fix.
        """
        if request.image:  # without one it is the operator's own default
            self.check_image(request.image, "image", ids=True)
        limits, requests = request.resources.limits, request.resources.requests
        for resource in ("cpu", "memory"):
            for part, amounts in (("limits", limits), ("requests", requests)):
                if (amount := getattr(amounts, resource)) is not None:
                    self.check_amount(resource, amount, f"resources.{part}.{resource}")
            if resource in self.ceilings and getattr(limits, resource) is None:
                limits = limits.model_copy(update={resource: self.ceilings[resource]})
        return request.evolve(resources=request.resources.model_copy(update={"limits": limits}))


def _amount(value: Any) -> Decimal | None:
    try:
        return parse_quantity(str(value))
    except ValueError:
        return None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of these, in which ``*`` stands for any part."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class _OnceLoader(yaml.SafeLoader):
    """A key that stands there twice is an error: the second would silently replace the first."""


def _once(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_OnceLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _once)


def load_policy(path: Path | None, variable: str, kind: type[Model]) -> Model:
    """The policy in the file that a setting names; the default one without a file.

    Raises:
        ConfigurationError: names the setting, the file, the key and what is wrong with it.
    """
    if path is None:
        return kind()
    try:
        data = yaml.load(path.read_text(), _OnceLoader)  # noqa: S506 - a safe loader
        if data is not None and not isinstance(data, dict):
            raise ConfigurationError(f"{variable}={path}: a policy is an object with keys")
        return kind.model_validate(data or {})
    except ValidationError as error:
        raise ConfigurationError(f"{variable}={path}: {_first(error)}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{variable}={path}: {error}") from error


def _first(error: ValidationError) -> str:
    item = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in item["loc"] if part != "[key]")
    if item["type"] == "extra_forbidden":
        return f"{place}: is not a known key; remove it or check its spelling"
    given = item.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float) else ""
    return f"{place}: {item['msg'].removeprefix('Value error, ')}{shown}"
