"""A change of the rollouts' database becomes a policy immediately, first in the file, and eventually in any case."""

import asyncio
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from echovlm_ray.serving.cluster.known_policy import ForeignPolicyError, read_policy
from echovlm_ray.serving.control import policies
from echovlm_ray.serving.control.policies import PolicyPublisher
from protos import control_pb2
from router.errors import RolloutStateError
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.database import Database
from router.rollouts.settings import RolloutPlan
from router.rollouts.states import Action
from router.rollouts.store import RolloutStore

LIVE = ExpertSet(
    backbone_digest="b" * 64, routing="organs", members=(ExpertSetMember(organ="heart", bundle_digest="1" * 64),)
)
NEW = "2" * 64


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RolloutStore]:
    database = Database(f"sqlite:///{tmp_path}/rollouts.db")
    store = RolloutStore(database)
    store.adopt(LIVE, actor="start")
    yield store
    database.close()


def promote(store: RolloutStore) -> None:
    with store.write() as transaction:
        rollout = transaction.stage("heart", NEW, RolloutPlan(), actor="ann", reason="")
        for action in (Action.VERIFY, Action.WARM_UP):
            rollout = transaction.move(rollout, action, actor="ann")
        transaction.promote(rollout, actor="ann", max_previous=3)


def heart(policy: control_pb2.TrafficPolicy | None) -> str:
    assert policy is not None
    return policy.stable.members[0].bundle_digest


async def published(path: Path, store: RolloutStore) -> PolicyPublisher:
    publisher = PolicyPublisher(store, lambda digest: digest[:1], path)
    await publisher.start()
    return publisher


async def test_a_change_is_published_when_it_has_been_made(store: RolloutStore, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    publisher = await published(path, store)
    before = publisher.current
    seen: list[str] = []
    # Who subscribed before does not hear of the change before the policy is there.
    store.subscribe(lambda: seen.append(heart(read_policy(path))))
    await asyncio.to_thread(promote, store)
    assert (heart(before), heart(publisher.current), seen) == ("1" * 64, NEW, [NEW])
    assert publisher.current.version > before.version
    assert dict(publisher.current.versions) == {NEW: "2"}
    publisher.stop()


async def test_who_watches_hears_of_it_and_of_nothing_that_changes_no_policy(
    store: RolloutStore, tmp_path: Path
) -> None:
    publisher = await published(tmp_path / "policy.json", store)
    watching = publisher.watch()
    assert heart(await anext(watching)) == "1" * 64

    def stage() -> None:
        with store.write() as transaction:
            transaction.stage("heart", NEW, RolloutPlan(), actor="ann", reason="")

    await asyncio.to_thread(stage)
    coming = asyncio.ensure_future(anext(watching))
    await asyncio.sleep(0.05)
    assert not coming.done()
    coming.cancel()
    publisher.stop()


async def test_a_control_that_starts_on_a_full_disk_publishes_and_writes_later(
    store: RolloutStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "RETRY_S", 0.02)
    path = tmp_path / "policy.json"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        publisher = await published(path, store)
        assert heart(publisher.current) == "1" * 64
        await asyncio.sleep(0.1)
        assert read_policy(path) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    async with asyncio.timeout(10):
        while read_policy(path) is None:
            await asyncio.sleep(0.02)
    assert heart(read_policy(path)) == "1" * 64
    publisher.stop()


async def test_a_policy_that_cannot_be_kept_is_published_later(
    store: RolloutStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(policies, "RETRY_S", 0.02)
    path = tmp_path / "state" / "policy.json"
    publisher = await published(path, store)
    watching = publisher.watch()
    await anext(watching)
    path.unlink()
    path.parent.rmdir()
    # A file where the folder was: nothing can be written there, even by root.
    path.parent.touch()
    await asyncio.to_thread(promote, store)
    assert heart(publisher.current) == "1" * 64
    assert "cannot be published now" in caplog.text
    path.parent.unlink()
    async with asyncio.timeout(5):
        assert heart(await anext(watching)) == NEW
    assert heart(read_policy(path)) == NEW
    publisher.stop()


async def test_after_its_end_nothing_is_published(store: RolloutStore, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    publisher = await published(path, store)
    publisher.stop()
    await asyncio.to_thread(promote, store)
    assert heart(publisher.current) == heart(read_policy(path)) == "1" * 64


async def test_an_older_database_is_published_above_what_its_file_says(store: RolloutStore, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    older = tmp_path / "older.db"
    with sqlite3.connect(tmp_path / "rollouts.db") as source, sqlite3.connect(older) as target:
        source.backup(target)
    publisher = await published(path, store)
    await asyncio.to_thread(promote, store)
    served = publisher.current
    publisher.stop()

    restored = RolloutStore(Database(f"sqlite:///{older}"))
    publisher = await published(path, restored)
    assert heart(publisher.current) == "1" * 64
    assert publisher.current.version > served.version
    assert read_policy(path) == publisher.current
    # Once is enough: the next start publishes the same.
    version = publisher.current.version
    publisher.stop()
    publisher = await published(path, restored)
    assert publisher.current.version == version
    publisher.stop()
    restored.database.close()


@pytest.mark.parametrize("ahead", [0, 5])
async def test_a_router_that_applies_something_else_is_outrun(store: RolloutStore, tmp_path: Path, ahead: int) -> None:
    publisher = await published(tmp_path / "policy.json", store)
    current = publisher.current
    watching = publisher.watch()
    await anext(watching)
    await asyncio.to_thread(publisher.outrun, current.identity, current.version, store.policy().content_digest)
    await asyncio.to_thread(publisher.outrun, "", current.version - 1, "e" * 64)
    assert publisher.current is current
    await asyncio.to_thread(publisher.outrun, current.identity, current.version + ahead, "e" * 64)
    assert (await anext(watching)).version == current.version + ahead + 1
    publisher.stop()


async def test_what_is_of_another_deployment_is_refused(store: RolloutStore, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    publisher = await published(path, store)
    with pytest.raises(RolloutStateError, match="serves the deployment"):
        await asyncio.to_thread(publisher.outrun, "f" * 32, 0, "")
    publisher.stop()
    other = RolloutStore(Database(f"sqlite:///{tmp_path}/other.db"))
    other.adopt(LIVE, actor="start")
    with pytest.raises(ForeignPolicyError, match="--take-over"):
        await published(path, other)
    other.database.close()
