"""A pod template is checked when the worker reads it, not when the first task is launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.kubernetes.pod import pod_base
from leoflow_celery.executors.kubernetes.template import load_base
from leoflow_celery.settings import KubernetesSettings


def load(tmp_path: Path, text: str):
    path = tmp_path / "template.yaml"
    path.write_text(text)
    return load_base(KubernetesSettings(pod_template=path))


def test_yaml_and_json_are_read(tmp_path: Path) -> None:
    as_yaml = load(tmp_path, "apiVersion: v1\nkind: Pod\nspec:\n  priorityClassName: batch\n")
    assert as_yaml["spec"]["priorityClassName"] == "batch"
    assert load(tmp_path, '{"spec": {"priorityClassName": "batch"}}')["spec"] == as_yaml["spec"]


def test_no_template_and_an_empty_one_are_our_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == load_base(KubernetesSettings()) == pod_base(KubernetesSettings())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "a Pod belongs here"),
        ("kind: Deployment", "a Pod belongs here"),
        ("containers: []", "containers: a Pod has metadata and spec"),
        ("spec: [", "while parsing"),
        ("spec: null", "spec and metadata cannot be deleted"),
        ("metadata: null", "spec and metadata cannot be deleted"),
        ("spec: {containers: [{name: task, $patch: delete}]}", "the container 'task' cannot be removed"),
        ("spec: {containers: [{image: x}]}", r"spec\.containers\[0\]: an object with 'name'"),
        ("spec: {tolerations: all}", r"spec\.tolerations: a list belongs here"),
        ("spec: {nodeSelector: [ssd]}", r"spec\.nodeSelector: an object belongs here"),
        ("spec: {affinity: [ssd]}", r"spec\.affinity: an object belongs here"),
        ("spec: {containers: [{name: task, resources: []}]}", r"resources: an object belongs here"),
        ("spec: {containers: [{name: task, resources: {limits: 1Gi}}]}", r"resources\.limits: an object belongs here"),
        ("spec: {containers: [{name: task, image: [x]}]}", r"image: a plain value belongs here"),
        ("spec: {serviceAccountName: {name: x}}", r"spec\.serviceAccountName: a plain value belongs here"),
        ("spec: {terminationGracePeriodSeconds: soon}", r"terminationGracePeriodSeconds: a number belongs here"),
        ("metadata: {$patch: replace, labels: x}", r"metadata\.labels: an object belongs here"),
        ("spec: {$patch: replace, securityContext: 5, containers: [{name: task}]}", r"securityContext: an object"),
        ("spec: {affinity: {$patch: bogus}}", r"spec\.affinity: \$patch is 'bogus'"),
    ],
)
def test_a_template_that_cannot_work_names_the_setting(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"LEOFLOW_KUBERNETES_POD_TEMPLATE=.*template\.yaml: .*{problem}"):
        load(tmp_path, text)


def test_a_missing_file_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"LEOFLOW_KUBERNETES_POD_TEMPLATE=.*No such file"):
        load_base(KubernetesSettings(pod_template=tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "metadata: {labels: {version: 1.10}}",
            r"metadata\.labels\.version: a number stands where text belongs; write it in quotes \(got 1\.1\)",
        ),
        ("metadata: {annotations: {on: x}}", r"metadata\.annotations: the key true is not text; quote it"),
        ("metadata: {annotations: {day: 2024-01-01}}", r"annotations\.day: a value of type date stands where text"),
        ("spec: {nodeSelector: {gpu: yes}}", r"spec\.nodeSelector\.gpu: true or false stands where text .*got true"),
        ("spec: {hostNetwork: 'false'}", r"spec\.hostNetwork: text stands where true or false belongs"),
        ("spec: {tolerations: [{value: 1}]}", r"spec\.tolerations\[0\]\.value: a number stands where text"),
        (
            "spec: {containers: [{name: task, args: [sleep, 5]}]}",
            r"spec\.containers\[task\]\.args\[1\]: a number stands where text belongs; write it in quotes \(got 5\)",
        ),
        (
            "spec: {volumes: [{name: v, secret: {secretName: a, defaultMode: '0400'}}]}",
            r"defaultMode: text stands where",
        ),
        ("spec: {nodeSelectr: {a: b}}", r"spec\.nodeSelectr: is not a field of a Pod; did you mean nodeSelector\?"),
        ("spec: {containers: [{name: task, resource: {}}]}", r"task\]\.resource: .*did you mean resources\?"),
    ],
)
def test_a_value_that_the_api_would_refuse_names_file_field_value_and_fix(
    tmp_path: Path, text: str, problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"LEOFLOW_KUBERNETES_POD_TEMPLATE=.*template\.yaml: .*{problem}"):
        load(tmp_path, text)


def test_the_value_of_a_variable_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"env\[PIN\]\.value: a number stands where text belongs") as caught:
        load(tmp_path, "spec: {containers: [{name: task, env: [{name: PIN, value: 74185}]}]}")
    assert "74185" not in str(caught.value)


def test_what_only_newer_servers_know_and_whole_numbers_as_the_api_writes_them_are_left_alone(tmp_path: Path) -> None:
    base = load(tmp_path, "spec: {somethingQuiteNew: {a: 1}, activeDeadlineSeconds: 5.0, overhead: {cpu: 1}}")
    assert base["spec"]["somethingQuiteNew"] == {"a": 1}
