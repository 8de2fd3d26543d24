"""A PostgreSQL of one's own, in a temporary folder, reached over a Unix socket."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCOUNT = "postgres"
# Tests lose nothing in a power cut.
OPTIONS = "-c listen_addresses='' -c fsync=off -c synchronous_commit=off -c full_page_writes=off -c shared_buffers=16MB"


def programs() -> Path | None:
    """Where Debian keeps the server's programs; the newest version's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def running_postgres(binaries: Path) -> Iterator[str]:
    """A server; gives the prefix of its databases' URLs, to which a name is appended by `url_of`."""
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(directory, ACCOUNT, ACCOUNT)
        data, log = directory / "data", directory / "log"
        _run(binaries / "initdb", "-D", data, "-U", ACCOUNT, "-A", "trust", "-E", "UTF8", "--no-sync")
        _run(binaries / "pg_ctl", "-D", data, "-l", log, "-w", "-o", f"{OPTIONS} -k {directory}", "start")
        try:
            yield str(directory)
        finally:
            _run(binaries / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(directory)


def url_of(directory: str, name: str) -> str:
    return f"postgresql://{ACCOUNT}@/{name}?host={directory}"


def _run(*command: str | Path) -> None:
    """As an account that PostgreSQL agrees to run under: it refuses root."""
    prefix = ["runuser", "-u", ACCOUNT, "--"] if os.geteuid() == 0 else []
    result = subprocess.run(
        [*prefix, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        timeout=60,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
