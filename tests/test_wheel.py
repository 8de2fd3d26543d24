"""The wheel contains only our packages with their types, the contracts and the configuration files.

And the C library, if there is a compiler.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"protos", "experts", "router", "echovlm_ray"}


@pytest.mark.parametrize("compiler", ["cc", "false"])
def test_the_wheel(compiler: str, tmp_path: Path) -> None:
    # From a copy, so that setuptools leaves nothing here.
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", ROOT, "ls-files", "-z", "--", *sorted(PACKAGES), "cluster", "*.toml"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in [*filter(None, tracked.split("\0")), "README.md", "LICENSE", "NOTICE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    environment = os.environ | {"CC": compiler}
    built = subprocess.run(
        [*pip, "--no-build-isolation", "-w", tmp_path, source], capture_output=True, text=True, env=environment
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    data, info = "echovlm_ray-0.1.0.data", "echovlm_ray-0.1.0.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, data, info}
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        sources -= {name for name in sources if name.startswith("echovlm_ray/client/distribution/")}
        assert {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")} == sources
    assert any("/cpu/_kernels." in name for name in names) == (compiler == "cc")
    for contract in (ROOT / "protos").glob("*.proto"):
        assert {f"protos/{contract.name}", f"protos/{contract.stem}_pb2.pyi"} <= names
    for file in (ROOT / "cluster").iterdir():
        assert f"{data}/data/share/echovlm-ray/{file.name}" in names
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names
