"""Whether an address belongs to this machine."""

import socket


def is_this_machine(address: str) -> bool:
    """Whether `host:port` is an address of this machine, or of this container if it has its own network.

    Args:
        address: in gRPC's format, with IPv6 literals in brackets.
    """
    host = address.rpartition(":")[0].strip("[]")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True
