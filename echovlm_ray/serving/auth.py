"""Bearer tokens: who may call a server."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from echovlm_ray.errors import UnauthenticatedError

SCHEME = "bearer "


class BearerTokens:
    """The tokens of a file, one a line; blank lines and lines that start with # do not count.

    The file is read again when it changes, so that tokens can be replaced without a restart.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            ValueError: it cannot be read or holds no token.
        """
        self._path = path
        self._changed_ns = -1
        self._digests: tuple[bytes, ...] = ()
        try:
            self._read()
        except OSError as error:
            raise ValueError(f"token_file {path} cannot be read: {error.strerror}") from None
        if not self._digests:
            raise ValueError(f"token_file {path} holds no token: write one into it, one a line")

    def check(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Lets a call pass that carries one of the tokens.

        Raises:
            UnauthenticatedError: it carries none, or another one.
        """
        self._read_if_changed()
        for key, value in metadata:
            if key == "authorization" and isinstance(value, str) and value.lower().startswith(SCHEME):
                digest = _digest(value[len(SCHEME) :].strip())
                # No early exit: how long a check takes must not tell which token was nearly right.
                if sum(hmac.compare_digest(digest, known) for known in self._digests):
                    return
                raise UnauthenticatedError("the bearer token is not one that this server knows")
        raise UnauthenticatedError('the call carries no token: send the metadata "authorization: Bearer <token>"')

    def _read_if_changed(self) -> None:
        try:
            if self._path.stat().st_mtime_ns != self._changed_ns:
                self._read()
        except OSError:
            # In the moment of its replacement the file may be missing: the tokens known so far stay good.
            return

    def _read(self) -> None:
        changed_ns = self._path.stat().st_mtime_ns
        lines = (line.strip() for line in self._path.read_text().splitlines())
        self._digests = tuple(_digest(line) for line in lines if line and not line.startswith("#"))
        self._changed_ns = changed_ns


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
