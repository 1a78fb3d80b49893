"""The staging claim of a run, and which storage classes can never serve it."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.executors.kubernetes.claims import SINGLE_WRITER_PROVISIONERS, build_claim, storage_class_problem


def request(**fields: str) -> TaskRequest:
    ids = {"task_instance_id": "ti", "dag_id": "Sales", "run_id": "Manual:1", "task_id": "t"}
    return TaskRequest.model_validate(
        {**ids, "operator": "bash", "entrypoint": "true", "staging_claim": "leoflow-staging-sales-1", **fields}
    )


def storage_class(provisioner: str):
    return {"metadata": {"name": "standard"}, "provisioner": provisioner}


def test_a_claim_is_shared_and_one_gibibyte_unless_the_request_says_otherwise() -> None:
    claim = build_claim(request(), "1Gi")
    assert claim["spec"] == {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    assert claim["metadata"]["name"] == "leoflow-staging-sales-1"
    assert claim["metadata"]["annotations"]["leoflow.io/run-id"] == "Manual:1"
    labels = claim["metadata"]["labels"]
    assert labels["leoflow.io/staging"] == "true"
    assert {f"leoflow.io/{name}-id" for name in ("run", "dag", "tenant")} <= labels.keys()


def test_a_request_decides_size_class_and_mode() -> None:
    own = request(staging_size="5Gi", staging_storage_class="fast", staging_access_mode="ReadWriteOnce")
    assert build_claim(own, "1Gi")["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "fast",
    }


def test_without_a_class_nothing_can_be_bound() -> None:
    assert "no default storage class; name one" in storage_class_problem(None, "", "ReadWriteMany")
    assert "has no storage class 'fast'" in storage_class_problem(None, "fast", "ReadWriteMany")


@pytest.mark.parametrize("provisioner", sorted(SINGLE_WRITER_PROVISIONERS))
def test_block_storage_is_refused_for_many_writers_only(provisioner: str) -> None:
    problem = storage_class_problem(storage_class(provisioner), "", "ReadWriteMany")
    assert provisioner in problem
    assert "set ReadWriteOnce" in problem
    assert storage_class_problem(storage_class(provisioner), "", "ReadWriteOnce") == ""


def test_storage_that_we_do_not_know_is_tried() -> None:
    assert storage_class_problem(storage_class("example.com/nfs"), "", "ReadWriteMany") == ""
