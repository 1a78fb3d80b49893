"""Which addresses a task may not call: link-local ones and the metadata services of the clouds.

Those answer anybody on the host with the host's own credentials. The check runs on the addresses a connection is about
to be opened to, after name resolution, so neither DNS nor a redirect nor an unusual spelling gets around it.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.inline_http.errors import RefusedAddress

_VARIABLE = "LEOFLOW_INLINE_HTTP_ALLOW_ADDRESSES"
_REFUSED_NETWORKS = tuple(
    ip_network(text)
    for text in (
        "169.254.0.0/16",  # link-local; AWS, Azure, GCP, OpenStack
        "fe80::/10",  # link-local
        "fd00:ec2::/32",  # AWS
        "fd20:ce::254/128",  # GCP
        "100.100.100.200/32",  # Alibaba
        "168.63.129.16/32",  # Azure
        "192.0.0.192/32",  # Oracle
    )
)
_REFUSED_HOSTS = frozenset(
    {
        "metadata",
        "metadata.google.internal",
        "metadata.goog",
        "instance-data",
        "instance-data.ec2.internal",
        "metadata.azure.internal",
        "metadata.tencentyun.com",
    }
)
_NAT64 = IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE = IPv6Network("::/96")


class AddressGuard:
    """Refuses link-local and metadata addresses except the hosts and networks an operator allows."""

    def __init__(self, allow_addresses: str = "") -> None:
        self._allowed_hosts: set[str] = set()
        self._allowed_networks: list[IPv4Network | IPv6Network] = []
        for part in filter(None, (item.strip() for item in allow_addresses.split(","))):
            self._allow(part)

    def check_host(self, host: str) -> None:
        """Refuse a metadata service by its name, before any resolution.

        Raises:
            RefusedAddress: the name is a metadata service's and not allowed.
        """
        name = _normal(host)
        if name in _REFUSED_HOSTS and name not in self._allowed_hosts:
            raise RefusedAddress(_refusal(name))

    def check_addresses(self, host: str, addresses: Iterable[str]) -> None:
        """Refuse the host when any of its addresses is refused: which of them answers is not ours to choose.

        Raises:
            RefusedAddress: an address is link-local or a metadata service's and not allowed.
        """
        if _normal(host) in self._allowed_hosts:
            return
        for text in addresses:
            address = embedded_address(ip_address(text))
            if _within(address, _REFUSED_NETWORKS) and not _within(address, self._allowed_networks):
                raise RefusedAddress(_refusal(str(address)))

    def _allow(self, part: str) -> None:
        try:
            self._allowed_networks.append(ip_network(part, strict=False))
        except ValueError as error:
            if "/" in part:
                raise ConfigurationError(
                    f"{_VARIABLE}: {part!r} is no network; write for example 169.254.10.0/24"
                ) from error
            self._allowed_hosts.add(_normal(part))


def embedded_address(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 one stands for (mapped, compatible, NAT64, 6to4), else the address itself."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64 or (address in _IPV4_COMPATIBLE and int(address) > 1):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _within(address: IPv4Address | IPv6Address, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    return any(address in network for network in networks)


def _normal(host: str) -> str:
    return host.lower().rstrip(".")


def _refusal(what: str) -> str:
    return f"{what} is a link-local or metadata address; add it to {_VARIABLE} to permit it"
