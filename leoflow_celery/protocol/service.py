"""The AgentService as a typed table: one row per method, shared by the gateway and the agent.

Generated stubs would say the same ten times over in 450 lines; grpc's generic handlers and channel methods take
exactly what this table holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from leoflow_celery.protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

SERVICE = "leoflow.agent.v1.AgentService"

#: Metadata keys beyond the protocol. Agents that do not know them are served all the same.
AUTHORIZATION_KEY = "authorization"
#: Chosen by the agent at start, sent with every call: the holder of the claim, so that a repeated Register is the
#: same holder and a second agent is not.
SESSION_KEY = "x-leoflow-session"
#: What an agent can do, comma separated.
CAPABILITIES_KEY = "x-leoflow-capabilities"
#: Entry of TaskSpec.extra: JSON, parameter → the list of tasks whose values it gets as a list.
FAN_IN = "xcom_input_lists"
#: It uses the token that an answer brings from its next call on.
RENEWS_TOKEN = "renewed-token"  # noqa: S105 - a name
#: Trailing metadata beside RegisterResponse, for an agent that renews: its first renewed token.
TOKEN_KEY = "x-leoflow-token"  # noqa: S105 - a name
#: A FailureReason value beside ReportState(FAILED).
REASON_KEY = "x-leoflow-reason"
#: Trailing metadata beside an error: why a Register was refused (a ClaimRefused.why).
REFUSED_KEY = "x-leoflow-refused"

#: Keys of TaskSpec.extra (all optional).
EXTRA_XCOM_SCHEMA = "xcom_schema"


@dataclass(frozen=True)
class Method:
    """One RPC: its name, message types and whether both sides stream."""

    name: str
    request: type[Message]
    response: type[Message]
    streaming: bool = False

    @property
    def path(self) -> str:
        """The HTTP/2 path, as grpc channels take it."""
        return f"/{SERVICE}/{self.name}"


def serialize(message: Message) -> bytes:
    """A message as bytes; what grpc wants as (de)serializer beside ``Method.request.FromString``."""
    return message.SerializeToString()


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("Register", pb.RegisterRequest, pb.RegisterResponse),
        Method("GetTaskSpec", pb.GetTaskSpecRequest, pb.TaskSpec),
        Method("FetchXCom", pb.FetchXComRequest, pb.FetchXComResponse),
        Method("PushXCom", pb.PushXComRequest, pb.PushXComResponse),
        Method("StreamLogs", pb.LogLine, pb.LogAck, streaming=True),
        Method("ReportState", pb.ReportStateRequest, pb.ReportStateResponse),
        Method("Heartbeat", pb.HeartbeatRequest, pb.HeartbeatResponse),
        Method("GetVariables", pb.GetVariablesRequest, pb.GetVariablesResponse),
        Method("GetConnections", pb.GetConnectionsRequest, pb.GetConnectionsResponse),
        Method("ExchangeToken", pb.ExchangeTokenRequest, pb.ExchangeTokenResponse),
    )
}
