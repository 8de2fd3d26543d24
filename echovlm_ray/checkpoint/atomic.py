"""Makes a folder in one step: it appears whole under its name, or not at all. Nothing that is there is replaced."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from experts.full_disk import full_disk_named


def require_vacant(destination: Path) -> None:
    """Checks that a folder can be made here: the name is free, or an empty folder has it.

    Raises:
        InvalidCheckpointError: something else is there.
    """
    if destination.is_dir() and not destination.is_symlink():
        if any(destination.iterdir()):
            raise InvalidCheckpointError(f"{destination} is not empty; give a new folder, or remove it first")
    elif destination.exists() or destination.is_symlink():
        raise InvalidCheckpointError(f"{destination} exists and is not a folder; give a new folder")


def require_vacant_file(destination: Path) -> None:
    """Checks that a file can be made here: nothing has the name.

    Raises:
        InvalidCheckpointError: something has.
    """
    if destination.exists() or destination.is_symlink():
        raise InvalidCheckpointError(f"{destination} exists; give a new name, or remove it first")


def require_space(destination: Path, nbytes: int) -> None:
    """Checks that the disk has room before hours are spent on filling it.

    Raises:
        InvalidCheckpointError: it has not; names both numbers.
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
    """Puts a file's name into an error that has none: what fails in the middle of writing, as on a full disk.

    Raises:
        OSError: the one that was raised, with a name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `destination` when the block ends well, and is removed when it raises.

    It lies beside the destination under a hidden name, so that the last step is a rename within one file system.
    A killed process leaves at most that hidden folder.

    Raises:
        InvalidCheckpointError: the destination is taken, before or by the time the block ends.
    """
    require_vacant(destination)
    destination.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.absolute().parent))
    try:
        with full_disk_named(destination.absolute().parent):
            yield partial
        # mkdtemp makes it private; a checkpoint is as readable as any folder that the user makes.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        require_vacant(destination)
        partial.replace(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
