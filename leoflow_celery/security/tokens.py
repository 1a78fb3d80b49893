"""Agent tokens: one JWT per attempt, HS256, ``iss`` leoflow, ``aud`` leoflow-agent, ``sub`` the task instance id.

The claim names are the agent protocol's; ``launch`` is ours and defaults to 1, so that a scheduler sharing the secret
may mint tokens of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jwt

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.xcom import RETURN_VALUE, XComKey
from leoflow_celery.errors import ConfigurationError, InvalidToken

ISSUER = "leoflow"
AUDIENCE = "leoflow-agent"
_ALGORITHM = "HS256"
_MIN_SECRET_BYTES = 32
_CACHED_TOKENS = 16_384
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

    def xcom_key(self, key: str = RETURN_VALUE, task_id: str = "") -> XComKey:
        """The key of a value in the caller's run; the caller's own task unless another is named."""
        return XComKey(self.tenant_id, self.dag_id, self.run_id, task_id or self.task_id, key or RETURN_VALUE)


class TokenIssuer:
    """Mints and verifies agent tokens with one shared secret."""

    def __init__(self, secret: str, ttl_seconds: int) -> None:
        if len(secret.encode()) < _MIN_SECRET_BYTES:
            raise ConfigurationError(
                f"LEOFLOW_JWT_SECRET must have at least {_MIN_SECRET_BYTES} bytes; 'leoflow keys' prints a fresh one"
            )
        self._secret = secret
        self._ttl_seconds = ttl_seconds
        # A heartbeat costs a signature check otherwise. Expiry is checked on every call, below.
        self._decode = lru_cache(maxsize=_CACHED_TOKENS)(self._decode_uncached)

    def mint(self, request: TaskRequest, attempt: AttemptId) -> str:
        """A token for one attempt, valid for the configured lifetime on top of the task's own timeout."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": [AUDIENCE],
            "sub": attempt.task_instance_id,
            "tenant_id": request.tenant_id,
            "dag_id": request.dag_id,
            "run_id": request.run_id,
            "task_id": request.task_id,
            "try_number": attempt.try_number,
            "launch": attempt.launch,
            "iat": now,
            "exp": now + self._ttl_seconds + request.timeout_seconds,
        }
        return jwt.encode(claims, self._secret, algorithm=_ALGORITHM)

    def verify(self, token: str) -> AgentIdentity:
        """The identity a token proves.

        Raises:
            InvalidToken: reason missing, malformed, forged, foreign (issuer or audience) or expired.
        """
        if not token:
            raise InvalidToken("missing", "no agent token: send metadata 'authorization: Bearer <token>'")
        identity = self._decode(token)
        if identity.expires_at <= time.time():
            raise InvalidToken("expired", "the agent token has expired")
        return identity

    def _decode_uncached(self, token: str) -> AgentIdentity:
        # iat is not checked: a dispatcher whose clock is a second ahead would make its own tokens unusable.
        options: Any = {"require": list(_REQUIRED), "verify_exp": False, "verify_iat": False}
        try:
            claims = jwt.decode(
                token, self._secret, algorithms=[_ALGORITHM], audience=AUDIENCE, issuer=ISSUER, options=options
            )
            return AgentIdentity(
                AttemptId(str(claims["sub"]), int(claims["try_number"]), int(claims.get("launch", 1))),
                str(claims["tenant_id"]),
                str(claims["dag_id"]),
                str(claims["run_id"]),
                str(claims["task_id"]),
                float(claims["exp"]),
            )
        except jwt.InvalidSignatureError as error:
            raise InvalidToken("forged", "the agent token's signature is not ours") from error
        except (jwt.InvalidAudienceError, jwt.InvalidIssuerError) as error:
            raise InvalidToken("foreign", f"the agent token is for somebody else: {error}") from error
        except (jwt.InvalidTokenError, ValueError, TypeError, OverflowError) as error:
            raise InvalidToken("malformed", f"the agent token cannot be read: {error}") from error
