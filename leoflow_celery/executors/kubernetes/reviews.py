"""``PodReviews``: asks the API server which pod a service account token was given to (TokenReview), and looks at it.

The server checks the token's signature, its time, that it was made for us, and that its pod still exists.
"""

from __future__ import annotations

from typing import Any

from leoflow_celery.errors import ClusterUnavailable, InvalidToken
from leoflow_celery.executors.base import Observer
from leoflow_celery.executors.core import AUDIENCE, PresentedPod
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.errors import ApiError, NotFound
from leoflow_celery.executors.kubernetes.merge import Json
from leoflow_celery.settings import KubernetesSettings

_REVIEWS_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
_POD_NAME, _POD_UID = "authentication.kubernetes.io/pod-name", "authentication.kubernetes.io/pod-uid"
#: An agent waits 20 s for an answer; the two calls have to fit into that.
_CONNECT_SECONDS, _ANSWER_SECONDS = 3.0, 5.0


class PodReviews:
    """The ``PodReviewer`` of a cluster. Thread-safe."""

    def __init__(self, settings: KubernetesSettings, connections: int, observer: Observer | None = None) -> None:
        """Raises ConfigurationError when there is no usable configuration. Calls no server."""
        limits = {
            "connect_timeout_seconds": min(settings.connect_timeout_seconds, _CONNECT_SECONDS),
            "request_timeout_seconds": min(settings.request_timeout_seconds, _ANSWER_SECONDS),
            "credential_timeout_seconds": min(settings.credential_timeout_seconds, _ANSWER_SECONDS),
        }
        self._api = KubernetesApi.from_settings(settings.model_copy(update=limits), connections, observer)

    @property
    def namespace(self) -> str:
        """Where task pods live."""
        return self._api.namespace

    def pod_of(self, token: str) -> PresentedPod:
        """See ``PodReviewer``."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]},
        }
        try:
            review = self._api.ask(_REVIEWS_PATH, body, operation="create_tokenreview")
            name, uid = reviewed_pod(review, self.namespace)
            pod = self._api.get(self._api.pods_path(name), operation="get_pod")
        except NotFound as error:
            raise InvalidToken("foreign", f"the pod of the service account token is gone: {error.message}") from error
        except ApiError as error:
            raise ClusterUnavailable(f"the API server does not say which pod this is: {error}") from error
        metadata = pod.get("metadata") or {}
        if metadata.get("uid") != uid:
            raise InvalidToken("foreign", f"the pod of the service account token is gone; another one is named {name}")
        return PresentedPod(self.namespace, name, uid, metadata.get("annotations") or {})

    def missing_rights(self) -> list[str]:
        """See ``PodReviewer``."""
        needed = {
            "create tokenreviews.authentication.k8s.io": {
                "verb": "create",
                "group": "authentication.k8s.io",
                "resource": "tokenreviews",
            },
            f"get pods in namespace {self.namespace}": {"verb": "get", "resource": "pods", "namespace": self.namespace},
        }
        try:
            return [name for name, attributes in needed.items() if not self._api.may(attributes)]
        except ApiError as error:
            raise ClusterUnavailable(f"the API server does not say what we may ask: {error}") from error

    def close(self) -> None:
        """Close idle connections."""
        self._api.close()


def reviewed_pod(review: Json, namespace: str) -> tuple[str, str]:
    """Name and uid of the pod that a TokenReview's answer speaks of.

    Raises:
        InvalidToken: it is no token of a pod in that namespace for us.
    """
    status: dict[str, Any] = review.get("status") or {}
    if status.get("authenticated") is not True:
        why = str(status.get("error") or "the API server does not know it")
        raise InvalidToken("forged", f"the service account token is not valid: {why[:500]}")
    # A server that knows no audiences says nothing of them, and would let any token of the cluster pass.
    if AUDIENCE not in (status.get("audiences") or ()):
        raise InvalidToken("foreign", f"the service account token is not for audience {AUDIENCE!r}")
    user: dict[str, Any] = status.get("user") or {}
    kind, _, account = str(user.get("username", "")).partition("system:serviceaccount:")
    if kind or account.partition(":")[0] != namespace:
        raise InvalidToken("foreign", f"the token is not of a service account in namespace {namespace!r}")
    extra: dict[str, Any] = user.get("extra") or {}
    names: list[Any] = extra.get(_POD_NAME) or []
    uids: list[Any] = extra.get(_POD_UID) or []
    if len(names) != 1 or len(uids) != 1 or not (names[0] and uids[0]):
        raise InvalidToken("foreign", "the service account token was not given to a pod")
    return str(names[0]), str(uids[0])
