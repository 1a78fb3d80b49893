"""Where the API server is and as whom we speak to it: the configuration loading of the ``kubernetes`` package.

Only its loading is used (service account, kubeconfig, exec and OIDC plugins, proxies, CA); our calls carry raw JSON.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

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
_NAMESPACE_FILE = Path(SERVICE_TOKEN_FILENAME).with_name("namespace")


class Connection:
    """One loaded configuration: host, connection pool, namespace and current credentials. Thread-safe."""

    def __init__(self, settings: KubernetesSettings, pool_size: int) -> None:
        """Raises ConfigurationError when there is no usable configuration."""
        self._configuration, self.namespace = _load(settings)
        self._configuration.connection_pool_maxsize = pool_size
        self._configuration.retries = False
        self._configuration.keep_alive = True
        if not self._configuration.verify_ssl:
            log.warning("kubernetes.tls_not_verified", extra={"server": self.host})
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # which comes with every call
        self._lock = threading.Lock()
        self._token, self._token_until = "", 0.0
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
                    self._token = self._configuration.get_api_key_with_prefix("BearerToken") or ""
                    self._token_until = time.monotonic() + _SAME_TOKEN_SECONDS
                token = self._token
        except (ConfigException, OSError, ValueError) as error:
            raise Unreachable("unauthorized", f"no credentials for {self.host}: {error}") from error
        return {"Authorization": token} if token else {}

    def close(self) -> None:
        self.pool.clear()


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
