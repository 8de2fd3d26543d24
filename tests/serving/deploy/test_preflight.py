import socket
from pathlib import Path
from typing import Any

import pytest

from echovlm_ray.config import Config
from echovlm_ray.serving.cluster.known_policy import write_policy
from echovlm_ray.serving.cluster.rollout_files import DatabaseLock, RolloutFiles
from echovlm_ray.serving.cluster.served import served_checkpoint
from echovlm_ray.serving.control.bundles import open_registry
from echovlm_ray.serving.deploy import preflight
from protos import control_pb2
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.database import Database
from router.rollouts.store import RolloutStore
from tests.certificates import write_certificates
from tests.changed_bundles import changed_bundle
from tests.random_checkpoint import make_random


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("preflight") / "demo"
    make_random(directory)
    return directory


def config(checkpoint: Path, **sections: dict[str, Any]) -> Config:
    data: dict[str, dict[str, Any]] = {"gateway": {"port": 0}, "control": {"port": 0}, "model": {}}
    for name, section in sections.items():
        data[name] = data.get(name, {}) | section
    data["model"]["checkpoint"] = checkpoint
    return Config.model_validate(data)


def test_what_is_right_passes_and_says_what_will_be_served(checkpoint: Path) -> None:
    served = preflight.check(config(checkpoint), local=True)
    assert served.organs == ("breast", "gynaecology", "heart", "kidney", "liver", "thyroid", "vessel")
    assert served.expert_set.id == served.index.expert_set().id
    assert served.versions["heart"] == "1.0.0"


