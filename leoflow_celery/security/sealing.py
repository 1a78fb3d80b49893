"""Sealing: whatever may hold a secret travels and rests encrypted.

Fernet gives confidentiality and integrity; MultiFernet gives rotation: the first key seals, every key opens.
"""

from __future__ import annotations

import json
from typing import Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from leoflow_celery.errors import ConfigurationError, Unsealable


class Sealer:
    """Seals JSON objects to text and opens them again."""

    def __init__(self, keys: str) -> None:
        """Take comma separated Fernet keys, newest first.

        Raises:
            ConfigurationError: no key, or one that is no Fernet key.
        """
        names = [key.strip() for key in keys.split(",") if key.strip()]
        if not names:
            raise ConfigurationError("LEOFLOW_SEAL_KEYS is empty; 'leoflow keys' prints a fresh key for it")
        try:
            self._fernet = MultiFernet([Fernet(name) for name in names])
        except ValueError as error:
            raise ConfigurationError(
                "LEOFLOW_SEAL_KEYS holds something that is no Fernet key; 'leoflow keys' prints a fresh one"
            ) from error

    def seal(self, value: dict[str, Any]) -> str:
        """A JSON object as text that only a holder of the keys can read or make."""
        return self.seal_bytes(json.dumps(value, separators=(",", ":")).encode())

    def seal_bytes(self, value: bytes) -> str:
        return self._fernet.encrypt(value).decode("ascii")

    def open(self, sealed: str) -> dict[str, Any]:
        """The object again.

        Raises:
            Unsealable: the payload was made with another key, or was changed on the way.
        """
        try:
            value = json.loads(self.open_bytes(sealed))
        except ValueError as error:
            raise Unsealable("a sealed payload is not a JSON object") from error
        if not isinstance(value, dict):
            raise Unsealable("a sealed payload is not a JSON object")
        return value

    def open_bytes(self, sealed: str) -> bytes:
        try:
            return self._fernet.decrypt(sealed.encode("ascii", "replace"))
        except InvalidToken as error:
            raise Unsealable(
                "a sealed payload cannot be opened with LEOFLOW_SEAL_KEYS of this process; "
                "it was sealed with another key or changed on the way"
            ) from error
