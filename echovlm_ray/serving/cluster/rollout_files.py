"""The files of the rollouts' state: the database, and those beside it.

rollouts.db                    the database, unless it is PostgreSQL
rollouts.db.policy.json        the policy last sent to the Routers, for replicas that start while Control is away
rollouts.db.incoming/          bundles that are being pushed
rollouts.db.bundles/           copies of the bundles in use, unless experts.registry.kept_bundles names another folder
rollouts.db.lock               held by the one Control that uses the database, and gone when it has ended in order
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
    """Where everything lies.

    Attributes:
        database: the database's URL.
        base: what the names of the other files begin with; the database itself where it is a file.
    """

    database: str
    base: Path

    @classmethod
    def of(cls, section: RolloutsSection, checkpoint: Path) -> Self:
        """What the configuration says, and where it says nothing, the checkpoint's folder, or the user's state folder
        when that cannot be written to."""
        folder = default_folder(checkpoint)
        if section.database is None:
            path = folder / DATABASE_NAME
            return cls(f"{SQLITE}{path}", path)
        if section.database.startswith(SQLITE):
            path = Path(section.database.removeprefix(SQLITE)).expanduser().absolute()
            return cls(f"{SQLITE}{path}", path)
        # Two databases must not share these files; a password in the URL may change.
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
        """The file that the database's Control holds."""
        return self.base.with_name(f"{self.base.name}.lock")

    @property
    def left_behind(self) -> tuple[Path, ...]:
        """What says that there was a database, apart from the database itself: the policy and a write-ahead log."""
        logs = [self.base.with_name(f"{self.base.name}{suffix}") for suffix in ("-wal", "-shm")]
        return tuple(path for path in (self.policy, *logs) if path.exists())

    def set_aside(self) -> tuple[Path, ...]:
        """Renames what a missing database left behind, so that it counts no more; returns the new names."""
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
    """Where the state lies when nothing is configured."""
    folder = checkpoint / FOLDER
    if os.access(folder if folder.exists() else checkpoint, os.W_OK):
        return folder
    state = user_folder("XDG_STATE_HOME", ".local/state")
    # Checkpoints of the same name in different places are different ones.
    place = hashlib.sha256(str(checkpoint.absolute()).encode()).hexdigest()[:12]
    return state / "echovlm-ray" / f"{checkpoint.name}-{place}"


def _aside(path: Path) -> Path:
    return path.rename(path.with_name(f"{path.name}.aside-{int(time.time())}"))


class DatabaseLock:
    """Held by the one Control that uses a database, and free again when its process ends, however it ends.

    It tells the Controls of one machine from each other, and of those that share the folder where its file system
    knows locks.
    """

    def __init__(self, path: Path) -> None:
        """Takes the lock's file; it is made when the lock is taken."""
        self._path = path
        self._descriptor: int | None = None

    def take(self, timeout_s: float) -> None:
        """Waits until no other process holds it.

        Raises:
            RolloutDatabaseError: another process still does after `timeout_s` seconds, or the file cannot be made.
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
