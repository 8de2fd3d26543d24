"""The kinds of bad bundles, each made from a good one, with the text of its refusal."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from experts.bundles.bundle import file_sha256
from experts.bundles.layout import expert_tensor, gate_tensor
from experts.bundles.manifest import BundleDescription
from experts.bundles.writer import write_bundle

SMALL = BundleDescription(
    name="b",
    organ="breast",
    version="1.0.0",
    description="",
    authors="",
    license="MIT",
    intended_use="",
    backbone_digest="0" * 64,
    num_layers=1,
    num_experts=1,
    hidden_size=2,
    intermediate_size=2,
    dtype="float32",
)


def small_bundle(folder: str) -> Path:
    """The smallest there can be, for many examples."""
    directory = Path(folder) / "bundle"
    write_bundle(directory, SMALL, lambda name: torch.ones((1, 2) if ".gate.weight" in name else (2, 2)))
    return directory


def declare(directory: Path, **changes: Any) -> None:
    """Makes the manifest agree with the files as they are now."""
    path = directory / "manifest.json"
    content = json.loads(path.read_bytes())
    for file in content["files"]:
        where = directory / file["path"]
        file.update(sha256=file_sha256(where), size=where.stat().st_size)
    path.write_text(json.dumps({**content, **changes}))


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def replace_tensors(directory: Path, file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / file).items()}
    change(tensors)
    save_file(tensors, directory / file)
    declare(directory)


def flip_last_byte(directory: Path) -> None:
    path = directory / "experts.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(directory: Path) -> None:
    os.truncate(directory / "experts.safetensors", 1000)


def truncate_and_declare(directory: Path) -> None:
    truncate(directory)
    declare(directory)


def replace_by_link(directory: Path) -> None:
    path = directory / "experts.safetensors"
    path.rename(directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")


def link_the_signature(directory: Path) -> None:
    (directory / "model.sig").symlink_to(directory / "manifest.json")


def replace_by_pipe(directory: Path) -> None:
    (directory / "gate.safetensors").unlink()
    os.mkfifo(directory / "gate.safetensors")


def replace_by_zipped_pickle(directory: Path) -> None:
    torch.save({gate_tensor(0): torch.zeros(3, 16)}, directory / "gate.safetensors")
    declare(directory)


def replace_by_plain_pickle(directory: Path) -> None:
    torch.save(
        {gate_tensor(0): torch.zeros(3, 16)}, directory / "gate.safetensors", _use_new_zipfile_serialization=False
    )
    declare(directory)


def name_a_pickle(directory: Path) -> None:
    torch.save({gate_tensor(0): torch.zeros(3, 16)}, directory / "weights.pkl")
    edit_manifest(directory, lambda content: content["files"].append({**content["files"][0], "path": "weights.pkl"}))


def leave_by_path(directory: Path) -> None:
    edit_manifest(directory, lambda content: content["files"][0].update(path="../outside.safetensors"))


def repeat_a_tensor(directory: Path) -> None:
    extra = load_file(directory / "gate.safetensors")[gate_tensor(0)]
    replace_tensors(directory, "experts.safetensors", lambda tensors: tensors.update({gate_tensor(0): extra}))


def repeat_a_tensor_in_one_header(directory: Path) -> None:
    path = directory / "gate.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)[gate_tensor(0)])
    header = header[:-1] + f',"{gate_tensor(0)}":{entry}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    declare(directory)


def lose(file: str, *names: str) -> Callable[[Path], None]:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    return lambda directory: replace_tensors(directory, file, remove)


def change_tensor(file: str, name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda directory: replace_tensors(
        directory, file, lambda tensors: tensors.update({name: make(tensors[name])})
    )


LAYER_1 = [expert_tensor(1, expert, projection) for expert in range(3) for projection in ("gate", "up", "down")]

# Of the bundle that `make_bundle` makes: kind → how it gets bad, and the reason that is given.
BAD_BUNDLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (
        lambda directory: (directory / "gate.safetensors").unlink(),
        "gate.safetensors: named by the manifest and missing",
    ),
    "extra weights": (
        lambda directory: (directory / "extra.safetensors").touch(),
        "extra.safetensors: is not in the manifest, remove it or add it there",
    ),
    "extra code": (
        lambda directory: (directory / "code.py").touch(),
        "code.py: is not in the manifest, and a bundle holds safetensors files only: pickles, code",
    ),
    "extra pickle": (
        lambda directory: (directory / "optimizer.pt").write_bytes(b"\x80\x04K\x01."),
        "optimizer.pt: is not in the manifest, and a bundle holds safetensors files only: pickles",
    ),
    "extra folder": (
        lambda directory: (directory / "folder").mkdir(),
        "folder: is not in the manifest, and a bundle holds safetensors files only",
    ),
    "wrong size": (truncate, "experts.safetensors: has 1000 bytes, the manifest says"),
    "wrong digest": (flip_last_byte, "experts.safetensors: is damaged, its SHA-256 is"),
    "link": (replace_by_link, "experts.safetensors: is a link"),
    "linked signature": (link_the_signature, "model.sig: is a link"),
    "pipe": (replace_by_pipe, "gate.safetensors: .*no plain file"),
    "zipped pickle": (replace_by_zipped_pickle, "gate.safetensors: is a pickle and no safetensors file"),
    "plain pickle": (replace_by_plain_pickle, "gate.safetensors: is a pickle and no safetensors file"),
    "named pickle": (name_a_pickle, "files.2.path: .*'weights.pkl' is not a .safetensors file"),
    "path that leaves": (leave_by_path, "files.0.path: .*leaves the bundle"),
    "truncated": (truncate_and_declare, "experts.safetensors: .*truncated"),
    "duplicate over files": (
        repeat_a_tensor,
        "gate.safetensors: tensor layers.0.gate.weight is also in experts.safetensors",
    ),
    "duplicate in a file": (repeat_a_tensor_in_one_header, "gate.safetensors: .*a name occurs twice"),
    "missing tensor": (
        lose("gate.safetensors", gate_tensor(1)),
        "1 tensors are missing, the first is layers.1.gate.weight",
    ),
    "missing layer": (lose("experts.safetensors", *LAYER_1), "layer 1 is missing: no file has any of its experts"),
    "missing expert": (
        lose("experts.safetensors", *(expert_tensor(0, 1, projection) for projection in ("gate", "up", "down"))),
        "3 tensors are missing, the first is layers.0.experts.1.gate_proj.weight",
    ),
    "unexpected tensor": (
        lambda directory: replace_tensors(
            directory, "gate.safetensors", lambda tensors: tensors.update(surprise=torch.zeros(1))
        ),
        "gate.safetensors: 1 unexpected tensors, the first is surprise",
    ),
    "wrong shape of a gate": (
        change_tensor("gate.safetensors", gate_tensor(0), lambda gate: gate[:2].clone()),
        r"layers.0.gate.weight has the shape \[2, 16\], the manifest's sizes make it \[3, 16\]",
    ),
    "wrong shape of an expert": (
        change_tensor("experts.safetensors", expert_tensor(1, 2, "down"), lambda down: down.T.contiguous()),
        r"layers.1.experts.2.down_proj.weight has the shape \[24, 16\]",
    ),
    "wrong dtype": (
        change_tensor("experts.safetensors", expert_tensor(0, 0, "up"), lambda up: up.half()),
        "layers.0.experts.0.up_proj.weight is torch.float16, the manifest says torch.float32",
    ),
    "not a number": (
        change_tensor("experts.safetensors", expert_tensor(0, 1, "up"), lambda up: up.fill_(float("nan"))),
        "layers.0.experts.1.up_proj.weight has values that are infinite",
    ),
    "one infinite gate row": (
        change_tensor("gate.safetensors", gate_tensor(1), lambda gate: gate.index_fill(0, torch.tensor(2), -torch.inf)),
        "layers.1.gate.weight has values that are infinite",
    ),
    "more experts than there are": (lambda directory: declare(directory, num_experts=4), "6 tensors are missing"),
    "more layers than memory": (
        lambda directory: declare(directory, num_layers=2**31 - 1),
        "the manifest's sizes make 21474836470 tensors, the files hold 20",
    ),
    "missing prototype": (
        lambda directory: declare(directory, has_prototype=True),
        "missing, the first is prototype",
    ),
    "missing probe": (
        lambda directory: declare(directory, probe={"tokens": 8, "top_k": 2}),
        "8 tensors are missing, the first is probe.layers.0.hidden_states",
    ),
    "too large a manifest": (
        lambda directory: edit_manifest(directory, lambda content: content.update(description="x" * 5_000_000)),
        "manifest.json: is larger than 4194304 bytes",
    ),
    "unknown field": (
        lambda directory: edit_manifest(directory, lambda content: content.update(run_this="rm")),
        "manifest.json: run_this: is no field of a manifest",
    ),
    "repeated key": (
        lambda directory: (directory / "manifest.json").write_text(
            (directory / "manifest.json").read_text().replace("{", '{"organ": "liver",', 1)
        ),
        "manifest.json: is not JSON: the key 'organ' occurs twice",
    ),
    "too large a signature": (
        lambda directory: (directory / "model.sig").write_bytes(bytes(2_000_000)),
        "model.sig: is larger than 1048576 bytes",
    ),
}
