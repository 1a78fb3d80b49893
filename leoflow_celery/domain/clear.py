"""What is cleared of a run, to run again, and what of its DAG that needs: pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from leoflow_celery.domain.states import TERMINAL, TaskState
from leoflow_celery.errors import InvalidRequest

_FAILED = frozenset({TaskState.FAILED, TaskState.UPSTREAM_FAILED})


class RunGraph(Protocol):
    """What a run's DAG says to whoever keeps it: ``lite.dag.Dag``, or a scheduler's own."""

    @property
    def by_id(self) -> Mapping[str, object]:
        """Its tasks."""

    def downstream(self, task_id: str) -> Collection[str]:
        """Every task that may start only after this one; none for a task that the DAG does not have."""

    def model_dump_json(self, *, exclude_unset: bool) -> str:
        """A JSON object with ``tasks``: objects with ``task_id`` and ``depends_on``, and whatever else it has."""


class KeptDag:
    """A DAG as it was stored with its run.

    Raises:
        ValueError: ``content`` does not have the form of ``RunGraph.model_dump_json``.
    """

    def __init__(self, content: Any) -> None:
        try:
            self.by_id: Mapping[str, Any] = {task["task_id"]: task for task in content["tasks"]}
            self._upstream = {one: frozenset(task.get("depends_on", ())) for one, task in self.by_id.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("has no list of tasks with task_id and depends_on") from error
        self.content: Mapping[str, Any] = content

    def downstream(self, task_id: str) -> set[str]:
        """Every task that may start only after this one; none for a task that the DAG does not have."""
        found: set[str] = set()
        new = {task_id}
        while new:
            new = {one for one, upstream in self._upstream.items() if upstream & new} - found
            found |= new
        return found


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tasks of a run to clear.

    Without ``task_ids``: what failed and everything that depends on it. With them: these, whatever became of them, and
    what was ``upstream_failed`` because of them. ``failed`` keeps of the named tasks those that failed; ``downstream``
    adds everything that depends on the tasks chosen.
    """

    task_ids: tuple[str, ...] = ()
    failed: bool = False
    downstream: bool = False

    def choose(
        self, states: Mapping[str, TaskState], downstream_of: Callable[[str], Collection[str]] | None
    ) -> tuple[str, ...]:
        """The tasks to clear, out of the newest tries of a run, in the order of ``states``.

        ``downstream_of`` gives everything that depends on a task; None: the graph is not known, and then only what is
        named or failed is cleared. A task that is at work is never chosen.

        Raises:
            InvalidRequest: a named task is unknown or at work, or the graph is needed and not known.
        """
        self._check(states, downstream_of is not None)
        named = self.task_ids or tuple(states)
        only_failed = self.failed or not self.task_ids
        roots = [one for one in named if not only_failed or states[one] in _FAILED]
        below = {one for root in roots for one in downstream_of(root)} if downstream_of else set()
        takes_all = self.downstream or not self.task_ids
        chosen = {one for one in below if takes_all or states.get(one) is TaskState.UPSTREAM_FAILED}.union(roots)
        return tuple(one for one, state in states.items() if one in chosen and state in TERMINAL)

    def _check(self, states: Mapping[str, TaskState], has_graph: bool) -> None:
        if self.downstream and not has_graph:
            raise InvalidRequest(
                "downstream: no DAG is stored with this run, so what depends on a task is not known; name every task",
                "downstream",
            )
        for task_id in self.task_ids:
            state = states.get(task_id)
            if state is None:
                known = ", ".join(states) or "none"
                raise InvalidRequest(f"task {task_id!r} has no try in this run that could be cleared; it has: {known}")
            if state is not TaskState.NONE and state not in TERMINAL:  # none: it was cleared before, and waits
                raise InvalidRequest(f"task {task_id!r} is {state}; wait for its end, or cancel it first")


@dataclass(frozen=True, slots=True)
class ClearedTask:
    """A task that is to run again: its newest try, which stays as it ended, and the number of the next one."""

    task_id: str
    task_instance_id: str
    ended_try: int
    state: TaskState

    @property
    def next_try(self) -> int:
        return self.ended_try + 1
