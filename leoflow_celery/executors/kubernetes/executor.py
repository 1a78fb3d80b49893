"""``KubernetesExecutor``: one pod per attempt, under the attempt's name, and a Secret that the pod names and owns.

The pod comes first: its uid makes it the owner of its Secret, so that nothing is left over whenever the worker dies.
The kubelet needs longer to start a container than the second call takes, and waits when it does not.

Where the agent exchanges its token there is none to keep in a Secret. The second call then writes our word for the pod,
with its uid, into its annotations (ADR 15).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from secrets import token_hex

from leoflow_celery.domain.attempt import TASK_CONTAINER
from leoflow_celery.domain.desired_state import Expectation
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.errors import PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.base import FailureReporter, Launched, LaunchSpec, Observer, Reconciled, Sealing
from leoflow_celery.executors.core import SEAL, Voucher
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.errors import (
    AlreadyExists,
    ApiError,
    NotFound,
    QuotaExceeded,
    to_launch_error,
)
from leoflow_celery.executors.kubernetes.labels import FINALIZER, another_system, attempt_of, is_held, system_of
from leoflow_celery.executors.kubernetes.merge import Json
from leoflow_celery.executors.kubernetes.pod import build_pod, build_secret, confidential, secret_of, secret_variables
from leoflow_celery.executors.kubernetes.policy import PodPolicy
from leoflow_celery.executors.kubernetes.reconcile import Reconciler
from leoflow_celery.executors.kubernetes.staging_pvc import StagingClaims, StagingCollector
from leoflow_celery.executors.kubernetes.template import load_base
from leoflow_celery.settings import Settings

log = logging.getLogger(__name__)
#: So long the answer holds whether we may patch pods.
_RIGHTS_SECONDS = 300.0


class KubernetesExecutor:
    """Starts attempts as pods of one namespace. Thread-safe."""

    #: All workers of the queue share one cluster.
    host = ""

    def __init__(self, settings: Settings, reporter: FailureReporter, observer: Observer | None = None) -> None:
        """Raises ConfigurationError for an unusable kubeconfig, pod template or policy."""
        self._settings = settings.kubernetes
        self._base = load_base(self._settings)
        self._policy = PodPolicy.load(self._settings.policy)
        self._api = KubernetesApi.from_settings(self._settings, observer=observer or Observer())
        self._claims = StagingClaims(
            self._api, settings.staging.default_size, self._settings.check_storage_class, self._settings.system
        )
        self._reconciler = Reconciler(self._api, self._settings, reporter, observer)
        self._collector = StagingCollector(self._api, self._settings)
        self._may_hold: bool | None = None
        self._asked_at = float("-inf")

    def execute(self, launch: LaunchSpec) -> Launched:
        """Create the staging claim, the pod and its Secret or voucher, as far as they are not there.

        Raises:
            TransientLaunchError: the API server is busy or away, or a quota is used up.
            PermanentLaunchError: it refused the pod; the message is its own.
        """
        secret = self._secret_name(launch)
        pod = self._held(build_pod(launch, self._settings, self._base, secret, self._policy))
        with _launch_errors():
            if launch.request.staging_claim:
                self._claims.ensure(launch.request)
            self._claims.check_named(launch.request)
            if self._settings.exchanges_tokens:
                found, already = self._create_vouched(launch, pod, secret)
            else:
                found, already = self._create(launch, pod)
                if awaited := _awaited_secret(found):
                    self._create_secret(launch, awaited, found["metadata"]["uid"])
        uid = found["metadata"]["uid"]
        return Launched(launch.name, already, place=self._api.namespace, details={"uid": uid})

    def cancel(self, name: str, grace_seconds: float) -> None:
        """Delete the pod when it is ours: SIGTERM now, SIGKILL after the grace, which is a second at least.

        With none at all the API server would forget the pod while it may still run.
        """
        grace = max(1, math.ceil(grace_seconds))
        with _launch_errors():
            found = self._find(name)
            if found is not None and self._is_ours(found["metadata"]):
                self._delete(name, found["metadata"]["uid"], grace, held=is_held(found["metadata"]))

    def reconcile(self, expectation: Expectation) -> Reconciled:
        """See ``ReconcilableExecutor``."""
        with _launch_errors():
            return self._reconciler.reconcile(expectation)

    def collect_staging(self, plan: StagingPlan) -> dict[str, str]:
        """See ``ReconcilableExecutor``."""
        with _launch_errors():
            return self._collector.collect(plan)

    def close(self) -> None:
        """Close idle connections. Pods go on."""
        self._api.close()

    def _held(self, pod: Json) -> Json:
        """The pod with our finalizer, where we may take it off again; without it in any other case."""
        others = [one for one in pod["metadata"].get("finalizers") or () if one != FINALIZER]
        finalizers = [*others, FINALIZER] if self._settings.hold_pods and self._may_release() else others
        metadata = {name: value for name, value in pod["metadata"].items() if name != "finalizers"}
        return {**pod, "metadata": {**metadata, **({"finalizers": finalizers} if finalizers else {})}}

    def _may_release(self) -> bool:
        """Whether we may patch pods, as the API server said last; no when it says nothing.

        A missing right is said when it is first seen missing: launches go on, only a drained node may cost an end.
        """
        if time.monotonic() - self._asked_at >= _RIGHTS_SECONDS:
            try:
                may = self._api.may_release_pods()
            except ApiError as error:
                log.warning("kubernetes.rights_unknown", extra={"error": str(error)})
                return False
            if not may and self._may_hold is not False:
                needed = f"patch pods in namespace {self._api.namespace}"
                told = (
                    "a task whose pod is deleted before its end is recorded runs again; docs/kubernetes.md, 'Held pods'"
                )
                log.warning("kubernetes.pods_not_held", extra={"missing_right": needed, "consequence": told})
            self._may_hold, self._asked_at = may, time.monotonic()
        return bool(self._may_hold)

    def _secret_name(self, launch: LaunchSpec) -> str:
        """Of the Secret, should this call create the pod: never that of an earlier pod of the same name."""
        needed = not self._settings.exchanges_tokens or secret_variables(launch, exchanged=True)
        return f"{launch.name}-{token_hex(4)}" if needed and self._settings.agent_environment == "secret" else ""

    def _create_vouched(self, launch: LaunchSpec, pod: Json, secret: str) -> tuple[Json, bool]:
        """The pod with our word for it, and whether an earlier delivery had given that.

        A pod of this name that nobody vouches for is what a worker left that died between its two calls, or what a
        stranger made to be taken for ours. Nothing tells them apart, and neither has ever had a token: it is replaced.
        """
        sealing = launch.sealing
        if sealing is None:
            raise PermanentLaunchError(FailureReason.INVALID_SPEC, "nobody gave this launch a key to vouch for its pod")
        found, already = self._create(launch, pod)
        if already:
            if self._is_vouched(found["metadata"], launch, sealing):
                return found, True
            self._replace(found["metadata"])
            found, already = self._create(launch, pod)
            if already:
                message = f"pod {launch.name} was made by somebody else while we made it again"
                raise TransientLaunchError(FailureReason.LAUNCH_FAILED, message)
        uid = found["metadata"]["uid"]
        if secret:
            self._create_secret(launch, secret, uid)
        self._vouch(launch, uid, sealing)
        return found, False

    def _is_vouched(self, metadata: Json, launch: LaunchSpec, sealing: Sealing) -> bool:
        sealed = (metadata.get("annotations") or {}).get(SEAL, "")
        expected = Voucher(launch.attempt, self._api.namespace, launch.name, metadata["uid"])
        return bool(sealed) and Voucher.opened(sealed, sealing) == expected

    def _replace(self, metadata: Json) -> None:
        """Delete a pod that nobody vouches for, unless somebody does meanwhile."""
        name, uid, version = metadata["name"], metadata["uid"], metadata.get("resourceVersion", "")
        log.warning("kubernetes.unvouched_pod_replaced", extra={"attempt_name": name, "uid": uid})
        path = self._api.pods_path(name)
        try:
            self._api.delete(path, uid, operation="delete_pod", grace_seconds=0, resource_version=version)
        except NotFound:
            return
        if is_held(metadata):
            self._api.release_pod(name, uid)

    def _vouch(self, launch: LaunchSpec, uid: str, sealing: Sealing) -> None:
        """Say under seal that we made this very pod for this attempt: what its agent's token is exchanged for."""
        sealed = Voucher(launch.attempt, self._api.namespace, launch.name, uid).sealed(sealing)
        body = {"metadata": {"uid": uid, "annotations": {SEAL: sealed}}}
        with self._taken_back_when_refused(launch.name, uid):
            try:
                self._api.patch(self._api.pods_path(launch.name), body, operation="patch_pod")
            except ApiError as error:
                is_another = any(cause.get("field") == "metadata.uid" for cause in error.causes)
                if not is_another and not isinstance(error, NotFound):
                    raise
                message = f"pod {launch.name} existed a moment ago and is gone, or another one has its name"
                raise TransientLaunchError(FailureReason.LAUNCH_FAILED, message) from error

    def _create(self, launch: LaunchSpec, pod: Json) -> tuple[Json, bool]:
        """The pod, and whether an earlier delivery had created it.

        A quota is asked before the name is looked at, and what fills it may be this very pod.
        """
        try:
            hide = confidential(launch, pod)
            query = self._validation(launch)
            metadata = self._api.post(self._api.pods_path(), pod, operation="create_pod", hide=hide, **query)
        except (AlreadyExists, QuotaExceeded) as error:
            found = self._find(launch.name)
            if found is not None:
                self._check_ours(found["metadata"], launch)
                return found, True
            if isinstance(error, QuotaExceeded):
                raise
            message = f"pod {launch.name} existed a moment ago and is gone"
            raise TransientLaunchError(FailureReason.LAUNCH_FAILED, message) from error
        return {**pod, "metadata": metadata}, False

    def _validation(self, launch: LaunchSpec) -> dict[str, str]:
        """Foreign JSON is checked for unknown fields where the server can (1.25); before, it drops them silently."""
        foreign = launch.request.pod_override or self._settings.pod_template
        return {"fieldValidation": "Strict"} if foreign else {}

    def _find(self, name: str) -> Json | None:
        try:
            return self._api.get(self._api.pods_path(name), operation="get_pod")
        except NotFound:
            return None

    def _is_ours(self, metadata: Json) -> bool:
        return attempt_of(metadata) is not None and system_of(metadata) == self._settings.system

    def _check_ours(self, metadata: Json, launch: LaunchSpec) -> None:
        """Refuse a pod of that name that is another attempt's, another system's or nobody's."""
        if attempt_of(metadata) != launch.attempt:
            message = f"a pod named {launch.name} exists in namespace {self._api.namespace}, and is not of this attempt"
            raise PermanentLaunchError(FailureReason.INVALID_SPEC, message)
        if (owner := system_of(metadata)) != self._settings.system:
            raise another_system(f"pod {launch.name} of namespace {self._api.namespace}", owner, self._settings.system)

    def _create_secret(self, launch: LaunchSpec, name: str, pod_uid: str) -> None:
        """Give the pod its Secret, unless another delivery did; a pod that can never get one is taken back."""
        secret = build_secret(launch, name, pod_uid, self._settings.system, self._settings.exchanges_tokens)
        with self._taken_back_when_refused(launch.name, pod_uid), suppress(AlreadyExists):
            hide = confidential(launch, {})
            self._api.post(self._api.path("secrets"), secret, operation="create_secret", hide=hide)

    @contextmanager
    def _taken_back_when_refused(self, name: str, uid: str) -> Iterator[None]:
        """Delete the pod that waits for what is done here, when that is refused.

        Also when it may be granted later: until then the kubelet would count the pod as one that cannot start.
        """
        try:
            yield
        except ApiError as error:
            refusal = to_launch_error(error)
            if isinstance(refusal, PermanentLaunchError) or error.status == 403:
                self._take_back(name, uid)
            raise refusal from error

    def _take_back(self, name: str, uid: str) -> None:
        try:
            self._delete(name, uid, grace_seconds=0, held=bool(self._may_hold))
        except ApiError as error:
            log.warning("kubernetes.pod_left_to_reconcile", extra={"attempt_name": name, "error": str(error)})

    def _delete(self, name: str, uid: str, grace_seconds: int, held: bool) -> None:
        try:
            self._api.delete(self._api.pods_path(name), uid, operation="delete_pod", grace_seconds=grace_seconds)
        except NotFound:
            return
        if held:
            self._api.release_pod(name, uid)


def _awaited_secret(pod: Json) -> str:
    """The Secret that a pod needs to start its container; nothing for one that has started it."""
    if pod.get("status", {}).get("phase", "Pending") != "Pending":
        return ""
    return secret_of(next(one for one in pod["spec"]["containers"] if one["name"] == TASK_CONTAINER))


@contextmanager
def _launch_errors() -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        raise to_launch_error(error) from error
