"""Staging claims: made before the first pod that mounts one; a claim that can never work is refused at once."""

from __future__ import annotations

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.staging import claims_named
from leoflow_celery.errors import PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.errors import AlreadyExists, ApiError, NotFound
from leoflow_celery.executors.kubernetes.labels import check_claim, claim_metadata
from leoflow_celery.executors.kubernetes.merge import Json

_CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
_DEFAULT_CLASS = ("storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class")
#: Block storage of one node: a claim for many writers stays pending for ever.
SINGLE_WRITER_PROVISIONERS = frozenset(
    {
        *("ebs.csi.aws.com", "kubernetes.io/aws-ebs"),
        *("pd.csi.storage.gke.io", "kubernetes.io/gce-pd"),
        *("disk.csi.azure.com", "kubernetes.io/azure-disk"),
        *("cinder.csi.openstack.org", "kubernetes.io/cinder"),
        *("dobs.csi.digitalocean.com", "csi.hetzner.cloud", "linodebs.csi.linode.com"),
        *("rancher.io/local-path", "openebs.io/local"),
    }
)


class StagingClaims:
    """Makes the claim of a request's run when it is not there."""

    def __init__(self, api: KubernetesApi, default_size: str, check_class: bool = True, system: str = "") -> None:
        self._api, self._default_size, self._check_class, self._system = api, default_size, check_class, system

    def ensure(self, request: TaskRequest) -> None:
        """The claim exists when this returns; one that an operator made under that name is taken as it is.

        Raises:
            ApiError: the API server refused.
            TransientLaunchError: the claim is being deleted.
            PermanentLaunchError: no storage class can serve it, or another system or run has its data there.
        """
        path = self._api.path("persistentvolumeclaims")
        if self._exists(request.staging_claim, request):
            return
        claim = build_claim(request, self._default_size, self._system)
        if self._check_class:
            self._check(request, claim["spec"]["accessModes"][0])
        try:
            self._api.post(path, claim, operation="create_claim")
        except AlreadyExists:
            self._exists(request.staging_claim, request)  # another task of the run was faster, or another system

    def check_named(self, request: TaskRequest) -> None:
        """Refuse the claims that a pod override names beside the run's own, where they are another run's.

        Raises:
            ApiError: the API server refused.
            PermanentLaunchError: a claim belongs to another system or run.
        """
        for name in claims_named(request):
            if name != request.staging_claim:
                self._exists(name, request)

    def _exists(self, name: str, request: TaskRequest) -> bool:
        try:
            claim = self._api.get(self._api.path("persistentvolumeclaims", name), operation="get_claim")
        except NotFound:
            return False
        metadata = claim["metadata"]
        check_claim(metadata, request, self._system)
        if "deletionTimestamp" in metadata:
            raise TransientLaunchError(
                FailureReason.LAUNCH_FAILED, f"staging claim {name!r} of an earlier run is still being deleted"
            )
        return True

    def _check(self, request: TaskRequest, access_mode: str) -> None:
        """Storage classes belong to the cluster: who may not read them leaves the check to the pending timeout."""
        try:
            storage_class = self._class_of(request.staging_storage_class)
        except ApiError as error:
            if error.status == 403:
                return
            raise
        refusal = storage_class_problem(storage_class, request.staging_storage_class, access_mode)
        if refusal:
            raise PermanentLaunchError(FailureReason.INVALID_SPEC, refusal)

    def _class_of(self, name: str) -> Json | None:
        if name:
            try:
                return self._api.get(f"{_CLASSES}/{name}", operation="get_storage_class")
            except NotFound:
                return None
        classes = self._api.get(_CLASSES, operation="list_storage_classes")["items"]
        return next((one for one in classes if _is_default(one)), None)


def build_claim(request: TaskRequest, default_size: str, system: str = "") -> Json:
    """The PersistentVolumeClaim of a request's run."""
    spec: Json = {
        "accessModes": [request.staging_access_mode or "ReadWriteMany"],
        "resources": {"requests": {"storage": request.staging_size or default_size}},
    }
    if request.staging_storage_class:
        spec["storageClassName"] = request.staging_storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": claim_metadata(request, system),
        "spec": spec,
    }


def storage_class_problem(storage_class: Json | None, named: str, access_mode: str) -> str:
    """Why a claim can never be bound: a sentence with the fix, or nothing. No class at all is None."""
    if storage_class is None and named:
        return f"staging_storage_class: the cluster has no storage class {named!r}; name one that it has"
    if storage_class is None:
        return "staging_storage_class: none is named and the cluster has no default storage class; name one"
    provisioner, name = storage_class.get("provisioner", ""), storage_class["metadata"]["name"]
    if access_mode == "ReadWriteMany" and provisioner in SINGLE_WRITER_PROVISIONERS:
        return (
            f"staging_access_mode: storage class {name!r} ({provisioner}) cannot serve {access_mode}; name a "
            "staging_storage_class of shared storage (NFS, CephFS, EFS, Azure Files), or set ReadWriteOnce, "
            "which keeps all tasks of a run on one node"
        )
    return ""


def _is_default(storage_class: Json) -> bool:
    annotations = storage_class["metadata"].get("annotations") or {}
    return any(annotations.get(name) == "true" for name in _DEFAULT_CLASS)
