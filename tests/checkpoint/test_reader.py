import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.checkpoint.reader import read_header, read_tensor_folder
from echovlm_ray.checkpoint.writer import load, plan_shards, tensor_digest, write_released


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(5).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(load(stored[name]), tensor)
        assert load(stored[name]).dtype == tensor.dtype
        assert stored[name].sha256() == tensor_digest(tensor)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": F32}, b"123", "truncated .*fetch it"),
        ({"a": F32}, b"12345", "not fully covered"),
        ({"a": {**F32, "data_offsets": [4, 8]}}, b"12345678", "invalid offset for tensor `a`"),
        ({"a": {**F32, "shape": [2]}}, b"1234", "invalid shape"),
        ({"a": F32, "b": F32}, b"1234", "invalid offset for tensor"),
        ([], b"", "invalid JSON"),
        (b'{"a": %(entry)s, "a": %(entry)s}' % {b"entry": json.dumps(F32).encode()}, b"1234", "a name occurs twice"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any, data: bytes, reason: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InvalidCheckpointError, match=reason) as raised:
        read_header(path)
    assert "x.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", (2**62).to_bytes(8, "little"), (50).to_bytes(8, "little") + b"{}"]
)
def test_files_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InvalidCheckpointError, match="is truncated or no valid safetensors file"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a\\b.safetensors", "code.py", 3, ".."])
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, file: object) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    read = read_tensor_folder(folder)
    assert read.tensors == {}
    assert len(read.problems) == 1
    assert "not a safetensors file of this folder" in read.problems[0]


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "nonsense"])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "not an index" in read_tensor_folder(tmp_path).problems[0]


def test_shards_are_filled_in_order_and_never_above_the_limit() -> None:
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 2}
    assert plan_shards(sizes, 8) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(sizes, 100) == [["a", "b", "c", "d", "e"]]


def test_written_shards_have_an_index_that_the_reader_and_transformers_understand(tmp_path: Path) -> None:
    tensors = {name: torch.full((4, 4), float(number)) for number, name in enumerate("abcde")}
    digests = write_released(
        tmp_path,
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
        tensors.__getitem__,
        max_shard_bytes=130,
    )
    read = read_tensor_folder(tmp_path)
    assert read.problems == []
    assert len(read.files) == 3
    assert {name: load(entry).mean().item() for name, entry in read.tensors.items()} == {
        name: tensor.mean().item() for name, tensor in tensors.items()
    }
    assert digests == {name: entry.sha256() for name, entry in read.tensors.items()}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    assert index["weight_map"]["e"] == "model-00003-of-00003.safetensors"
