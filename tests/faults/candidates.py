"""Bad candidates of every kind, made out of what an organ serves: each past the point where it must be noticed."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experts.bundles.bundle import Bundle
from experts.bundles.digest import canonical_json
from experts.bundles.layout import PROBE_FILE, expert_tensor, probe_tensor
from experts.bundles.manifest import MANIFEST_NAME, Manifest
from experts.bundles.probe import make_inputs, probe_sizes, reference_output
from experts.bundles.writer import write_bundle
from tests.changed_bundles import changed_bundle, changed_description, not_a_number
from tests.experts.bad_bundles import replace_tensors

# Times the incumbent's size, under a limit of 120 MB on replicas.
TOO_LARGE = 40
LIMIT_BYTES = 120_000_000


@dataclass(frozen=True)
class Workshop:
    """Where a candidate is made.

    Attributes:
        incumbent: the bundle that is served.
        version: the candidate's.
        folder: an empty one for it.
        registry: the root of the system's registry, for what goes wrong after a push.
        push: to the running system.
    """

    incumbent: Bundle
    version: str
    folder: Path
    registry: Path
    push: Callable[[Path], object]

    def make(self, change: Callable[[torch.Tensor], torch.Tensor] | None = None, **fields: Any) -> str:
        """Pushes a version with other weights, or that says something else of itself."""
        digest = changed_bundle(self.folder, self.incumbent, self.version, change or self.own_weights, **fields).digest
        self.push(self.folder)
        return digest

    def own_weights(self, tensor: torch.Tensor) -> torch.Tensor:
        """Weights that no other version of any organ has: the registry keeps equal files once, and some get damaged."""
        return tensor * (1.5 + int(self.version.rsplit(".", 1)[-1]) / 128)

    def write(self, tensor: Callable[[str], torch.Tensor], **fields: Any) -> str:
        digest = write_bundle(self.folder, changed_description(self.incumbent, self.version, **fields), tensor).digest
        self.push(self.folder)
        return digest

    @property
    def manifest_path(self) -> Path:
        return self.registry / "bundles" / self.incumbent.manifest.organ / self.version / MANIFEST_NAME

    def stored_experts(self) -> Path:
        """The file in the registry with the candidate's experts, which no other bundle has, ready to be damaged."""
        manifest = Manifest.from_json(self.manifest_path.read_bytes(), MANIFEST_NAME)
        largest = max(manifest.files, key=lambda entry: entry.size)
        path = self.registry / "files" / f"{largest.sha256}.safetensors"
        # The pushed folder may be the same file.
        shutil.copyfile(path, path.with_suffix(".copy"))
        path.with_suffix(".copy").replace(path)
        return path

    def say(self, **changes: Any) -> str:
        """Changes the manifest in the registry, and so its digest."""
        content = {**json.loads(self.manifest_path.read_bytes()), **changes}
        self.manifest_path.unlink()
        self.manifest_path.write_bytes(canonical_json(content))
        return Manifest.from_json(self.manifest_path.read_bytes(), MANIFEST_NAME).digest


def corrupt(workshop: Workshop) -> str:
    digest = workshop.make()
    with workshop.stored_experts().open("r+b") as file:
        file.seek(-7, 2)
        file.write(b"\x42")
    return digest


def truncated(workshop: Workshop) -> str:
    digest = workshop.make()
    with workshop.stored_experts().open("r+b") as file:
        file.truncate(file.seek(0, 2) - 100)
    return digest


def gone(workshop: Workshop) -> str:
    digest = workshop.make()
    workshop.stored_experts().unlink()
    return digest


def lies(**changes: Any) -> Callable[[Workshop], str]:
    def make(workshop: Workshop) -> str:
        workshop.make()
        return workshop.say(**changes)

    return make


def infinite(workshop: Workshop) -> str:
    return workshop.make(lambda tensor: tensor.index_fill(0, torch.tensor(3), torch.inf))


def other_self_test(workshop: Workshop) -> str:
    """Brings outputs that are not those of its weights."""
    sizes = probe_sizes(workshop.incumbent.manifest.num_experts)
    description = changed_description(workshop.incumbent, workshop.version, probe=sizes)
    write_bundle(workshop.folder, description, workshop.incumbent.tensor)
    output = probe_tensor(2, "output")
    replace_tensors(workshop.folder, PROBE_FILE, lambda tensors: tensors.update({output: tensors[output] * 1.01}))
    workshop.push(workshop.folder)
    return Manifest.from_json(workshop.manifest_path.read_bytes(), MANIFEST_NAME).digest


def badly_signed(workshop: Workshop) -> str:
    """With a signature that is another bundle's."""
    digest = workshop.make()
    (workshop.manifest_path.parent / f"{digest}.sig").write_bytes(b'{"mediaType": "something else"}')
    return digest


def wide(factor: int) -> Callable[[Workshop], str]:
    """Computes what the incumbent does, with every row of its weights many times over."""

    def tensor_of(workshop: Workshop) -> Callable[[str], torch.Tensor]:
        def tensor(name: str) -> torch.Tensor:
            found = workshop.incumbent.tensor(name)
            if "down_proj" in name:
                return found.repeat(1, factor) / factor
            return found.repeat(factor, 1) if ".experts." in name else found

        return tensor

    def make(workshop: Workshop) -> str:
        width = workshop.incumbent.manifest.intermediate_size * factor
        return workshop.write(tensor_of(workshop), intermediate_size=width)

    return make


def overflows(workshop: Workshop) -> str:
    """Finite weights whose outputs are finite for the inputs of the self-test, but hardly, and not for others."""
    manifest = workshop.incumbent.manifest
    inputs = make_inputs(manifest, probe_sizes(manifest.num_experts), 0)
    # Kernels weight the outputs last.
    inputs = replace(inputs, weight_TK=torch.ones_like(inputs.weight_TK))
    largest = float(reference_output(workshop.incumbent.load_layer(0), inputs).abs().max())
    scale = 0.9 * torch.finfo(torch.float32).max / largest
    loud = {expert_tensor(0, expert, "down") for expert in range(manifest.num_experts)}
    return workshop.write(lambda name: workshop.incumbent.tensor(name) * (scale if name in loud else 1))


# Kind → how it is made, and the reason that is given; all are found before any request could reach them.
REFUSED: Mapping[str, tuple[Callable[[Workshop], str], str]] = {
    "not a number": (lambda workshop: workshop.make(not_a_number), "not a number"),
    "infinite": (infinite, "infinite"),
    "corrupt": (corrupt, "is damaged, its SHA-256 is"),
    "truncated": (truncated, "bytes, the manifest says"),
    "gone": (gone, "missing"),
    "wrong shape": (lies(intermediate_size=96), "shape"),
    "wrong gate": (lies(num_experts=5, source_experts=[0, 1, 2, 3, 4]), "tensors are missing"),
    "wrong backbone": (lambda workshop: workshop.make(backbone_digest="c" * 64), "backbone"),
    "other sizes": (lies(hidden_size=128), "128"),
    "other layers": (lies(num_layers=3), "layers"),
    "other outputs": (other_self_test, "differs in float32 from the recorded output"),
}
# These need a system that is set up for them.
REFUSED_BY_SETTING: Mapping[str, tuple[Callable[[Workshop], str], str]] = {
    "too large": (wide(TOO_LARGE), f"above the limit max_resident_bytes = {LIMIT_BYTES}"),
    "wrong signature": (badly_signed, "signature"),
}
# Noticed by what requests get.
OVERFLOWS: tuple[Callable[[Workshop], str], str] = (overflows, "infinite or not a number")
