"""The address a server is reached by, which is not always the one it listens on."""

from __future__ import annotations

import ipaddress
import socket

from .errors import BadRequestError

_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses that are nobody's (RFC 5737, RFC 3849): the kernel says which of ours it would reach them from, and sends nothing."""


def host_port(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def reachable_host(listen_host: str, advertise_host: str | None) -> str:
    """The host that others reach a server by: as told, else where it listens, else this host's on its default interface.

    Raises BadRequestError for a wildcard (0.0.0.0, [::]) where this host has no such interface, or told to be reached by.
    """
    if advertise_host is not None:
        if not advertise_host or "/" in advertise_host or is_wildcard(advertise_host) or _has_port(advertise_host):
            raise BadRequestError(
                f"cannot be reached by host {advertise_host!r}; give --advertise-host a name or an address, without a port"
            )
        return advertise_host
    if not is_wildcard(listen_host):
        return listen_host
    families = [socket.AF_INET6, socket.AF_INET] if ":" in listen_host else [socket.AF_INET]
    for family in families:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((_ELSEWHERE[family], 9))
            except OSError:
                continue
            return str(probe.getsockname()[0])
    raise BadRequestError(
        f"listening on {listen_host}, all interfaces, and this host has no default one that others would reach it by; give "
        "--advertise-host"
    )


def is_wildcard(host: str) -> bool:
    """Whether the host means every interface of this machine: 0.0.0.0, [::], and what resolves to them, such as 0."""
    try:
        found = socket.getaddrinfo(host.strip("[]") or "::", None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(_is_unspecified(str(sockaddr[0])) for *_, sockaddr in found)


def _is_unspecified(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_unspecified


def _has_port(host: str) -> bool:
    name, colon, port = host.rpartition(":")
    return bool(colon) and port.isdigit() and (":" not in name or name.endswith("]"))
