"""The last lines that a pod's container printed, for an end that its agent could not report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.errors import ApiError
from leoflow_celery.executors.kubernetes.parse_pod import PodState

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
