"""Where the API server is and as whom we speak to it: the configuration loading of the ``kubernetes`` package.

Only its loading is used (service account, kubeconfig, exec and OIDC plugins, proxies, CA); our calls carry raw JSON.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TypeVar

import urllib3
from kubernetes.client import Configuration
from kubernetes.client.rest import RESTClientObject
from kubernetes.config import ConfigException, list_kube_config_contexts, load_incluster_config, load_kube_config
from kubernetes.config.incluster_config import SERVICE_TOKEN_FILENAME
from yaml import YAMLError

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.kubernetes.errors import Unreachable
from leoflow_celery.settings import KubernetesSettings

log = logging.getLogger(__name__)

#: The package sets its whole configuration again for each token it is asked for. It renews one minutes before its end.
_SAME_TOKEN_SECONDS = 5.0
#: What a command that was killed takes to be gone.
_END_SECONDS = 2.0
Answer = TypeVar("Answer")
_NAMESPACE_FILE = Path(SERVICE_TOKEN_FILENAME).with_name("namespace")


class Connection:
    """One loaded configuration: host, connection pool, namespace and current credentials. Thread-safe."""

    def __init__(self, settings: KubernetesSettings, pool_size: int) -> None:
        """Raises ConfigurationError when there is no usable configuration, Unreachable when its plugin hangs."""
        self._limit_seconds = settings.credential_timeout_seconds
        self._configuration, self.namespace = _within(self._limit_seconds, lambda: _load(settings))
        self._configuration.connection_pool_maxsize = pool_size
        self._configuration.retries = False
        self._configuration.keep_alive = True
        if not self._configuration.verify_ssl:
            log.warning("kubernetes.tls_not_verified", extra={"server": self.host})
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # which comes with every call
        self._lock = threading.Lock()
        self._token, self._token_until = "", 0.0
        self._hanging_until = 0.0
        self.pool: urllib3.PoolManager = RESTClientObject(self._configuration).pool_manager

    @property
    def host(self) -> str:
        """The API server's URL."""
        return self._configuration.host.rstrip("/")

    def credentials(self) -> dict[str, str]:
        """The header that says who we are; renews a token that is about to expire.

        Raises:
            Unreachable: there is none just now; the same call may work later.
        """
        try:
            with self._lock:  # a plugin that fetches a new token runs once, not once per thread
                if not self._token or time.monotonic() >= self._token_until:
                    self._token = self._renewed()
                    self._token_until = time.monotonic() + _SAME_TOKEN_SECONDS
                token = self._token
        except (ConfigException, OSError, ValueError) as error:
            raise Unreachable("unauthorized", f"no credentials for {self.host}: {error}") from error
        return {"Authorization": token} if token else {}

    def _renewed(self) -> str:
        """The token of now. Whoever waited while a plugin hung does not wait for the next try as well."""
        if time.monotonic() < self._hanging_until:
            raise Unreachable(
                "unauthorized", f"no credentials for {self.host}: its credential plugin hung a moment ago"
            )
        try:
            token = _within(self._limit_seconds, lambda: self._configuration.get_api_key_with_prefix("BearerToken"))
        except Unreachable:
            self._hanging_until = time.monotonic() + _SAME_TOKEN_SECONDS
            raise
        return str(token or "")

    def close(self) -> None:
        self.pool.clear()


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """What ``ask`` returns or raises, in a thread of its own: a credential plugin is a command that may hang.

    The package waits for it without a limit, and hides it: what runs too long is found as a child of the thread.

    Raises:
        Unreachable: it took longer; what it had started was ended.
    """
    outcome: Future[Answer] = Future()

    def run() -> None:
        try:
            outcome.set_result(ask())
        except Exception as error:  # noqa: BLE001 - for whoever waits
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="leoflow-credentials", daemon=True)
    thread.start()
    try:
        return outcome.result(seconds)
    except FutureTimeout:
        # The thread may have been done in this very moment.
        if outcome.done():
            return outcome.result()
        _end_children(thread.native_id or 0)
        thread.join(_END_SECONDS)
        raise Unreachable(
            "unauthorized",
            f"the credential plugin of the kubeconfig did not answer within {seconds:g} s and was ended "
            "(LEOFLOW_KUBERNETES_CREDENTIAL_TIMEOUT_SECONDS)",
        ) from None


def _end_children(thread_id: int) -> None:
    """Kill what a thread of ours started, and what that started. Where the system does not tell, it is left alone."""
    found = _children(Path(f"/proc/self/task/{thread_id}/children"))
    for pid in found:  # grows while it is read
        for threads in Path(f"/proc/{pid}/task").glob("*/children"):
            found += _children(threads)
    for pid in found:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _children(path: Path) -> list[int]:
    try:
        return [int(pid) for pid in path.read_text().split()]
    except OSError:
        return []


def _load(settings: KubernetesSettings) -> tuple[Configuration, str]:
    """The configuration and the namespace: the settings', else that of the service account or the context."""
    configuration = Configuration()
    if settings.kubeconfig is None and not settings.context:
        try:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        except ConfigException:
            pass  # not in a pod, or in one without a service account
        else:
            return configuration, settings.namespace or _NAMESPACE_FILE.read_text().strip()
    path = str(settings.kubeconfig) if settings.kubeconfig else None
    try:
        load_kube_config(path, settings.context or None, client_configuration=configuration)  # type: ignore[no-untyped-call]
        contexts, active = list_kube_config_contexts(path)  # type: ignore[no-untyped-call]
    except (ConfigException, OSError, ValueError, TypeError, KeyError, YAMLError) as error:
        what = f"LEOFLOW_KUBERNETES_KUBECONFIG={path}" if path else "no service account here, and no usable kubeconfig"
        raise ConfigurationError(
            f"{what}: {error}; name a kubeconfig, or run in a pod with a service account"
        ) from error
    context = next((one for one in contexts if one["name"] == settings.context), active)
    return configuration, settings.namespace or context["context"].get("namespace") or "default"
