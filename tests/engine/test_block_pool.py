import pytest

from echovlm_ray.engine.block_pool import BlockContents, BlockPool


def contents(name: str, *bundles: str) -> BlockContents:
    return BlockContents(name.encode(), frozenset(bundles), {"breast": 3})


def filled(pool: BlockPool, names: str, *bundles: str) -> list[int]:
    """Blocks that are held, with known contents."""
    blocks = pool.allocate(len(names))
    assert blocks is not None
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, contents(name, *bundles))
    return blocks


def keys(names: str) -> list[bytes]:
    return [name.encode() for name in names]


def test_a_released_block_cannot_be_released_again() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    assert pool.allocate(1) is None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(blocks)


def test_contents_stay_until_the_room_is_needed_and_the_end_of_the_oldest_goes_first() -> None:
    pool = BlockPool(6)
    old, new = filled(pool, "abc"), filled(pool, "xy")
    pool.release(old)
    pool.release(new)
    assert (pool.num_free, pool.num_cached) == (6, 5)
    assert pool.allocate(2) is not None
    assert pool.find(keys("abc")) == old[:2]
    assert pool.allocate(1) is not None
    assert pool.find(keys("abc")) == old[:1]
    assert pool.find(keys("xy")) == new
    assert pool.num_free == 3


def test_what_is_used_again_stays_longer() -> None:
    pool = BlockPool(3)
    for name in "abc":
        pool.release(filled(pool, name))
    found = pool.find(keys("a"))
    pool.acquire(found)
    assert pool.num_free == 2
    pool.release(found)
    assert pool.allocate(2) is not None
    assert pool.find(keys("a")) == found


def test_a_block_with_several_holders_is_given_away_by_none() -> None:
    pool = BlockPool(2)
    blocks = filled(pool, "ab")
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.allocate(1) is None
    assert pool.num_free_without(blocks) == 0
    pool.release(blocks)
    assert pool.num_free == 2
    assert pool.num_free_without(blocks) == 0
    assert pool.contents(blocks[0]).routed_pairs == {"breast": 3}


def test_the_first_block_with_some_contents_stays_the_known_one() -> None:
    pool = BlockPool(2)
    (first,) = filled(pool, "a")
    (second,) = filled(pool, "a")
    pool.release([second])
    assert pool.find(keys("a")) == [first]
    assert pool.num_cached == 0


def test_a_bundle_is_forgotten_alone() -> None:
    pool = BlockPool(4)
    kept, held = filled(pool, "ab", "old"), filled(pool, "c", "old", "new")
    other = filled(pool, "d", "new")
    pool.release(kept)
    pool.release(other)
    pool.evict_bundle("old")
    assert [pool.find(keys(name)) for name in "abcd"] == [[], [], [], other]
    assert (pool.num_free, pool.num_cached) == (3, 1)
    pool.release(held)
    assert (pool.num_free, pool.num_cached) == (4, 1)
    pool.evict_all()
    assert (pool.num_free, pool.num_cached) == (4, 0)
