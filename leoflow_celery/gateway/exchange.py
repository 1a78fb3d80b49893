"""ExchangeToken: an agent whose pod holds no token proves which pod it is, and gets the token of that pod's attempt.

Three parties have to agree. The cluster says which pod presents the token; the launch worker that made this very pod
(its uid) says for which attempt, under a seal; SQL says that this attempt is one of pods, and under which name. Labels
and annotations alone say nothing: whoever may create pods can write them.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from leoflow_celery import metrics
from leoflow_celery.domain.attempt import AttemptId, attempt_name
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.errors import (
    ClaimRefused,
    ClusterUnavailable,
    ConfigurationError,
    InvalidToken,
    NotFound,
)
from leoflow_celery.executors.base import Observer, Sealing
from leoflow_celery.executors.core import AUDIENCE, SEAL, PodReviewer, PresentedPod, Voucher, attempt_in
from leoflow_celery.gateway.rpc import REFUSED_EXCHANGES, NotPermitted, NotPossible
from leoflow_celery.gateway.threads import REVIEW_THREADS, Threads
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import AUTHORIZATION_KEY
from leoflow_celery.queueing.messages import SCOPE_OF, open_request
from leoflow_celery.services import Services
from leoflow_celery.settings import Settings
from leoflow_celery.store.views import TaskInstanceView

log = logging.getLogger(__name__)
refused_log = logging.getLogger(REFUSED_EXCHANGES)

_MAX_TOKEN_CHARACTERS = 8_192
#: Clocks of the cluster and of the gateway may differ so much.
_LEEWAY_SECONDS = 60.0
#: Exchanges that wait or are asked about. The API server is not asked about more; agents ask again.
_MAX_OPEN = 64


def open_reviewer(settings: Settings) -> PodReviewer | None:
    """What asks the cluster; None where no token is exchanged.

    Raises:
        ConfigurationError: there is no usable kubeconfig or service account, or the client is not installed.
    """
    if not settings.kubernetes.exchanges_tokens:
        return None
    try:
        from leoflow_celery.executors.kubernetes.reviews import PodReviews
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"LEOFLOW_KUBERNETES_AGENT_TOKEN=exchange needs the package {error.name!r}: "
            "pip install 'leoflow-celery[kubernetes]'"
        ) from error
    return PodReviews(settings.kubernetes, REVIEW_THREADS, _Counted())


class _Counted(Observer):
    def api_call(self, operation: str, result: str) -> None:
        metrics.record_kubernetes_call(operation, result)


class Exchange:
    """The method, and how its calls are authenticated."""

    def __init__(self, services: Services, threads: Threads, reviewer: PodReviewer | None) -> None:
        self._services, self._threads, self._reviewer = services, threads, reviewer
        self._open = 0

    def authenticate(
        self, metadata: Iterable[tuple[str, str | bytes]] | None, _peer: Callable[[], str], _method: str
    ) -> tuple[PodReviewer, str]:
        """The token that a call presents, once it looks like one worth asking the cluster about.

        Raises:
            NotPossible: this gateway exchanges no tokens.
            InvalidToken: it cannot be the token of a task's pod.
        """
        header = dict(metadata or ()).get(AUTHORIZATION_KEY, "")
        scheme, _, token = header.partition(" ") if isinstance(header, str) else ("", "", "")
        if scheme.lower() != "bearer" or not token:
            raise InvalidToken("missing", "send metadata 'authorization: Bearer <token of the pod's service account>'")
        check_plausible(token.strip(), time.time(), self._reviewer.namespace if self._reviewer is not None else None)
        if self._reviewer is None:
            raise NotPossible(
                "this gateway exchanges no tokens: give it LEOFLOW_KUBERNETES_AGENT_TOKEN=exchange, as its workers have"
            )
        return self._reviewer, token.strip()

    async def exchange_token(
        self, presented: tuple[PodReviewer, str], _: pb.ExchangeTokenRequest
    ) -> pb.ExchangeTokenResponse:
        """The attempt's token, for the pod that was made for it."""
        if self._open >= _MAX_OPEN:
            raise ClusterUnavailable(f"{_MAX_OPEN} exchanges are under way; ask again")
        reviewer, token = presented
        self._open += 1
        try:
            pod = await self._threads.review(reviewer.pod_of, token)
            answer = await self._threads.store(self._token_of, pod)
        except NotPermitted as error:
            refused_log.warning("exchange.refused", extra={"why": str(error)})
            raise
        except ClusterUnavailable as error:
            refused_log.warning("exchange.unanswered", extra={"why": str(error)})
            raise
        finally:
            self._open -= 1
        return pb.ExchangeTokenResponse(agent_token=answer)

    def _token_of(self, pod: PresentedPod) -> str:
        attempt = vouched_attempt(pod, self._services.keys.sealer(SCOPE_OF[ExecutorType.KUBERNETES]))
        try:
            view = self._services.store.attempts.get(attempt.task_instance_id, attempt.try_number)
        except NotFound as error:
            raise ClaimRefused("unknown", f"attempt {attempt} is not recorded here") from error
        check_recorded(view, attempt, pod)
        token = self._services.tokens.mint(open_request(self._services.keys, view.sealed_request), attempt)
        log.info("exchange.granted", extra={"attempt": str(attempt), "pod": pod.name})
        return token

    async def warn_of_missing_rights(self) -> None:
        """Say at the start what the cluster would refuse later, once for each agent."""
        if self._reviewer is None:
            return
        try:
            missing = await self._threads.review(self._reviewer.missing_rights)
        except ClusterUnavailable as error:
            log.warning("exchange.rights_unknown", extra={"why": str(error)})
            return
        if missing:
            log.error(
                "exchange.rights_missing: no token can be exchanged; grant the gateway's service account: %s",
                ", ".join(missing),
            )

    def close(self) -> None:
        """Close idle connections."""
        if self._reviewer is not None:
            self._reviewer.close()


