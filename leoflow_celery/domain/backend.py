"""The address of a back end: an executor and, where each host has its own, the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from leoflow_celery.domain.attempt import digest
from leoflow_celery.domain.routing import QUEUE_OF, ExecutorType, host_queue


@dataclass(frozen=True, slots=True)
class BackEnd:
    """Whose server it is: all workers of the Kubernetes queue share one, each Docker host has its own.

    ``place`` is where on that server an attempt was started (a namespace), whatever the settings say later. It makes no
    other back end of it.
    """

    executor: ExecutorType
    host: str = ""
    place: str = field(default="", compare=False)

    @property
    def queue(self) -> str:
        """The queue that reaches it."""
        return host_queue(self.executor, self.host) if self.host else QUEUE_OF[self.executor]

    def __str__(self) -> str:
        """As staging volumes and presence records name it: ``kubernetes``, ``docker:host-1``; without a place."""
        return f"{self.executor}:{self.host}" if self.host else str(self.executor)

    @property
    def address(self) -> str:
        """With its place, as attempts record it: ``kubernetes/team-a``."""
        return f"{self}/{self.place}" if self.place else str(self)

    @classmethod
    def parse(cls, text: str) -> BackEnd:
        """Raises ValueError for an executor that there is none of."""
        server, _, place = text.partition("/")
        executor, _, host = server.partition(":")
        return cls(ExecutorType(executor), host, place)


def choose_host(claim_name: str, hosts: Iterable[str]) -> str:
    """The host of a new staging volume: spread over all, and the same one whoever asks about the same hosts."""
    return max(hosts, key=lambda host: digest(claim_name, host))
