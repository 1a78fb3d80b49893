"""Agent tokens: one JWT per attempt, HS256, ``iss`` leoflow, ``aud`` leoflow-agent, ``sub`` the task instance id.

The claim names are the agent protocol's; ``launch`` is ours and defaults to 1, so that a scheduler sharing the secret
may mint tokens of its own. There are two kinds. A **launch token** is minted before anybody knows the agent and lives
as long as its message may wait and its task may run. A **renewed token** names the holder it was given to in the claim
``holder``, proves nothing for anybody else, and lives for minutes. Both are dated by the broker's clock, which every
process here reads; a host whose own clock is wrong mints and refuses nothing by it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jwt

from leoflow_celery.clock import broker_clock
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.xcom import RETURN_VALUE, XComKey
from leoflow_celery.errors import ConfigurationError, InvalidToken

ISSUER = "leoflow"
AUDIENCE = "leoflow-agent"
_ALGORITHM = "HS256"
_MIN_SECRET_BYTES = 32
_CACHED_TOKENS = 16_384
#: Of its life, after which a renewed token is replaced: two thirds are left for heartbeats that get lost.
_RENEWAL_SHARE = 1 / 3
_REQUIRED = ("iss", "aud", "sub", "iat", "exp", "tenant_id", "dag_id", "run_id", "task_id", "try_number")


@dataclass(frozen=True, slots=True)
class AgentIdentity:
    """Who a token says the caller is."""

    attempt: AttemptId
    tenant_id: str
    dag_id: str
    run_id: str
    task_id: str
    expires_at: float
    #: The only holder a renewed token is good for; empty for a launch token.
    holder: str = ""
    #: From when on (seconds since the epoch) a holder that renews is given the next one.
    renew_at: float = 0.0

    def xcom_key(self, key: str = RETURN_VALUE, task_id: str = "") -> XComKey:
        """The key of a value in the caller's run; the caller's own task unless another is named."""
        return XComKey(self.tenant_id, self.dag_id, self.run_id, task_id or self.task_id, key or RETURN_VALUE)


def holder_name(attempt: AttemptId, session: str, *, renews: bool = False) -> str:
    """What SQL and the gateway's memory call the holder of an attempt; nobody can find the session from it.

    It is derived from both: a session says nothing about another attempt, nor about another launch of this one. An
    agent that renews its token is never the holder that it would be without: only it may use the launch token once.
    """
    text = f"{attempt.task_instance_id}\x00{attempt.try_number}\x00{attempt.launch}\x00{session}"
    hashed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{'renewing' if renews else 'agent'}:{hashed}"


def signing_secrets(text: str) -> list[str]:
    """The secrets in a setting, the one that signs first.

    A secret may hold a comma itself, as it could before there were several: a text with a part that is too short for a
    secret is one, and a text as a whole verifies too.

    Raises:
        ConfigurationError: not even the whole is long enough.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) > 1 and all(len(part.encode()) >= _MIN_SECRET_BYTES for part in parts):
        return [*parts, text]
    if len(text.encode()) < _MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"LEOFLOW_JWT_SECRET must have at least {_MIN_SECRET_BYTES} bytes, and so must each of several with commas "
            "between them, newest first; 'leoflow keys' prints a fresh one"
        )
    return [text]


