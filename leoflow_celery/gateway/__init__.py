"""The gateway: the agents' gRPC server, between agents and the store.

A call is authenticated (``rpc``, ``sessions``), becomes a compare-and-set (``lifecycle``, ``xcoms``), lines on disk
(``log_streams``, ``log_writer``) or a note in memory that is written together with others (``heartbeats``). SQL is the
only truth: a gateway that is killed at any moment loses nothing that it acknowledged.
"""

from __future__ import annotations

from leoflow_celery.gateway.server import GatewayServer, run

__all__ = ["GatewayServer", "run"]