def check_plausible(token: str, now: float, namespace: str | None = None) -> None:
    """Refuse what cannot be the token of a pod (in that namespace), without asking anybody. Its words prove nothing.

    Raises:
        InvalidToken: the text says why.
    """
    claims = _claims(token)
    audiences, bound = claims.get("aud"), claims.get("kubernetes.io")
    if AUDIENCE not in ([audiences] if isinstance(audiences, str) else audiences or ()):
        raise InvalidToken("foreign", f"the service account token is not for audience {AUDIENCE!r}")
    if not isinstance(bound, dict) or not isinstance(bound.get("pod"), dict):
        raise InvalidToken("foreign", "the service account token was not given to a pod")
    if namespace is not None and bound.get("namespace") != namespace:
        raise InvalidToken("foreign", f"the service account token is not of a pod in namespace {namespace!r}")
    expires_at = claims.get("exp")
    # Nothing is added to it: a whole number may be larger than any float.
    if not isinstance(expires_at, int | float) or expires_at <= now - _LEEWAY_SECONDS:
        raise InvalidToken("expired", "the service account token has expired")


def _claims(token: str) -> dict[str, Any]:
    parts = token.split(".")
    if len(token) <= _MAX_TOKEN_CHARACTERS and len(parts) == 3 and all(parts):
        try:
            claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        except (ValueError, RecursionError):
            claims = None
        if isinstance(claims, dict) and isinstance(claims.get("aud"), str | list | None):
            return claims
    raise InvalidToken("malformed", "this is no service account token of a pod")


def vouched_attempt(pod: PresentedPod, sealing: Sealing) -> AttemptId:
    """The attempt that a launch worker made this pod for.

    Raises:
        ClusterUnavailable: no launch worker has said so yet; it does within a moment of making a pod, or makes another.
        NotPermitted: none did, or not of this pod.
    """
    sealed = pod.annotations.get(SEAL, "")
    if not sealed:
        if attempt_in(pod.annotations) is None:
            raise NotPermitted(f"pod {pod.namespace}/{pod.name} is not one of a task")
        raise ClusterUnavailable(f"no launch worker has vouched for pod {pod.namespace}/{pod.name} ({pod.uid}) yet")
    voucher = Voucher.opened(sealed, sealing)
    if voucher is None:
        raise NotPermitted(
            f"pod {pod.namespace}/{pod.name}: its seal was not made with our keys; give the gateway and the k8s "
            "workers the same LEOFLOW_SEAL_KEYS"
        )
    if not voucher.is_of(pod):
        raise NotPermitted(f"pod {pod.namespace}/{pod.name} ({pod.uid}) has the seal of another pod")
    return voucher.attempt


def check_recorded(view: TaskInstanceView, attempt: AttemptId, pod: PresentedPod) -> None:
    """Whether SQL gave this attempt to pods, under this name, and still waits for its end.

    Raises:
        ClaimRefused: superseded, terminal or unknown.
        NotPermitted: the attempt is another executor's, or has another name.
    """
    if view.attempt != attempt:
        why = "superseded" if view.launch > attempt.launch else "unknown"
        raise ClaimRefused(why, f"attempt {attempt} is not the current one of its try, which is {view.attempt}")
    if view.executor != ExecutorType.KUBERNETES:
        raise NotPermitted(f"attempt {attempt} runs on the {view.executor} executor, not in a pod")
    if pod.name != attempt_name(attempt, view.dag_id, view.task_id):
        raise NotPermitted(f"pod {pod.name} does not have the name of attempt {attempt}")
    if view.is_terminal:
        raise ClaimRefused("terminal", f"attempt {attempt} is {view.state} already")