class TokenIssuer:
    """Mints and verifies agent tokens with shared secrets."""

    def __init__(self, secrets: str, ttl_seconds: int, renewed_ttl_seconds: float = 900) -> None:
        """Take comma separated secrets, newest first: the first signs, each of them verifies.

        Raises:
            ConfigurationError: no secret that is long enough.
        """
        self._secrets = signing_secrets(secrets)
        self._ttl_seconds, self._renewed_ttl_seconds = ttl_seconds, renewed_ttl_seconds
        # A heartbeat costs a signature check otherwise. Expiry is checked on every call, below.
        self._decode = lru_cache(maxsize=_CACHED_TOKENS)(self._decode_uncached)

    def mint(self, request: TaskRequest, attempt: AttemptId) -> str:
        """A token for one attempt, valid for the configured lifetime on top of the task's own timeout."""
        now = int(broker_clock.time())
        times = {"iat": now, "exp": now + self._ttl_seconds + request.timeout_seconds}
        return self._sign(attempt, request.tenant_id, request.dag_id, request.run_id, request.task_id, times)

    def renew(self, identity: AgentIdentity, holder: str) -> str:
        """A short token for the same attempt that only ``holder`` can use."""
        now = round(broker_clock.time(), 3)
        bound = {"iat": now, "exp": now + self._renewed_ttl_seconds, "holder": holder}
        one = identity
        return self._sign(one.attempt, one.tenant_id, one.dag_id, one.run_id, one.task_id, bound)

    def _sign(
        self, attempt: AttemptId, tenant_id: str, dag_id: str, run_id: str, task_id: str, more: dict[str, Any]
    ) -> str:
        claims = {
            "iss": ISSUER,
            "aud": [AUDIENCE],
            "sub": attempt.task_instance_id,
            "tenant_id": tenant_id,
            "dag_id": dag_id,
            "run_id": run_id,
            "task_id": task_id,
            "try_number": attempt.try_number,
            "launch": attempt.launch,
            **more,
        }
        return jwt.encode(claims, self._secrets[0], algorithm=_ALGORITHM)

    def verify(self, token: str) -> AgentIdentity:
        """The identity a token proves.

        Raises:
            InvalidToken: reason missing, malformed, forged, foreign (issuer or audience) or expired.
        """
        if not token:
            raise InvalidToken("missing", "no agent token: send metadata 'authorization: Bearer <token>'")
        identity = self._decode(token)
        if identity.expires_at <= broker_clock.time():
            raise InvalidToken("expired", "the agent token has expired")
        return identity

    def _decode_uncached(self, token: str) -> AgentIdentity:
        try:
            claims = self._claims(token)
            holder, issued_at, expires_at = claims.get("holder", ""), float(claims["iat"]), float(claims["exp"])
            if not isinstance(holder, str) or not math.isfinite(issued_at + expires_at):
                raise InvalidToken("malformed", "the agent token's holder, iat or exp is not of its kind")
            return AgentIdentity(
                AttemptId(str(claims["sub"]), int(claims["try_number"]), int(claims.get("launch", 1))),
                str(claims["tenant_id"]),
                str(claims["dag_id"]),
                str(claims["run_id"]),
                str(claims["task_id"]),
                expires_at,
                holder,
                issued_at + (expires_at - issued_at) * _RENEWAL_SHARE if holder else 0.0,
            )
        except jwt.InvalidSignatureError as error:
            raise InvalidToken("forged", "the agent token's signature is not ours") from error
        except (jwt.InvalidAudienceError, jwt.InvalidIssuerError) as error:
            raise InvalidToken("foreign", f"the agent token is for somebody else: {error}") from error
        except (jwt.InvalidTokenError, ValueError, TypeError, OverflowError) as error:
            raise InvalidToken("malformed", f"the agent token cannot be read: {error}") from error

    def _claims(self, token: str) -> dict[str, Any]:
        # iat is not checked: a dispatcher whose clock is a second ahead would make its own tokens unusable.
        options: Any = {"require": list(_REQUIRED), "verify_exp": False, "verify_iat": False}
        *newer, oldest = self._secrets
        for secret in newer:
            try:
                return self._decoded(token, secret, options)
            except jwt.InvalidSignatureError:
                continue
        return self._decoded(token, oldest, options)

    @staticmethod
    def _decoded(token: str, secret: str, options: Any) -> dict[str, Any]:
        return dict(
            jwt.decode(token, secret, algorithms=[_ALGORITHM], audience=AUDIENCE, issuer=ISSUER, options=options)
        )
