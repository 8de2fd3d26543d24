"""Prefix cache keys: one for every full block of a sequence.

The keys form a chain, as in vLLM's automatic prefix caching: each takes in the key before it, and so everything that
the block's keys and values were computed from. Equal keys mean equal tokens at equal positions, the same pictures by
content and encoder, and the same shares of the same organs, computed by the same bundles, and the same salt: a caller
finds only what callers of its own salt left behind. Sets that differ in other
organs share their blocks: so the replacement of one organ's experts costs the others' prompts nothing.
"""

import hashlib
import json
import struct
from array import array
from bisect import bisect_left
from collections.abc import Sequence as Sequences
from typing import TYPE_CHECKING

from echovlm_ray.engine.block_pool import BLOCK_SIZE
from router.gating.expert_set import ExpertSetMember

if TYPE_CHECKING:
    from echovlm_ray.engine.sequence import SequenceRequest


class PrefixKeys:
    """The keys of one sequence's blocks, made when they are first asked for."""

    def __init__(self, request: "SequenceRequest", experts: Sequences[ExpertSetMember]) -> None:
        """
        Args:
            request: the sequence's.
            experts: all that may compute its tokens, in the order of its expert set; of one backbone.
        """
        self._request = request
        self._experts = experts
        self._keys: list[bytes] = []
        self._vision_rows: list[int] = []
        # Set at a picture without a digest: nothing tells what the blocks from there on hold.
        self._ended = False

    def first(self, num_blocks: int, token_ids: Sequences[int]) -> list[bytes]:
        """The keys of the first blocks; fewer when a picture without a content digest lies in one of them.

        Args:
            num_blocks: full blocks only.
            token_ids: the sequence's tokens so far, prompt and answer.
        """
        while len(self._keys) < num_blocks and not self._ended:
            start = len(self._keys) * BLOCK_SIZE
            pictures = self._pictures(start)
            if pictures is None:
                self._ended = True
                break
            digest = hashlib.sha256(self._keys[-1] if self._keys else self._root())
            digest.update(array("q", token_ids[start : start + BLOCK_SIZE]).tobytes())
            digest.update(self._positions(start))
            digest.update(pictures)
            self._keys.append(digest.digest())
        return self._keys[:num_blocks]

    def _root(self) -> bytes:
        # The sum over the organs runs in the set's order, so the order of the shares makes no difference.
        experts = [(member.organ, member.bundle_digest) for member in self._experts]
        return json.dumps([experts, sorted(self._request.shares), self._request.cache_salt.hex()]).encode()

    def _positions(self, start: int) -> bytes:
        request = self._request
        end, delta = start + BLOCK_SIZE, request.position_delta
        generated = range(max(start, len(request.input_ids)) + delta, end + delta)
        prompt_3T = request.position_ids_3T[:, start:end].tolist()
        return b"".join(array("q", [*axis, *generated]).tobytes() for axis in prompt_3T)

    def _pictures(self, start: int) -> bytes | None:
        """Which rows of which pictures lie where in a block; None when a picture has no digest."""
        request = self._request
        if request.vision_rows_V is None:
            return b""
        if not self._vision_rows:
            self._vision_rows = request.vision_rows_V.tolist()
        rows = self._vision_rows
        first, last = bisect_left(rows, start), bisect_left(rows, start + BLOCK_SIZE)
        parts = []
        unknown = last - first
        for picture in request.vision_digests:
            begin, end = max(first, picture.start), min(last, picture.end)
            if begin >= end:
                continue
            unknown -= end - begin
            content = picture.content_digest.encode()
            parts.append(struct.pack("<3q", len(content), begin - picture.start, end - begin) + content)
            parts.append(array("q", [row - start for row in rows[begin:end]]).tobytes())
        return None if unknown else b"".join(parts)
