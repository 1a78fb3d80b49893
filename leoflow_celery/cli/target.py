"""How commands name a task instance or a run: one word, or DAG RUN, or DAG RUN TASK."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from leoflow_celery.cli import complete
from leoflow_celery.cli.complete import LATEST
from leoflow_celery.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from leoflow_celery.client import Client
    from leoflow_celery.store.views import TaskInstanceView

TargetArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="TARGET",
        help="A task instance id; or DAG RUN; or DAG RUN TASK. RUN may be 'latest'.",
        autocompletion=complete.targets,
    ),
]
DagIdArgument = Annotated[str, typer.Argument(metavar="DAG", help="The id of the DAG.", autocompletion=complete.dags)]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="The id of the run, or 'latest'.", autocompletion=complete.runs)
]
TenantOption = Annotated[str, typer.Option("--tenant", help="Whose run it is.")]
#: What the column of SQL holds.
_MOST_TRIES = 2**31 - 1
TryOption = Annotated[
    int | None, typer.Option("--try", min=1, max=_MOST_TRIES, help="Which try; the newest unless given.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout, for other programs.")]


@dataclass(frozen=True, slots=True)
class Target:
    """What was named. ``task_instance_id`` alone, or dag and run and perhaps a task."""

    tenant_id: str
    task_instance_id: str | None = None
    dag_id: str = ""
    run_id: str = ""
    task_id: str | None = None

    @classmethod
    def parse(cls, words: list[str], tenant_id: str) -> Target:
        """The target of one, two or three words.

        Raises:
            InvalidRequest: more words, or an empty one.
        """
        if not all(words):
            raise InvalidRequest(
                "TARGET: a word is empty; name a task instance id, or DAG RUN, or DAG RUN TASK", "TARGET"
            )
        match words:
            case [only]:
                return cls(tenant_id, task_instance_id=only)
            case [dag_id, run_id]:
                return cls(tenant_id, None, dag_id, run_id)
            case [dag_id, run_id, task_id]:
                return cls(tenant_id, None, dag_id, run_id, task_id)
        raise InvalidRequest(
            f"TARGET: {len(words)} words given; name a task instance id, or DAG RUN, or DAG RUN TASK", "TARGET"
        )

    @classmethod
    def named(cls, client: Client, words: list[str], tenant_id: str) -> Target:
        """The target of these words, with the run that ``latest`` stands for.

        Raises:
            InvalidRequest: more than three words, or an empty one.
            NotFound: the DAG has no run.
        """
        found = cls.parse(words, tenant_id)
        if found.run_id != LATEST:
            return found
        return replace(found, run_id=client.latest_run(found.dag_id, tenant_id))

    @property
    def is_run(self) -> bool:
        return self.task_instance_id is None and self.task_id is None

    def check_try(self, try_number: int | None) -> None:
        """Refuse ``--try`` of a run.

        Raises:
            InvalidRequest: a run was named, and a try.
        """
        if self.is_run and try_number is not None:
            raise InvalidRequest("--try: a run has no tries; name one of its tasks as third word", "try")

    def task_instance(self, client: Client, try_number: int | None = None) -> TaskInstanceView:
        """The try that was named.

        Raises:
            InvalidRequest: only a run was named.
            NotFound: there is no such task instance; names the tasks there are.
        """
        if self.task_instance_id is not None:
            return client.task_instance(self.task_instance_id, try_number)
        found = self.task_instances(client)
        known = ", ".join(view.task_id for view in found)
        if self.task_id is None:
            raise InvalidRequest(f"TARGET: name a task of run {self.run_id!r} as third word: {known}", "TARGET")
        newest = next((view for view in found if view.task_id == self.task_id), None)
        if newest is None:
            raise NotFound(f"run {self.run_id!r} has not started a task {self.task_id!r}; it has: {known or 'none'}")
        return newest if try_number is None else client.task_instance(newest.task_instance_id, try_number)

    def task_instances(self, client: Client) -> list[TaskInstanceView]:
        """The newest try of each task of the run.

        Raises:
            NotFound: there is no such run, and no task instance names it.
        """
        found = client.task_instances(self.dag_id, self.run_id, self.tenant_id)
        if not found:
            client.run(self.dag_id, self.run_id, self.tenant_id)
        return found
