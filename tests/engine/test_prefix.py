"""Prefix keys are equal if and only if everything that determines the cached blocks is equal."""

from dataclasses import replace

import pytest
import torch

from echovlm_ray.engine.block_pool import BLOCK_SIZE
from echovlm_ray.engine.prefix import PrefixKeys
from echovlm_ray.engine.sequence import SequenceRequest, VisionDigest
from router.gating.expert_set import ExpertSetMember

NUM_PROMPT = 50
# A picture of six rows in the second block and one of ten across the second and the third.
ROWS = (*range(18, 24), *range(28, 38))


def request() -> SequenceRequest:
    return SequenceRequest(
        input_ids=tuple(range(100, 100 + NUM_PROMPT)),
        position_ids_3T=torch.arange(NUM_PROMPT).expand(3, -1).clone(),
        position_delta=5,
        expert_set_id="set",
        shares=(("breast", 0.25), ("liver", 0.75)),
        max_new_tokens=40,
        vision_rows_V=torch.tensor(ROWS),
        vision_embeddings_VD=torch.zeros(len(ROWS), 4),
        vision_digests=(VisionDigest(0, 6, "a" * 64), VisionDigest(6, 16, "b" * 64)),
    )


def bundles(**digests: str) -> tuple[ExpertSetMember, ...]:
    return tuple(ExpertSetMember(organ=organ, bundle_digest=digest) for organ, digest in digests.items())


EXPERTS = bundles(breast="b1", liver="l1")


def keys(
    own: SequenceRequest,
    num_blocks: int = 3,
    token_ids: list[int] | None = None,
    experts: tuple[ExpertSetMember, ...] = EXPERTS,
) -> list[bytes]:
    return PrefixKeys(own, experts).first(num_blocks, token_ids or list(own.input_ids))


def moved(token: int, axis: int) -> torch.Tensor:
    positions = request().position_ids_3T.clone()
    positions[axis, token] += 1
    return positions


@pytest.mark.parametrize(
    ("changed", "same_blocks"),
    [
        (request(), 3),
        (replace(request(), max_new_tokens=3, stop_token_ids=frozenset({1})), 3),
        (replace(request(), shares=(("liver", 0.75), ("breast", 0.25))), 3),
        (replace(request(), shares=(("breast", 0.75), ("liver", 0.25))), 0),
        (replace(request(), cache_salt=b"another caller"), 0),
        (replace(request(), shares=(("breast", 1.0),)), 0),
        (replace(request(), shares=()), 0),
        (replace(request(), input_ids=(1, *request().input_ids[1:])), 0),
        (replace(request(), input_ids=(*request().input_ids[:40], 1, *request().input_ids[41:])), 2),
        (replace(request(), position_ids_3T=moved(3, 0)), 0),
        (replace(request(), position_ids_3T=moved(20, 1)), 1),
        (replace(request(), position_ids_3T=moved(47, 2)), 2),
        (replace(request(), vision_digests=(VisionDigest(0, 6, "c" * 64), VisionDigest(6, 16, "b" * 64))), 1),
        (replace(request(), vision_digests=(VisionDigest(0, 6, "b" * 64), VisionDigest(6, 16, "a" * 64))), 1),
        (replace(request(), vision_digests=(VisionDigest(0, 16, "a" * 64),)), 1),
        (replace(request(), vision_rows_V=torch.tensor([*range(18, 24), *range(29, 39)])), 1),
        (replace(request(), vision_rows_V=None, vision_embeddings_VD=None, vision_digests=()), 1),
    ],
)
def test_what_decides_the_contents_decides_the_key(changed: SequenceRequest, same_blocks: int) -> None:
    pairs = zip(keys(request()), keys(changed), strict=True)
    assert [one == other for one, other in pairs] == [index < same_blocks for index in range(3)]


@pytest.mark.parametrize(
    "others",
    [bundles(breast="b2", liver="l1"), bundles(breast="b1", liver="l2"), bundles(liver="l1", breast="b1"), ()],
)
def test_other_experts_or_another_order_of_them_share_nothing(others: tuple[ExpertSetMember, ...]) -> None:
    assert not set(keys(request())) & set(keys(request(), experts=others))


def test_sets_share_what_the_same_experts_computed() -> None:
    assert keys(replace(request(), expert_set_id="other")) == keys(request())


def test_a_picture_without_a_digest_ends_what_can_be_reused() -> None:
    nothing = replace(request(), vision_digests=())
    assert keys(nothing) == keys(request())[:1]
    one = replace(request(), vision_digests=request().vision_digests[:1])
    assert keys(one) == keys(request())[:1]


def test_keys_of_an_answer_are_those_of_the_same_tokens_in_a_prompt() -> None:
    own = request()
    answer = [7] * 30
    token_ids = [*own.input_ids, *answer]
    positions = torch.arange(NUM_PROMPT, NUM_PROMPT + 30).expand(3, -1) + own.position_delta
    longer = replace(
        own, input_ids=tuple(token_ids), position_ids_3T=torch.cat([own.position_ids_3T, positions], dim=1)
    )
    assert keys(own, 5, token_ids) == keys(longer, 5)
    assert keys(own, 5, [*token_ids[:79], 8])[:4] == keys(longer, 5)[:4]
    assert keys(own, 5, [*token_ids[:79], 8])[4] != keys(longer, 5)[4]


def test_keys_are_made_as_the_answer_grows() -> None:
    own = request()
    growing = PrefixKeys(own, EXPERTS)
    token_ids = list(own.input_ids)
    assert growing.first(3, token_ids) == keys(own)
    token_ids += [7] * 30
    assert growing.first(5, token_ids) == keys(own, len(token_ids) // BLOCK_SIZE, token_ids)
    assert growing.first(2, token_ids) == keys(own)[:2]
