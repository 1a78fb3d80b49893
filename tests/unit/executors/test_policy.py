"""Images by repository and ceilings by resource, as pods and containers have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import ConfigurationError, PermanentLaunchError
from leoflow_celery.executors.policy import ExecutorPolicy, ImageReference, ImageRules, load_policy

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "name", "tag", "digest"),
    [
        ("python", "docker.io/library/python", "", ""),
        ("python:3.11", "docker.io/library/python", "3.11", ""),
        ("acme/tasks", "docker.io/acme/tasks", "", ""),
        ("docker.io/python", "docker.io/library/python", "", ""),
        ("index.docker.io/library/python", "docker.io/library/python", "", ""),
        ("registry-1.docker.io/acme/tasks", "docker.io/acme/tasks", "", ""),
        ("localhost/tasks:1", "localhost/tasks", "1", ""),
        ("localhost:5000/tasks", "localhost:5000/tasks", "", ""),
        ("Registry.Example:443/Team".lower() + "/app:v1", "registry.example/team/app", "v1", ""),
        ("REGISTRY.example/team/app", "registry.example/team/app", "", ""),
        ("REGISTRY/team/app", "registry/team/app", "", ""),
        (f"registry.example:5000/a/b/c@sha256:{HEX}", "registry.example:5000/a/b/c", "", f"sha256:{HEX}"),
        (f"python:3@sha256:{HEX}", "docker.io/library/python", "3", f"sha256:{HEX}"),
        ("[2001:db8::1]:5000/a", "[2001:db8::1]:5000/a", "", ""),
    ],
)
def test_an_image_is_read_as_docker_and_the_kubelet_read_it(text: str, name: str, tag: str, digest: str) -> None:
    reference = ImageReference.parse(text)
    assert (reference.name, reference.tag, reference.digest) == (name, tag, digest)


@pytest.mark.parametrize(
    "text", ["", " ", "Python", "a//b", "a:", "a@sha256:12", "/a", "a/", "-a", "a b", "http://a/b"]
)
def test_what_is_no_reference_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not the reference of an image"):
        ImageReference.parse(text)


ALLOW = ImageRules(allow=("registry.example/team/", "registry.example/base", "python", "acme/"))
REFUSE = ImageRules(refuse=("registry.example/team/", "evil", "docker.io/"))


@pytest.mark.parametrize(
    ("rules", "image", "fine"),
    [
        (ALLOW, "registry.example/team/app:1", True),
        (ALLOW, "registry.example:443/team/app", True),
        (ALLOW, "registry.example/team-evil/app", False),
        (ALLOW, "registry.example/team", False),
        (ALLOW, "registry.example/base@sha256:" + HEX, True),
        (ALLOW, "registry.example/base/more", False),
        (ALLOW, "registry.example.evil/base", False),
        (ALLOW, "python:3.11", True),
        (ALLOW, "docker.io/library/python", True),
        (ALLOW, "other.example/library/python", False),
        (ALLOW, "docker.io/acme/tasks", True),
        (ALLOW, "acmeevil/tasks", False),
        (ImageRules(allow=("docker.io/library/",)), "python:3", True),
        (ImageRules(allow=("docker.io/library/",)), "acme/python", False),
        (ImageRules(allow=("library/*",)), "python", True),
        (ImageRules(allow=("localhost:5000/",)), "localhost:5000/a/b", True),
        (ImageRules(allow=("localhost:5000/",)), "localhost:50001/a", False),
        (ALLOW, "not an image", False),
        (REFUSE, "registry.example:443/team/app", False),
        (REFUSE, "REGISTRY.example/team/app", False),
        (REFUSE, "registry.example/other", True),
        (REFUSE, "alpine", False),
        (REFUSE, "registry-1.docker.io/library/alpine", False),
        (ImageRules(), "anything at all", True),
        (ImageRules(allow=("*",), refuse=("python",)), "python:3", False),
        (ImageRules(allow=("*",)), "registry.example/a", True),
    ],
)
def test_rules_go_by_repository_and_prefix(rules: ImageRules, image: str, fine: bool) -> None:
    assert (rules.problem(image) == "") is fine


@pytest.mark.parametrize("rule", ["registry.example/team*", "a:1", f"a@sha256:{HEX}", "A B", "", "https://a/"])
def test_a_rule_that_says_something_else_is_refused(rule: str) -> None:
    with pytest.raises(ValidationError, match="repository"):
        ImageRules(allow=(rule,))


@pytest.mark.parametrize("image", [f"sha256:{HEX}", HEX, HEX[:12], "deadbeef"])
def test_the_id_of_a_local_image_names_no_repository(image: str) -> None:
    rules = ImageRules(allow=("docker.io/",))
    assert "id of a local image" in rules.problem(image, ids=True)
    assert ImageRules().problem(image, ids=True) == ""


def request(**fields: object) -> TaskRequest:
    ids = dict.fromkeys(("task_instance_id", "dag_id", "run_id", "task_id", "entrypoint"), "x")
    return TaskRequest.model_validate({**ids, "operator": "bash", "image": "python:3", **fields})


POLICY = ExecutorPolicy(images=ImageRules(allow=("python",)), ceilings={"cpu": "2", "memory": "1Gi"})


def test_a_container_without_a_limit_gets_the_ceiling() -> None:
    limits = POLICY.within(request()).resources.limits
    assert (limits.cpu, limits.memory) == ("2", "1Gi")
    asked = request(resources={"limits": {"cpu": "500m"}})
    assert POLICY.within(asked).resources.limits.cpu == "500m"
    assert ExecutorPolicy().within(asked) == asked


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"image": "alpine"}, "forbidden", r"image: 'alpine' \(docker.io/library/alpine\) is not among"),
        (
            {"resources": {"limits": {"cpu": "2001m"}}},
            "invalid_quantity",
            r"resources\.limits\.cpu: 2001m is more than the 2",
        ),
        ({"resources": {"requests": {"memory": "2G"}}}, "invalid_quantity", r"resources\.requests\.memory: 2G is more"),
    ],
)
def test_a_refusal_names_field_value_and_fix(fields: dict[str, object], reason: str, words: str) -> None:
    with pytest.raises(PermanentLaunchError, match=words) as caught:
        POLICY.within(request(**fields))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imagse: {}", "imagse: is not a known key"),
        ("images: {alow: [a]}", r"images\.alow: is not a known key"),
        ("images: {allow: [a], allow: [b]}", "the key 'allow' is there twice"),
        ("ceilings: {cpu: 2}", r"ceilings\.cpu: .*string.*got 2"),
        ("ceilings: {cpu: lots}", r"ceilings\.cpu: .*not a Kubernetes quantity"),
        ("[1]", "a policy is an object"),
        ("images: [", "while parsing"),
    ],
)
def test_a_policy_that_cannot_be_meant_stops_the_worker(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=rf"LEOFLOW_DOCKER_POLICY=.*policy\.yaml: .*{words}"):
        load_policy(path, "LEOFLOW_DOCKER_POLICY", ExecutorPolicy)


def test_a_policy_is_read_and_an_empty_one_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("images: {refuse: [evil/]}\nceilings: {cpu: '4'}\n")
    read = load_policy(path, "V", ExecutorPolicy)
    assert (read.images.refuse, read.ceilings) == (("docker.io/evil/",), {"cpu": "4"})
    path.write_text("")
    assert load_policy(path, "V", ExecutorPolicy) == load_policy(None, "V", ExecutorPolicy) == ExecutorPolicy()
    with pytest.raises(ConfigurationError, match="No such file"):
        load_policy(tmp_path / "none", "V", ExecutorPolicy)
