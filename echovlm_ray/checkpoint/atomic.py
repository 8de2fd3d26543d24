"""Creates a folder atomically: it appears complete under its name, or not at all. Existing files are never replaced."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from experts.full_disk import full_disk_named


def require_vacant(destination: Path) -> None:
    """Checks that a folder can be created: the path does not exist, or is an empty folder.

    Raises:
        InvalidCheckpointError: the path exists and is not an empty folder.
    """
    if destination.is_dir() and not destination.is_symlink():
        if any(destination.iterdir()):
            raise InvalidCheckpointError(f"{destination} is not empty; give a new folder, or remove it first")
    elif destination.exists() or destination.is_symlink():
        raise InvalidCheckpointError(f"{destination} exists and is not a folder; give a new folder")


def require_vacant_file(destination: Path) -> None:
    """Checks that a file can be created: the path does not exist.

    Raises:
        InvalidCheckpointError: the path exists.
    """
    if destination.exists() or destination.is_symlink():
        raise InvalidCheckpointError(f"{destination} exists; give a new name, or remove it first")


def require_space(destination: Path, nbytes: int) -> None:
    """Checks that the disk has enough space before a long operation.

    Raises:
        InvalidCheckpointError: it has not; the text has both numbers.
    """
    existing = destination.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise InvalidCheckpointError(
            f"{destination}: {nbytes / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB are free; choose another disk"
        )


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Adds a file's name to an OSError without one, for example of a full disk during a write.

    Raises:
        OSError: the original error with the name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder; it is renamed to `destination` at the end of the block, and removed if the block raises.

    It is a hidden folder next to the destination, so that the rename is within one file system. A killed process leaves
    at most that hidden folder.

    Raises:
        InvalidCheckpointError: the destination exists, before or at the end of the block.
    """
    require_vacant(destination)
    destination.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.absolute().parent))
    try:
        with full_disk_named(destination.absolute().parent):
            yield partial
        # mkdtemp makes it private; a checkpoint gets the user's default mode.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        require_vacant(destination)
        partial.replace(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
