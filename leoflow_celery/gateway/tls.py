"""Server credentials from files, read again when they changed: certificates are renewed without a restart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc

from leoflow_celery.errors import ConfigurationError

log = logging.getLogger(__name__)


class Certificate:
    """A certificate chain and its key, on disk."""

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._served: tuple[bytes, bytes] = (b"", b"")

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files.

        Raises:
            ConfigurationError: a file cannot be read, or holds no PEM.
        """
        self._served = self._read()
        # The stubs do not know that None keeps what is served.
        fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._changed)
        return grpc.dynamic_ssl_server_credentials(_configuration(self._served), fetcher)

    def _read(self) -> tuple[bytes, bytes]:
        pairs = (("LEOFLOW_GATEWAY_TLS_CERT", self._cert), ("LEOFLOW_GATEWAY_TLS_KEY", self._key))
        found = []
        for setting, path in pairs:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ConfigurationError(f"{setting}={path}: {error.strerror}") from error
            if b"-----BEGIN " not in content:
                raise ConfigurationError(f"{setting}={path} holds no PEM block")
            found.append(content)
        return found[0], found[1]

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        # Called by grpc for every new connection; None keeps what is served.
        try:
            now = self._read()
        except ConfigurationError as error:
            log.warning("the TLS files cannot be read, the certificate read before is served: %s", error)
            return None
        if now == self._served:
            return None
        self._served = now
        return _configuration(now)


def _configuration(pair: tuple[bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    cert, key = pair
    return grpc.ssl_server_certificate_configuration([(key, cert)])
