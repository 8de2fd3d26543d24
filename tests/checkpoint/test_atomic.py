"""A disk that is full names the file that it has no room for."""

import subprocess
import sys
from pathlib import Path

from tests.data.records import record, write_lines

# The command with a limit on the size of files, which gives the same kind of error as a full disk.
LIMITED = """
import resource, signal, sys
from echovlm_ray.cli.main import app
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
app(sys.argv[1:])
"""


def test_converting_and_splitting_name_the_file(tmp_path: Path) -> None:
    records = [record(f"r{number}", patient=f"p{number}", note="x" * 300) for number in range(40)]
    path = write_lines(tmp_path / "all.jsonl", records)
    for arguments, name in (
        (["convert", path, tmp_path / "out.jsonl"], "out.jsonl"),
        (["split", path, tmp_path / "parts"], "train.jsonl"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, "data", *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert f"{name}: File too large" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["all.jsonl"]
