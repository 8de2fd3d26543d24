import fcntl
import gc
import itertools
import mmap
import os
import socket
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import InvalidTensorError
from experts.transport.attached_memory import AttachedMemory, AttachError
from experts.transport.layout import ALIGNMENT, Layout
from experts.transport.shared_memory import IDLE_S, RESIDENT_BYTES, MemoryBudget, SharedMemory
from protos import expert_pb2, tensor_pb2

LIMIT = 16 * 1024 * 1024
FLOAT = tensor_pb2.DATA_TYPE_FLOAT32


@pytest.fixture
def memory() -> SharedMemory:
    return SharedMemory(MemoryBudget(LIMIT))


def attach(memory: SharedMemory) -> AttachedMemory:
    return AttachedMemory(memory.descriptor, memory.size)


def pages(memory: SharedMemory) -> int:
    return os.fstat(memory._descriptor).st_blocks * 512


def mappings() -> int:
    return sum("memfd:echovlm" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_both_ends_see_the_same_bytes(memory: SharedMemory) -> None:
    layout = Layout.of(3, 5, 2, torch.bfloat16)
    allocated = memory.allocate(layout.nbytes)
    assert allocated is not None
    area, offset = allocated
    attached = attach(memory)
    memory.close_descriptor()
    views = attached.views(layout.to_proto(offset))
    x_TD = torch.randn(3, 5).to(torch.bfloat16)
    layout.hidden_states_TD(area).copy_(x_TD)
    layout.expert_index_TK(area).fill_(-1)
    layout.weight_TK(area).fill_(0.5)
    assert torch.equal(views.hidden_states_TD, x_TD)
    assert views.expert_index_TK.tolist() == [[-1, -1]] * 3
    assert views.weight_TK.tolist() == [[0.5, 0.5]] * 3
    views.output_TD.copy_(x_TD * 2)
    assert torch.equal(layout.output_TD(area), x_TD * 2)
    assert attached.views(layout.to_proto(offset)) is views


def test_a_place_is_free_only_when_no_tensor_is_left_of_it(memory: SharedMemory) -> None:
    layout = Layout.of(4, 64, 1, torch.float32)

    def allocate() -> tuple[torch.Tensor, int]:
        allocated = memory.allocate(layout.nbytes)
        assert allocated is not None
        return layout.output_TD(allocated[0]), allocated[1]

    output_TD, first = allocate()
    row_D = output_TD[2:3]
    del output_TD
    _, second = allocate()
    assert second != first, "a view of the answer was still there"
    del row_D
    kept, third = allocate()
    assert third == first
    del kept
    assert {allocate()[1] for _ in range(50)} <= {first, second}


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 300_000), st.booleans()), max_size=60))
def test_areas_never_overlap_and_nothing_is_lost(sizes: list[tuple[int, bool]]) -> None:
    budget = MemoryBudget(4 * 1024 * 1024)
    memory = SharedMemory(budget)
    fill(memory, sizes)
    assert budget.used_bytes <= budget.limit_bytes
    whole = memory.allocate(budget.limit_bytes)
    assert whole is not None, "what was freed is in pieces, or lost"
    assert memory.allocate(1) is None


def fill(memory: SharedMemory, sizes: list[tuple[int, bool]]) -> None:
    kept: dict[int, int] = {}
    areas = []
    for size, keep in sizes:
        allocated = memory.allocate(size)
        if allocated is None:
            continue
        area, offset = allocated
        assert offset % ALIGNMENT == 0
        assert 0 <= offset <= memory.size - len(area)
        assert all(offset + len(area) <= start or end <= offset for start, end in kept.items())
        if keep:
            kept[offset] = offset + len(area)
            areas.append(area)


def test_over_the_budget_there_is_none_and_nothing_else_is_disturbed() -> None:
    budget = MemoryBudget(1024 * 1024)
    first, second = SharedMemory(budget), SharedMemory(budget)
    held = first.allocate(700_000)
    assert held is not None
    assert second.allocate(700_000) is None
    small = second.allocate(100_000)
    assert small is not None
    del held
    assert second.allocate(700_000) is None, "what is resident is not taken away"
    assert first.allocate(700_000) is not None
    assert budget.used_bytes <= budget.limit_bytes


def test_what_one_memory_does_not_need_another_gets() -> None:
    budget = MemoryBudget(8 * 1024 * 1024)
    first, second = SharedMemory(budget), SharedMemory(budget)
    assert first.allocate(7 * 1024 * 1024) is not None
    assert second.allocate(6 * 1024 * 1024) is not None
    assert budget.used_bytes <= budget.limit_bytes


def test_memory_that_was_needed_once_goes_back_to_the_system(memory: SharedMemory) -> None:
    allocated = memory.allocate(12 * 1024 * 1024)
    assert allocated is not None
    allocated[0][:] = 1
    attached = attach(memory)
    assert pages(memory) >= 12 * 1024 * 1024
    memory.give_back_if_idle(memory._used_at + IDLE_S + 1)
    assert pages(memory) >= 12 * 1024 * 1024, "it was still in use"
    del allocated
    memory.give_back_if_idle(memory._used_at + IDLE_S - 1)
    assert pages(memory) >= 12 * 1024 * 1024
    memory.give_back_if_idle(memory._used_at + IDLE_S + 1)
    assert pages(memory) <= RESIDENT_BYTES + 2 * mmap.PAGESIZE
    assert memory.budget.used_bytes <= RESIDENT_BYTES + 2 * mmap.PAGESIZE
    # And can be had again.
    layout = Layout.of(1000, 1000, 1, torch.float32)
    again = memory.allocate(layout.nbytes)
    assert again is not None
    layout.hidden_states_TD(again[0]).fill_(3)
    assert attached.views(layout.to_proto(again[1])).hidden_states_TD.eq(3).all()


