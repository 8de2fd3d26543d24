"""Bearer tokens."""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from echovlm_ray.errors import UnauthenticatedError
from echovlm_ray.serving.core.caller import KnownToken
from echovlm_ray.serving.grpc.private_file import read_private

logger = logging.getLogger(__name__)

# Ends a call with an error.
End = Callable[[Exception], None]

SCHEME = "bearer "
# How long a call that runs may outlive its token.
REVOKED_AFTER_S = 1.0
# A file that is written in place is empty, then half of it is there. A token that was good so short a time ago may be
# in what is still to come: its calls wait for that.
REWRITTEN_WITHIN_S = 0.5
LOOK_AGAIN_S = 0.05
# The times of a file system may have no finer steps. Until so long after a change the next one may look like it.
SETTLED_S = 3.0
REVOKED = "the bearer token of this call was revoked"


class _State(NamedTuple):
    """What changes with a file: its contents, mode or owner move `changed_at_ns`, which no user can set."""

    device: int
    inode: int
    mode: int
    user: int
    size: int
    changed_at_ns: int


class BearerTokens:
    """The tokens of a file, one per line, without blank lines and lines that start with #.

    A token may be followed by a name, with a space between: quotas go by it, and tokens of one name are one caller's.

    The file is looked at with every call, so that its tokens are those of this moment. While it is missing, or holds
    what cannot be read, no token is good. Belongs to one event loop.

    Attributes:
        names: that the file gives its tokens.
    """

    names: frozenset[str] = frozenset()

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            ValueError: it cannot be read, other users can read it, or it holds no token.
        """
        self._path = path
        self._content: bytes | None = None
        self._wrong = ""
        # Of the file, while what was read of it is what it holds.
        self._settled: _State | None = None
        self._known: dict[bytes, KnownToken] = {}
        # Digests of tokens that are not in the file any more, and since when.
        self._gone: dict[bytes, float] = {}
        # Of every call under way: its token's digest, and what ends it.
        self._calls: set[tuple[bytes, End]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._take(read_private(path, "token_file"))

    async def admit(self, metadata: Sequence[tuple[str, str | bytes]]) -> KnownToken:
        """As `check`, and waits for the rest of the file where the token may stand in it.

        Raises:
            UnauthenticatedError: what `check` raises.
        """
        while True:
            try:
                return self.check(metadata)
            except UnauthenticatedError:
                if not self._may_come_back(metadata):
                    raise
            await asyncio.sleep(LOOK_AGAIN_S)

    def check(self, metadata: Iterable[tuple[str, str | bytes]]) -> KnownToken:
        """Lets a call pass that carries one of the tokens, and returns which.

        Raises:
            UnauthenticatedError: it carries none, or another one.
        """
        digest = _shown(metadata)
        if digest is None:
            raise UnauthenticatedError('the call carries no token: send the metadata "authorization: Bearer <token>"')
        self._read_again()
        # How long it takes tells nothing of a token that was nearly right: its digest is another one altogether.
        known = self._known.get(digest)
        if known is None:
            raise UnauthenticatedError("the bearer token is not one that this server knows")
        return known

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
            await asyncio.sleep(REVOKED_AFTER_S / 2)
            self._read_again()
            now = time.monotonic()
            for digest, end in list(self._calls):
                if digest not in self._known and now - self._gone.get(digest, 0.0) > REWRITTEN_WITHIN_S:
                    end(UnauthenticatedError(REVOKED))

    def _may_come_back(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        gone_since = self._gone.get(_shown(metadata) or b"")
        return gone_since is not None and time.monotonic() - gone_since < REWRITTEN_WITHIN_S

    def _read_again(self) -> None:
        # A caller without a token has this done too, so a long file must not be read with each call.
        state = _state(self._path)
        if state is not None and state == self._settled:
            return
        self._settled = None
        now = time.time()
        try:
            content = read_private(self._path, "token_file")
            if content != self._content:
                self._take(content)
            if state is not None and now - state.changed_at_ns / 1e9 > SETTLED_S:
                self._settled = state
        except ValueError as error:
            if self._wrong != str(error):
                self._wrong = str(error)
                logger.error("%s; until it is mended, every token is refused", error)
            self._content = None
            self._set({})

    def _take(self, content: bytes) -> None:
        try:
            lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"token_file {self._path} is not UTF-8 text: write it again, one token a line") from None
        tokens = [_token(line) for line in lines if line and not line.startswith("#")]
        if not tokens:
            raise ValueError(f"token_file {self._path} holds no token: write one into it, one a line")
        self._content, self._wrong = content, ""
        # Of a token that stands there twice, the first line counts.
        self._set({token.digest: token for token in reversed(tokens)})

    def _set(self, known: dict[bytes, KnownToken]) -> None:
        if known == self._known:
            return
        now = time.monotonic()
        gone = {digest: since for digest, since in self._gone.items() if now - since < REWRITTEN_WITHIN_S}
        self._gone = {digest: gone.get(digest, now) for digest in {*gone, *self._known} if digest not in known}
        self._known = known
        self.names = frozenset(token.name for token in known.values() if token.name)


def _state(path: Path) -> _State | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _State(found.st_dev, found.st_ino, found.st_mode, found.st_uid, found.st_size, found.st_ctime_ns)


def _shown(metadata: Iterable[tuple[str, str | bytes]]) -> bytes | None:
    """The digest of the token that a call carries."""
    for key, value in metadata:
        if key == "authorization" and isinstance(value, str) and value.lower().startswith(SCHEME):
            return _digest(value[len(SCHEME) :].strip())
    return None


def _token(line: str) -> KnownToken:
    token, *name = line.split(maxsplit=1)
    return KnownToken(_digest(token), "".join(name))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
