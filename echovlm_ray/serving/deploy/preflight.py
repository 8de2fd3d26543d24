"""Checks before anything starts, so that a mistake is reported at once and in plain words."""

import logging
import os
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echovlm_ray.config import Config, ControlSection, ExpertsSection, GatewaySection
from echovlm_ray.hosts import host_port
from echovlm_ray.serving.cluster.known_policy import ForeignPolicyError, check_identity, read_policy
from echovlm_ray.serving.cluster.rollout_files import FOLDER, SQLITE, DatabaseLock, RolloutFiles
from echovlm_ray.serving.cluster.served import ServedCheckpoint, served_checkpoint
from echovlm_ray.serving.grpc.auth import BearerTokens
from echovlm_ray.serving.grpc.certificates import CertificateFiles
from experts.bundles.digest import digest_of
from experts.errors import InvalidBundleError, RegistryAwayError, UnknownBundleError
from router.errors import RolloutDatabaseError, RolloutStateError

if TYPE_CHECKING:
    from router.rollouts.database import Database

logger = logging.getLogger(__name__)


class PortTakenError(ValueError):
    """Something else listens where the gateway or Control should. The text names the field to change."""


def resolve_paths(config: Config) -> Config:
    """The configuration with absolute paths: replicas have another working directory."""
    update: dict[str, Any] = {
        "model": config.model.model_copy(update={"checkpoint": config.model.checkpoint.expanduser().absolute()}),
        "gateway": _absolute(config.gateway),
        "control": _absolute(config.control),
    }
    checkpoint = update["model"].checkpoint
    update["experts"] = _absolute_experts(config.experts, RolloutFiles.of(config.rollouts, checkpoint).bundles)
    update["rollouts"] = config.rollouts.model_copy(
        update={"database": RolloutFiles.of(config.rollouts, checkpoint).database}
    )
    return config.model_copy(update=update)


def begin_anew(config: Config) -> None:
    """Has the next start make a new database, where the one before is missing; what it left behind is set aside.

    Args:
        config: with absolute paths.

    Raises:
        ValueError: there is a database.
    """
    files = RolloutFiles.of(config.rollouts, config.model.checkpoint)
    if config.router.experts == "local":
        raise ValueError("--begin-anew: with router.experts local no state is kept, so every start begins again")
    if not files.is_new and files.database.startswith(SQLITE):
        raise ValueError(
            f"--begin-anew: the rollouts' database {files.base} is there; move it away first if what it says is to be "
            "given up"
        )
    for path in files.set_aside():
        logger.warning("kept as %s", path)


def check(config: Config, *, local: bool, take_over: bool = False) -> ServedCheckpoint:
    """Checks the checkpoint, the rollouts' database, certificates, tokens and ports.

    Args:
        config: with absolute paths.
        local: whether the servers will run on this machine.
        take_over: whether a database may take the place of another deployment's, whose policy is beside it.

    Returns:
        the checkpoint that will be served, with the experts that the rollouts' database says.

    Raises:
        ValueError: something cannot be used; the text says what and how to mend it.
    """
    served = served_checkpoint(config.model)
    if config.router.experts == "remote":
        served = _with_live_set(config, served, local=local, take_over=take_over)
    else:
        # Nothing is kept, so what is served says who it is.
        stateless = {"checkpoint": str(served.directory), "backbone": served.expert_set.backbone_digest}
        served = replace(served, identity=digest_of(stateless)[:32])
    _check_organs(config, served)
    _check_kernel(config.experts.kernel)
    _check_cpu_variant()
    _check_bundles(config.experts, served)
    for name, section in (("gateway", config.gateway), ("control", config.control)):
        _check_credentials(name, section)
        if local:
            check_port(name, section)
    return served


def check_port(name: str, section: GatewaySection | ControlSection) -> None:
    """Refuses a port on which something listens already.

    Raises:
        PortTakenError: names the port and the field.
        ValueError: the host is no address of this machine.
    """
    if not section.port:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            section.host, section.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ValueError(f"{name}.host {section.host!r} cannot be resolved: {error.strerror}") from None
    with socket.socket(family, kind, protocol) as probe:
        # Connections that ended a moment ago must not count; a listener still does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            # Two that share a port with SO_REUSEADDR may both bind, but only one may listen.
            probe.listen(1)
        except OSError as error:
            raise PortTakenError(
                f"{name} cannot listen on {host_port(section.host, section.port)}: {error.strerror}. If another "
                f"EchoVLM-Ray runs here, `echoray stop` ends it; otherwise set {name}.port to another port, or to 0 "
                "for any free one"
            ) from None


def _with_live_set(config: Config, served: ServedCheckpoint, *, local: bool, take_over: bool) -> ServedCheckpoint:
    """The checkpoint with the identity of the rollouts' database, which is made if there is none, and with its set."""
    from router.rollouts.store import RolloutStore

    files = RolloutFiles.of(config.rollouts, served.directory)
    if served.directory / FOLDER not in files.base.parents:
        logger.info("the rollouts' state is kept in %s", files.base.parent)
    try:
        if local:
            lock = DatabaseLock(files.lock)
            lock.take(0)
            lock.release()
        database = _open_database(files, take_over=take_over)
        try:
            served = replace(served, identity=database.identity)
            store = RolloutStore(database)
            with store.read() as transaction:
                if not transaction.adopted():
                    return served
            store.check_belongs_to(served.expert_set)
            live = store.snapshot().expert_set()
        finally:
            database.close()
    except (RolloutDatabaseError, RolloutStateError, ForeignPolicyError) as error:
        raise ValueError(f"rollouts.database: {error}") from None
    own = {entry.bundle_digest for entry in served.index.organs}
    if all(member.bundle_digest in own for member in live.members):
        return replace(served, expert_set=live)
    from echovlm_ray.serving.control.bundles import open_kept

    bundles = open_kept(config.experts, served.directory)
    others = [member.bundle_digest for member in live.members if member.bundle_digest not in own]
    versions = {}
    for digest in others:
        # A bundle that neither a copy nor the registry has cannot be answered, and status says so; the others can.
        with suppress(UnknownBundleError, RegistryAwayError):
            versions[digest] = bundles.manifest(digest).version
    return replace(served, expert_set=live, other_versions=versions)


