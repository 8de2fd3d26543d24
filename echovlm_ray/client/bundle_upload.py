"""Converts a bundle's folder to the messages of a push: manifest, signature, then the files in pieces."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from echovlm_ray.client.errors import FieldViolation, InvalidRequestError
from protos import control_pb2

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "model.sig"
# The same limits as Control's.
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
PIECE_BYTES = 1024 * 1024
FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,150}")


@dataclass(frozen=True, slots=True)
class BundleUpload:
    """The contents of a push. The server checks them; here only the sizes are checked.

    Attributes:
        manifest: the bytes of the manifest.
        signature: the bytes of the signature, or empty.
        files: name in the manifest → path of the file.
        size_bytes: the size of all files.
    """

    manifest: bytes
    signature: bytes
    files: dict[str, Path]
    size_bytes: int

    def messages(self, progress: Callable[[int], None] = lambda nbytes: None) -> Iterator[control_pb2.PushRequest]:
        """The messages in order; `progress` is called with the size of each piece."""
        yield control_pb2.PushRequest(manifest=self.manifest)
        if self.signature:
            yield control_pb2.PushRequest(signature=self.signature)
        for name, path in self.files.items():
            yield control_pb2.PushRequest(file=name)
            with path.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    progress(len(piece))
                    yield control_pb2.PushRequest(data=piece)


def open_upload(directory: Path) -> BundleUpload:
    """Reads a bundle's manifest and locates its files.

    Raises:
        InvalidRequestError: the folder is not a bundle: the manifest or a file is missing, a link, or has another size.
    """
    manifest = _read(directory / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    try:
        entries = [(str(entry["path"]), int(entry["size"])) for entry in json.loads(manifest)["files"]]
    except (ValueError, TypeError, KeyError):
        raise _invalid(f"{directory / MANIFEST_NAME} is no manifest of a bundle") from None
    files: dict[str, Path] = {}
    for name, size in entries:
        path = directory / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise _invalid(f"{name[:200]!r} in the manifest leads out of the bundle's folder {directory}")
        if not FILE_NAME.fullmatch(name):
            raise _invalid(
                f"the manifest names a file {name[:200]!r}; a name has letters, digits, '.', '_' and '-', at most 150 "
                "of them"
            )
        if path.is_symlink():
            raise _invalid(f"{name[:200]!r} in the manifest leads out of the bundle's folder {directory}")
        if not path.is_file():
            raise _invalid(f"{path} is missing, and the manifest names it")
        if path.stat().st_size != size:
            raise _invalid(f"{path} has {path.stat().st_size} bytes; the manifest says {size}")
        files[name] = path
    signature = directory / SIGNATURE_NAME
    content = _read(signature, MAX_MANIFEST_BYTES) if os.path.lexists(signature) else b""
    return BundleUpload(manifest, content, files, sum(size for _, size in entries))


def _read(path: Path, limit: int) -> bytes:
    if path.is_symlink():
        raise _invalid(f"{path} is a link; put the file itself there")
    try:
        if path.stat().st_size > limit:
            raise _invalid(f"{path} has more than {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise _invalid(f"{path} cannot be read: {error.strerror}; name a bundle's folder") from None


def _invalid(text: str) -> InvalidRequestError:
    return InvalidRequestError(text, violations=[FieldViolation("", text)])
