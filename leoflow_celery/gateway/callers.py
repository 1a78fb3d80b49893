"""Who calls: the token says which attempt, the session which holder of it.

Agents of ours choose a session and send it with every call. Other agents do not; they get a holder at Register that is
remembered with their connection, and found again in the row after a gateway restart or a reconnect.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.errors import InvalidToken
from leoflow_celery.gateway.recent import Recent
from leoflow_celery.gateway.refusals import InvalidArgument
from leoflow_celery.protocol.service import AUTHORIZATION_KEY, REASON_KEY, SESSION_KEY
from leoflow_celery.security import AgentIdentity, TokenIssuer
from leoflow_celery.store.claims import Claim

FOREIGN_PREFIX = "foreign:"
_BEARER = "bearer "
_MAX_SESSION_CHARACTERS = 200
_MAX_NUMBER = 1_000_000


@dataclass(frozen=True, slots=True)
class Caller:
    """One caller of one call. ``holder`` is empty for an agent without a session that is not known yet."""

    identity: AgentIdentity
    holder: str
    peer: Callable[[], str]
    reason: str = ""

    @property
    def attempt(self) -> AttemptId:
        return self.identity.attempt

    def held_by(self, holder: str) -> Caller:
        return replace(self, holder=holder)


class Authenticator:
    """Reads a call's metadata."""

    def __init__(self, tokens: TokenIssuer) -> None:
        self._tokens = tokens
        self._checked: Recent[AgentIdentity, bool] = Recent(16_384)

    def __call__(self, metadata: Iterable[tuple[str, str | bytes]] | None, peer: Callable[[], str]) -> Caller:
        """The caller.

        Raises:
            InvalidToken: no acceptable token.
            InvalidArgument: a session that cannot be a holder's name.
        """
        values = {key: value for key, value in metadata or () if isinstance(value, str)}
        identity = self._tokens.verify(_bearer(values.get(AUTHORIZATION_KEY, "")))
        if self._checked.get(identity) is None:
            check_identity(identity)
            self._checked.set(identity, True)
        session = values.get(SESSION_KEY, "")
        if session:
            _check_session(session)
        return Caller(identity, session, peer, values.get(REASON_KEY, ""))


def _bearer(header: str) -> str:
    if not header:
        return ""
    if not header[: len(_BEARER)].lower() == _BEARER:
        raise InvalidToken("malformed", "metadata 'authorization' must be 'Bearer <token>'")
    return header[len(_BEARER) :].strip()


def check_identity(identity: AgentIdentity) -> None:
    """Refuse ids that no database could hold: one of them would fail a whole batch of heartbeats.

    Raises:
        InvalidToken: the claim is named.
    """
    attempt = identity.attempt
    names = ("tenant_id", "dag_id", "run_id", "task_id")
    texts = {"sub": attempt.task_instance_id} | {name: getattr(identity, name) for name in names}
    for name, text in texts.items():
        if not text or "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidToken("malformed", f"the agent token's {name} is empty or holds characters no id may hold")
    if not (1 <= attempt.try_number <= _MAX_NUMBER and 1 <= attempt.launch <= _MAX_NUMBER):
        raise InvalidToken("malformed", f"the agent token's try_number or launch is not in 1..{_MAX_NUMBER}")


def _check_session(session: str) -> None:
    if len(session) > _MAX_SESSION_CHARACTERS or session.startswith(FOREIGN_PREFIX):
        raise InvalidArgument(
            f"metadata {SESSION_KEY!r} must have at most {_MAX_SESSION_CHARACTERS} characters and not start with "
            f"{FOREIGN_PREFIX!r}; choose a random hex text per agent process"
        )


class ForeignHolders:
    """Holders of agents that send no session, by attempt and connection."""

    def __init__(self) -> None:
        self._by_peer: Recent[tuple[AttemptId, str], str] = Recent()

    def known(self, caller: Caller) -> str:
        """The holder of this attempt that this connection registered as, or empty."""
        return self._by_peer.get((caller.attempt, caller.peer())) or ""

    def register(self, caller: Caller) -> str:
        """The holder to claim with: the same one for a repeated Register on one connection, else a new one."""
        holder = self.known(caller) or f"{FOREIGN_PREFIX}{uuid.uuid4().hex}"
        self._remember(caller, holder)
        return holder

    def forget(self, caller: Caller) -> None:
        self._by_peer.pop((caller.attempt, caller.peer()))

    def recover(self, caller: Caller, claim: Claim | None) -> str:
        """The holder that the row names, for a connection we do not know: a restart or reconnect lies between."""
        if claim is None or claim.attempt != caller.attempt or not (claim.holder or "").startswith(FOREIGN_PREFIX):
            return ""
        self._remember(caller, claim.holder or "")
        return claim.holder or ""

    def _remember(self, caller: Caller, holder: str) -> None:
        peer = caller.peer()
        # All clients of a unix socket have one name; to remember it would make them all the same holder.
        if not peer.startswith("unix:"):
            self._by_peer.set((caller.attempt, peer), holder)
