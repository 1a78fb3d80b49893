"""What docs/kubernetes.md tells people to write is accepted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from leoflow_celery.executors.kubernetes.pod import build_pod
from leoflow_celery.executors.kubernetes.policy import PodPolicy
from leoflow_celery.executors.kubernetes.template import load_base
from leoflow_celery.settings import KubernetesSettings
from tests.support.launches import launch_spec

TEXT = (Path(__file__).parents[4] / "docs" / "kubernetes.md").read_text()

TEXT_OF_POLICY = (Path(__file__).parents[4] / "docs" / "policy.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    (text,) = blocks("yaml")
    path = tmp_path / "template.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", blocks("json"))
def test_each_override_goes_over_the_template(template: Path, text: str) -> None:
    settings = KubernetesSettings(pod_template=template)
    # One of them needs more than the defaults, as the page says.
    policy = PodPolicy.model_validate({"allow": {"fields": ["spec.initContainers"]}})
    pod = build_pod(launch_spec(pod_override=json.loads(text)), settings, load_base(settings), policy=policy)
    assert pod["spec"]["tolerations"] == [{"key": "tasks", "operator": "Exists", "effect": "NoSchedule"}]


def test_the_policy_of_its_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT_OF_POLICY, re.DOTALL)
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    policy = PodPolicy.load(path)
    assert policy.images.allow == ("registry.example/team/", "docker.io/library/python")
    for group in ("allow", "force", "refuse", "images"):
        named = set(getattr(policy, group).model_fields_set)
        assert named == set(type(getattr(policy, group)).model_fields), "the page shows every key"


def test_every_setting_exists_with_its_default() -> None:
    rows = re.findall(r"^\| (`[A-Z_`, ]+) \|([^|]*)\|", TEXT, re.MULTILINE)
    named = [name.strip("` ").lower() for names, _ in rows for name in names.split(",")]
    assert set(named) <= KubernetesSettings.model_fields.keys()
    assert len(named) >= 15
    for names, default in rows:
        values = [KubernetesSettings.model_fields[name.strip("` ").lower()].default for name in names.split(",")]
        if re.fullmatch(r"[\d, ]*\d[\d, ]*", default):
            assert [float(text) for text in default.split(",")] == values
