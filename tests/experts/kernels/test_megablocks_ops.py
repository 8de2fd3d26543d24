"""Each operation against a plain statement of what MegaBlocks' compiled one does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.kernels import megablocks_ops as ops

ROOT = Path(__file__).resolve().parents[3]
INTEGERS = st.sampled_from([torch.int16, torch.int32, torch.int64])
UNWRITTEN = -7


@st.composite
def bin_ends(draw: st.DrawFn, multiple: int = 1) -> list[int]:
    sizes = draw(st.lists(st.integers(0, 5), max_size=7))
    return [multiple * sum(sizes[: i + 1]) for i in range(len(sizes))]


def bin_of(place: int, ends: list[int]) -> int | None:
    return next((number for number, end in enumerate(ends) if place < end), None)


@given(st.lists(st.integers(0, 300), max_size=40), INTEGERS, st.integers(1, 70))
def test_sort_by_some_bits(values: list[int], dtype: torch.dtype, end_bit: int) -> None:
    x = torch.tensor(values, dtype=dtype)
    x_out, iota_out = torch.full_like(x, UNWRITTEN), torch.full_like(x, UNWRITTEN)
    ops.sort(x, end_bit, x_out, iota_out)
    expected = sorted(range(len(values)), key=lambda place: values[place] % 2**end_bit)
    assert iota_out.tolist() == expected
    assert x_out.tolist() == [values[place] for place in expected]
    assert x_out.dtype == iota_out.dtype == dtype


@given(st.lists(st.integers(-(2**15), 2**15 - 1), max_size=40), INTEGERS)
def test_sort_by_all_bits_is_signed(values: list[int], dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=dtype)
    x_out, iota_out = torch.empty_like(x), torch.empty_like(x)
    ops.sort(x, 8 * dtype.itemsize, x_out, iota_out)
    assert x_out.tolist() == sorted(values)


@given(st.lists(st.lists(st.integers(-2, 9), min_size=3, max_size=3), min_size=1, max_size=4), INTEGERS)
def test_histogram(rows: list[list[int]], dtype: torch.dtype) -> None:
    expected = [[row.count(number) for number in range(6)] for row in rows]
    counted = ops.histogram(torch.tensor(rows, dtype=dtype), 6)
    assert counted.dtype == torch.int32
    assert counted.tolist() == expected
    assert ops.histogram(torch.tensor(rows[0], dtype=dtype), 6).tolist() == expected[0]


def test_histogram_of_nothing() -> None:
    assert ops.histogram(torch.empty(0, dtype=torch.int32), 3).tolist() == [0, 0, 0]


@given(st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=3), INTEGERS)
def test_cumsums(rows: list[list[int]], dtype: torch.dtype) -> None:
    x = torch.tensor(rows, dtype=dtype)
    inclusive, exclusive = torch.full_like(x, UNWRITTEN), torch.full_like(x, UNWRITTEN)
    ops.inclusive_cumsum(x, 1, inclusive)
    ops.exclusive_cumsum(x, 1, exclusive)
    assert inclusive.tolist() == [[sum(row[: i + 1]) for i in range(4)] for row in rows]
    assert exclusive.tolist() == [[sum(row[:i]) for i in range(4)] for row in rows]


def test_cumsums_wrap_around_in_their_type() -> None:
    x = torch.tensor([[2**15 - 1, 1]], dtype=torch.int16)
    out = torch.empty_like(x)
    ops.inclusive_cumsum(x, 1, out)
    assert out.tolist() == [[2**15 - 1, -(2**15)]]


@given(bin_ends(multiple=4), st.integers(1, 5), st.integers(0, 3))
def test_block_columns(ends: list[int], columns: int, rows_beyond: int) -> None:
    rows = (ends[-1] if ends else 0) // 4 + rows_beyond
    out = torch.full((rows * columns,), UNWRITTEN, dtype=torch.int16)
    ops.indices(torch.tensor(ends, dtype=torch.int32), 4, rows, columns, out)
    expected = []
    for row in range(rows):
        found = bin_of(4 * row, ends)
        expected += [UNWRITTEN if found is None else found * columns + column for column in range(columns)]
    assert out.tolist() == expected


@given(bin_ends(), st.integers(0, 3), st.sampled_from([torch.float16, torch.int16, torch.int32]))
def test_replicate(ends: list[int], beyond: int, dtype: torch.dtype) -> None:
    width = (ends[-1] if ends else 0) + beyond
    x = torch.arange(2 * len(ends)).reshape(2, len(ends)).to(dtype)
    out = torch.full((2, width), UNWRITTEN, dtype=dtype)
    ops.replicate_forward(x, torch.tensor(ends, dtype=torch.int32), out)
    places = [bin_of(place, ends) for place in range(width)]
    assert out.tolist() == [[UNWRITTEN if found is None else row[found] for found in places] for row in x.tolist()]


@given(bin_ends(), st.integers(0, 3))
def test_replicate_backward(ends: list[int], beyond: int) -> None:
    width = (ends[-1] if ends else 0) + beyond
    gradient = torch.arange(2 * width).reshape(2, width).half()
    out = torch.full((2, len(ends)), UNWRITTEN, dtype=torch.float16)
    ops.replicate_backward(gradient, torch.tensor(ends, dtype=torch.int32), out)
    starts = [0, *ends[:-1]]
    expected = [[sum(row[a:b]) for a, b in zip(starts, ends, strict=False)] for row in gradient.tolist()]
    assert out.tolist() == expected


def test_wrong_types_are_refused() -> None:
    floats = torch.zeros(3)
    with pytest.raises(ValueError, match=r"must be int16, int32 or int64, not torch\.float32"):
        ops.histogram(floats, 2)
    with pytest.raises(ValueError, match="block columns int16"):
        ops.indices(torch.zeros(1, dtype=torch.int32), 4, 1, 1, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="along dimension 1"):
        ops.inclusive_cumsum(torch.zeros(2, 2, dtype=torch.int32), 0, torch.zeros(2, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("compiled", "taken"),
    [
        (None, "experts.kernels.megablocks_ops"),
        ("raise ImportError('undefined symbol')", "experts.kernels.megablocks_ops"),
        ("", "megablocks_ops"),
    ],
    ids=["absent", "compiled for another torch", "there"],
)
def test_it_stands_in_only_where_the_compiled_module_does_not_import(
    compiled: str | None, taken: str, tmp_path: Path
) -> None:
    if compiled is not None:
        (tmp_path / "megablocks_ops.py").write_text(compiled)
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; "
        "from experts.kernels import megablocks_ops as ours; ours.install(); ours.install(); "
        "import megablocks_ops; print(megablocks_ops.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == taken
