"""Prefix cache keys: one for every full block of a sequence.

The keys form a chain, as in vLLM's automatic prefix caching: each includes the previous key, and so all inputs of the
block's keys and values. Equal keys mean equal tokens at equal positions, the same images by content and encoder, the
same shares of the same organs, the same bundles, and the same salt: callers only find blocks of callers with the same
salt. Expert sets that differ in other organs share blocks, so replacing one organ's experts does not invalidate the
other organs' cache.
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
    """The keys of one sequence's blocks, computed on first use."""

    def __init__(self, request: "SequenceRequest", experts: Sequences[ExpertSetMember]) -> None:
        """
        Args:
            request: the sequence's request.
            experts: all experts that may compute its tokens, in the order of its expert set, with one backbone.
        """
        self._request = request
        self._experts = experts
        self._keys: list[bytes] = []
        self._vision_rows: list[int] = []
        # Set at an image without a digest: the contents of the blocks from there on are unknown.
        self._ended = False

    def first(self, num_blocks: int, token_ids: Sequences[int]) -> list[bytes]:
        """The keys of the first blocks; fewer if one of them contains an image without a digest.

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
        # The organs are summed in the set's order, so the order of the shares does not matter.
        experts = [(member.organ, member.bundle_digest) for member in self._experts]
        return json.dumps([experts, sorted(self._request.shares), self._request.cache_salt.hex()]).encode()

    def _positions(self, start: int) -> bytes:
        request = self._request
        end, delta = start + BLOCK_SIZE, request.position_delta
        generated = range(max(start, len(request.input_ids)) + delta, end + delta)
        prompt_3T = request.position_ids_3T[:, start:end].tolist()
        return b"".join(array("q", [*axis, *generated]).tobytes() for axis in prompt_3T)

    def _pictures(self, start: int) -> bytes | None:
        """The rows of images in a block and their positions; None if an image has no digest."""
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
