"""Staging claims: made before the first pod that mounts one, deleted when the control plane gives them up.

A claim that can never work is refused at once. A plan of deletions is seconds old when it arrives, and a run may have
been cleared and started again meanwhile, with the same claim. A claim that a live pod mounts is therefore left alone:
deleting it would take the data from the run's next task. Pods that have ended are kept for people to look at, but a
cluster keeps a claim that any pod names: they go first.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.staging import StagingPlan, claims_named
from leoflow_celery.errors import PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.errors import AlreadyExists, ApiError, NotFound
from leoflow_celery.executors.kubernetes.labels import (
    MANAGED_SELECTOR,
    STAGING_SELECTOR,
    check_claim,
    claim_metadata,
    of_system,
)
from leoflow_celery.executors.kubernetes.merge import Json
from leoflow_celery.executors.kubernetes.parse_pod import PodState, claims_of, observe, seconds
from leoflow_celery.settings import KubernetesSettings

log = logging.getLogger(__name__)

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


_THREADS = 4
_RESOURCE = "persistentvolumeclaims"


@dataclass(frozen=True, slots=True)
class _Claim:
    """One claim that this system made."""

    name: str
    uid: str
    created_at: float
    run_label: str

    @classmethod
    def of(cls, claim: Json) -> Self:
        metadata = claim["metadata"]
        return cls(
            metadata["name"],
            metadata["uid"],
            seconds(metadata.get("creationTimestamp")) or 0.0,
            (metadata.get("labels") or {}).get(MANAGED_SELECTOR, ""),
        )


class StagingCollector:
    """Touches nothing but claims that this system made, each by its uid."""

    def __init__(self, api: KubernetesApi, settings: KubernetesSettings) -> None:
        self._api, self._settings = api, settings

    def collect(self, plan: StagingPlan) -> dict[str, str]:
        """Delete; returns those that are gone, name → reason. What fails for one claim is tried by the next plan.

        Raises:
            ApiError: the list of claims could not be had to its end; nothing was concluded.
        """
        begun = time.monotonic()
        claims = self._list()
        plan = plan.by_clock_of(self._api.clock.time(), time.monotonic() - begun)
        doomed = plan.doomed({claim.name: claim.created_at for claim in claims.values()})
        if not doomed:
            return {}
        with ThreadPoolExecutor(min(_THREADS, len(doomed)), thread_name_prefix="leoflow-staging") as pool:
            gone = list(pool.map(lambda name: self._remove(name, claims.get(name), doomed[name]), doomed))
        return {name: doomed[name] for name, is_gone in zip(doomed, gone, strict=True) if is_gone}

    def _list(self) -> dict[str, _Claim]:
        pages = self._api.list_pages(
            self._api.path(_RESOURCE),
            operation="list_claims",
            label_selector=of_system(STAGING_SELECTOR, self._settings.system),
            limit=self._settings.page_size,
        )
        return {claim.name: claim for page in pages for claim in map(_Claim.of, page["items"])}

    def _remove(self, name: str, claim: _Claim | None, reason: str) -> bool:
        """Whether the claim is gone, or sure to go."""
        fields = {"claim": name, "reason": reason}
        try:
            if claim is None:
                return self._is_absent(name)
            users = self._users(claim)
            if live := [pod.name for pod in users if not pod.ended]:
                log.info("kubernetes.claim_in_use", extra={**fields, "attempt_name": live[0]})
                return False
            for pod in users:
                if pod.system == self._settings.system:
                    self._delete("pods", pod, "delete_pod")
                    if pod.held:
                        self._api.release_pod(pod.name, pod.uid)
            self._delete(_RESOURCE, claim, "delete_claim")
        except ApiError as error:
            log.warning("kubernetes.claim_not_deleted", extra={**fields, "error": str(error)})
            return False
        log.info("kubernetes.claim_deleted", extra=fields)
        return True

    def _is_absent(self, name: str) -> bool:
        """No claim of ours has that name. One that an operator or another system made under it stays."""
        try:
            self._api.get(self._api.path(_RESOURCE, name), operation="get_claim")
        except NotFound:
            return True
        log.warning("kubernetes.claim_is_not_ours", extra={"claim": name})
        return False

    def _users(self, claim: _Claim) -> list[PodState]:
        """The pods of the claim's run that mount it, whosesoever."""
        selector = f"{MANAGED_SELECTOR}={claim.run_label}" if claim.run_label else MANAGED_SELECTOR
        pages = self._api.list_pages(
            self._api.pods_path(),
            operation="list_pods",
            label_selector=selector,
            limit=self._settings.page_size,
        )
        return [observe(pod) for page in pages for pod in page["items"] if claim.name in claims_of(pod["spec"])]

    def _delete(self, resource: str, thing: _Claim | PodState, operation: str) -> None:
        try:
            self._api.delete(self._api.path(resource, thing.name), thing.uid, operation=operation)
        except NotFound:
            return
