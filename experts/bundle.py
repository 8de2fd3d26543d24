"""A bundle: one version of one organ's experts, a folder of a manifest and safetensors files."""

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Self

import torch

from experts.bundle_layout import (
    PROTOTYPE_TENSOR,
    expected_tensors,
    expert_tensors_of_layer,
    gate_tensor,
)
from experts.errors import InvalidBundleError
from experts.kernels.base import ExpertWeights
from experts.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest
from experts.safetensors_reader import SafetensorsFile

_READ_BYTES = 4 * 1024 * 1024


class Bundle:
    """Reads one bundle. Weights are views of memory-mapped files wherever the files' order allows.

    Attributes:
        manifest: what the bundle says about itself.
    """

    def __init__(self, manifest: Manifest, locations: Mapping[str, Path], *, directory: Path | None = None) -> None:
        """Joins a manifest to its files.

        Args:
            manifest: the manifest.
            locations: where each of the manifest's files lies.
            directory: the bundle's own folder, which must hold nothing else; none where files are stored by digest.
        """
        self.manifest = manifest
        self._locations = dict(locations)
        self._directory = directory

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Opens the bundle in a folder; `verify` looks at more than the manifest.

        Raises:
            InvalidBundleError: there is no manifest, it is a link, or it is not valid.
        """
        path = directory / MANIFEST_NAME
        if path.is_symlink() or not path.is_file():
            raise InvalidBundleError(f"{directory}: has no {MANIFEST_NAME} that is a plain file; it is no bundle")
        with path.open("rb") as file:
            manifest = Manifest.from_json(file.read(MAX_MANIFEST_BYTES + 1), str(path))
        return cls(manifest, {entry.path: directory / entry.path for entry in manifest.files}, directory=directory)

    @property
    def digest(self) -> str:
        """The version's identity: the manifest's digest."""
        return self.manifest.digest

    @property
    def locations(self) -> dict[str, Path]:
        """Where each file of the manifest lies."""
        return dict(self._locations)

    def load_layer(self, layer: int) -> ExpertWeights:
        """One layer's experts, on the CPU, as the files have them.

        Raises:
            IndexError: there is no such layer.
            InvalidBundleError: a tensor is missing or a file is damaged.
        """
        self._check_layer(layer)
        gate, up, down = (self._stacked(names) for names in expert_tensors_of_layer(self.manifest, layer).values())
        return ExpertWeights(gate, up, down)

    def gate_ED(self, layer: int) -> torch.Tensor:
        """The gate's rows of this organ's experts in one layer: experts × hidden.

        Raises:
            IndexError: there is no such layer.
            InvalidBundleError: the tensor is missing or its file is damaged.
        """
        self._check_layer(layer)
        name = gate_tensor(layer)
        return self._file_of(name).tensor(name)

    def prototype(self) -> torch.Tensor | None:
        """The mean vision feature of this organ's images, [hidden] in float32, if the bundle has one."""
        if not self.manifest.has_prototype:
            return None
        return self._file_of(PROTOTYPE_TENSOR).tensor(PROTOTYPE_TENSOR)

    def verify(self, *, digests: bool = True, finite: bool = False) -> None:
        """Checks that the bundle is exactly what its manifest says.

        Args:
            digests: read every file once and compare its SHA-256.
            finite: refuse weights that are infinite or not a number.

        Raises:
            InvalidBundleError: names the file or tensor and what is wrong with it.
        """
        if self._directory is not None:
            self._verify_directory(self._directory)
        for entry in self.manifest.files:
            verify_file(self._locations[entry.path], entry, digest=digests)
        self._verify_tensors()
        if finite:
            self._verify_finite()

    @cached_property
    def _files(self) -> dict[str, SafetensorsFile]:
        return {
            entry.path: SafetensorsFile(self._locations[entry.path], display_name=entry.path)
            for entry in self.manifest.files
        }

    @cached_property
    def _file_by_tensor(self) -> dict[str, SafetensorsFile]:
        files: dict[str, SafetensorsFile] = {}
        for file in self._files.values():
            for name in file.tensors:
                if name in files:
                    raise InvalidBundleError(f"{file.name}: tensor {name} is also in {files[name].name}")
                files[name] = file
        return files

    def _file_of(self, name: str) -> SafetensorsFile:
        if name not in self._file_by_tensor:
            raise InvalidBundleError(f"bundle {self.manifest.name} {self.manifest.version}: tensor {name} is missing")
        return self._file_by_tensor[name]

    def _stacked(self, names: list[str]) -> torch.Tensor:
        files = {self._file_of(name) for name in names}
        if len(files) == 1:
            return files.pop().stacked(names)
        return torch.stack([self._file_of(name).tensor(name) for name in names])

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.manifest.num_layers:
            raise IndexError(f"layer {layer}: the bundle has layers 0 to {self.manifest.num_layers - 1}")

    def _verify_directory(self, directory: Path) -> None:
        known = {MANIFEST_NAME, *self._locations}
        found = set()
        for entry in os.scandir(directory):
            if entry.is_symlink():
                raise InvalidBundleError(f"{entry.name}: is a link; a bundle holds plain files only")
            if entry.name not in known:
                raise InvalidBundleError(f"{entry.name}: is not in the manifest; remove it or add it there")
            found.add(entry.name)
        if missing := sorted(known - found):
            raise InvalidBundleError(f"{', '.join(missing)}: named by the manifest and missing")

    def _verify_tensors(self) -> None:
        expected = expected_tensors(self.manifest)
        found = self._file_by_tensor
        if missing := [name for name in expected if name not in found]:
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

    def _verify_finite(self) -> None:
        for name, file in self._file_by_tensor.items():
            if not torch.isfinite(file.tensor(name)).all():
                raise InvalidBundleError(f"{file.name}: {name} has values that are infinite or not a number")


def verify_file(path: Path, entry: FileEntry, *, digest: bool = True) -> None:
    """Checks that a file is the one that a manifest names.

    Raises:
        InvalidBundleError: missing, a link or no plain file, of another size, or of another SHA-256.
    """
    if path.is_symlink():
        raise InvalidBundleError(f"{entry.path}: is a link; a bundle holds plain files only")
    if not path.is_file():
        raise InvalidBundleError(f"{entry.path}: named by the manifest and missing, or no plain file")
    size = path.stat().st_size
    if size != entry.size:
        raise InvalidBundleError(f"{entry.path}: has {size} bytes, the manifest says {entry.size}")
    if digest and (found := file_sha256(path)) != entry.sha256:
        raise InvalidBundleError(f"{entry.path}: is damaged, its SHA-256 is {found}, the manifest says {entry.sha256}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
