"""``Reconciler``: compares the pods that exist with the attempts that SQL expects, and acts on the difference.

One paged list, nothing else, unless there is something to report or to delete. A pod that is not in the list is asked
for by name, where it was launched, before it is called missing: it may have been made under other settings. An end that
its agent could not report comes with the last lines that the pod's container printed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.desired_state import Expectation, ExpectedAttempt
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.executors.base import FailureReporter, Observer, Reconciled
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.decisions import (
    KEEP,
    NEVER_STARTED,
    PodDecision,
    PodReport,
    ReconcilePolicy,
    decide_pod,
    is_missing,
    is_pod_of,
    missing_outcome,
)
from leoflow_celery.executors.kubernetes.errors import ApiError, NotFound
from leoflow_celery.executors.kubernetes.events import (
    PodEvent,
    explain,
    explain_claim,
    failing_since,
    fetch_events,
    pull_words,
)
from leoflow_celery.executors.kubernetes.labels import MANAGED_SELECTOR, of_system
from leoflow_celery.executors.kubernetes.parse_pod import PodState, observe
from leoflow_celery.settings import KubernetesSettings

log = logging.getLogger(__name__)
#: Lines may be of any length; an outcome travels through the broker.
_MAX_BYTES = 32_768
#: Of one answer. A kubelet that is asked for lines and bytes cuts off the last of the lines.
_READ_BYTES = 1_048_576
#: What a kubelet answers, with status 200, when the container is removed already.
_NO_LOG = "unable to retrieve container logs for "


def fetch_log_tail(api: KubernetesApi, pod: PodState, lines: int) -> tuple[str, ...]:
    """The last ``lines`` lines, of at most 32 KiB together; nothing when there is no log (any more).

    They are of the task's container, or of the init container whose failure kept it from starting.
    """
    container = pod.task if pod.has_run else pod.failed_init
    if container is None or lines <= 0:
        return ()
    try:
        text = _read(partial(_ask, api, pod.name, container.name), lines)
    except ApiError as error:
        # The pod, its container or its node may be gone: an outcome without a log is better than none.
        log.info("kubernetes.no_log", extra={"attempt_name": pod.name, "error": str(error)})
        return ()
    return () if text.startswith(_NO_LOG) else tail_of(text, lines)


def _ask(api: KubernetesApi, pod: str, container: str, lines: int) -> str:
    path = api.pods_path(pod, "log")
    return api.get_text(path, operation="get_log", container=container, tailLines=lines, limitBytes=_READ_BYTES)


def _read(ask: Callable[[int], str], lines: int) -> str:
    """The last lines, fewer of them when they are too long to come whole."""
    while len((text := ask(lines)).encode()) >= _READ_BYTES and lines > 1:
        lines = max(1, lines // 8)
    return text


def tail_of(text: str, lines: int) -> tuple[str, ...]:
    """The last whole lines that fit; of a single longer one, its end."""
    kept: list[str] = []
    room = _MAX_BYTES
    for line in reversed(text.splitlines()[-lines:]):
        size = len(line.encode())
        if size > room:
            if not kept:
                kept.append("…" + line.encode()[-room:].decode("utf-8", "ignore"))
            break
        kept.append(line)
        room -= size
    return tuple(reversed(kept))


def _find(api: KubernetesApi, name: str) -> PodState | None:
    try:
        return observe(api.get(api.pods_path(name), operation="get_pod"))
    except NotFound:
        return None


#: Pods dealt with at a time. More would take the connections of the launches beside us.
_THREADS = 8


@dataclass(frozen=True, slots=True)
class _Done:
    """What was done about one pod, or one that is missing."""

    reported: bool = False
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class _Away:
    """A pod of ours that our list does not have."""

    namespace: str
    uid: str


class Reconciler:
    """Keeps the moment it looked last, and which pods are not in its list. One reconcile runs at a time."""

    def __init__(
        self,
        api: KubernetesApi,
        settings: KubernetesSettings,
        reporter: FailureReporter,
        observer: Observer | None = None,
        policy: ReconcilePolicy | None = None,
    ) -> None:
        self._api, self._settings, self._reporter = api, settings, reporter
        self._observer = observer or Observer()
        self._policy = policy or ReconcilePolicy.of(settings)
        self._looked_at = time.monotonic()
        self._away: dict[str, _Away] = {}

    def reconcile(self, expectation: Expectation) -> Reconciled:
        """One pass. What fails for one pod is tried again by the next pass, and stops no other.

        Raises:
            ApiError: the list could not be had, or not to its end; nothing was concluded.
            Exception: what the reporter raised; the rest is left to the next pass.
        """
        begun = time.monotonic()
        pods = self._list()
        expectation = expectation.by_clock_of(self._api.clock.time(), time.monotonic() - begun)
        self._observe(pods.values())
        work = [*self._decided(pods, expectation), *self._absent(pods, expectation)]
        done = list(self._in_parallel(work)) if work else []
        return Reconciled(len(pods), sum(one.reported for one in done), sum(one.deleted for one in done))

    def _list(self) -> dict[str, PodState]:
        pages = self._api.list_pages(
            self._api.pods_path(),
            operation="list_pods",
            label_selector=of_system(MANAGED_SELECTOR, self._policy.system),
            limit=self._settings.page_size,
        )
        # By name: a list that had to start again yields some pods twice.
        return {pod.name: pod for page in pages for pod in map(observe, page["items"])}

    def _observe(self, pods: Iterable[PodState]) -> None:
        """Count what runs; a pod that started since we looked last has just left the cluster's queue."""
        running, monotonic = 0, time.monotonic()
        looked_at, self._looked_at = self._api.clock.time() - (monotonic - self._looked_at), monotonic
        for pod in pods:
            running += pod.phase == "Running"
            if pod.task is not None and (pod.task.started_at or 0.0) > looked_at:
                self._observer.pending((pod.task.started_at or 0.0) - pod.created_at)
        self._observer.running(running)

    # -- deciding -----------------------------------------------------------------------------------------------

    def _decided(self, pods: dict[str, PodState], expectation: Expectation) -> Iterable[Callable[[], _Done]]:
        now = self._api.clock.time()  # the list's own: a pod's times are the cluster's
        for pod in pods.values():
            expected = expectation.attempts.get(pod.name)
            decide = partial(decide_pod, pod, expected, expectation.read_at, now, self._policy)
            if (decision := decide()) != KEEP:
                yield partial(self._act, pod, expected, decision, decide)

    def _absent(self, pods: dict[str, PodState], expectation: Expectation) -> Iterable[Callable[[], _Done]]:
        """Only ever called with a complete list: an incomplete one raised before."""
        attempts = expectation.attempts
        missing = {name for name, one in attempts.items() if is_missing(one, expectation.read_at, self._policy)}
        for name in (missing | self._away.keys()) - pods.keys():
            yield partial(self._look_for, name, attempts.get(name), expectation.read_at)

    def _in_parallel(self, work: list[Callable[[], _Done]]) -> Iterable[_Done]:
        with ThreadPoolExecutor(min(_THREADS, len(work)), thread_name_prefix="leoflow-reconcile") as pool:
            futures = [pool.submit(one) for one in work]
            try:
                for future in futures:
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    # -- acting -------------------------------------------------------------------------------------------------

    def _act(
        self, pod: PodState, expected: ExpectedAttempt | None, decision: PodDecision, decide: Callable[..., PodDecision]
    ) -> _Done:
        if decision.report is not None and expected is not None:
            events = self._events(pod.name, pod.uid) if decision.report.outcome.reason else []
            if decision.why == NEVER_STARTED:
                decision = decide(failing_since=failing_since(events), pull_words=pull_words(events))
            if decision.report is not None:
                self._report_end(pod, expected.attempt, decision.report, events)
        deleted = decision.delete and self._delete(pod, decision)
        if pod.held and (decision.release or decision.delete):
            self._api.release_pod(pod.name, pod.uid)
        return _Done(decision.report is not None, deleted)

    def _report_end(self, pod: PodState, attempt: AttemptId, report: PodReport, events: list[PodEvent]) -> None:
        outcome = explain(report.outcome, events) if report.outcome.reason else report.outcome
        if outcome.reason is FailureReason.UNSCHEDULABLE and "volume" in pod.unscheduled.lower():
            for claim in pod.claims:
                outcome = explain_claim(outcome, claim, self._events(claim, kind="PersistentVolumeClaim"))
        if report.wants_log_tail:
            outcome = outcome.evolve(log_tail=fetch_log_tail(self._api, pod, self._settings.log_tail_lines))
        self._report(pod.name, attempt, outcome, report.return_value)

    def _look_for(self, name: str, expected: ExpectedAttempt | None, read_at: float) -> _Done:
        """Ask for a pod by name, and judge it as one of the list; report the attempt whose pod there is none of."""
        away = self._away.get(name)
        api = self._api.within(away.namespace if away else expected.place if expected else "")
        try:
            pod = _find(api, name)
        except ApiError as error:
            fields = {"attempt_name": name, "namespace": api.namespace, "error": str(error)}
            log.warning("kubernetes.pod_not_looked_up", extra=fields)
            return _Done()
        if pod is not None and (pod.uid == away.uid if away else expected and is_pod_of(pod, expected, self._policy)):
            if away is None:
                log.warning("kubernetes.pod_away", extra={"attempt_name": name, "namespace": api.namespace})
                self._away[name] = _Away(api.namespace, pod.uid)
            return self._judge_away(api, pod, expected, read_at)
        self._away.pop(name, None)
        if expected is None or not is_missing(expected, read_at, self._policy):
            return _Done()
        outcome = explain(missing_outcome(expected), self._events(expected.name))
        self._report(expected.name, expected.attempt, outcome, None)
        return _Done(reported=True)

    def _judge_away(self, api: KubernetesApi, pod: PodState, expected: ExpectedAttempt | None, read_at: float) -> _Done:
        """With the means of its own namespace, and as a pod of our system."""
        policy = replace(self._policy, system=pod.system)
        there = Reconciler(api, self._settings, self._reporter, self._observer, policy)
        decide = partial(decide_pod, pod, expected, read_at, self._api.clock.time(), policy)
        decision = decide()
        return _Done() if decision == KEEP else there._act(pod, expected, decision, decide)

    def _events(self, name: str, uid: str = "", kind: str = "Pod") -> list[PodEvent]:
        """An end without the words of the cluster is better than none."""
        try:
            return fetch_events(self._api, name, uid, kind)
        except ApiError as error:
            log.warning("kubernetes.no_events", extra={"kind": kind, "object_name": name, "error": str(error)})
            return []

    def _report(self, name: str, attempt: AttemptId, outcome: Outcome, return_value: str | None) -> None:
        log.warning(
            "kubernetes.unreported_end",
            extra={
                "attempt": str(attempt),
                "attempt_name": name,
                "state": outcome.state.value,
                "reason": str(outcome.reason),
                "outcome": outcome.message,
            },
        )
        self._reporter(attempt, outcome, return_value)

    def _delete(self, pod: PodState, decision: PodDecision) -> bool:
        fields = {"attempt_name": pod.name, "why": decision.why}
        try:
            self._api.delete(self._api.pods_path(pod.name), pod.uid, operation="delete_pod")
        except NotFound:
            return False
        except ApiError as error:
            log.warning("kubernetes.pod_not_deleted", extra={**fields, "error": str(error)})
            return False
        log.info("kubernetes.pod_deleted", extra=fields)
        return True
