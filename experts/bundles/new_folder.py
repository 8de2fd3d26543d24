"""The folder of a new bundle, which has its name only when it is complete."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experts.full_disk import full_disk_named


@contextmanager
def new_bundle_folder(directory: Path) -> Iterator[Path]:
    """A folder to fill; it gets its name when the block ends well and is removed when it raises.

    Raises:
        FileExistsError: the name is taken.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists; bundles are never changed in place")
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    try:
        with full_disk_named(directory.absolute().parent):
            yield partial
        partial.chmod(0o755)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
