"""Shared by the commands that call a server: the token to send, and the certificates."""

from pathlib import Path
from typing import Annotated

import typer

from echovlm_ray.client.connection import TLS

TokenFile = Annotated[Path | None, typer.Option(help="File with the token to send.")]
Authority = Annotated[
    Path | None,
    typer.Option("--ca", help="PEM file of the authority that signed the server's certificate; turns TLS on."),
]
Certificate = Annotated[Path | None, typer.Option(help="PEM file of your own certificate, if the server asks for one.")]
Key = Annotated[Path | None, typer.Option(help="PEM file of your certificate's key.")]


def token_of(path: Path | None) -> str | None:
    """The first token of a file; the server's own will do: it may hold comments, and one token a line.

    Raises:
        ValueError: there is none in it.
        OSError: it cannot be read.
    """
    if path is None:
        return None
    lines = [line.strip() for line in path.read_text().splitlines()]
    token = next((line for line in lines if line and not line.startswith("#")), None)
    if token is None:
        raise ValueError(f"{path} holds no token: write it on a line of its own")
    return token


def tls_of(authority: Path | None, certificate: Path | None, key: Path | None) -> TLS | None:
    """TLS as soon as any of the files is named."""
    if authority or certificate or key:
        return TLS(authority=authority, certificate=certificate, key=key)
    return None