def test_it_goes_with_the_last_tensor_and_gives_its_budget_back() -> None:
    budget = MemoryBudget(LIMIT)
    before = mappings()
    layout = Layout.of(4, 64, 1, torch.float32)
    output_TD = answer_of(SharedMemory(budget), layout)
    assert mappings() == before + 1
    assert budget.used_bytes
    output_TD.fill_(1)
    del output_TD
    assert mappings() == before
    assert budget.used_bytes == 0


def answer_of(memory: SharedMemory, layout: Layout) -> torch.Tensor:
    allocated = memory.allocate(layout.nbytes)
    assert allocated is not None
    return layout.output_TD(allocated[0])


def test_its_size_cannot_be_changed_by_anybody(memory: SharedMemory) -> None:
    for size in (0, memory.size - 1, memory.size + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(memory._descriptor, size)


class TestOffersThatAreRefused:
    def test_sizes_that_are_wrong(self, memory: SharedMemory) -> None:
        for size, reason in (
            (0, "size is 0"),
            (2**60, "at most"),
            (memory.size - 1, "the caller says"),
            (memory.size + 1, "the caller says"),
        ):
            with pytest.raises(AttachError, match=reason):
                AttachedMemory(memory.descriptor, size)

    def test_files_that_are_something_else(self) -> None:
        reading, writing = os.pipe()
        unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        growing = os.memfd_create("growing", os.MFD_ALLOW_SEALING)
        for descriptor in (unsealed, growing):
            os.ftruncate(descriptor, 4096)
        fcntl.fcntl(growing, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with tempfile.TemporaryFile() as file, socket.socket() as connection:
            file.truncate(4096)
            for descriptor, reason in (
                (file.fileno(), "not of memory|not sealed"),
                (connection.fileno(), "not of memory"),
                (reading, "not of memory"),
                (2**31 - 1, "not of memory"),
                (unsealed, "not sealed"),
                (growing, "not sealed"),
            ):
                with pytest.raises(AttachError, match=reason):
                    AttachedMemory(descriptor, 4096)
        for descriptor in (reading, writing, unsealed, growing):
            os.close(descriptor)

    def test_memory_that_cannot_be_written(self) -> None:
        sealed = os.memfd_create("read-only", os.MFD_ALLOW_SEALING)
        os.ftruncate(sealed, 4096)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        with pytest.raises(AttachError, match="cannot be mapped"):
            AttachedMemory(sealed, 4096)
        os.close(sealed)

    def test_memory_of_another_user(self, memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(AttachError, match="another user"):
            attach(memory)

    def test_memory_whose_owner_has_closed_the_way_to_it(self, memory: SharedMemory) -> None:
        memory.close_descriptor()
        with pytest.raises(AttachError):
            attach(memory)


@pytest.fixture(scope="module")
def attached() -> AttachedMemory:
    memory = SharedMemory(MemoryBudget(1024 * 1024))
    return attach(memory)


@settings(max_examples=300, deadline=None)
@given(
    offset=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 20_000).map(lambda n: n * ALIGNMENT)),
    dtype=st.integers(0, 8),
    sizes=st.tuples(*[st.one_of(st.integers(0, 70), st.sampled_from([2**16, 2**31, 2**32 - 1]))] * 3),
)
def test_no_numbers_lead_out_of_the_memory(
    attached: AttachedMemory, offset: int, dtype: int, sizes: tuple[int, int, int]
) -> None:
    tokens, hidden_size, top_k = sizes
    shared = expert_pb2.SharedTensors(
        offset=offset,
        dtype=dtype,  # type: ignore[arg-type]
        tokens=tokens,
        hidden_size=hidden_size,
        top_k=top_k,
    )
    start = attached._octets.ctypes.data
    try:
        views = attached.views(shared)
    except InvalidTensorError:
        return
    tensors = (views.hidden_states_TD, views.output_TD, views.expert_index_TK, views.weight_TK)
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    assert spans[0][0] >= start
    assert spans[-1][1] <= start + attached.size
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), "they overlap"


def test_places_outside_are_refused_in_words(attached: AttachedMemory) -> None:
    for offset, tokens, reason in ((65, 1, "multiple of 64"), (64, 10**6, "end within")):
        shared = expert_pb2.SharedTensors(offset=offset, dtype=FLOAT, tokens=tokens, hidden_size=8, top_k=1)
        with pytest.raises(InvalidTensorError, match=reason):
            attached.views(shared)


def test_the_other_end_goes_with_its_last_view() -> None:
    memory = SharedMemory(MemoryBudget(LIMIT))
    before = mappings()
    views = attach(memory).views(Layout.of(2, 8, 1, torch.float32).to_proto(64))
    gc.collect()
    assert mappings() == before + 1
    views.output_TD.fill_(1)
    del views
    assert mappings() == before
