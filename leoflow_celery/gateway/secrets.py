"""GetVariables and GetConnections, and whether this channel may carry what is secret."""

from __future__ import annotations

from dataclasses import dataclass

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.gateway.rpc import NotPossible
from leoflow_celery.gateway.sessions import Caller, Claims
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.gateway.values import ValueProvider, open_provider
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class ChannelPolicy:
    """Secrets travel on TLS and unix sockets; on plain text only when an operator said so."""

    secure: bool
    allow_insecure: bool

    @classmethod
    def of(cls, settings: GatewaySettings) -> ChannelPolicy:
        """The policy of the configured listener.

        Raises:
            ConfigurationError: only one of certificate and key is set.
        """
        if (settings.tls_cert is None) != (settings.tls_key is None):
            raise ConfigurationError("set both LEOFLOW_GATEWAY_TLS_CERT and LEOFLOW_GATEWAY_TLS_KEY, or none of them")
        secure = settings.tls_cert is not None or settings.listen.startswith("unix:")
        return cls(secure, settings.allow_insecure_secrets)

    def check(self, what: str) -> None:
        """Refuse to send secrets in plain text.

        Raises:
            NotPossible: names the settings that would allow it.
        """
        if not (self.secure or self.allow_insecure):
            raise NotPossible(
                f"{what} are not sent on a plain-text channel; give the gateway LEOFLOW_GATEWAY_TLS_CERT and "
                "LEOFLOW_GATEWAY_TLS_KEY, or allow it with LEOFLOW_GATEWAY_ALLOW_INSECURE_SECRETS=true"
            )


class SecretMethods:
    """The two methods that hand out everything a provider has."""

    def __init__(self, settings: GatewaySettings, policy: ChannelPolicy, claims: Claims, threads: Threads) -> None:
        self._policy, self._claims, self._threads = policy, claims, threads
        self._variables = open_provider(settings.variables_path, "LEOFLOW_GATEWAY_VARIABLES_PATH")
        self._connections = open_provider(settings.connections_path, "LEOFLOW_GATEWAY_CONNECTIONS_PATH")

    async def get_variables(self, caller: Caller, _: pb.GetVariablesRequest) -> pb.GetVariablesResponse:
        return pb.GetVariablesResponse(variables=await self._values(caller, "variables", self._variables))

    async def get_connections(self, caller: Caller, _: pb.GetConnectionsRequest) -> pb.GetConnectionsResponse:
        return pb.GetConnectionsResponse(connection_uris=await self._values(caller, "connections", self._connections))

    async def _values(self, caller: Caller, what: str, provider: ValueProvider) -> dict[str, str]:
        self._policy.check(what)
        await self._claims.require(caller)
        return dict(await self._threads.store(provider.values))
