"""What is checked before anything starts, so that a mistake is told at once and in words."""

import logging
import socket
import ssl
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from echovlm_ray.config import Config, ControlSection, ExpertsSection, GatewaySection
from echovlm_ray.serving.auth import BearerTokens
from echovlm_ray.serving.rollout_files import FOLDER, DatabaseLock, RolloutFiles
from echovlm_ray.serving.served import ServedCheckpoint, served_checkpoint
from experts.errors import InvalidBundleError, RegistryAwayError, UnknownBundleError
from router.errors import RolloutDatabaseError, RolloutStateError

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


def check(config: Config, *, local: bool) -> ServedCheckpoint:
    """Checks the checkpoint, the rollouts' database, certificates, tokens and ports.

    Args:
        config: with absolute paths.
        local: whether the servers will run on this machine.

    Returns:
        the checkpoint that will be served, with the experts that the rollouts' database says.

    Raises:
        ValueError: something cannot be used; the text says what and how to mend it.
    """
    served = served_checkpoint(config.model)
    if config.router.experts == "remote":
        served = _with_live_set(config, served, local=local)
    _check_organs(config, served)
    _check_kernel(config.experts.kernel)
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
                f"{name} cannot listen on {section.host}:{section.port}: {error.strerror}. If another EchoVLM-Ray runs "
                f"here, `echoray stop` ends it; otherwise set {name}.port to another port, or to 0 for any free one"
            ) from None


def _with_live_set(config: Config, served: ServedCheckpoint, *, local: bool) -> ServedCheckpoint:
    """The checkpoint with the set of the rollouts' database, if there is one already."""
    files = RolloutFiles.of(config.rollouts, served.directory)
    if served.directory / FOLDER not in files.base.parents:
        logger.info("the rollouts' state is kept in %s", files.base.parent)
    try:
        if local:
            lock = DatabaseLock(files.lock)
            lock.take(0)
            lock.release()
        if files.is_new:
            return served
        from router.rollouts.database import Database
        from router.rollouts.store import RolloutStore

        database = Database(files.database)
        try:
            store = RolloutStore(database)
            with store.read() as transaction:
                if not transaction.adopted():
                    return served
            store.check_belongs_to(served.expert_set)
            live = store.snapshot().expert_set()
        finally:
            database.close()
    except (RolloutDatabaseError, RolloutStateError) as error:
        raise ValueError(f"rollouts.database: {error}") from None
    own = {entry.bundle_digest for entry in served.index.organs}
    if all(member.bundle_digest in own for member in live.members):
        return replace(served, expert_set=live)
    from echovlm_ray.serving.bundles import open_kept

    bundles = open_kept(config.experts, served.directory)
    others = [member.bundle_digest for member in live.members if member.bundle_digest not in own]
    versions = {}
    for digest in others:
        # A bundle that neither a copy nor the registry has cannot be answered, and status says so; the others can.
        with suppress(UnknownBundleError, RegistryAwayError):
            versions[digest] = bundles.manifest(digest).version
    return replace(served, expert_set=live, other_versions=versions)


def _check_organs(config: Config, served: ServedCheckpoint) -> None:
    """Refuses resources for organs that there are not, and of which no bundle is in the registry either."""
    known = {*served.organs, *(entry.organ for entry in served.index.organs)}
    if unknown := [organ for organ in config.experts.organs if organ not in known]:
        from echovlm_ray.serving.bundles import open_registry

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


def _check_bundles(section: ExpertsSection, served: ServedCheckpoint) -> None:
    for key in section.public_keys:
        if not key.is_file():
            raise ValueError(f"experts.public_keys {key} is no file: give the path of a PEM public key")
    # The checkpoint's own bundles, by default accepted as they are: no look, which would need torch.
    if section.registry is None and section.signatures == "optional":
        return
    from echovlm_ray.serving.bundles import open_kept, signature_policy

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
            BearerTokens(section.token_file)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    tls = section.tls
    if tls is None:
        return
    for field, path in (("certificate", tls.certificate), ("key", tls.key), ("client_authority", tls.client_authority)):
        if path is not None and not path.is_file():
            raise ValueError(f"{name}.tls.{field} {path} is no file: give the PEM file's path")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key that is encrypted would ask for its password on the terminal.
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: b"")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"{name}.tls.certificate {tls.certificate} and {name}.tls.key {tls.key} cannot be used together: {reason}; "
            "both must be PEM and belong together, and the key must have no password"
        ) from None


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
