"""The streaming writer and the mapping reader, each against the safetensors library."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experts.bundles.bundle import file_sha256
from experts.bundles.safetensors_header import read_header
from experts.bundles.safetensors_reader import SafetensorsFile
from experts.bundles.safetensors_writer import ALIGNMENT, DTYPE_NAMES, StreamingWriter, WrittenFile
from experts.errors import InvalidBundleError

Spec = tuple[torch.dtype, list[int]]
SPECS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(list(DTYPE_NAMES)), st.lists(st.integers(0, 4), max_size=4)),
    max_size=8,
)


def random_tensors(specs: dict[str, Spec]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        high = 2 if dtype == torch.bool else 256
        octets = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
        tensors[name] = octets.view(dtype).reshape(shape)
    return tensors


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> WrittenFile:
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with StreamingWriter(path, specs, metadata) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
    assert writer.written is not None
    return writer.written


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@given(specs=SPECS)
@settings(max_examples=100, deadline=None)
def test_the_library_reads_what_is_written(specs: dict[str, Spec]) -> None:
    tensors = random_tensors(specs)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        written = write(path, tensors, {"format": "pt"})
        assert_same(load_file(path), tensors)
        assert written == WrittenFile(path, file_sha256(path), path.stat().st_size)
        assert [file.name for file in Path(folder).iterdir()] == ["x.safetensors"]
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        mapped = SafetensorsFile(path)
        assert_same({name: mapped.tensor(name) for name in mapped.tensors}, tensors)
        for info in mapped.tensors.values():
            assert info.start % info.dtype.itemsize == 0
        if mapped.tensors:
            assert min(info.start for info in mapped.tensors.values()) % ALIGNMENT == 0


@given(specs=SPECS)
@settings(max_examples=50, deadline=None)
def test_the_reader_reads_what_the_library_writes(specs: dict[str, Spec]) -> None:
    tensors = random_tensors(specs)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(tensors, path)
        mapped = SafetensorsFile(path)
        assert_same({name: mapped.tensor(name) for name in mapped.tensors}, tensors)


def test_equal_content_makes_equal_files(tmp_path: Path) -> None:
    tensors = random_tensors({"a": (torch.bfloat16, [3]), "b": (torch.float32, [2, 2])})
    assert (
        write(tmp_path / "1", tensors, {"x": "1", "y": "2"}).sha256
        == write(tmp_path / "2", tensors, {"y": "2", "x": "1"}).sha256
    )


def test_order_is_as_given_within_one_element_size(tmp_path: Path) -> None:
    specs = {"z": (torch.float32, [1]), "h": (torch.bfloat16, [1]), "a": (torch.float32, [1])}
    writer = StreamingWriter(tmp_path / "x", specs)
    assert writer.order == ("z", "a", "h")
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, [2]), "b": (torch.float32, [2])}
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="a comes next"), StreamingWriter(path, specs) as writer:
        writer.write("b", torch.zeros(2))
    with pytest.raises(ValueError, match=r"announced as torch.float32 \[2\]"), StreamingWriter(path, specs) as writer:
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match=r"announced as torch.float32"), StreamingWriter(path, specs) as writer:
        writer.write("a", torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="b was announced and not written"), StreamingWriter(path, specs) as writer:
        writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="all tensors are written"), StreamingWriter(path, {}) as writer:
        writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="complex64"):
        StreamingWriter(path, {"a": (torch.complex64, [1])})
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.ones(1)})
    writer = StreamingWriter(path, {"a": (torch.float32, [1])})
    assert load_file(path)["a"].item() == 1
    writer.write("a", torch.zeros(1))
    first = writer.close()
    assert load_file(path)["a"].item() == 0
    assert writer.close() == first


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    code = f"""
import resource, torch
from pathlib import Path
from experts.bundles.safetensors_writer import StreamingWriter
tensor = torch.zeros(1 << 20)
specs = {{str(index): (torch.float32, (1 << 20,)) for index in range(64)}}
with StreamingWriter(Path({str(tmp_path / "x")!r}), specs) as writer:
    writer.write("0", tensor)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in writer.order[1:]:
        writer.write(name, tensor)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # KiB; the file has 256 MiB.
    assert int(grown.stdout) < 16 * 1024


