import ctypes
import hashlib

import pytest
import torch

from experts.transport.layout import Layout
from experts.transport.shared_memory import MemoryBudget, SharedMemory
from protos import expert_pb2
from router.dispatch.tokens import Tokens, TokenWriter

LIMIT = 16 * 1024 * 1024
DIGESTS = tuple(hashlib.sha256(name).hexdigest() for name in (b"old", b"new"))


class _MallocInfo(ctypes.Structure):
    """Glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated_bytes() -> int:
    """What native code and large Python objects hold; tracemalloc sees nothing of the former."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("this C library does not say how much is allocated")
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def some_tokens(digest: str, layer: int) -> Tokens:
    return Tokens(
        bundle_digest=digest,
        layer=layer,
        x_TD=torch.randn(5, 8),
        row_R=torch.tensor([0, 2, 4]),
        expert_index_RK=torch.tensor([[0, 1], [1, 0], [1, 1]]),
        weight_RK=torch.rand(3, 2),
    )


def test_each_message_says_what_it_is_of_and_where_it_lies() -> None:
    memory = SharedMemory(MemoryBudget(LIMIT))
    writer = TokenWriter(memory)
    for correlation_id in range(1, 9):
        tokens = some_tokens(DIGESTS[correlation_id % 2], correlation_id % 3)
        written = writer.write(tokens, correlation_id)
        assert written is not None
        request = expert_pb2.ForwardRequest.FromString(written[0])
        assert request.correlation_id == correlation_id
        assert (request.bundle_digest, request.layer) == (tokens.bundle_digest, tokens.layer)
        layout = Layout.of(3, 8, 2, torch.float32)
        offset = request.shared.offset
        assert request.shared == layout.to_proto(offset)
        stretch = memory.stretch(offset, layout.nbytes)
        assert tokens.row_R is not None
        assert torch.equal(layout.hidden_states_TD(stretch), tokens.x_TD[tokens.row_R])
        assert torch.equal(layout.expert_index_TK(stretch), tokens.expert_index_RK.to(torch.int32))
        assert torch.equal(layout.weight_TK(stretch), tokens.weight_RK)


def test_exchanges_without_end_hold_no_more_memory() -> None:
    writer = TokenWriter(SharedMemory(MemoryBudget(LIMIT)))
    tokens = [some_tokens(digest, 0) for digest in DIGESTS]

    def write(times: int) -> None:
        for number in range(times):
            assert writer.write(tokens[number % 2], number) is not None

    write(1000)
    before = allocated_bytes()
    write(20_000)
    # Their digests alone have 1.3 MB.
    assert allocated_bytes() - before < 400_000
