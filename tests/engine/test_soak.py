"""A small run of the soak benchmark: every block is freed, whatever happens to requests."""

from pathlib import Path

from benchmarks.engine_soak import soak, soaking_engine


def test_no_block_is_lost(demo_checkpoint: Path) -> None:
    with soaking_engine(demo_checkpoint, seed=7) as (engine, requests):
        report = soak(engine, requests, 300, lambda: None)
        assert report.leaked == 0
        assert report.still_held == 0
        assert not any(engine._scheduler.pool._ref_counts)
        assert sum(report.outcomes.values()) == 300
        assert engine.preemptions
        assert engine.prefix_hits
    allowed = {"complete", "cancelled at once", "cancelled while it spoke", "expired", "experts failed", "refused"}
    assert set(report.outcomes) <= allowed
    assert {"complete", "cancelled while it spoke", "expired"} <= set(report.outcomes)
