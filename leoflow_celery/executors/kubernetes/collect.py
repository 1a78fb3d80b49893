"""``StagingCollector``: deletes the staging claims that the control plane gives up, and those it has never heard of.

A plan is seconds old when it arrives, and a run may have been cleared and started again meanwhile, with the same claim.
A claim that a live pod mounts is therefore left alone: deleting it would take the data from the run's next task. Pods
that have ended are kept for people to look at, but a cluster keeps a claim that any pod names: they go first.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.errors import ApiError, NotFound
from leoflow_celery.executors.kubernetes.labels import MANAGED_SELECTOR, STAGING_SELECTOR, of_system
from leoflow_celery.executors.kubernetes.parse_pod import Json, PodState, claims_of, observe, seconds
from leoflow_celery.settings import KubernetesSettings

log = logging.getLogger(__name__)
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
        claims = self._list()
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
