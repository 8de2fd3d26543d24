"""Bearer tokens."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from echovlm_ray.errors import UnauthenticatedError
from echovlm_ray.serving.core.caller import KnownToken
from echovlm_ray.serving.grpc.private_file import read_private

logger = logging.getLogger(__name__)

# Ends a call with an error.
End = Callable[[Exception], None]

SCHEME = "bearer "
# How long a call that runs may outlive its token.
REVOKED_AFTER_S = 1.0
REVOKED = "the bearer token of this call was revoked"


class BearerTokens:
    """The tokens of a file, one a line; blank lines and lines that start with # do not count.

    A token may be followed by a name, with a space between: quotas go by it, and tokens of one name are one caller's.

    The file is read with every call, so that its tokens are those of this moment. While it is missing, or holds what
    cannot be read, no token is good. Belongs to one event loop.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            ValueError: it cannot be read, other users can read it, or it holds no token.
        """
        self._path = path
        self._content: bytes | None = None
        self._known: tuple[KnownToken, ...] = ()
        # Of every call under way: its token's digest, and what ends it.
        self._calls: set[tuple[bytes, End]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._take(read_private(path, "token_file"))
        if not self._known:
            raise ValueError(f"token_file {path} holds no token: write one into it, one a line")

    @property
    def names(self) -> frozenset[str]:
        """That the file gives its tokens."""
        return frozenset(token.name for token in self._known if token.name)

    def check(self, metadata: Iterable[tuple[str, str | bytes]]) -> KnownToken:
        """Lets a call pass that carries one of the tokens, and returns which.

        Raises:
            UnauthenticatedError: it carries none, or another one.
        """
        for key, value in metadata:
            if key == "authorization" and isinstance(value, str) and value.lower().startswith(SCHEME):
                digest = _digest(value[len(SCHEME) :].strip())
                self._read_again()
                if (known := self._find(digest)) is not None:
                    return known
                raise UnauthenticatedError("the bearer token is not one that this server knows")
        raise UnauthenticatedError('the call carries no token: send the metadata "authorization: Bearer <token>"')

    @contextmanager
    def watched(self, digest: bytes, end: End) -> Iterator[None]:
        """While a call runs: ends it, about a second later, when the token that `check` let pass is revoked.

        Args:
            digest: of what `check` returned.
            end: called with the error that the call ends with; the call then leaves the block.
        """
        call = (digest, end)
        self._calls.add(call)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._end_revoked())
        try:
            yield
        finally:
            self._calls.discard(call)

    async def _end_revoked(self) -> None:
        """Runs while calls do."""
        while self._calls:
            await asyncio.sleep(REVOKED_AFTER_S)
            self._read_again()
            for digest, end in list(self._calls):
                if self._find(digest) is None:
                    end(UnauthenticatedError(REVOKED))

    def _find(self, digest: bytes) -> KnownToken | None:
        # No early exit: how long a check takes must not tell which token was nearly right.
        found = [known for known in self._known if hmac.compare_digest(digest, known.digest)]
        return found[0] if found else None

    def _read_again(self) -> None:
        try:
            content = read_private(self._path, "token_file")
            if content != self._content:
                self._take(content)
        except ValueError as error:
            if self._content is not None:
                logger.error("%s; until it is mended, every token is refused", error)
            self._content, self._known = None, ()

    def _take(self, content: bytes) -> None:
        try:
            lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"token_file {self._path} is not UTF-8 text: write it again, one token a line") from None
        self._content = content
        self._known = tuple(_token(line) for line in lines if line and not line.startswith("#"))


def _token(line: str) -> KnownToken:
    token, *name = line.split(maxsplit=1)
    return KnownToken(_digest(token), "".join(name))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
