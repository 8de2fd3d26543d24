"""The files of the rollouts' state: the database, and those in the same folder.

rollouts.db                    the database, unless it is PostgreSQL
rollouts.db.policy.json        the last policy, for replicas that start while Control is unavailable
rollouts.db.incoming/          bundles that are being pushed
rollouts.db.bundles/           copies of the bundles in use, unless experts.kept_bundles sets another folder
rollouts.db.lock               held by the one Control that uses the database; removed when it ends in order
"""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from echovlm_ray.config import RolloutsSection
from echovlm_ray.serving.cluster.held_file import HeldError, hold, release
from experts.full_disk import NO_ROOM
from experts.private_folder import user_folder
from router.errors import RolloutDatabaseError

SQLITE = "sqlite:///"
FOLDER = "rollouts"
DATABASE_NAME = "rollouts.db"
LOCK_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class RolloutFiles:
    """The paths of the files.

    Attributes:
        database: the database's URL.
        base: the prefix of the other files' names; the path of the database if it is a file.
    """

    database: str
    base: Path

    @classmethod
    def of(cls, section: RolloutsSection, checkpoint: Path) -> Self:
        """The configured files; by default in the checkpoint's folder, or in the user's state folder if that is not
        writable.
        """
        folder = default_folder(checkpoint)
        if section.database is None:
            path = folder / DATABASE_NAME
            return cls(f"{SQLITE}{path}", path)
        if section.database.startswith(SQLITE):
            path = Path(section.database.removeprefix(SQLITE)).expanduser().absolute()
            return cls(f"{SQLITE}{path}", path)
        # Separate for each database. Without the password, which may change.
        parts = urlsplit(section.database)
        named = f"{parts.hostname}:{parts.port}{parts.path}?{parts.query}"
        return cls(section.database, folder / f"postgresql-{hashlib.sha256(named.encode()).hexdigest()[:12]}")

    @property
    def policy(self) -> Path:
        """Control's last policy, as JSON of the message `TrafficPolicy`."""
        return self.base.with_name(f"{self.base.name}.policy.json")

    @property
    def incoming(self) -> Path:
        """The folder for bundles that are being pushed."""
        return self.base.with_name(f"{self.base.name}.incoming")

    @property
    def bundles(self) -> Path:
        """The folder for copies of bundles."""
        return self.base.with_name(f"{self.base.name}.bundles")

    @property
    def lock(self) -> Path:
        """The lock file of the database's Control."""
        return self.base.with_name(f"{self.base.name}.lock")

    @property
    def left_behind(self) -> tuple[Path, ...]:
        """The files that show that a database existed: the policy and a write-ahead log."""
        logs = [self.base.with_name(f"{self.base.name}{suffix}") for suffix in ("-wal", "-shm")]
        return tuple(path for path in (self.policy, *logs) if path.exists())

    def set_aside(self) -> tuple[Path, ...]:
        """Renames the files that a missing database left behind, and returns the new names."""
        return tuple(_aside(path) for path in self.left_behind)

    def set_aside_policy(self) -> Path:
        """Renames the policy of another deployment; returns its new name."""
        return _aside(self.policy)

    @property
    def is_file(self) -> bool:
        """Whether the database is a file."""
        return self.database.startswith(SQLITE)

    @property
    def is_new(self) -> bool:
        """Whether the database is a file that does not exist yet."""
        return self.is_file and not self.base.exists()


def default_folder(checkpoint: Path) -> Path:
    """The default folder of the state."""
    folder = checkpoint / FOLDER
    if os.access(folder if folder.exists() else checkpoint, os.W_OK):
        return folder
    state = user_folder("XDG_STATE_HOME", ".local/state")
    # Checkpoints with the same name in different folders differ.
    place = hashlib.sha256(str(checkpoint.absolute()).encode()).hexdigest()[:12]
    return state / "echovlm-ray" / f"{checkpoint.name}-{place}"


def _aside(path: Path) -> Path:
    return path.rename(path.with_name(f"{path.name}.aside-{int(time.time())}"))


class DatabaseLock:
    """The lock of the Control that uses a database. It is released when the process ends in any way.

    It excludes Controls on the same machine, and on machines that share the folder if its file system supports locks.
    """

    def __init__(self, path: Path) -> None:
        """`path` is created when the lock is taken."""
        self._path = path
        self._descriptor: int | None = None

    def take(self, timeout_s: float) -> None:
        """Waits for the lock and takes it.

        Raises:
            RolloutDatabaseError: another process still holds it after `timeout_s` seconds, or creating the file failed.
        """
        deadline = time.monotonic() + timeout_s
        while self._descriptor is None:
            try:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._descriptor = hold(self._path, 0o600)
            except HeldError as error:
                if time.monotonic() < deadline:
                    time.sleep(LOCK_POLL_S)
                    continue
                named = f" (process {error.holder})" if error.holder else ""
                raise RolloutDatabaseError(
                    f"another Control{named} uses the rollouts' database beside {self._path}: stop that system "
                    "(`echoray stop`), or set rollouts.database to another file"
                ) from None
            except OSError as error:
                remedy = (
                    "make room there"
                    if error.errno in NO_ROOM
                    else "set rollouts.database to a file in a folder that may be written"
                )
                raise RolloutDatabaseError(f"{self._path} cannot be made: {error.strerror}; {remedy}") from None

    def release(self) -> None:
        """Releases it and removes its file; idempotent."""
        if self._descriptor is not None:
            release(self._descriptor, self._path)
            self._descriptor = None
