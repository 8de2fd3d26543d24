"""Receives a pushed bundle into a temporary folder, which is removed if anything is wrong."""

import asyncio
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from echovlm_ray.errors import InvalidRequestError, OverloadedError
from echovlm_ray.serving.core.caller import current_caller
from experts.bundles.bundle import MAX_SIGNATURE_BYTES, SIGNATURE_NAME
from experts.bundles.manifest import MANIFEST_NAME, FileEntry, Manifest
from experts.errors import InvalidBundleError, RegistryError, RegistryFullError
from experts.full_disk import NO_ROOM
from experts.registry.registry import Registry
from protos import control_pb2

# The manifest of one layer per file still fits.
MAX_FILES = 1000
# At the same time: of one operator, and of all.
MAX_PUSHES_OF_ONE = 4
MAX_PUSHES = 16
RETRY_AFTER_S = 5.0
DRAIN_S = 1.0


class PushReceiver:
    """Takes bundles in and puts them into the registry. Belongs to one event loop."""

    def __init__(self, registry: Registry, incoming: Path, max_bytes: int) -> None:
        """Takes where bundles go, a folder of its own for those that are on their way, and the most bytes of one."""
        self._registry = registry
        self._incoming = incoming
        self._max_bytes = max_bytes
        self._pushes: Counter[bytes] = Counter()

    def clear(self) -> None:
        """Deletes what unfinished pushes left behind; to be called before the first push."""
        shutil.rmtree(self._incoming, ignore_errors=True)

    async def receive(self, requests: AsyncIterator[control_pb2.PushRequest]) -> Manifest:
        """Takes in one bundle.

        Returns:
            Its manifest, once the registry has it.

        Raises:
            InvalidRequestError: the messages are not in order, or are not what the manifest says.
            InvalidBundleError: the bundle is not one, or the registry has another one of its organ and version.
            OverloadedError: others are being pushed.
            RegistryError: nothing can be written here or there.
        """
        operator = current_caller().id
        if self._pushes[operator] >= MAX_PUSHES_OF_ONE:
            raise OverloadedError(
                f"{MAX_PUSHES_OF_ONE} bundles are being pushed with these credentials already; push it later",
                RETRY_AFTER_S,
            )
        if self._pushes.total() >= MAX_PUSHES:
            raise OverloadedError(f"{MAX_PUSHES} bundles are being pushed already; push it later", RETRY_AFTER_S)
        self._pushes[operator] += 1
        try:
            with self._folder() as folder:
                try:
                    await self._fill(folder, requests)
                except OSError as error:
                    raise _cannot_write(self._incoming, error) from None
                return await asyncio.to_thread(self._into_registry, folder)
        except Exception:
            await _drain(requests)
            raise
        finally:
            self._pushes -= Counter([operator])

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        try:
            self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self._incoming))
        except OSError as error:
            raise _cannot_write(self._incoming, error) from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            # With the last push; making it and the folder in it is one step of the event loop.
            with suppress(OSError):
                self._incoming.rmdir()

    async def _fill(self, folder: Path, requests: AsyncIterator[control_pb2.PushRequest]) -> None:
        manifest: Manifest | None = None
        waiting: dict[str, FileEntry] = {}
        with _Writing(folder) as writing:
            async for request in requests:
                part = request.WhichOneof("part")
                if (part == "manifest") != (manifest is None):
                    raise InvalidRequestError("part", "must be the manifest first, and once")
                if part == "manifest":
                    manifest = self._manifest(request.manifest)
                    waiting = {entry.path: entry for entry in manifest.files}
                    (folder / MANIFEST_NAME).write_bytes(request.manifest)
                elif part == "signature":
                    _write_signature(folder / SIGNATURE_NAME, request.signature)
                elif part == "file":
                    await asyncio.to_thread(writing.end)
                    entry = waiting.pop(request.file, None)
                    if entry is None:
                        raise InvalidRequestError(
                            "file", f"{request.file[:150]!r} is no file of the manifest, or was sent already"
                        )
                    writing.begin(entry)
                elif part == "data":
                    await asyncio.to_thread(writing.write, request.data)
                else:
                    raise InvalidRequestError("part", "is empty; send a manifest, a signature, a file or data")
            await asyncio.to_thread(writing.end)
        if manifest is None:
            raise InvalidRequestError("part", "must be the manifest first; nothing came")
        if waiting:
            raise InvalidRequestError("file", f"{', '.join(sorted(waiting)[:5])} did not come")

    def _manifest(self, content: bytes) -> Manifest:
        manifest = Manifest.from_json(content, MANIFEST_NAME)
        if len(manifest.files) > MAX_FILES:
            raise InvalidBundleError(f"{MANIFEST_NAME}: names {len(manifest.files)} files; at most {MAX_FILES} may be")
        if manifest.size_bytes > self._max_bytes:
            raise InvalidBundleError(
                f"{MANIFEST_NAME}: its files have {manifest.size_bytes} bytes, above the limit "
                f"rollouts.max_push_bytes = {self._max_bytes}"
            )
        return manifest

    def _into_registry(self, folder: Path) -> Manifest:
        try:
            # The folder is used only here and goes away: the files need not be copied.
            return self._registry.push(folder, link=True)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise RegistryFullError(
                    f"the disk is full: the registry {self._registry.root} takes no further bundle; no part of this "
                    "one is visible. Make room there, then push again"
                ) from None
            raise RegistryError(
                f"the registry {self._registry.root} cannot be written: {error.strerror or type(error).__name__}; set "
                "experts.registry to one that can"
            ) from None


def _cannot_write(folder: Path, error: OSError) -> RegistryError:
    if error.errno in NO_ROOM:
        return RegistryFullError(
            f"the disk is full: Control keeps bundles that are on their way in {folder}, and nothing of this one was "
            "kept. Make room there, then push again"
        )
    return RegistryError(
        f"Control cannot write into {folder}: {error.strerror or type(error).__name__}; let the user who runs it write "
        "there, on a file system that is not mounted read-only"
    )


async def _drain(requests: AsyncIterator[control_pb2.PushRequest]) -> None:
    """Reads what still comes, for a moment: a client that writes to a call that has ended may not see how it ended."""
    with suppress(Exception):
        async with asyncio.timeout(DRAIN_S):
            async for _ in requests:
                pass


class _Writing:
    """The file that is being received, if there is one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entry: FileEntry | None = None
        self._file: BinaryIO | None = None
        self._written = 0

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self, entry: FileEntry) -> None:
        descriptor = os.open(self._folder / entry.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._entry, self._file, self._written = entry, os.fdopen(descriptor, "wb"), 0

    def write(self, data: bytes) -> None:
        if self._file is None or self._entry is None:
            raise InvalidRequestError("data", "belongs to no file; send the file's name first")
        self._written += len(data)
        if self._written > self._entry.size:
            raise InvalidRequestError(
                "data", f"{self._entry.path} has more bytes than the {self._entry.size} that the manifest says"
            )
        self._file.write(data)

    def end(self) -> None:
        if self._file is None or self._entry is None:
            return
        self._file.flush()
        # The registry may take the file over as it is.
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        if self._written < self._entry.size:
            raise InvalidRequestError(
                "data", f"{self._entry.path} ended after {self._written} of {self._entry.size} bytes"
            )


def _write_signature(path: Path, signature: bytes) -> None:
    if path.exists():
        raise InvalidRequestError("signature", "was sent already")
    if len(signature) > MAX_SIGNATURE_BYTES:
        raise InvalidRequestError("signature", f"is larger than {MAX_SIGNATURE_BYTES} bytes")
    path.write_bytes(signature)
