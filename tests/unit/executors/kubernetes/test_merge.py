"""Strategic merge; that it is the API server's own is shown in the integration tests with the same cases."""

from __future__ import annotations

import copy

import pytest

from leoflow_celery.executors.kubernetes.merge import MergeError, merge
from tests.support.merge_cases import BASE, CASES


def pod(**spec: object) -> dict[str, object]:
    return {"spec": spec}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_patch_is_merged_and_nothing_else_is_touched(case) -> None:
    base, patch = copy.deepcopy(BASE), copy.deepcopy(case.patch)
    merged = merge(base, patch)
    assert (base, patch) == (BASE, case.patch)
    for path, expected in case.expected.items():
        assert at(merged, path) == expected, path


def at(value, path: str):
    for step in path.split("/"):
        value = value[int(step)] if isinstance(value, list) else value.get(step)
    return value


def test_another_kind_of_value_replaces_the_first() -> None:
    """``kubectl patch`` would keep both and the API server refuse that."""
    env = [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]
    patched = merge(
        pod(containers=[{"name": "task", "env": env}]),
        pod(containers=[{"name": "task", "env": [{"name": "A", "value": "1"}]}]),
    )
    assert patched["spec"]["containers"][0]["env"] == [{"name": "A", "value": "1"}]


def test_another_source_of_a_volume_replaces_the_first() -> None:
    base = pod(volumes=[{"name": "v", "emptyDir": {}}])
    patched = merge(base, pod(volumes=[{"name": "v", "configMap": {"name": "c"}}]))
    assert patched["spec"]["volumes"] == [{"name": "v", "configMap": {"name": "c"}}]


def test_the_same_source_of_a_volume_is_merged() -> None:
    base = pod(volumes=[{"name": "v", "emptyDir": {"medium": "Memory"}}])
    patched = merge(base, pod(volumes=[{"name": "v", "emptyDir": {"sizeLimit": "1Gi"}}]))
    assert patched["spec"]["volumes"] == [{"name": "v", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]


@pytest.mark.parametrize(
    ("patch", "text"),
    [
        (pod(containers=[{"image": "x"}]), r"spec\.containers\[0\]: an object with 'name' belongs here"),
        (pod(containers=["task"]), r"spec\.containers\[0\]: an object with 'name'"),
        (pod(containers={"name": "task"}), r"spec\.containers: a list belongs here"),
        (pod(volumes="all"), r"spec\.volumes: a list belongs here"),
        ({"spec": "x"}, r"spec: an object belongs here"),
        ({"spec": []}, r"spec: an object belongs here"),
        (pod(nodeSelector="ssd"), r"spec\.nodeSelector: an object belongs here"),
        (pod(schedulerName={"a": 1}), r"spec\.schedulerName: a plain value belongs here"),
        (pod(tolerations="all"), r"spec\.tolerations: a list belongs here"),
        (
            pod(containers=[{"name": "task", "$patch": "replace", "image": "x"}]),
            r"spec\.containers\[0\]: an item with \$patch: replace replaces the whole list",
        ),
        ({"$patch": "remove"}, r"the patch: \$patch is 'remove'"),
        (pod(**{"$setElementOrder/containers": []}), r"spec\.\$setElementOrder/containers: only the directive \$patch"),
    ],
)
def test_a_patch_that_cannot_be_merged_says_where(patch: dict[str, object], text: str) -> None:
    with pytest.raises(MergeError, match=text):
        merge(BASE, patch)
