"""The gateway's description of the model follows Control's live set."""

from pathlib import Path

from echovlm_ray.serving.cluster.live_model import LiveModel
from echovlm_ray.serving.core.description import ModelDescription
from experts.registry.registry import Registry
from router.rollouts.traffic import TrafficPolicy
from tests.serving.rollout_feed import Control, make_versions
from tests.waiting import until_async


async def test_it_follows_the_live_set_and_goes_on_without_control(golden_dir: Path, tmp_path: Path) -> None:
    versions = make_versions(golden_dir / "base" / "checkpoint", tmp_path)
    control = Control()
    control.servicer.versions = {digest: version for (_, version), digest in versions.digests.items()}
    stable, second = versions.expert_set(), versions.expert_set(liver="2.0.0", lung="1.0.0")
    start = ModelDescription("demo", "1.0.0", "text", stable.backbone_digest, stable.id, (), "breast", ("notice",))
    registry = Registry(versions.split.registry)
    live = LiveModel(lambda: list(control.addresses), start, registry.manifest)
    await live.start()
    try:
        assert live.describe() is start
        await control.start()
        await control.servicer.set(TrafficPolicy(version=4, stable=second))
        await until_async(lambda: live.describe().expert_set_id == second.id)
        found = live.describe()
        assert [(organ.organ, organ.bundle_version, organ.num_experts) for organ in found.organs] == [
            ("breast", "1.0.0", 4),
            ("liver", "2.0.0", 4),
            ("heart", "1.0.0", 4),
            ("lung", "1.0.0", 4),
        ]
        assert (found.notices, found.default_organ) == (("notice",), "breast")
        # It is no Router, whose pins Control would ask for, and says what it describes.
        assert control.servicer.watchers == {""}
        assert found.policy_version == 4
        await until_async(lambda: control.servicer.taken_up == {live.name: 4})
        await control.stop()
        assert live.describe() is found
        # After a restart, elsewhere; a bundle that cannot be described changes nothing.
        await control.start()
        unknown = second.model_copy(update={"members": second.members[:1]})
        control.servicer.versions = {}
        await control.servicer.set(TrafficPolicy(version=5, stable=unknown))
        control.servicer.versions = {digest: version for (_, version), digest in versions.digests.items()}
        await control.servicer.set(TrafficPolicy(version=6, stable=stable))
        await until_async(lambda: live.describe().expert_set_id == stable.id, timeout_s=20)
        await until_async(lambda: control.servicer.taken_up == {live.name: 6})
    finally:
        await live.stop()
        await control.stop()
