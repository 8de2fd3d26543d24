"""Which machine this is."""

import socket


def is_this_machine(address: str) -> bool:
    """Whether `host:port` names an address of this machine, or of this container where it has a network of its own.

    Args:
        address: as gRPC writes it; an IPv6 literal is in brackets.
    """
    host = address.rpartition(":")[0].strip("[]")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True
