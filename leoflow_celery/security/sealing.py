"""Sealing: whatever may hold a secret, or states a fact, travels and rests encrypted and authenticated.

Fernet gives confidentiality and integrity. Every scope has a key of its own, derived from the master keys with HKDF
(RFC 5869): a launch worker is given the key of its queue and can read and state nothing else. MultiFernet gives
rotation: the first master key seals, every one opens.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import zlib
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from leoflow_celery.errors import ConfigurationError, DecryptionFailed

_KEY_BYTES = 32
_INFO = "leoflow/seal/1/"
#: Smaller content costs more to compress than to send.
_COMPRESS_FROM_BYTES = 4096
_COMPRESSED = b"z"
#: What a sealed object may unpack to: a reconcile of 100,000 attempts has a fifth of it.
_MAX_OBJECT_BYTES = 64 * 1024 * 1024


def fresh_keys() -> dict[str, str]:
    """A new pair of keys under the names of their settings."""
    return {"LEOFLOW_JWT_SECRET": secrets.token_urlsafe(48), "LEOFLOW_SEAL_KEYS": Fernet.generate_key().decode("ascii")}


class Scope(StrEnum):
    """Who shares a key. The scopes of launch workers are named like their queues."""

    KUBERNETES = "k8s"
    DOCKER = "docker"
    SUBPROCESS = "subprocess"
    #: Publishers that seal what they dispatch.
    DISPATCH = "dispatch"
    #: Who may have any try cancelled, and nothing else: Flower, say.
    CANCEL = "cancel"
    #: What the processes of the control plane tell each other.
    CONTROL = "control"
    #: Requests as they rest in SQL.
    REQUEST = "request"


class Sealer:
    """Seals JSON objects of one scope to text and opens them again."""

    def __init__(self, keys: Sequence[str], scope: str = "") -> None:
        """Take Fernet keys, newest first."""
        self._fernet, self._scope = MultiFernet([Fernet(key) for key in keys]), scope

    def seal(self, value: dict[str, Any]) -> str:
        """A JSON object as text that only a holder of the keys can read or make."""
        return self.seal_json(json.dumps(value, separators=(",", ":")).encode())

    def seal_json(self, content: bytes) -> str:
        """The same of an object that is JSON text already."""
        if len(content) >= _COMPRESS_FROM_BYTES:
            content = _COMPRESSED + zlib.compress(content, 1)
        return self.seal_bytes(content)

    def seal_bytes(self, value: bytes) -> str:
        return self._fernet.encrypt(value).decode("ascii")

    def open(self, sealed: str) -> dict[str, Any]:
        """The object again.

        Raises:
            DecryptionFailed: the payload was made with another key, was changed on the way or is not a JSON object.
        """
        try:
            value = json.loads(_unpacked(self.open_bytes(sealed)))
        except (ValueError, RecursionError, zlib.error) as error:
            raise DecryptionFailed("a sealed payload is not a JSON object") from error
        if not isinstance(value, dict):
            raise DecryptionFailed("a sealed payload is not a JSON object")
        return value

    def open_bytes(self, sealed: str) -> bytes:
        """The bytes again.

        Raises:
            DecryptionFailed: the payload was made with another key or was changed on the way.
        """
        try:
            return self._fernet.decrypt(sealed.encode("ascii", "replace"))
        except InvalidToken as error:
            scope = f" for {str(self._scope)!r}" if self._scope else ""
            raise DecryptionFailed(
                f"a sealed payload cannot be opened with the keys{scope} of this process (LEOFLOW_SEAL_KEYS); "
                "it was sealed with another key or changed on the way"
            ) from error


def _unpacked(content: bytes) -> bytes:
    if not content.startswith(_COMPRESSED):
        return content
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(content[len(_COMPRESSED) :], _MAX_OBJECT_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError(f"more than {_MAX_OBJECT_BYTES} bytes")
    return unpacked


class KeyRing:
    """The keys that a process holds: all of them (master keys), or those of single scopes.

    Thread-safe: a sealer that two threads make at once is the same twice.
    """

    def __init__(self, text: str) -> None:
        """Take LEOFLOW_SEAL_KEYS: comma separated, newest first; each a Fernet key (a master key) or ``SCOPE:KEY``.

        Raises:
            ConfigurationError: no key, or one that is not a Fernet key.
        """
        entries = [entry.strip().rpartition(":") for entry in text.split(",") if entry.strip()]
        if not entries:
            raise ConfigurationError("LEOFLOW_SEAL_KEYS is empty; 'leoflow keys' prints a fresh key for it")
        for _, _, key in entries:
            _key_bytes(key)
        self._masters = [key for scope, _, key in entries if not scope]
        self._given: dict[str, list[str]] = {}
        for scope, _, key in entries:
            if scope:
                self._given.setdefault(scope, []).append(key)
        self._sealers: dict[str, Sealer] = {}

    def keys(self, scope: str) -> list[str]:
        """The Fernet keys of a scope, newest first: derived from the master keys, then those given.

        Raises:
            ConfigurationError: the process holds none.
        """
        found = [derived_key(master, scope) for master in self._masters] + self._given.get(scope, [])
        if not found:
            raise ConfigurationError(
                f"LEOFLOW_SEAL_KEYS holds no key for {str(scope)!r}; 'leoflow keys --for {scope}' prints it where the "
                "master key is"
            )
        return found

    def sealer(self, scope: str) -> Sealer:
        """What seals and opens for a scope.

        Raises:
            ConfigurationError: the process holds no key of the scope.
        """
        if scope not in self._sealers:
            keys = self.keys(scope)
            if scope == Scope.REQUEST:
                # Rows of a version before scopes were sealed with the master key itself.
                keys = [*keys, *self._masters]
            self._sealers[scope] = Sealer(keys, scope)
        return self._sealers[scope]


def derived_key(master: str, scope: str) -> str:
    """The Fernet key of a scope: HKDF-SHA256 of the master key without salt, info ``leoflow/seal/1/<scope>``."""
    derivation = HKDF(SHA256(), _KEY_BYTES, salt=None, info=f"{_INFO}{scope}".encode())
    return base64.urlsafe_b64encode(derivation.derive(_key_bytes(master))).decode("ascii")


def _key_bytes(key: str) -> bytes:
    try:
        found = base64.urlsafe_b64decode(key.encode("ascii"))
    except (ValueError, binascii.Error):
        found = b""
    if len(found) != _KEY_BYTES:
        raise ConfigurationError(
            "LEOFLOW_SEAL_KEYS holds something that is not a Fernet key; 'leoflow keys' prints a fresh one"
        )
    return found