def _open_database(files: RolloutFiles, *, take_over: bool) -> "Database":
    """Opens the database, or makes it where there never was one.

    Raises:
        RolloutDatabaseError: it is missing beside what it left behind, or cannot be opened.
        ForeignPolicyError: the policy beside it is another deployment's.
    """
    from router.rollouts.database import Database

    left = files.left_behind
    if files.is_new and left:
        raise RolloutDatabaseError(
            f"{files.base} is missing, but {left[0].name} beside it says that there was one: restore a backup of it "
            "(`echoray experts restore`), or start with `echoray serve --begin-anew` to begin from the checkpoint's "
            "own experts"
        )
    database = Database(files.database, create=not files.policy.exists())
    try:
        if (policy := read_policy(files.policy)) is not None:
            check_identity(policy, database.identity, str(files.policy))
    except ForeignPolicyError:
        if not take_over:
            database.close()
            raise
        files.set_aside_policy()
    return database


def _check_organs(config: Config, served: ServedCheckpoint) -> None:
    """Refuses resources for organs that there are not, and of which no bundle is in the registry either."""
    known = {*served.organs, *(entry.organ for entry in served.index.organs)}
    if unknown := [organ for organ in config.experts.organs if organ not in known]:
        from echovlm_ray.serving.control.bundles import open_registry

        known |= {manifest.organ for manifest in open_registry(config.experts, served.directory).list()}
        for organ in unknown:
            if organ not in known:
                raise ValueError(
                    f"experts.organs names {organ!r}, which {served.directory} does not have: it has "
                    f"{', '.join(sorted(known))}"
                )


def _check_kernel(name: str) -> None:
    # The default needs no look, and a look needs torch.
    if name == ExpertsSection().kernel:
        return
    from experts.kernels.registry import get_kernel

    try:
        get_kernel(name)
    except ValueError as error:
        raise ValueError(f"experts.kernel: {error}") from None


def _check_cpu_variant() -> None:
    # What is not set needs no look, and a look needs torch.
    if "ECHORAY_CPU_VARIANT" in os.environ:
        from experts.kernels.cpu.library import cpu_library

        cpu_library()


def _check_bundles(section: ExpertsSection, served: ServedCheckpoint) -> None:
    for key in section.public_keys:
        if not key.is_file():
            raise ValueError(f"experts.public_keys {key} is no file: give the path of a PEM public key")
    # The checkpoint's own bundles, by default accepted as they are: no look, which would need torch.
    if section.registry is None and section.signatures == "optional":
        return
    from echovlm_ray.serving.control.bundles import open_kept, signature_policy

    bundles, policy = open_kept(section, served.directory), signature_policy(section)
    for member in served.expert_set.members:
        try:
            bundle = bundles.look(member.bundle_digest)
        except (UnknownBundleError, RegistryAwayError, InvalidBundleError) as error:
            logger.warning("the experts of %s cannot be loaded now: %s", member.organ, error)
            continue
        policy.admit(bundle)


def _check_credentials(name: str, section: GatewaySection | ControlSection) -> None:
    if section.token_file is not None:
        try:
            tokens = BearerTokens(section.token_file)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
        if isinstance(section, GatewaySection):
            _check_quota_names(section, tokens.names)
    if section.tls is not None:
        CertificateFiles(section.tls, f"{name}.tls")


def _check_quota_names(section: GatewaySection, names: frozenset[str]) -> None:
    unknown = sorted(section.quotas.keys() - names)
    if unknown and (section.tls is None or section.tls.client_authority is None):
        raise ValueError(
            f"gateway.quotas names {', '.join(unknown)}, but no token of {section.token_file} has that name: write it "
            "behind the token, with a space between"
        )


def _absolute(section: GatewaySection | ControlSection) -> GatewaySection | ControlSection:
    update: dict[str, object] = {}
    if section.token_file is not None:
        update["token_file"] = _path(section.token_file)
    if (tls := section.tls) is not None:
        authority = None if tls.client_authority is None else _path(tls.client_authority)
        paths = {"certificate": _path(tls.certificate), "key": _path(tls.key), "client_authority": authority}
        update["tls"] = tls.model_copy(update=paths)
    return section.model_copy(update=update)


def _absolute_experts(section: ExpertsSection, kept_bundles: Path) -> ExpertsSection:
    update: dict[str, object] = {"public_keys": tuple(_path(key) for key in section.public_keys)}
    update["kept_bundles"] = kept_bundles if section.kept_bundles is None else _path(section.kept_bundles)
    if section.registry is not None and "://" not in section.registry:
        update["registry"] = str(_path(Path(section.registry)))
    return section.model_copy(update=update)


def _path(path: Path) -> Path:
    return path.expanduser().absolute()
