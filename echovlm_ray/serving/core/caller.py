"""The identity of a caller: derived from its credentials, without revealing them."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

# Of this process alone: what is made with it means nothing to other processes, or after a restart.
_SECRET = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class KnownToken:
    """A token that a server knows.

    Attributes:
        digest: SHA-256 of the token.
        name: that the token file gives it; tokens of one name are one caller's.
    """

    digest: bytes
    name: str = ""


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a call.

    Attributes:
        id: 32 bytes; none where callers show no credentials, or none that are checked.
        names: of its token, or else those in its certificate; quotas go by them.
    """

    id: bytes = b""
    names: tuple[str, ...] = ()


NOT_KNOWN = Caller()
_current: ContextVar[Caller] = ContextVar("caller", default=NOT_KNOWN)


def current_caller() -> Caller:
    """The caller of the call that is being served."""
    return _current.get()


def set_caller(caller: Caller) -> None:
    """Names the caller of the call that the current task serves."""
    _current.set(caller)


def caller_of(token: KnownToken | None, peer_identities: Iterable[bytes] | None) -> Caller:
    """The sender of a call.

    Args:
        token: that was checked.
        peer_identities: the names in the client's certificate, if it showed one that was checked.
    """
    identities = sorted(peer_identities or ())
    shown = [] if token is None else [b"name", token.name.encode()] if token.name else [b"token", token.digest]
    shown += identities
    if not shown:
        return NOT_KNOWN
    if token is not None and token.name:
        names: tuple[str, ...] = (token.name,)
    else:
        names = tuple(identity.decode(errors="replace") for identity in identities)
    # Each with its length, so that no two lists look alike.
    joined = b"".join(len(each).to_bytes(8) + each for each in shown)
    return Caller(hmac.digest(_SECRET, joined, hashlib.sha256), names)
