"""A bundle: one version of one organ's experts, a folder of a manifest and safetensors files.

The folder may contain `model.sig`, a signature over all files (`experts.bundles.signing`). The bundle's digest does not
include it.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from experts.bundles.layout import (
    PROBE_PARTS,
    PROTOTYPE_TENSOR,
    ProbePart,
    expected_tensors,
    expert_tensors_of_layer,
    gate_tensor,
    num_expected_tensors,
    probe_tensor,
)
from experts.bundles.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest
from experts.errors import InvalidBundleError

if TYPE_CHECKING:
    import torch

    from experts.bundles.safetensors_reader import SafetensorsFile
    from experts.kernels.base import ExpertWeights

SIGNATURE_NAME = "model.sig"
# A signature lists every file of the bundle once; typical ones have a few kilobytes.
MAX_SIGNATURE_BYTES = 1024 * 1024

_MAX_LISTED_TENSORS = 100_000
_READ_BYTES = 4 * 1024 * 1024


class Bundle:
    """Reads one bundle. Weights are views of memory-mapped files if the order in the files allows it.

    torch is imported when the first weight is read: parts that read manifests alone do without its memory.

    Attributes:
        manifest: the bundle's manifest.
        manifest_bytes: the bytes of the manifest file, which a signature covers.
        signature: the content of `model.sig`; None if the bundle is not signed.
    """

    def __init__(
        self,
        manifest: Manifest,
        locations: Mapping[str, Path],
        *,
        directory: Path | None = None,
        manifest_bytes: bytes | None = None,
        signature: bytes | None = None,
        fetch_again: Callable[[FileEntry], Path | None] | None = None,
    ) -> None:
        """
        Args:
            manifest: the manifest.
            locations: the paths of the manifest's files; files without one are not read.
            directory: the bundle's folder, which must contain nothing else; None if files are stored by digest.
            manifest_bytes: the manifest file; by default the output of `Manifest.to_json`.
            signature: the signature, if there is one.
            fetch_again: replaces a damaged local copy of a file and returns the new path; returns None if the file is
                not a copy.
        """
        self.manifest = manifest
        self.manifest_bytes = manifest.to_json() if manifest_bytes is None else manifest_bytes
        self.signature = signature
        self._locations = dict(locations)
        self._directory = directory
        self._fetch_again = fetch_again

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Opens the bundle in a folder. Reads only the manifest; `verify` checks the files.

        Raises:
            InvalidBundleError: the manifest is missing, a link or invalid, or the signature is a link or too large.
        """
        path = directory / MANIFEST_NAME
        if path.is_symlink() or not path.is_file():
            raise InvalidBundleError(f"{directory}: has no {MANIFEST_NAME} that is a plain file; it is no bundle")
        with path.open("rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
        manifest = Manifest.from_json(content, str(path))
        return cls(
            manifest,
            {entry.path: directory / entry.path for entry in manifest.files},
            directory=directory,
            manifest_bytes=content,
            signature=_read_signature(directory / SIGNATURE_NAME),
        )

    @property
    def digest(self) -> str:
        """The version's identity: the manifest's digest."""
        return self.manifest.digest

    @property
    def locations(self) -> dict[str, Path]:
        """The path of each file of the manifest."""
        return dict(self._locations)

    def load_layer(self, layer: int) -> "ExpertWeights":
        """One layer's experts, on the CPU, as the files have them.

        Raises:
            IndexError: there is no such layer.
            InvalidBundleError: a tensor is missing or a file is damaged.
        """
        from experts.kernels.base import ExpertWeights

        self._check_layer(layer)
        gate, up, down = (self._stacked(names) for names in expert_tensors_of_layer(self.manifest, layer).values())
        return ExpertWeights(gate, up, down)

    def gate_ED(self, layer: int) -> "torch.Tensor":
        """The gate's rows of this organ's experts in one layer: experts × hidden.

        Raises:
            IndexError: there is no such layer.
            InvalidBundleError: the tensor is missing or its file is damaged.
        """
        self._check_layer(layer)
        name = gate_tensor(layer)
        return self._file_of(name).tensor(name)

    def tensor(self, name: str) -> "torch.Tensor":
        """One tensor by its name in the bundle.

        Raises:
            InvalidBundleError: the tensor is missing or its file is damaged.
        """
        return self._file_of(name).tensor(name)

    def prototype(self) -> "torch.Tensor | None":
        """The mean vision feature of this organ's images, [hidden] in float32, if the bundle has one."""
        if not self.manifest.has_prototype:
            return None
        return self._file_of(PROTOTYPE_TENSOR).tensor(PROTOTYPE_TENSOR)

    def probe(self, layer: int) -> "dict[ProbePart, torch.Tensor]":
        """The recorded inputs and output of one layer; see `experts.bundles.probe`.

        Raises:
            IndexError: there is no such layer.
            InvalidBundleError: the bundle has no probe, or its file is damaged.
        """
        self._check_layer(layer)
        names = {part: probe_tensor(layer, part) for part in PROBE_PARTS}
        return {part: self._file_of(name).tensor(name) for part, name in names.items()}

    def verify(
        self, *, digests: bool = True, finite: bool = False, read: Callable[[int], None] = lambda _: None
    ) -> None:
        """Checks that the bundle matches its manifest exactly.

        Args:
            digests: read every file once and compare its SHA-256.
            finite: refuse weights with NaN or infinity.
            read: called with the number of further bytes that were read to compare digests.

        Raises:
            InvalidBundleError: names the file or tensor and the problem.
        """
        if self._directory is not None:
            self._verify_directory(self._directory)
        self.verify_files(digests=digests, read=read)
        self._verify_tensors()
        if finite:
            self._verify_finite()

    def verify_files(self, *, digests: bool = True, read: Callable[[int], None] = lambda _: None) -> None:
        """Checks only the files with a location; see `verify`.

        Raises:
            InvalidBundleError: names the file and the problem.
        """
        for entry in self.manifest.files:
            if entry.path not in self._locations:
                continue
            try:
                verify_file(self._locations[entry.path], entry, digest=digests, read=read)
            except InvalidBundleError:
                fetched = self._fetch_again(entry) if self._fetch_again is not None else None
                if fetched is None:
                    raise
                self._locations[entry.path] = fetched
                # The mapping is of the damaged copy.
                self.__dict__.pop("_files", None)
                self.__dict__.pop("_file_by_tensor", None)

    @cached_property
    def _files(self) -> "dict[str, SafetensorsFile]":
        from experts.bundles.safetensors_reader import SafetensorsFile

        return {
            entry.path: SafetensorsFile(self._locations[entry.path], display_name=entry.path)
            for entry in self.manifest.files
            if entry.path in self._locations
        }

    @cached_property
    def _file_by_tensor(self) -> "dict[str, SafetensorsFile]":
        files: dict[str, SafetensorsFile] = {}
        for file in self._files.values():
            for name in file.tensors:
                if name in files:
                    raise InvalidBundleError(f"{file.name}: tensor {name} is also in {files[name].name}")
                files[name] = file
        return files

    def _file_of(self, name: str) -> "SafetensorsFile":
        if name not in self._file_by_tensor:
            raise InvalidBundleError(f"bundle {self.manifest.name} {self.manifest.version}: tensor {name} is missing")
        return self._file_by_tensor[name]

    def _stacked(self, names: list[str]) -> "torch.Tensor":
        files = {self._file_of(name) for name in names}
        if len(files) == 1:
            return files.pop().stacked(names)
        import torch

        return torch.stack([self._file_of(name).tensor(name) for name in names])

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.manifest.num_layers:
            raise IndexError(f"layer {layer}: the bundle has layers 0 to {self.manifest.num_layers - 1}")

    def _verify_directory(self, directory: Path) -> None:
        needed = {MANIFEST_NAME, *self._locations}
        found = set()
        for entry in os.scandir(directory):
            if entry.is_symlink():
                raise InvalidBundleError(f"{entry.name}: is a link; a bundle holds plain files only")
            if entry.name not in needed | {SIGNATURE_NAME}:
                hint = "remove it or add it there"
                if not entry.name.endswith(".safetensors"):
                    hint = (
                        "and a bundle holds safetensors files only: pickles, code and folders are never read; remove it"
                    )
                raise InvalidBundleError(f"{entry.name}: is not in the manifest, {hint}")
            found.add(entry.name)
        if missing := sorted(needed - found):
            raise InvalidBundleError(f"{', '.join(missing)}: named by the manifest and missing")

    def _verify_tensors(self) -> None:
        found = self._file_by_tensor
        count = num_expected_tensors(self.manifest)
        if count > len(found) + _MAX_LISTED_TENSORS:
            # Sizes in a manifest must not determine how much memory is allocated here.
            raise InvalidBundleError(f"the manifest's sizes make {count} tensors, the files hold {len(found)}")
        expected = expected_tensors(self.manifest)
        if missing := [name for name in expected if name not in found]:
            self._refuse_missing_layer(set(missing))
            raise InvalidBundleError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
        if unexpected := [name for name in found if name not in expected]:
            raise InvalidBundleError(
                f"{found[unexpected[0]].name}: {len(unexpected)} unexpected tensors, the first is {unexpected[0]}"
            )
        for name, (dtype, shape) in expected.items():
            info = found[name].tensors[name]
            if info.dtype != dtype:
                raise InvalidBundleError(f"{found[name].name}: {name} is {info.dtype}, the manifest says {dtype}")
            if info.shape != shape:
                raise InvalidBundleError(
                    f"{found[name].name}: {name} has the shape {list(info.shape)}, the manifest's sizes make it "
                    f"{list(shape)}"
                )

    def _refuse_missing_layer(self, missing: set[str]) -> None:
        for layer in range(self.manifest.num_layers):
            projections = expert_tensors_of_layer(self.manifest, layer).values()
            if missing.issuperset(name for names in projections for name in names):
                raise InvalidBundleError(
                    f"layer {layer} is missing: no file has any of its experts, and the manifest says that there are "
                    f"layers 0 to {self.manifest.num_layers - 1}"
                )

    def _verify_finite(self) -> None:
        from experts.bundles.finite import is_finite

        for name, file in self._file_by_tensor.items():
            tensor = file.tensor(name)
            if not is_finite(tensor):
                raise InvalidBundleError(f"{file.name}: {name} has values that are infinite or not a number")


def verify_file(
    path: Path, entry: FileEntry, *, digest: bool = True, read: Callable[[int], None] = lambda _: None
) -> None:
    """Checks a file against its entry in a manifest.

    Raises:
        InvalidBundleError: it is missing or not a plain file, or its size or SHA-256 differs.
    """
    if path.is_symlink():
        raise InvalidBundleError(f"{entry.path}: is a link; a bundle holds plain files only")
    if not path.is_file():
        raise InvalidBundleError(f"{entry.path}: named by the manifest and missing, or no plain file")
    size = path.stat().st_size
    if size != entry.size:
        raise InvalidBundleError(f"{entry.path}: has {size} bytes, the manifest says {entry.size}")
    if digest and (found := file_sha256(path, read)) != entry.sha256:
        raise InvalidBundleError(f"{entry.path}: is damaged, its SHA-256 is {found}, the manifest says {entry.sha256}")


def file_sha256(path: Path, read: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file's content, in hexadecimal, read in pieces; `read` is called with the size of each."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            read(len(piece))
    return digest.hexdigest()


def _read_signature(path: Path) -> bytes | None:
    if path.is_symlink():
        raise InvalidBundleError(f"{path.name}: is a link; a bundle holds plain files only")
    if not path.exists():
        return None
    if not path.is_file():
        raise InvalidBundleError(f"{path.name}: is no plain file")
    with path.open("rb") as file:
        content = file.read(MAX_SIGNATURE_BYTES + 1)
    if len(content) > MAX_SIGNATURE_BYTES:
        raise InvalidBundleError(f"{path.name}: is larger than {MAX_SIGNATURE_BYTES} bytes; this is no signature")
    return content
