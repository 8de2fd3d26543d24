"""Who sends a call: an identity that keeps callers apart, made of their credentials and telling none of them."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from contextvars import ContextVar

AUTHORIZATION = "authorization"
# Of this process alone: what is made with it means nothing to other processes, or after a restart.
_SECRET = secrets.token_bytes(32)
_current: ContextVar[bytes] = ContextVar("caller", default=b"")


def current_caller() -> bytes:
    """The caller of the call that is being served: 32 bytes, or none where callers show no credentials."""
    return _current.get()


def set_caller(caller: bytes) -> None:
    """Names the caller of the call that the current task serves."""
    _current.set(caller)


def caller_of(metadata: Iterable[tuple[str, str | bytes]], peer_identities: Iterable[bytes] | None) -> bytes:
    """The identity of a call's sender, its credentials having been checked.

    Args:
        metadata: with the token, if there is one.
        peer_identities: the names in the client's certificate, if it showed one.
    """
    tokens = [value for key, value in metadata if key == AUTHORIZATION and isinstance(value, str)]
    shown = [token.split(maxsplit=1)[-1].strip().encode() for token in tokens[:1]]
    shown += sorted(peer_identities or ())
    if not shown:
        return b""
    # Each with its length, so that no two lists look alike.
    joined = b"".join(len(each).to_bytes(8) + each for each in shown)
    return hmac.digest(_SECRET, joined, hashlib.sha256)
