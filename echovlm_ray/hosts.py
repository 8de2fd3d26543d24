"""Host names and addresses, IPv4 and IPv6."""

import ipaddress


def host_port(host: str, port: int) -> str:
    """host:port, an IPv6 literal in brackets: [::1]:50051."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host is localhost or a loopback address of IPv4 or IPv6, in any notation."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
