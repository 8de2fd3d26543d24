"""Checkpoints of a running training: which are complete, and from which to resume.

transformers' `Trainer` writes a checkpoint's files one after the other, and a killed process leaves some of them. So a
checkpoint is complete only when `complete.json` lists all its files with their sizes; it is written last, atomically.
"""

import json
import os
import shutil
from pathlib import Path

MARKER = "complete.json"
_PREFIX = "checkpoint-"


def mark_complete(checkpoint: Path) -> None:
    """Marks a checkpoint as complete, after syncing its files to disk.

    Raises:
        OSError: the disk is full or gone.
    """
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MARKER:
            _sync(path)
            sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    partial = checkpoint / f".{MARKER}"
    partial.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(checkpoint / MARKER)
    _sync(checkpoint)


def is_complete(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint exist with their sizes."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next((path for path in reversed(_checkpoints(folder)) if is_complete(path)), None)


def remove_unfinished(folder: Path) -> bool:
    """Removes incomplete checkpoints; returns whether there were any."""
    unfinished = [path for path in _checkpoints(folder) if not is_complete(path)]
    for path in unfinished:
        shutil.rmtree(path, ignore_errors=True)
    return bool(unfinished)


def remove_old(folder: Path, keep: int) -> None:
    """Removes all but the newest complete checkpoints."""
    for path in [path for path in _checkpoints(folder) if is_complete(path)][:-keep]:
        # The marker first: a folder that is half removed must not count.
        (path / MARKER).unlink()
        shutil.rmtree(path, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps of a checkpoint."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=step_of)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
