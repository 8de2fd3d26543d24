"""Stores the secret of a running system in Ray, and in a private file.

Replicas read it from Ray's key-value store, which asks for Ray's own token, on whatever machine they run; no command
line and no environment shows it. The file, of mode 0600, is for tools that call a part itself, such as the benchmarks:
`<runtime folder>/secret-<identity>`.
"""

import os
from contextlib import suppress
from pathlib import Path

from echovlm_ray.serving.cluster import ray_internals
from echovlm_ray.serving.cluster.system_id import SystemId
from experts.private_folder import runtime_folder
from experts.transport.inner_channel import InnerChannels
from experts.transport.secret import SystemSecret

_NAMED_BY = 16


def keep_secret(system: SystemId) -> SystemSecret:
    """The secret of a system that is about to be deployed: the one that its replicas have already, or a new one.

    Raises:
        ValueError: there is no folder for the file.
        OSError: the file cannot be written.
    """
    secret = _stored(system) or _of_file(secret_file(system.identity)) or SystemSecret.random()
    if not ray_internals.write_record(_key(system), secret.text.encode(), replace=False):
        secret = _stored(system) or secret
    _write(secret_file(system.identity), secret.text)
    return secret


def secret_of(system: SystemId) -> SystemSecret:
    """The secret of the system that a replica belongs to.

    Raises:
        RuntimeError: it is no longer in the store.
    """
    secret = _stored(system)
    if secret is None:
        raise RuntimeError(f"the secret of {system} is not kept by this Ray: the system was removed; start it again")
    return secret


def delete_secrets(name: str) -> None:
    """Removes those of all systems that had a name on this Ray, when they were taken down."""
    prefix = _key(SystemId(name))
    for key in ray_internals.record_keys():
        if key.startswith(prefix):
            ray_internals.delete_record(key)
            delete_secret_file(key.removeprefix(prefix))


def delete_secret_file(identity: str) -> None:
    """Removes only the file: the Ray with the secret has ended, or it runs on another machine."""
    with suppress(OSError, ValueError):
        secret_file(identity).unlink(missing_ok=True)


def secret_file(identity: str) -> Path:
    """Where the secret of a deployment that this user runs on this machine lies.

    Raises:
        ValueError: there is no folder for it.
    """
    return runtime_folder() / f"secret-{identity[:_NAMED_BY]}"


def channels_to(identity: str) -> InnerChannels:
    """Channels to the parts of a deployment that this user runs on this machine.

    Args:
        identity: of the deployment, as in `echoray status --json`.

    Raises:
        ValueError: none runs here.
    """
    secret = _of_file(secret_file(identity))
    if secret is None:
        raise ValueError(f"no deployment {identity[:12]} of yours runs on this machine")
    return InnerChannels(secret)


def _stored(system: SystemId) -> SystemSecret | None:
    found = ray_internals.read_record(_key(system))
    return SystemSecret(found.decode()) if found else None


def _of_file(path: Path) -> SystemSecret | None:
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    return SystemSecret(text) if text else None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text + "\n")
    partial.replace(path)


def _key(system: SystemId) -> str:
    return f"secret/{system.name}/{system.identity}"
