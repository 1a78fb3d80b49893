"""Who calls, whom SQL lets write, and what this process remembers of both.

A token says which attempt, a session which agent of it. From the two comes the *holder* (``security.holder_name``): the
only word of it that goes on from here, so that everything kept by holder is kept by attempt and session, and a session
that somebody learns opens nothing of another attempt.

Agents of ours choose a session and send it with every call. Other agents send none: each is known by the connection
that registered, and its holder's name says which gateway granted it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from leoflow_celery import metrics
from leoflow_celery.domain.attempt import MAX_NUMBER, AttemptId
from leoflow_celery.domain.reap import may_judge_silence
from leoflow_celery.errors import Fenced, GatewayUnavailable, InvalidToken
from leoflow_celery.gateway.rpc import InvalidArgument
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.protocol.service import (
    AUTHORIZATION_KEY,
    CAPABILITIES_KEY,
    REASON_KEY,
    RENEWS_TOKEN,
    SESSION_KEY,
)
from leoflow_celery.security import AgentIdentity, TokenIssuer, holder_name
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import Beat
from leoflow_celery.store.claims import Claim
from leoflow_celery.store.logs import LogKey

FOREIGN_PREFIX = "foreign:"
_BEARER = "bearer "
_MAX_SESSION_CHARACTERS = 200

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The last ``limit`` entries that were set: memory of callers must not grow with their number.

    What is forgotten can be found in SQL again.
    """

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        return self._entries.get(key)

    def set(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def pop(self, key: K) -> V | None:
        return self._entries.pop(key, None)


# -- who calls --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Caller:
    """One caller of one call. ``holder`` is empty for an agent without a session that is not known yet."""

    identity: AgentIdentity
    holder: str
    peer: Callable[[], str]
    reason: str = ""
    #: It uses the tokens that we give it.
    renews: bool = False
    #: What it sent, to be told nobody else.
    session: str = field(default="", repr=False)

    @property
    def attempt(self) -> AttemptId:
        return self.identity.attempt

    @property
    def log_key(self) -> LogKey:
        """Where its log is."""
        one = self.identity
        return LogKey(one.tenant_id, one.dag_id, one.run_id, one.task_id, one.attempt.try_number)

    def held_by(self, holder: str) -> Caller:
        return replace(self, holder=holder)


class Authenticator:
    """Reads a call's metadata."""

    def __init__(self, tokens: TokenIssuer) -> None:
        self._tokens = tokens
        self._checked: Recent[AgentIdentity, bool] = Recent(16_384)

    def __call__(
        self, metadata: Iterable[tuple[str, str | bytes]] | None, peer: Callable[[], str], method: str
    ) -> Caller:
        """The caller of ``method``.

        Raises:
            InvalidToken: no acceptable token, or one that this caller may not use for this method.
            InvalidArgument: a session that cannot be one.
        """
        values = {key: value for key, value in metadata or () if isinstance(value, str)}
        identity = self._tokens.verify(_bearer(values.get(AUTHORIZATION_KEY, "")))
        if self._checked.get(identity) is None:
            check_identity(identity)
            self._checked.set(identity, True)
        session, holder, renews = values.get(SESSION_KEY, ""), "", False
        if session:
            _check_session(session)
            renews = RENEWS_TOKEN in (word.strip() for word in values.get(CAPABILITIES_KEY, "").split(","))
            holder = holder_name(identity.attempt, session, renews=renews)
        check_use(identity, holder, renews, method)
        return Caller(identity, holder, peer, values.get(REASON_KEY, ""), renews, session)


def check_use(identity: AgentIdentity, holder: str, renews: bool, method: str) -> None:
    """Refuse a token in the wrong hands, or for a method it is not for.

    An agent that renews gets its first renewed token from Register, so whoever knows the token it was launched with
    (from a pod's Secret, say) can do nothing with it but register, which a live holder refuses.

    Raises:
        InvalidToken: bound, or launch.
    """
    if identity.holder:
        if identity.holder != holder:
            raise InvalidToken("bound", "the agent token was renewed for another session, or for an agent that renews")
    elif renews and method != "Register":
        raise InvalidToken("launch", "this token is for Register only: use the one that Register answered with")


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
    if not (1 <= attempt.try_number <= MAX_NUMBER and 1 <= attempt.launch <= MAX_NUMBER):
        raise InvalidToken("malformed", f"the agent token's try_number or launch is not in 1..{MAX_NUMBER}")


def _check_session(session: str) -> None:
    if len(session) > _MAX_SESSION_CHARACTERS or session.startswith(FOREIGN_PREFIX):
        raise InvalidArgument(
            f"metadata {SESSION_KEY!r} must have at most {_MAX_SESSION_CHARACTERS} characters and not start with "
            f"{FOREIGN_PREFIX!r}; choose a random hex text per agent process"
        )


class ForeignHolders:
    """Holders of agents that send no session, by attempt and connection.

    One of them is one connection. Another connection may follow once that one is known to be gone (``Claims``): SQL
    then renames the holder, so that of two new connections only one follows and the old one has lost it.
    """

    def __init__(self) -> None:
        #: This gateway, in the name of every holder that it grants.
        self.gateway = uuid.uuid4().hex[:12]
        self._by_peer: Recent[tuple[AttemptId, str], str] = Recent()
        self._lost: Recent[str, bool] = Recent()
        #: Why the return value of a holder was refused: it cannot say so when it reports the failure.
        self.refused_values: Recent[str, str] = Recent(4_096)
        #: Why a holder's task skipped itself: it cannot say so when it reports success.
        self.skipped: Recent[str, str] = Recent(4_096)

    def known(self, caller: Caller) -> str:
        """The holder of this attempt that this connection registered as, or empty."""
        holder = self._by_peer.get((caller.attempt, caller.peer())) or ""
        if holder:
            self._lost.pop(holder)
        return holder

    def register(self, caller: Caller) -> str:
        """The holder to claim with: the same one for a repeated Register on one connection, else a new one."""
        return self.known(caller) or self.follow(caller)

    def follow(self, caller: Caller) -> str:
        """A new holder, which this connection is from now on."""
        holder = f"{FOREIGN_PREFIX}{self.gateway}:{uuid.uuid4().hex}"
        peer = caller.peer()
        # All clients of a unix socket have one name; to remember it would make them all the same holder.
        if not peer.startswith("unix:"):
            self._by_peer.set((caller.attempt, peer), holder)
        return holder

    def forget(self, caller: Caller) -> None:
        self._by_peer.pop((caller.attempt, caller.peer()))

    @staticmethod
    def is_one(holder: str) -> bool:
        return holder.startswith(FOREIGN_PREFIX)

    def lose(self, holder: str) -> None:
        """The holder's log stream broke off: so did its connection, until it calls again."""
        self._lost.set(holder, True)

    def is_lost(self, holder: str) -> bool:
        return self._lost.get(holder) is not None


# -- what SQL says of a caller -----------------------------------------------------------------------------------------


class Standing(StrEnum):
    """What a caller is to its attempt. ``OVER``: nobody may do anything any more."""

    HOLDER = "holder"
    #: The last holder, moments after the end.
    ENDED = "ended"
    #: Nobody holds it yet.
    UNCLAIMED = "unclaimed"
    #: Somebody else holds it who fell silent, and may be replaced.
    REPLACEABLE = "replaceable"
    FENCED = "fenced"
    OVER = "over"


def standing_of(claim: Claim | None, attempt: AttemptId, holder: str, ended_access_seconds: float) -> Standing:
    """What ``holder`` is to the attempt; it is empty for an agent without a session that is not known."""
    if claim is None or claim.attempt.launch < attempt.launch:
        return Standing.UNCLAIMED
    if claim.ended_seconds is not None and claim.ended_seconds >= ended_access_seconds:
        return Standing.OVER
    if claim.attempt.launch > attempt.launch:
        return Standing.FENCED
    if holder and claim.holder == holder:
        return Standing.HOLDER if claim.ended_seconds is None else Standing.ENDED
    if claim.ended_seconds is not None:
        return Standing.FENCED
    if claim.holder is None:
        return Standing.UNCLAIMED
    return Standing.FENCED if (claim.lease_left_seconds or 0) > 0 else Standing.REPLACEABLE


class Claims:
    """Finds holders and asks SQL what they are."""

    def __init__(
        self,
        store: Store,
        foreign: ForeignHolders,
        registry: HolderRegistry,
        threads: Threads,
        *,
        lease_seconds: float,
        ended_access_seconds: float,
    ) -> None:
        self._store, self._foreign, self._registry, self._threads = store, foreign, registry, threads
        self._lease_seconds, self._ended_access_seconds = lease_seconds, ended_access_seconds

    async def of(self, caller: Caller) -> Claim | None:
        """The claim on the caller's try."""
        attempt = caller.attempt
        return await self._threads.store(self._store.claims.claim, attempt.task_instance_id, attempt.try_number)

    async def standing(self, caller: Caller) -> Standing:
        """What the caller is to its attempt now."""
        return standing_of(await self.of(caller), caller.attempt, caller.holder, self._ended_access_seconds)

    async def require(self, caller: Caller) -> None:
        """Refuse whoever does not hold the attempt now.

        Raises:
            Fenced: the attempt has ended, or another launch or holder took over.
        """
        caller = await self.identify(caller)
        if not caller.holder or await self.standing(caller) is not Standing.HOLDER:
            metrics.record_fenced("read")
            raise Fenced(f"attempt {caller.attempt} is not held by the caller (any more)")

    async def refuse_after_the_end(self, caller: Caller) -> Standing:
        """What the caller is, unless the attempt ended long ago.

        Raises:
            Fenced: it did.
        """
        if (found := await self.standing(caller)) is Standing.OVER:
            raise over(caller)
        return found

    async def identify(self, caller: Caller) -> Caller:
        """The caller with its holder; still without one when nobody without a session holds the attempt.

        Raises:
            GatewayUnavailable: an agent without a session holds it, and its connection is not known to be gone.
        """
        if caller.holder:
            return caller
        if known := self._foreign.known(caller):
            return caller.held_by(known)
        claim = await self.of(caller)
        if claim is None or claim.attempt != caller.attempt or claim.ended_seconds is not None:
            return caller
        if not (claim.holder or "").startswith(FOREIGN_PREFIX):
            return caller
        return caller.held_by(await self._followed(caller, claim))

    async def _followed(self, caller: Caller, claim: Claim) -> str:
        """The holder that goes on where one without a session lost its connection."""
        before = claim.holder or ""
        if caller.peer().startswith("unix:"):
            return before  # whoever may open the socket: its connections cannot be told apart
        if await self._is_gone(claim):
            after = self._foreign.follow(caller)
            if await self._threads.store(self._store.claims.hand_over, caller.attempt, before, after):
                self._registry.stop(before, Stop.FENCED)
                self._registry.grant(after, caller.attempt)
                return after
            self._foreign.forget(caller)
        raise GatewayUnavailable(
            f"attempt {caller.attempt} is held through another connection; whoever lost it can go on when it has been "
            f"silent for {self._lease_seconds / 3:.0f} s"
        )

    async def _is_gone(self, claim: Claim) -> bool:
        """Whether a holder without a session lost its connection: it broke, its gateway ended, or it is silent."""
        present = await self._threads.store(self._store.presence.gateways)
        silent_seconds = self._lease_seconds - (claim.lease_left_seconds or 0)
        # After an outage of the database or of all gateways everybody seems silent.
        if silent_seconds >= self._lease_seconds / 3 and may_judge_silence(present.get(""), self._lease_seconds):
            return True
        holder = claim.holder or ""
        gateway = holder.removeprefix(FOREIGN_PREFIX).rpartition(":")[0]
        if gateway == self._foreign.gateway:
            return self._foreign.is_lost(holder)
        return gateway not in present


def over(caller: Caller) -> Fenced:
    """The refusal of a token whose attempt ended long ago."""
    metrics.record_fenced("over")
    return Fenced(f"attempt {caller.attempt} is over, and its token opens nothing any more")


# -- what this process remembers ---------------------------------------------------------------------------------------


class Stop(StrEnum):
    """Why a holder must stop. A cancelled one keeps its claim until it has reported; an ended one has reported."""

    FENCED = "fenced"
    CANCELLED = "cancelled"
    ENDED = "ended"


class Stoppable(Protocol):
    """An open log stream."""

    @property
    def beat(self) -> Beat: ...

    def stop(self, why: Stop) -> None: ...


class HolderRegistry:
    """The holders this gateway has heard of: who holds, who must stop, whose log streams are open.

    Memory only, and on the event loop only: SQL decides, and everything here can be lost with the process.
    """

    def __init__(self) -> None:
        #: Since when SQL was not asked (monotonic).
        self._granted: Recent[str, float] = Recent()
        #: SQL does not answer: what was known before holds on.
        self.database_is_away = False
        self._stops: Recent[str, Stop] = Recent()
        self._ended_at: Recent[str, float] = Recent()
        #: How often a holder of a try was granted here: whoever asked SQL in between asks again.
        self._grants: Recent[tuple[str, int], int] = Recent()
        self._streams: defaultdict[str, set[Stoppable]] = defaultdict(set)
        self._holders_of: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
        self._registered: dict[AttemptId, asyncio.Event] = {}

    # -- claims ---------------------------------------------------------------------------------------------------

    def grant(self, holder: str, attempt: AttemptId) -> None:
        """SQL says that the holder has the attempt. Log streams of everybody else who had the try are closed."""
        attempt_try = (attempt.task_instance_id, attempt.try_number)
        for other in self._holders_of.get(attempt_try, set()) - {holder}:
            self.stop(other, Stop.FENCED)
            self._close_streams(other, Stop.FENCED)
        self._grants.set(attempt_try, self.grants(attempt) + 1)
        self._stops.pop(holder)
        self.confirm(holder)
        self.wake(attempt)

    def confirm(self, *holders: str) -> None:
        """SQL said just now that they have their attempts; who was told to leave since it was asked is left out."""
        now = time.monotonic()
        for holder in holders:
            if self._stops.get(holder) in (None, Stop.CANCELLED):
                self._granted.set(holder, now)

    def revive(self, holder: str, stopped: Stop | None) -> None:
        """SQL said that it has its attempt, and nobody learned better since it was ``stopped``."""
        if self._stops.get(holder) is stopped:
            self._stops.pop(holder)
            self.confirm(holder)

    def is_granted(self, holder: str, within_seconds: float = math.inf) -> bool:
        """Whether the holder had its attempt when SQL was last asked, so long ago at the most, and may keep it."""
        at = self._granted.get(holder)
        return at is not None and (self.database_is_away or time.monotonic() - at < within_seconds)

    def grants(self, attempt: AttemptId) -> int:
        return self._grants.get((attempt.task_instance_id, attempt.try_number)) or 0

    def wake(self, attempt: AttemptId) -> None:
        """Let whoever waits for a Register of the attempt look again."""
        if event := self._registered.pop(attempt, None):
            event.set()

    async def wait_for_register(self, attempt: AttemptId, timeout_seconds: float) -> None:
        """Until somebody registers for the attempt here, or the time is over."""
        event = self._registered.setdefault(attempt, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), timeout_seconds)
        if not event.is_set():
            self._registered.pop(attempt, None)
            event.set()

    # -- stops ----------------------------------------------------------------------------------------------------

    def stop(self, holder: str, why: Stop) -> None:
        """Remember it, and close the holder's log streams so that its agent asks at once."""
        known = self._stops.get(holder)
        if known in (Stop.ENDED, Stop.FENCED) or known is why:
            return
        self._stops.set(holder, why)
        if why is Stop.ENDED:
            self._ended_at.set(holder, time.monotonic())
        if why is not Stop.CANCELLED:
            self._granted.pop(holder)
        if why is not Stop.ENDED:
            self._close_streams(holder, why)

    def _close_streams(self, holder: str, why: Stop) -> None:
        for stream in tuple(self._streams.get(holder, ())):
            stream.stop(why)

    def why_stopped(self, holder: str) -> Stop | None:
        return self._stops.get(holder)

    # -- streams --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def streaming(self, stream: Stoppable) -> Iterator[None]:
        """The stream is open inside."""
        holder, attempt = stream.beat.holder, stream.beat.attempt
        attempt_try = (attempt.task_instance_id, attempt.try_number)
        self._streams[holder].add(stream)
        self._holders_of[attempt_try].add(holder)
        try:
            yield
        finally:
            self._streams[holder].discard(stream)
            if not self._streams[holder]:
                del self._streams[holder]
                self._holders_of[attempt_try].discard(holder)
            if not self._holders_of[attempt_try]:
                del self._holders_of[attempt_try]

    def watched(self) -> list[Beat]:
        """Holders with an open stream that have not been told to stop."""
        return [
            next(iter(streams)).beat for holder, streams in self._streams.items() if self._stops.get(holder) is None
        ]

    def end_late_streams(self, ended_before: float) -> None:
        """Close the streams of holders that ended before that (monotonic): the time for last lines is over."""
        for holder in list(self._streams):
            at = self._ended_at.get(holder)
            if at is not None and at < ended_before:
                self._close_streams(holder, Stop.FENCED)

    @property
    def stream_count(self) -> int:
        return sum(map(len, self._streams.values()))