def test_a_checkpoint_that_is_not_there_or_not_split_says_which_command_makes_one(
    tmp_path: Path, checkpoint: Path
) -> None:
    with pytest.raises(ValueError, match="echoray checkpoint demo"):
        preflight.check(config(tmp_path / "absent"), local=True)
    with pytest.raises(ValueError, match="echoray checkpoint split"):
        preflight.check(config(checkpoint / "backbone"), local=True)


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"model": {"default_organ": "spleen"}}, r"model\.default_organ is 'spleen'.*breast"),
        ({"experts": {"organs": {"hart": {}}}}, r"experts\.organs names 'hart'.*heart"),
        ({"model": {"routing": "flat"}}, r"model\.routing is \"flat\".*copy of the same experts"),
        ({"gateway": {"token_file": "/absent/tokens"}}, r"gateway\.token_file /absent/tokens cannot be read"),
        (
            {"control": {"tls": {"certificate": "/absent/a.pem", "key": "/absent/a.key"}}},
            r"control\.tls\.key /absent/a\.key cannot be read",
        ),
    ],
)
def test_what_does_not_fit_names_the_field_and_what_there_is(
    checkpoint: Path, sections: dict[str, dict[str, Any]], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        preflight.check(config(checkpoint, **sections), local=True)


def test_a_variant_of_the_c_library_that_there_is_not(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHORAY_CPU_VARIANT", "sse9")
    with pytest.raises(ValueError, match="ECHORAY_CPU_VARIANT is 'sse9'; it may be avx512_bf16"):
        preflight.check(config(checkpoint), local=True)


def test_a_key_of_another_certificate_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    write_certificates(tmp_path)
    tls = {"certificate": tmp_path / "server.pem", "key": tmp_path / "client.key"}
    with pytest.raises(ValueError, match="cannot be used together"):
        preflight.check(config(checkpoint, gateway={"tls": tls}), local=True)
    tls["key"] = tmp_path / "server.key"
    preflight.check(config(checkpoint, gateway={"tls": tls}), local=True)


@pytest.mark.parametrize("name", ["gateway", "control"])
@pytest.mark.parametrize("reuse_port", [False, True])
def test_a_taken_port_is_named_even_if_its_owner_would_share_it(checkpoint: Path, name: str, reuse_port: bool) -> None:
    with socket.socket() as owner:
        if reuse_port:
            owner.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        wanted = config(checkpoint, **{name: {"port": port}})
        with pytest.raises(
            preflight.PortTakenError, match=rf"{name} cannot listen on 127\.0\.0\.1:{port}.*{name}\.port"
        ):
            preflight.check(wanted, local=True)
        # On a cluster the port is another machine's.
        preflight.check(wanted, local=False)
    preflight.check(wanted, local=True)


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tls = {"certificate": "a.pem", "key": "~/a.key"}
    found = preflight.resolve_paths(config(Path("demo"), gateway={"tls": tls, "token_file": "tokens"}))
    assert found.model.checkpoint == tmp_path / "demo"
    assert found.gateway.token_file == tmp_path / "tokens"
    assert found.gateway.tls is not None
    assert found.gateway.tls.certificate == tmp_path / "a.pem"
    assert found.gateway.tls.key == tmp_path / "home" / "a.key"
    assert found.gateway.tls.client_authority is None


def test_another_routing_is_another_expert_set(checkpoint: Path) -> None:
    model = config(checkpoint).model
    assert served_checkpoint(model).expert_set.routing == "organs"
    same = served_checkpoint(model.model_copy(update={"routing": "organs"}))
    assert same.expert_set.id == served_checkpoint(model).expert_set.id


def adopted(checkpoint: Path, **changes: Any) -> ExpertSet:
    """Writes a live set into the checkpoint's database, as Control does, and returns it."""
    index = served_checkpoint(config(checkpoint).model).expert_set
    expert_set = index.model_copy(update=changes)
    database = Database(RolloutFiles.of(config(checkpoint).rollouts, checkpoint).database)
    RolloutStore(database).adopt(expert_set, actor="tests")
    database.close()
    return expert_set


class TestRollouts:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        make_random(tmp_path / "demo")
        return tmp_path / "demo"

    def test_the_databases_set_is_what_will_be_served(self, checkpoint: Path) -> None:
        index = served_checkpoint(config(checkpoint).model)
        source = open_registry(config(checkpoint).experts, checkpoint).open(index.expert_set.bundle_digest("heart"))
        manifest = changed_bundle(checkpoint.parent / "next", source, "1.1.0")
        open_registry(config(checkpoint).experts, checkpoint).push(checkpoint.parent / "next")
        kept = [member for member in index.expert_set.members if member.organ == "breast"]
        heart = ExpertSetMember(organ="heart", bundle_digest=manifest.digest)
        live = adopted(checkpoint, members=(*kept, heart))
        served = preflight.check(config(checkpoint), local=True)
        assert served.expert_set == live
        assert served.versions == {"breast": "1.0.0", "heart": "1.1.0"}
        # Experts in the router's own process are the checkpoint's.
        local = preflight.check(config(checkpoint, router={"experts": "local"}), local=True)
        assert local.expert_set == index.expert_set

    def test_a_database_of_another_backbone_is_refused_with_both_named(self, checkpoint: Path) -> None:
        ours = adopted(checkpoint, backbone_digest="0" * 64)
        with pytest.raises(ValueError, match=r"^rollouts\.database: .*000000000000.*give another database"):
            preflight.check(config(checkpoint), local=True)
        other = {"database": f"sqlite:///{checkpoint.parent}/other.db"}
        served = preflight.check(config(checkpoint, rollouts=other), local=True)
        assert served.expert_set.backbone_digest != ours.backbone_digest

    def test_a_database_that_another_control_uses_is_refused(self, checkpoint: Path) -> None:
        lock = DatabaseLock(RolloutFiles.of(config(checkpoint).rollouts, checkpoint).lock)
        lock.take(0)
        with pytest.raises(ValueError, match=r"^rollouts\.database: another Control"):
            preflight.check(config(checkpoint), local=True)
        lock.release()
        preflight.check(config(checkpoint), local=True)

    def test_resources_may_be_given_to_an_organ_that_is_not_served_yet(self, checkpoint: Path) -> None:
        sections: dict[str, Any] = {"experts": {"organs": {"lung": {"num_cpus": 0.5}}}}
        with pytest.raises(ValueError, match="names 'lung'"):
            preflight.check(config(checkpoint, **sections), local=True)
        index = served_checkpoint(config(checkpoint).model)
        registry = open_registry(config(checkpoint).experts, checkpoint)
        source = registry.open(index.expert_set.bundle_digest("heart"))
        changed_bundle(checkpoint.parent / "lung", source, "1.0.0", organ="lung")
        registry.push(checkpoint.parent / "lung")
        preflight.check(config(checkpoint, **sections), local=True)

    def test_paths_are_those_of_the_folder_in_which_it_was_called(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(checkpoint.parent)
        resolved = preflight.resolve_paths(config(Path("demo"), rollouts={"database": "sqlite:///state/r.db"}))
        assert resolved.rollouts.database == f"sqlite:///{checkpoint.parent}/state/r.db"
        resolved = preflight.resolve_paths(config(Path("demo")))
        assert resolved.rollouts.database == f"sqlite:///{checkpoint}/rollouts/rollouts.db"


class TestIdentity:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        make_random(tmp_path / "demo")
        return tmp_path / "demo"

    @pytest.fixture
    def files(self, checkpoint: Path) -> RolloutFiles:
        """Of a system that ran, with the policy that its Control left."""
        identity = preflight.check(config(checkpoint), local=True).identity
        files = RolloutFiles.of(config(checkpoint).rollouts, checkpoint)
        write_policy(files.policy, control_pb2.TrafficPolicy(version=7, identity=identity))
        return files

    def test_the_database_says_it_and_it_stays(self, checkpoint: Path, files: RolloutFiles) -> None:
        first = preflight.check(config(checkpoint), local=True)
        assert len(first.identity) == 32
        assert first == preflight.check(config(checkpoint), local=True)
        stateless = config(checkpoint, router={"experts": "local"})
        assert len({first.identity, preflight.check(stateless, local=True).identity}) == 2
        assert preflight.check(stateless, local=True) == preflight.check(stateless, local=True)

    def test_a_missing_database_is_no_new_one(self, checkpoint: Path, files: RolloutFiles) -> None:
        before = preflight.check(config(checkpoint), local=True).identity
        with pytest.raises(ValueError, match=r"--begin-anew: .* is there"):
            preflight.begin_anew(config(checkpoint))
        files.base.unlink()
        with pytest.raises(ValueError, match=r"is missing, but .*policy\.json .*restore .*--begin-anew"):
            preflight.check(config(checkpoint), local=True)
        assert not files.base.exists()
        preflight.begin_anew(config(checkpoint))
        assert preflight.check(config(checkpoint), local=True).identity != before
        assert not files.policy.exists()
        assert list(files.policy.parent.glob("*.policy.json.aside-*"))

    def test_an_empty_database_is_refused(self, checkpoint: Path, files: RolloutFiles) -> None:
        files.base.write_bytes(b"")
        with pytest.raises(ValueError, match=r"^rollouts\.database: .*empty file.*restore"):
            preflight.check(config(checkpoint), local=True)

    def test_another_deployments_database_is_taken_on_purpose_only(self, checkpoint: Path, files: RolloutFiles) -> None:
        files.base.unlink()
        Database(files.database).close()
        with pytest.raises(ValueError, match=r"^rollouts\.database: the policy .*of the deployment .*--take-over"):
            preflight.check(config(checkpoint), local=True)
        preflight.check(config(checkpoint), local=True, take_over=True)
        preflight.check(config(checkpoint), local=True)
