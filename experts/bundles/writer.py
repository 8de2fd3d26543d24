"""Writes bundles, tensor by tensor, and derives one bundle from another."""

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from experts.bundles.bundle import Bundle
from experts.bundles.layout import (
    EXPERTS_FILE,
    GATE_FILE,
    PROBE_FILE,
    PROTOTYPE_FILE,
    TensorSpec,
    expert_stacks,
    gate_tensors,
    probe_tensors,
    prototype_tensors,
)
from experts.bundles.manifest import MANIFEST_NAME, BundleDescription, FileEntry, Manifest
from experts.bundles.new_folder import new_bundle_folder
from experts.bundles.probe import NormWeight, ProbeSource
from experts.bundles.safetensors_writer import StreamingWriter
from experts.kernels.base import ExpertWeights

TensorSource = Callable[[str], torch.Tensor]

MAX_FILE_BYTES = 5 * 1000**3
_ABOUT_WEIGHTS = {
    "num_layers",
    "num_experts",
    "hidden_size",
    "intermediate_size",
    "dtype",
    "gate_dtype",
    "has_prototype",
    "probe",
}


def write_bundle(
    directory: Path,
    description: BundleDescription,
    source: TensorSource,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    norm_weight: NormWeight | None = None,
    probed: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Writes a bundle. The folder appears atomically when it is complete.

    Args:
        directory: the folder to make; its parent exists.
        description: what the manifest should say. With `probe` set, the self-test's inputs and outputs are recorded.
        source: gives a tensor by its name in the bundle; asked once for each, in the files' order, and only one
            tensor is held at a time.
        max_file_bytes: experts are spread over several files, none with more bytes of weights than this, unless one
            layer's matrices of one projection alone have more.
        norm_weight: of the norm before the experts, for the probe's inputs to have the backbone's scale.
        probed: called with each layer of which the probe was recorded.

    Returns:
        The manifest, whose digest is the bundle's identity.

    Raises:
        FileExistsError: the folder exists.
        ValueError: a tensor of the source has another dtype or shape than described.
    """
    with new_bundle_folder(directory) as partial:
        shards = _shards(description, max_file_bytes)
        files = [
            _write_file(partial / _shard_name(index, len(shards)), tensors, source)
            for index, tensors in enumerate(shards)
        ]
        files.append(_write_file(partial / GATE_FILE, gate_tensors(description), source))
        if description.has_prototype:
            files.append(_write_file(partial / PROTOTYPE_FILE, prototype_tensors(description), source))
        if description.probe is not None:

            def load_layer(layer: int) -> ExpertWeights:
                probed(layer)
                # Opened again for each layer: the pages of a map that is gone count for no process.
                written = _manifest(description, files)
                return Bundle(written, {entry.path: partial / entry.path for entry in files}).load_layer(layer)

            probe = ProbeSource(description, load_layer, norm_weight)
            files.append(_write_file(partial / PROBE_FILE, probe_tensors(description), probe))
        manifest = _manifest(description, files)
        (partial / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def derive_bundle(directory: Path, source: Bundle, changes: Mapping[str, Any]) -> Manifest:
    """Makes another bundle with the same weights, for example for another organ. Files are hard-linked if possible.

    Args:
        directory: the folder to create; its parent must exist.
        source: the bundle to copy.
        changes: the fields of its description that differ; sizes and dtypes must not.

    Returns:
        The new manifest.

    Raises:
        FileExistsError: the folder exists.
        ValueError: a changed field is invalid or must not be changed.
    """
    if fixed := sorted(set(changes) & _ABOUT_WEIGHTS):
        raise ValueError(f"{', '.join(fixed)} cannot differ in a bundle of the same weights")
    content = source.manifest.model_dump(exclude={"format", "files"})
    manifest = _manifest(BundleDescription.model_validate({**content, **changes}), list(source.manifest.files))
    with new_bundle_folder(directory) as partial:
        for name, location in source.locations.items():
            link_or_copy(location, partial / name)
        (partial / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-links a file, or copies it if the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target, follow_symlinks=False)


def _manifest(description: BundleDescription, files: list[FileEntry]) -> Manifest:
    return Manifest(format="echovlm-experts-1", files=tuple(files), **description.model_dump())


def _shards(description: BundleDescription, max_file_bytes: int) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    room = max_file_bytes
    for stack in expert_stacks(description):
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in stack.values())
        if shards[-1] and size > room:
            shards.append({})
            room = max_file_bytes
        shards[-1].update(stack)
        room -= size
    return shards


def _shard_name(index: int, count: int) -> str:
    return EXPERTS_FILE if count == 1 else f"experts-{index + 1:05}-of-{count:05}.safetensors"


def _write_file(path: Path, tensors: Mapping[str, TensorSpec], source: TensorSource) -> FileEntry:
    with StreamingWriter(path, tensors, {"format": "pt"}) as writer:
        for name in writer.order:
            writer.write(name, source(name))
    assert writer.written is not None
    return FileEntry(path=path.name, sha256=writer.written.sha256, size=writer.written.size)
