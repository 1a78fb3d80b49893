"""Which addresses a task may call: what the operator's policy reaches, and never a cloud's metadata service.

Metadata services answer anybody on the host with the host's own credentials. The check runs on the addresses a
connection is about to be opened to, after name resolution, so neither DNS nor a redirect nor an unusual spelling gets
around it.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.inline_http.errors import RefusedAddress

_POLICY_VARIABLE = "LEOFLOW_INLINE_HTTP_ADDRESSES"
_VARIABLE = "LEOFLOW_INLINE_HTTP_ALLOW_ADDRESSES"
PUBLIC = "public"
ANY_BUT_LINK_LOCAL = "any but link-local"
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
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")
#: A site's own NAT64 (RFC 8215): where in it the IPv4 address stands is the site's choice (RFC 6052).
_LOCAL_NAT64 = IPv6Network("64:ff9b:1::/48")
_IPV4_COMPATIBLE = IPv6Network("::/96")
_IPV4_TRANSLATED = IPv6Network("::ffff:0:0:0/96")
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)


class AddressGuard:
    """Lets calls through to what the operator's policy reaches: ``public``, ``any but link-local``, or CIDRs.

    Link-local and metadata addresses are no part of any policy, but for a CIDR inside them. ``allow_addresses`` are the
    hosts and networks that may be called all the same.
    """

    def __init__(self, allow_addresses: str = "", addresses: str = ANY_BUT_LINK_LOCAL) -> None:
        """Raises ConfigurationError for what is no policy, host or network."""
        self._policy = " ".join(addresses.split()).lower()
        self._reachable: list[Network] = []
        if self._policy not in (PUBLIC, ANY_BUT_LINK_LOCAL):
            self._reachable = [_network(part) for part in _parts(addresses)]
            if not self._reachable:
                raise ConfigurationError(
                    f"{_POLICY_VARIABLE} is empty; write {PUBLIC!r}, {ANY_BUT_LINK_LOCAL!r}, or CIDRs"
                )
        self._allowed_hosts: set[str] = set()
        self._allowed_networks: list[Network] = [net for net in self._reachable if _is_refused_network(net)]
        for part in _parts(allow_addresses):
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
            RefusedAddress: an address is link-local, a metadata service's or outside the policy, and not allowed.
        """
        if _normal(host) in self._allowed_hosts:
            return
        for text in addresses:
            for address in meant_addresses(ip_address(text)):
                if _within(address, self._allowed_networks):
                    continue
                if _within(address, _REFUSED_NETWORKS):
                    raise RefusedAddress(_refusal(str(address)))
                if not self._is_reachable(address):
                    raise RefusedAddress(
                        f"{address} is not what {_POLICY_VARIABLE}={self._policy} reaches; add it to {_VARIABLE} to "
                        "permit it"
                    )

    def _is_reachable(self, address: Address) -> bool:
        if self._policy == ANY_BUT_LINK_LOCAL:
            return True
        if self._policy == PUBLIC:
            return address.is_global and not address.is_multicast and address not in _LOCAL_NAT64
        return _within(address, self._reachable)

    def _allow(self, part: str) -> None:
        try:
            self._allowed_networks.append(ip_network(part, strict=False))
        except ValueError as error:
            if "/" in part:
                raise ConfigurationError(
                    f"{_VARIABLE}: {part!r} is no network; write for example 169.254.10.0/24"
                ) from error
            self._allowed_hosts.add(_normal(part))


def meant_addresses(address: Address) -> list[Address]:
    """Where a packet to an address may end up: the IPv4 address inside an IPv6 one, else the address itself.

    Mapped, compatible, translated, NAT64, 6to4, Teredo and ISATAP. A site's own NAT64 may mean any of several.
    """
    if isinstance(address, IPv4Address):
        return [address]
    bits = int(address)
    low = IPv4Address(bits & 0xFFFF_FFFF)
    if address in _NAT64 or address in _IPV4_TRANSLATED or (address in _IPV4_COMPATIBLE and bits > 1):
        return [low]
    if address in _LOCAL_NAT64:
        return [address, low, *(_embedded(bits, prefix) for prefix in (48, 56, 64))]
    if found := address.ipv4_mapped or address.sixtofour:
        return [found]
    if address.teredo:
        return [address, address.teredo[1]]
    return [address, low] if bits >> 32 & 0xFFFF_FFFF in _ISATAP else [address]


def _embedded(bits: int, prefix: int) -> IPv4Address:
    """The IPv4 address behind a NAT64 prefix of so many bits; bits 64 to 71 are skipped (RFC 6052, 2.2)."""
    without_gap = (bits >> 64 << 56) | (bits & (1 << 56) - 1)
    return IPv4Address(without_gap >> (120 - prefix - 32) & 0xFFFF_FFFF)


def _parts(text: str) -> list[str]:
    return [part for part in (item.strip() for item in text.split(",")) if part]


def _network(part: str) -> Network:
    try:
        return ip_network(part, strict=False)
    except ValueError as error:
        raise ConfigurationError(
            f"{_POLICY_VARIABLE}: {part!r} is not a network; write {PUBLIC!r}, {ANY_BUT_LINK_LOCAL!r}, or CIDRs like "
            "10.0.0.0/8, comma separated"
        ) from error


def _is_refused_network(network: Network) -> bool:
    """Whether a network lies inside one that is refused: who names it means it."""
    return any(network.version == one.version and network.subnet_of(one) for one in _REFUSED_NETWORKS)  # type: ignore[arg-type]


def _within(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def _normal(host: str) -> str:
    return host.lower().rstrip(".")


def _refusal(what: str) -> str:
    return f"{what} is a link-local or metadata address; add it to {_VARIABLE} to permit it"
