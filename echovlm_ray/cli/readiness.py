"""Notifies a service manager that the service is ready: systemd's `sd_notify` protocol, one datagram."""

import os
import socket
from contextlib import suppress


def notify_ready() -> None:
    """Sends READY=1 to the socket in `NOTIFY_SOCKET`, if it is set."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # An abstract socket's name begins with a zero byte; systemd writes it as "@".
    name = "\0" + address[1:] if address.startswith("@") else address
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.sendto(b"READY=1", name)