def test_neighbours_are_stacked_without_a_copy(tmp_path: Path) -> None:
    tensors = random_tensors({name: (torch.float32, [2, 3]) for name in "abc"})
    write(tmp_path / "x", tensors)
    file = SafetensorsFile(tmp_path / "x")
    stacked = file.stacked(["a", "b", "c"])
    assert torch.equal(stacked.view(torch.int32), torch.stack(list(tensors.values())).view(torch.int32))
    stacked[1].fill_(5)
    assert torch.equal(file.tensor("b"), torch.full((2, 3), 5.0)), "a view of the same map"
    assert torch.equal(load_file(tmp_path / "x")["b"].view(torch.int32), tensors["b"].view(torch.int32)), (
        "the file itself is never written to"
    )


def test_others_are_stacked_with_a_copy(tmp_path: Path) -> None:
    tensors = random_tensors({name: (torch.uint8, [4]) for name in "abc"})
    write(tmp_path / "x", tensors)
    file = SafetensorsFile(tmp_path / "x")
    assert torch.equal(file.stacked(["c", "a"]), torch.stack([tensors["c"], tensors["a"]]))
    with pytest.raises(InvalidBundleError, match="no tensor d"):
        file.stacked(["a", "d"])


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EMPTY = json.dumps(entry(shape=[0], offsets=[0, 0])).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated .*too small"),
        (b"\1\0\0", "truncated .*too small"),
        (b"\x80", "truncated .*too small"),
        (b"\xff" * 8 + b"{}", "truncated or no valid safetensors file .*too large"),
        ((100).to_bytes(8, "little") + b"{}", "truncated .*invalid header length"),
        (b"\x80\x04\x95" + b"p" * 40, "is a pickle"),
        (raw(b"{"), "invalid JSON in header"),
        (raw(b"\xff\xfe"), "invalid UTF-8 in header"),
        (raw(b"[" * 100_000), "invalid JSON in header"),
        (raw(b'{"a":{"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}}"), "recursion limit"),
        (raw(b'{"a":' + EMPTY + b',"a":' + EMPTY + b"}"), "a name occurs twice"),
        (raw(b'{"a":' + EMPTY + b',"\\u0061":' + EMPTY + b"}"), "a name occurs twice"),
        (raw([]), "invalid JSON in header"),
        (raw({"a": 1}), "invalid JSON in header"),
        (raw({"a": ["F32", [2], [0, 8]]}, bytes(8)), "entry of a must be an object with dtype, shape, data_offsets"),
        (raw({"a": entry(dtype="F99")}, bytes(8)), "unknown variant `F99`"),
        (raw({"a": entry(dtype="C64", shape=[1])}, bytes(8)), "a has the unknown dtype 'C64'"),
        (raw({"a": entry(dtype=["F32"])}, bytes(8)), "invalid JSON in header"),
        (raw({"a": entry(shape=[-2])}, bytes(8)), "integer `-2`"),
        (raw({"a": entry(shape=[2.0])}, bytes(8)), "floating point `2.0`"),
        (raw({"a": entry(shape=[True])}, bytes(8)), "boolean `true`"),
        (raw({"a": entry(shape="2")}, bytes(8)), "expected a sequence"),
        (raw({"a": entry(shape=[2**62, 2**62])}, bytes(8)), "overflow"),
        (raw({"a": entry(offsets=[0, 8, 9])}, bytes(8)), "invalid length 3"),
        (raw({"a": entry(offsets=[0, 4])}, bytes(4)), "invalid shape, data type, or offset"),
        (raw({"a": entry(offsets=[8, 0])}, bytes(8)), "invalid offset for tensor `a`"),
        (raw({"a": entry(offsets=[4, 12])}, bytes(12)), "invalid offset for tensor `a`"),
        (raw({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "invalid offset for tensor `b`"),
        (raw({"a": entry()}, bytes(7)), "truncated .*not fully covered"),
        (raw({"a": entry()}, bytes(9)), "truncated .*not fully covered"),
    ],
)
def test_damaged_files_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidBundleError, match=f"x.safetensors.*{reason}"):
        SafetensorsFile(path)


def test_the_header_is_read_from_the_open_file_wherever_its_path_leads_by_now(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, {"a": torch.zeros(1)})
    with path.open("rb") as file:
        path.rename(tmp_path / "y")
        os.mkfifo(path)
        info = read_header(file.fileno())["a"]
        assert (info.dtype, info.shape, info.end - info.start, file.tell()) == ("F32", (1,), 4, 0)


def test_links_and_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "real", {"a": torch.zeros(1)})
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(InvalidBundleError, match="links are not followed"):
        SafetensorsFile(tmp_path / "link")
    with pytest.raises(InvalidBundleError, match="not a plain file"):
        SafetensorsFile(tmp_path)
    with pytest.raises(InvalidBundleError, match="cannot be opened"):
        SafetensorsFile(tmp_path / "none")
