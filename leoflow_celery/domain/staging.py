"""Whose a staging volume is, when it is deleted, and what the control plane asks a back end to delete.

A volume belongs to one run: the one that its name is derived from, or that was recorded with it first.

The rules are the contract's (GCStagingClaims): success frees the volume now, a failed run keeps it for the TTL after
its end, an active run keeps it, and a volume whose run is unknown goes when it is older than the TTL itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from leoflow_celery.domain.attempt import STAGING_PREFIX, sanitise, staging_claim_name
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.states import RunState
from leoflow_celery.errors import InvalidRequest


class StagingReason(StrEnum):
    """Why a volume was deleted, as recorded."""

    RUN_SUCCEEDED = "run_succeeded"
    TTL_EXPIRED = "ttl_expired"
    ORPHANED = "orphaned"


def claims_named(request: TaskRequest) -> dict[str, str]:
    """Every volume claim that a request names, also in its pod override → the field that names it."""
    found = {name: f"pod_override.{place}" for place, name in _claim_names(request.pod_override, "")}
    return found | ({request.staging_claim: "staging_claim"} if request.staging_claim else {})


def _claim_names(part: Any, place: str) -> Iterator[tuple[str, str]]:
    children = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in children:
        below = f"{place}.{key}".lstrip(".")
        if key == "claimName" and isinstance(value, str):
            yield below, value
        yield from _claim_names(value, below)


def check_claims(request: TaskRequest) -> None:
    """Refuse the staging volume of another run, by its name: what ``staging_claim_name`` gives belongs to one run.

    A name of another form belongs to the run that is recorded with it first, which SQL knows.

    Raises:
        InvalidRequest: names the field, the value and the run's own name.
    """
    own = staging_claim_name(request.dag_id, request.run_id, request.tenant_id)
    # What publishers of other make derive, which know no hash; two runs that share it are told apart by SQL.
    plain = f"{STAGING_PREFIX}{sanitise(request.dag_id)}-{sanitise(request.run_id)}"
    for name, where in claims_named(request).items():
        if name.startswith(STAGING_PREFIX) and name not in (own, plain):
            raise InvalidRequest(
                f"{where}: {name!r} is the volume of another run; this run's is {own!r}, and a volume of your own may "
                f"have any name that does not begin with {STAGING_PREFIX!r}",
                where,
            )


def staging_decision(
    run_state: RunState | None, seconds_since_end: float | None, age_seconds: float, ttl_seconds: float
) -> StagingReason | None:
    """The reason to delete a volume now, or None to keep it. ``run_state`` is None when the run's row is gone."""
    if run_state is None:
        return StagingReason.ORPHANED if age_seconds > ttl_seconds else None
    if run_state is RunState.SUCCESS:
        return StagingReason.RUN_SUCCEEDED
    if run_state is RunState.FAILED and seconds_since_end is not None and seconds_since_end > ttl_seconds:
        return StagingReason.TTL_EXPIRED
    return None


#: A server's clock and the times of its volumes are read in whole seconds.
_WHOLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class StagingPlan:
    """What a back end is asked: delete these claims (name → reason), and what neither list knows once it is old.

    ``keep`` are all other active claims of SQL at ``read_at``; a labelled volume in neither that is older than
    ``orphan_seconds`` at that moment is an orphan. ``age_seconds`` is how long ago that was, when it was sent and when
    a worker got it; None when nobody said so.
    """

    read_at: float
    delete: dict[str, str] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()
    orphan_seconds: float = 24 * 3600
    age_seconds: float | None = None

    def by_clock_of(self, server_now: float, seconds_since: float) -> StagingPlan:
        """The same with ``read_at`` as a server's clock showed it then, which its volumes' times are compared with.

        ``server_now`` is what that shows now, ``seconds_since`` how long ago the worker got the plan.
        """
        if self.age_seconds is None:
            return self
        return replace(self, read_at=server_now - seconds_since - self.age_seconds - _WHOLE_SECONDS)

    def is_orphan(self, name: str, created_at: float) -> bool:
        """Whether a labelled volume is one that SQL does not know and never will."""
        unknown = name not in self.keep and name not in self.delete
        return unknown and self.read_at - created_at > self.orphan_seconds

    def doomed(self, created_at: Mapping[str, float | None]) -> dict[str, str]:
        """What goes, name → reason; ``created_at`` has the labelled volumes that exist, None where it is not known.

        One of a name that is to go, and that came into being after SQL was read, stays: its run was cleared and makes
        it anew, and this plan was late or sent again.
        """
        orphans = [name for name, at in created_at.items() if at is not None and self.is_orphan(name, at)]
        named = {name: why for name, why in self.delete.items() if (created_at.get(name) or 0.0) <= self.read_at}
        return named | dict.fromkeys(orphans, StagingReason.ORPHANED.value)

    def to_json(self) -> dict[str, Any]:
        return {
            "read_at": self.read_at,
            "delete": self.delete,
            "keep": sorted(self.keep),
            "orphan_seconds": self.orphan_seconds,
            "age_seconds": self.age_seconds,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StagingPlan:
        age = data.get("age_seconds")
        return cls(
            float(data["read_at"]),
            dict(data["delete"]),
            frozenset(data["keep"]),
            float(data["orphan_seconds"]),
            None if age is None else float(age),
        )
