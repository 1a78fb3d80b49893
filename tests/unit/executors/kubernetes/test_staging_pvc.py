"""The staging claim of a run, and which storage classes can never serve it."""

from __future__ import annotations

from typing import Any

import pytest

from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.kubernetes.errors import NotFound
from leoflow_celery.executors.kubernetes.labels import check_claim
from leoflow_celery.executors.kubernetes.staging_pvc import (
    SINGLE_WRITER_PROVISIONERS,
    StagingClaims,
    build_claim,
    storage_class_problem,
)


def request(**fields: Any) -> TaskRequest:
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


def metadata(**changes):
    made = build_claim(request(), "1Gi", "blue")["metadata"]
    return {**made, **changes}


def test_a_claim_of_the_own_run_is_taken_also_one_that_an_older_version_made() -> None:
    check_claim(metadata(), request(), "blue")
    ids = metadata()["annotations"]
    check_claim(metadata(annotations={key: one for key, one in ids.items() if "tenant" not in key}), request(), "blue")
    check_claim({"name": "an operator's"}, request(), "blue")


@pytest.mark.parametrize("other", [{"run_id": "manual:1"}, {"dag_id": "sales"}, {"tenant_id": "acme"}])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_claim_of_another_run_is_refused_by_its_labels(other: dict[str, str], is_old: bool) -> None:
    ids = {key: one for key, one in metadata()["annotations"].items() if not is_old or "tenant" not in key}
    with pytest.raises(PermanentLaunchError, match="'leoflow-staging-sales-1' belongs to another run"):
        check_claim(metadata(annotations=ids), request(**other), "blue")


class Cluster:
    """As much of the API as a look at claims needs."""

    def path(self, *parts: str) -> str:
        return "/".join(parts)

    def get(self, path: str, operation: str) -> Any:
        if path.endswith("leoflow-staging-sales-1"):
            return {"metadata": metadata()}
        raise NotFound("get", 404, "NotFound", "gone")


def test_the_claims_of_a_pod_override_are_looked_at_as_well() -> None:
    claims: Any = StagingClaims(Cluster(), "1Gi", system="blue")  # type: ignore[arg-type]
    volumes = [{"name": n, "persistentVolumeClaim": {"claimName": n}} for n in ("absent", "leoflow-staging-sales-1")]
    own = request(staging_claim="", pod_override={"spec": {"volumes": volumes}})
    claims.check_named(own)
    with pytest.raises(PermanentLaunchError, match="belongs to another run"):
        claims.check_named(own.evolve(run_id="another"))
