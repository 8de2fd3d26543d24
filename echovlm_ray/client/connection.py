"""The client's connection to a server: address, TLS, token, and the ids of calls."""

import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import grpc

from echovlm_ray.client.arguments import invalid, text

DEFAULT_ADDRESS = "127.0.0.1:50051"
REQUEST_ID_KEY = "x-request-id"
# The ids that the server accepts; it would replace others.
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
LOOPBACK = re.compile(r"((ipv4|ipv6|dns):(///)?)?(127(\.\d{1,3}){3}|localhost|\[::1\])(:\d+)?$|unix:|unix-abstract:")

# https://github.com/grpc/grpc/blob/master/doc/naming.md
OWN_KINDS = frozenset({"unix", "unix-abstract", "dns", "ipv4", "ipv6", "vsock"})
# After a lost connection gRPC waits before it reconnects, by default up to two minutes, and calls fail until then.
# `client.retries` retries calls instead. "min" is also the time that one attempt to connect may take: a busy server may
# need long for its first bytes.
RECONNECT_MS = {"initial": 100, "min": 5000, "max": 1000}


@dataclass(frozen=True, slots=True)
class TLS:
    """TLS: how to verify the server, and the client's certificate.

    Attributes:
        authority: PEM file of the authority that signed the server's certificate; None for the machine's trusted ones.
        certificate: PEM file of the client's certificate, if the server requires one.
        key: PEM file of its key.
        server_name: the name in the server's certificate, if it differs from the address.
    """

    authority: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Raises:
            ValueError: a certificate without a key, or the reverse.
            OSError: a file cannot be read.
        """
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client certificate needs its key and a key its certificate: give both or neither")
        authority, certificate, key = (
            None if path is None else Path(path).read_bytes() for path in (self.authority, self.certificate, self.key)
        )
        return grpc.ssl_channel_credentials(authority, key, certificate)


def check_connection(address: str, token: str | None, tls: TLS | None) -> None:
    """Validates the arguments of a connection.

    Raises:
        ValueError: the address is empty or a URL instead of host:port, or a token would be sent unencrypted.
    """
    text("address", address)
    if tls is not None and not isinstance(tls, TLS):
        raise invalid("tls", f"is a {type(tls).__name__}; give a TLS()")
    if not address or "//" in address or not _names_a_port(address):
        raise ValueError(f"the address is {address!r}; give host:port, for example {DEFAULT_ADDRESS!r}")
    if token is not None:
        text("token", token)
        if not re.fullmatch(r"[!-~]+", token):
            raise ValueError("the token must be one line of printable ASCII without spaces: check the token file")
        if tls is None and not LOOPBACK.match(address):
            raise ValueError(
                f"the token would cross the network to {address} in the clear: pass tls=TLS(), or call loopback"
            )


def _names_a_port(address: str) -> bool:
    """Whether an address is host:port, or one of gRPC's other schemes, like unix:PATH."""
    if address.partition(":")[0] in OWN_KINDS:
        return True
    host, _, port = address.rpartition(":")
    if ":" in host and not host.startswith("["):
        raise ValueError(f"an IPv6 address stands in brackets before the port: [{host}]:{port}")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


def channel_options(address: str, tls: TLS | None) -> list[tuple[str, str | int]]:
    """Options of a channel, the same for `grpc` and `grpc.aio`."""
    options: list[tuple[str, str | int]] = [
        (f"grpc.{name}_reconnect_backoff_ms", milliseconds) for name, milliseconds in RECONNECT_MS.items()
    ]
    options.append(("grpc.enable_retries", 0))
    if LOOPBACK.match(address):
        # A proxy cannot reach this machine's loopback.
        options.append(("grpc.enable_http_proxy", 0))
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def open_channel(address: str, tls: TLS | None, *further: tuple[str, str | int]) -> grpc.Channel:
    """A blocking channel to a server.

    Args:
        address: host:port.
        tls: the TLS settings; None for plain text.
        further: additional channel options.

    Raises:
        ValueError: see `TLS.credentials`.
        OSError: see `TLS.credentials`.
    """
    options = [*channel_options(address, tls), *further]
    if tls is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, tls.credentials(), options)


def open_asynchronous_channel(address: str, tls: TLS | None, *further: tuple[str, str | int]) -> grpc.aio.Channel:
    """A `grpc.aio` channel; see `open_channel`."""
    options = [*channel_options(address, tls), *further]
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, tls.credentials(), options)


def call_metadata(token: str | None, request_id: str | None) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The id of a call, generated if it is None, and the metadata with the id and the token.

    Raises:
        ValueError: the id is not 1 to 128 of A-Z a-z 0-9 . _ : / -
    """
    if request_id is not None and not REQUEST_ID_PATTERN.fullmatch(text("request_id", request_id)):
        raise ValueError("request_id must be 1 to 128 of these characters: A-Z a-z 0-9 . _ : / -")
    identity = request_id or uuid.uuid4().hex
    metadata = ((REQUEST_ID_KEY, identity),)
    return identity, metadata if token is None else (*metadata, ("authorization", f"Bearer {token}"))
