"""The reverse proxies whose word counts for where a request came from, and how."""

import ipaddress
from typing import TypeAlias

Networks: TypeAlias = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]


def networks(text: str) -> Networks:
    """text: addresses and networks, separated by commas. Raises ValueError, which says what to write."""
    return tuple(_network(each.strip()) for each in text.split(",") if each.strip())


def among(address: str, networks: Networks) -> bool:
    if not networks:
        return False
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        network = None
    if network is None or not network.prefixlen:
        raise ValueError(
            f"{text!r} is no address and no network: name the proxies alone, as 10.0.0.5,172.18.0.0/16, for whoever is"
            " named may say of any request where it came from"
        )
    return network
