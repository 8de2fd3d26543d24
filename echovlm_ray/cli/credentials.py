"""Shared by the commands that call a server: the token to send, and the certificates."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echovlm_ray.client.connection import TLS

if TYPE_CHECKING:
    from echovlm_ray.config import ControlSection, GatewaySection

TokenFile = Annotated[Path | None, typer.Option(help="File with the token to send.")]
Authority = Annotated[
    Path | None,
    typer.Option("--ca", help="PEM file of the authority that signed the server's certificate; turns TLS on."),
]
Certificate = Annotated[Path | None, typer.Option(help="PEM file of your own certificate, if the server requires one.")]
Key = Annotated[Path | None, typer.Option(help="PEM file of your certificate's key.")]


def token_of(path: Path | None) -> str | None:
    """The first token of a file, which may be the server's token file, with comments and names.

    Raises:
        ValueError: it has no token.
        OSError: it is unreadable.
    """
    if path is None:
        return None
    lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    token = next((line.split()[0] for line in lines if line and not line.startswith("#")), None)
    if token is None:
        raise ValueError(f"{path} holds no token: write it on a separate line")
    return token


def tls_of(authority: Path | None, certificate: Path | None, key: Path | None) -> TLS | None:
    """TLS if any of the files is given."""
    if authority or certificate or key:
        return TLS(authority=authority, certificate=certificate, key=key)
    return None


def options_for(section: "GatewaySection | ControlSection") -> str:
    """The options for calling a server, for messages; placeholders are in capitals."""
    options = ""
    if section.tls is not None:
        options += " --ca AUTHORITY.pem"
        if section.tls.client_authority is not None:
            options += " --certificate CERTIFICATE.pem --key KEY.pem"
    if section.token_file is not None:
        options += f" --token-file {shlex.quote(str(section.token_file))}"
    return options
